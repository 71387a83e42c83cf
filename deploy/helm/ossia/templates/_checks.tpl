{{/* Values that a schema cannot judge, because two of them do not go together. Each refusal names the key and the cure.
Every template that looks a group's model up begins with them, because Helm promises no order. */}}

{{- define "ossia.hasAuth" -}}
{{- if or .Values.auth.apiKeys.existingSecret .Values.auth.jwt.existingSecret .Values.auth.jwt.jwksUrl }}true{{ end -}}
{{- end }}

{{- define "ossia.check" -}}
{{- $values := .Values -}}
{{- if and $values.etcd.external.endpoints $values.etcd.bundled.enabled -}}
{{- fail "etcd.bundled.enabled: there is an external etcd too; set etcd.bundled.enabled to false, or remove etcd.external.endpoints" -}}
{{- end -}}
{{- if not (or $values.etcd.external.endpoints $values.etcd.bundled.enabled) -}}
{{- fail "etcd.external.endpoints: there is no etcd; name one's host and port, or set etcd.bundled.enabled to true" -}}
{{- end -}}
{{- if and $values.etcd.external.tls (not $values.etcd.external.existingSecret) -}}
{{- fail "etcd.external.existingSecret: etcd.external.tls needs it; name a secret with tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- if and $values.redis.external.existingSecret $values.redis.bundled.enabled -}}
{{- fail "redis.bundled.enabled: there is an external Redis too; set redis.bundled.enabled to false, or remove redis.external.existingSecret" -}}
{{- end -}}
{{- if and $values.auth.jwt.existingSecret $values.auth.jwt.jwksUrl -}}
{{- fail "auth.jwt.jwksUrl: auth.jwt.existingSecret gives the keys too; keep one of the two" -}}
{{- end -}}
{{- if and (or $values.auth.jwt.existingSecret $values.auth.jwt.jwksUrl) (not (and $values.auth.jwt.issuer $values.auth.jwt.audience)) -}}
{{- fail "auth.jwt.issuer: tokens for somebody else would count here; name auth.jwt.issuer and auth.jwt.audience" -}}
{{- end -}}
{{- if and (or $values.edge.ingress.enabled $values.edge.gateway.enabled) (not (include "ossia.hasAuth" .)) (not $values.auth.allowAnonymous) -}}
{{- fail "auth.apiKeys.existingSecret: the edge would be open to everyone beyond the cluster; name a secret of keys, or auth.jwt, or set auth.allowAnonymous to true" -}}
{{- end -}}
{{- if and (include "ossia.hasAuth" .) $values.auth.allowAnonymous -}}
{{- fail "auth.allowAnonymous: keys or tokens are asked for too; set auth.allowAnonymous to false, or remove auth.apiKeys and auth.jwt" -}}
{{- end -}}
{{- if and $values.edge.ingress.enabled (not $values.edge.ingress.host) -}}
{{- fail "edge.ingress.host: edge.ingress.enabled needs it; name the host, as in api.example.com" -}}
{{- end -}}
{{- if and $values.edge.gateway.enabled (not $values.edge.gateway.parents) -}}
{{- fail "edge.gateway.parents: edge.gateway.enabled needs it; name the gateway, as in {public: {namespace: gateways}}" -}}
{{- end -}}
{{- if and (or $values.edge.ingress.enabled $values.edge.gateway.enabled) $values.networkPolicy.enabled (not $values.networkPolicy.clients) -}}
{{- fail "networkPolicy.clients: the network policy keeps the ingress or gateway out; name its namespace, as in {ingress: {namespace: ingress-nginx}}" -}}
{{- end -}}
{{- if and $values.edge.autoscaling.enabled (gt (int $values.edge.autoscaling.minReplicas) (int $values.edge.autoscaling.maxReplicas)) -}}
{{- fail "edge.autoscaling.maxReplicas: must not be less than edge.autoscaling.minReplicas" -}}
{{- end -}}
{{- if and (not $values.edge.autoscaling.enabled) (lt (int $values.edge.replicas) 1) -}}
{{- fail "edge.replicas: 0 serves nothing; set it to 1 or more, or edge.autoscaling.enabled to true" -}}
{{- end -}}
{{- if $values.tls.enabled -}}
{{- range $role := include "ossia.roles" . | fromJsonArray -}}
{{- $secret := get $values.tls.existingSecrets $role -}}
{{- if and $values.tls.certManager.issuerName $secret -}}
{{- fail (printf "tls.existingSecrets.%s: tls.certManager.issuerName makes one too; keep one of the two" $role) -}}
{{- end -}}
{{- if not (or $values.tls.certManager.issuerName $secret) -}}
{{- fail (printf "tls.existingSecrets.%s: tls.enabled needs it; name a secret with tls.crt, tls.key and ca.crt, or tls.certManager.issuerName" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (not $values.worker.groups) (not $values.worker.trial) -}}
{{- fail "worker.groups: there is no group, so nothing could be served; name one, or set worker.trial to true" -}}
{{- end -}}
{{- $models := include "ossia.models" . | fromJson -}}
{{- range $name, $model := $models -}}{{ include "ossia.checkModel" (dict "name" $name "source" $model.source) }}{{- end -}}
{{- $claims := dict -}}
{{- range $name, $group := include "ossia.groups" . | fromJson -}}
{{- $key := printf "worker.groups.%s" $name -}}
{{- $model := get $models $group.model -}}
{{- if not $model -}}
{{- fail (printf "%s.model: there is no model %q under models; name one of: %s" $key $group.model (keys $models | sortAlpha | join ", " | default "(none)")) -}}
{{- end -}}
{{- include "ossia.checkGroup" (dict "root" $ "key" $key "group" $group "model" $model) -}}
{{- range $claim := list ($model.source.claim | default dict) (($model.source.cache).claim | default dict) -}}
{{- if hasPrefix "ReadWriteOnce" ($claim.accessMode | default "") -}}
{{- $pods := add (get $claims $claim.name | default 0 | int) (include "ossia.maxReplicas" $group | int) -}}
{{- $_ := set $claims $claim.name $pods -}}
{{- if gt $pods 1 -}}
{{- fail (printf "%s: %d pods would share the claim %q, which is %s; take a ReadOnlyMany or ReadWriteMany claim, or one replica" $key $pods $claim.name $claim.accessMode) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "ossia.checkModel" -}}
{{- $given := list -}}
{{- range $kind := list "url" "claim" "image" "path" -}}{{- if hasKey $.source $kind }}{{ $given = append $given $kind }}{{ end -}}{{- end -}}
{{- if ne (len $given) 1 -}}
{{- fail (printf "models.%s.source: give exactly one of url, claim, image and path, not %s" .name (join " and " $given | default "none")) -}}
{{- end -}}
{{- if and .source.url (not .source.files) -}}
{{- fail (printf "models.%s.source.files: url needs it; give each file's SHA-256, so that nothing else is ever served" .name) -}}
{{- end -}}
{{- if not .source.url -}}
{{- range $extra := list "files" "cache" "existingSecret" "s3Endpoint" "s3Region" -}}
{{- if hasKey $.source $extra }}{{ fail (printf "models.%s.source.%s: only goes with url; remove it, or give url" $.name $extra) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "ossia.checkGroup" -}}
{{- $group := .group -}}{{- $scaling := .group.autoscaling -}}
{{- $gpus := int $group.gpus -}}
{{- if $scaling.enabled -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling.maxReplicas: must not be less than autoscaling.minReplicas" .key) -}}
{{- end -}}
{{- if and (eq $scaling.kind "keda") (not .root.Values.observability.prometheusAddress) -}}
{{- fail (printf "observability.prometheusAddress: %s.autoscaling asks Prometheus for queue seconds; name it, as in http://prometheus.monitoring:9090" .key) -}}
{{- end -}}
{{- else if lt (int $group.replicas) 1 -}}
{{- fail (printf "%s.replicas: 0 serves nothing; set it to 1 or more, or %s.autoscaling.enabled to true" .key .key) -}}
{{- end -}}
{{- if and $gpus (mod (int .model.kvHeads) $gpus) -}}
{{- fail (printf "%s.gpus: %d does not divide the %d key and value heads of %s; take a divisor" .key $gpus (int .model.kvHeads) $group.model) -}}
{{- end -}}
{{- if and $gpus $group.gpuMemoryGib -}}
{{- $need := addf (divf (float64 .model.sizeGib) (float64 $gpus)) (float64 $group.kvCacheGib) 1.5 -}}
{{- if gt $need (float64 $group.gpuMemoryGib) -}}
{{- fail (printf "%s.gpuMemoryGib: weights, kvCacheGib and 1.5 GiB of room take %.1f GiB of each GPU, which has %v; take more gpus or a smaller kvCacheGib" .key $need $group.gpuMemoryGib) -}}
{{- end -}}
{{- end -}}
{{- end }}
