{{/*
One component's flows. Takes root, component; from: names of ports to the components that may reach them; clients: who else may;
to: component and port of pods of this release, or external names to ports of what is outside of it.
*/}}
{{- define "ossia.policy" }}
{{- $names := dict "root" .root "component" .component "name" .component }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "ossia.metadata" $names | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "ossia.selector" $names | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- if .from }}
  ingress:
    {{- range $ports, $peers := .from }}
    - ports:
        {{- range splitList "," $ports }}
        - port: {{ . }}
        {{- end }}
      from:
        {{- range $peers }}
        - podSelector:
            matchLabels:
              {{- include "ossia.selector" (dict "root" $.root "component" .) | nindent 14 }}
        {{- end }}
        {{- if hasKey $ "clients" }}
        {{- include "ossia.clients" $ | nindent 8 }}
        {{- end }}
    {{- end }}
  {{- end }}
  {{- if .to }}
  egress:
    - ports: # names
        - port: 53
          protocol: UDP
        - port: 53
          protocol: TCP
    {{- range .to }}
    {{- if .external }}
    - ports: # outside of the release: {{ .component }}
        {{- range $name, $port := .external }}
        - port: {{ $port }}
        {{- end }}
    {{- else if dig "bundled" (hasKey . "port") . }}
    - to:
        - podSelector:
            matchLabels:
              {{- include "ossia.selector" (dict "root" $.root "component" .component) | nindent 14 }}
      ports:
        - port: {{ .port }}
    {{- end }}
    {{- end }}
  {{- end }}
{{- end }}

{{/* Who may reach the edge: the named clients, or, where none is named, the release's own namespace. */}}
{{- define "ossia.clients" -}}
{{- range $name, $client := .clients }}
{{- if $client.cidr }}
- ipBlock:
    cidr: {{ $client.cidr }}
{{- else }}
- namespaceSelector:
    {{- if $client.namespace }}
    matchLabels:
      kubernetes.io/metadata.name: {{ $client.namespace }}
    {{- else }} {}
    {{- end }}
  {{- with $client.podLabels }}
  podSelector:
    matchLabels:
      {{- toYaml . | nindent 6 }}
  {{- end }}
{{- end }}
{{- else }}
- podSelector: {}
{{- end }}
{{- end }}

{{/* The ports that downloads of weights go to, as JSON by model. */}}
{{- define "ossia.storePorts" -}}
{{- $ports := dict -}}
{{- range $name, $model := include "ossia.models" . | fromJson -}}
{{- if $model.source.url -}}
{{- $url := $model.source.s3Endpoint | default $model.source.url | urlParse -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "http" | ternary "80" "443") -}}
{{- $_ := set $ports $name (int $port) -}}
{{- end -}}
{{- end -}}
{{- toJson $ports -}}
{{- end }}
