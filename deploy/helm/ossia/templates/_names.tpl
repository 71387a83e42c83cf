{{/* Names and labels. Every selector is a subset of the labels that the same definition gives. */}}
{{- define "ossia.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $full | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{/* What selects the pods of one component, and of one group where there is one. Takes root, component, group. */}}
{{- define "ossia.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .group }}
ossia/group: {{ . }}
{{- end }}
{{- end }}

{{- define "ossia.labels" -}}
{{ include "ossia.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* The head of an object. Takes root, component, name (what follows the release's name), and may take group and labels. */}}
{{- define "ossia.metadata" -}}
name: {{ include "ossia.fullname" .root }}{{ with .name }}-{{ . }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "ossia.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* repository:tag@digest. Takes root and image; an image of our own without a tag has the chart's version. */}}
{{- define "ossia.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "ossia.anyAddress" -}}
{{ eq .Values.ipFamily "IPv6" | ternary "[::]" "0.0.0.0" }}
{{- end }}

{{/* The pod's own address, as part of host:port. */}}
{{- define "ossia.podHost" -}}
{{ eq .Values.ipFamily "IPv6" | ternary "[$(POD_IP)]" "$(POD_IP)" }}
{{- end }}

{{- define "ossia.etcdEndpoints" -}}
{{- if .Values.etcd.external.endpoints -}}
{{- $endpoints := list -}}
{{- range $host, $port := .Values.etcd.external.endpoints }}{{ $endpoints = append $endpoints (printf "%s:%v" $host $port) }}{{ end -}}
{{ join "," $endpoints }}
{{- else -}}
{{ include "ossia.fullname" . }}-etcd:2379
{{- end -}}
{{- end }}

{{/* The roles that need a certificate, as JSON: the processes, and etcd where it is bundled. */}}
{{- define "ossia.roles" -}}
{{ .Values.etcd.external.endpoints | empty | ternary (list "edge" "scheduler" "worker" "etcd") (list "edge" "scheduler" "worker") | toJson }}
{{- end }}
