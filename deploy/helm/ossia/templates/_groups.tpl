{{/* Worker groups and models as they are after the defaults; each gives JSON. */}}

{{/* Where no group is named, a trial serves ossia-nano, the demonstration model in the worker image, on a CPU. */}}
{{- define "ossia.isTrial" -}}
{{- if and (not .Values.worker.groups) .Values.worker.trial }}true{{ end -}}
{{- end }}

{{- define "ossia.groups" -}}
{{- $groups := .Values.worker.groups -}}
{{- if include "ossia.isTrial" . -}}
{{- $groups = dict "trial" (dict "model" "ossia-nano" "gpus" 0 "kvCacheGib" 0.5 "memoryGib" 3 "cpu" "1") -}}
{{- end -}}
{{- $found := dict -}}
{{- range $name, $group := $groups -}}
{{- $_ := set $found $name (mergeOverwrite (deepCopy $.Values.worker.groupDefaults) $group) -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{- define "ossia.models" -}}
{{- $models := .Values.models -}}
{{- if include "ossia.isTrial" . -}}
{{- $models = dict "ossia-nano" (dict "sizeGib" 0.2 "kvHeads" 4 "source" (dict "path" "/opt/ossia/models/ossia-nano")) -}}
{{- end -}}
{{- $found := dict -}}
{{- range $name, $model := $models -}}
{{- $_ := set $found $name (merge (deepCopy $model) (dict "servedName" $name "kvHeads" 8)) -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* The most pods that a group may have. */}}
{{- define "ossia.maxReplicas" -}}
{{ .autoscaling.enabled | ternary .autoscaling.maxReplicas .replicas | int }}
{{- end }}

{{/* Host memory of a worker pod in GiB: staging buffers and pinned memory by rank, or the weights unpacked on a CPU. Takes group, model. */}}
{{- define "ossia.memoryGib" -}}
{{- if .group.memoryGib -}}
{{ .group.memoryGib }}
{{- else if .group.gpus -}}
{{ add 8 (mul 8 (int .group.gpus)) }}
{{- else -}}
{{ addf 2 (mulf 8 (float64 .model.sizeGib)) (float64 .group.kvCacheGib) | ceil | int }}
{{- end -}}
{{- end }}

{{/* Shared memory of the ranks in GiB: NCCL's and gloo's buffers, for each rank. */}}
{{- define "ossia.shmGib" -}}
{{ max 1 (mul 2 (int .gpus)) }}
{{- end }}

{{/* Seconds that a worker may take to load and warm up. Takes root and model. */}}
{{- define "ossia.startBudgetS" -}}
{{ addf 120 (mulf (float64 .model.sizeGib) (float64 .root.Values.worker.loadSecondsPerGib)) | ceil | int }}
{{- end }}

{{/* Seconds that a rollout may take for one pod: the old one's drain, a download, and the slowest group's start, which edges wait for too. */}}
{{- define "ossia.progressDeadlineS" -}}
{{- $models := include "ossia.models" . | fromJson -}}
{{- $longest := 0 -}}
{{- range $group := include "ossia.groups" . | fromJson -}}
{{- $longest = max $longest (include "ossia.startBudgetS" (dict "root" $ "model" (get $models $group.model)) | int) -}}
{{- end -}}
{{ add (include "ossia.graceS" . | int) $longest 7200 }}
{{- end }}

{{/* GiB of a volume that holds the model: its files, what is half downloaded, and room. */}}
{{- define "ossia.volumeGib" -}}
{{ addf 2 (mulf 1.1 (float64 .sizeGib)) | ceil | int }}
{{- end }}

{{/* What the edge says of models beyond what their workers tell: other names, defaults and prices, as the YAML of its models file. */}}
{{- define "ossia.offers" -}}
{{- $offers := dict -}}
{{- range $name, $model := .Values.models -}}
{{- $offer := dict -}}
{{- with $model.aliases }}{{ $_ := set $offer "aliases" (include "ossia.chosen" . | splitList ",") }}{{ end -}}
{{- with $model.price -}}
{{- $price := dict "input" .input "output" .output -}}
{{- if hasKey . "cachedInput" }}{{ $_ := set $price "cached_input" .cachedInput }}{{ end -}}
{{- $_ := set $offer "price" $price -}}
{{- end -}}
{{- if $offer }}{{ $_ := set $offers ($model.servedName | default $name) $offer }}{{ end -}}
{{- end -}}
{{- if $offers }}{{ toYaml (dict "models" $offers) }}{{ end -}}
{{- end }}

{{/* The keys of a map that are true, comma separated. */}}
{{- define "ossia.chosen" -}}
{{- $chosen := list -}}
{{- range $key, $used := . }}{{ if $used }}{{ $chosen = append $chosen $key }}{{ end }}{{ end -}}
{{ join "," $chosen }}
{{- end }}
