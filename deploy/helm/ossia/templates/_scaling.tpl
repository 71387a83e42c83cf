{{/* Scale-down waits for the drain: what was needed within the last grace period stays, and then one pod goes in each. */}}
{{- define "ossia.scaleDown" -}}
scaleDown:
  stabilizationWindowSeconds: {{ min 3600 (include "ossia.graceS" . | int) }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: {{ min 1800 (include "ossia.graceS" . | int) }}
{{- end }}

{{/* Groups by queue seconds: the seconds of work that wait for all groups of a model, so the share of each group is what one group's queue takes. */}}
{{- define "ossia.groupScaler" -}}
{{- $scaling := .group.autoscaling -}}
{{- $target := printf "%s-worker-%s" (include "ossia.fullname" .root) .me.group }}
{{- if eq $scaling.kind "keda" }}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  {{- include "ossia.metadata" .me | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ $target }}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  pollingInterval: 15 # while Prometheus is away, the number of copies stays as it is
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- include "ossia.scaleDown" .root | nindent 8 }}
  triggers:
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ .root.Values.observability.prometheusAddress }}
        query: {{ include "ossia.queueSeconds" . | quote }}
        threshold: {{ $scaling.queueSeconds | quote }}
{{- else }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "ossia.metadata" .me | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ $target }}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  metrics:
    - type: External
      external:
        metric:
          name: ossia_scheduler_group_queue_seconds
          selector:
            matchLabels:
              model: {{ .model.servedName | quote }}
        target:
          type: AverageValue
          averageValue: {{ $scaling.queueSeconds | quote }}
  behavior:
    {{- include "ossia.scaleDown" .root | nindent 4 }}
{{- end }}
{{- end }}

{{- define "ossia.queueSeconds" -}}
sum(ossia_scheduler_group_queue_seconds{namespace="{{ .root.Release.Namespace }}",model="{{ .model.servedName }}"})
{{- end }}
