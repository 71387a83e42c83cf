{{/* What every pod has in common. */}}

{{/* Takes root, component, pod (the values of that name), and group where there is one. */}}
{{- define "ossia.podSpec" -}}
serviceAccountName: {{ include "ossia.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range $name, $used := . }}{{ if $used }}
  - name: {{ $name }}
  {{- end }}{{ end }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- range $name, $toleration := . }}
  - {{ toYaml $toleration | nindent 4 | trim }}
  {{- end }}
{{- end }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "ossia.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "ossia.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  privileged: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "ossia.resources" -}}
resources:
  requests:
    cpu: {{ .cpu | quote }}
    memory: {{ .memory }}
  limits:
    cpu: {{ .cpuLimit | quote }}
    memory: {{ .memory }}
{{- end }}

{{/* Liveness is the process's own watchdog, readiness its own word; both on the port and thread of the metrics. Takes startS. */}}
{{- define "ossia.probes" -}}
startupProbe:
  httpGet:
    path: {{ .startPath }}
    port: metrics
  periodSeconds: 5
  failureThreshold: {{ div (add .startS 4) 5 }}
livenessProbe:
  httpGet:
    path: /livez
    port: metrics
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet:
    path: /readyz
    port: metrics
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{/* The longest stream ends within the drain; what is left of the grace period is for the end of the process. */}}
{{- define "ossia.graceS" -}}
{{ add (int .Values.longestStreamS) (int .Values.endpointDelayS) 20 }}
{{- end }}

{{/* Environment of a process: its own settings over what all have. Takes root, process (edge, scheduler or worker) and settings. */}}
{{- define "ossia.env" -}}
{{- $prefix := printf "OSSIA_%s_" (upper .process) -}}
{{- $values := .root.Values -}}
{{- $common := dict
  "LOG_LEVEL" $values.logLevel
  "CLUSTER" $values.cluster
  "ETCD" (include "ossia.etcdEndpoints" .root)
  "METRICS_LISTEN" (printf "%s:9090" (include "ossia.anyAddress" .root))
  "DRAIN_S" $values.longestStreamS
  "OTLP_ENDPOINT" $values.observability.otlpEndpoint -}}
{{- range $prefix, $folder := dict "" "tls" "ETCD_" (include "ossia.etcdTls" .root) -}}
{{- if and $folder (or $prefix $values.tls.enabled) -}}
{{- range $flag, $file := dict "CERT" "tls.crt" "KEY" "tls.key" "CA" "ca.crt" -}}
{{- $_ := set $common (printf "%sTLS_%s" $prefix $flag) (printf "/etc/ossia/%s/%s" $folder $file) -}}
{{- end -}}
{{- end -}}
{{- end -}}
env:
  - name: POD_IP
    valueFrom:
      fieldRef:
        fieldPath: status.podIP
  - name: POD_NAME
    valueFrom:
      fieldRef:
        fieldPath: metadata.name
  {{- range $name, $value := merge .settings $common }}
  {{- if ne (toString $value) "" }}
  - name: {{ $prefix }}{{ $name }}
    value: {{ include "ossia.plain" $value | quote }}
  {{- end }}
  {{- end }}
  {{- range $name, $value := .plain }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
{{- end }}

{{/* A value as a flag takes it: large whole numbers, which arrive as floats, without an exponent. */}}
{{- define "ossia.plain" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end -}}
{{- end }}

{{/* The folder of the files that etcd is shown: the external one's own, or the cluster's for the bundled one; empty: plaintext. */}}
{{- define "ossia.etcdTls" -}}
{{- if .Values.etcd.external.endpoints -}}
{{ .Values.etcd.external.tls | ternary "etcd-tls" "" }}
{{- else -}}
{{ .Values.tls.enabled | ternary "tls" "" }}
{{- end -}}
{{- end }}

{{/* Certificates of a process. Takes root and process. */}}
{{- define "ossia.tlsMounts" -}}
{{- if .root.Values.tls.enabled }}
- name: tls
  mountPath: /etc/ossia/tls
  readOnly: true
{{- end }}
{{- if eq (include "ossia.etcdTls" .root) "etcd-tls" }}
- name: etcd-tls
  mountPath: /etc/ossia/etcd-tls
  readOnly: true
{{- end }}
{{- end }}

{{- define "ossia.tlsVolumes" -}}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ get .root.Values.tls.existingSecrets .process | default (printf "%s-%s-tls" (include "ossia.fullname" .root) .process) }}
    defaultMode: 0440
{{- end }}
{{- if eq (include "ossia.etcdTls" .root) "etcd-tls" }}
- name: etcd-tls
  secret:
    secretName: {{ .root.Values.etcd.external.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- end }}
