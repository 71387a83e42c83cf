{{/* How a model's files reach the pod. Each takes root, model and name (the model's). */}}

{{- define "ossia.modelDir" -}}
{{ .model.source.path | default "/models" }}
{{- end }}

{{/* The volume that holds the files; none where they are in the worker image. */}}
{{- define "ossia.modelVolume" -}}
{{- $source := .model.source -}}
{{- if $source.claim }}
- name: model
  persistentVolumeClaim:
    claimName: {{ $source.claim.name }}
    readOnly: true
{{- else if $source.image }}
- name: model
  image:
    reference: {{ $source.image.reference }}
    pullPolicy: {{ $source.image.pullPolicy | default "IfNotPresent" }}
{{- else if $source.url }}
{{- $cache := $source.cache | default dict }}
- name: model
  {{- if $cache.claim }}
  persistentVolumeClaim:
    claimName: {{ $cache.claim.name }}
  {{- else if hasKey $cache "storageClassName" }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ $cache.storageClassName | quote }}
        resources:
          requests:
            storage: {{ include "ossia.volumeGib" .model }}Gi
  {{- else }}
  emptyDir:
    sizeLimit: {{ include "ossia.volumeGib" .model }}Gi
  {{- end }}
- name: manifest
  configMap:
    name: {{ include "ossia.fullname" .root }}-manifest-{{ .name }}
{{- with $source.existingSecret }}
- name: store
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}
{{- end }}

{{- define "ossia.modelMount" -}}
{{- $source := .model.source -}}
{{- if not $source.path }}
- name: model
  mountPath: /models
  readOnly: true
  {{- with ($source.claim).subPath }}
  subPath: {{ . }}
  {{- end }}
  {{- if and $source.url ($source.cache).claim }}
  subPath: {{ .name }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Downloads what is missing, resumes what broke, and ends well only when every digest is right. */}}
{{- define "ossia.modelInit" -}}
{{- $source := .model.source -}}
{{- if $source.url }}
initContainers:
  - name: weights
    image: {{ include "ossia.image" (dict "root" .root "image" .root.Values.image.control) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    args:
      - weights
      - fetch
      - {{ $source.url | quote }}
      - /models
      - --manifest=/etc/ossia/manifest/SHA256SUMS
      {{- with $source.s3Endpoint }}
      - --s3-endpoint={{ . }}
      {{- end }}
      {{- with $source.s3Region }}
      - --s3-region={{ . }}
      {{- end }}
      {{- if $source.existingSecret }}
      - --credentials=/etc/ossia/store
      {{- end }}
    {{- include "ossia.resources" (dict "cpu" "1" "cpuLimit" "4" "memory" "512Mi") | nindent 4 }}
    {{- include "ossia.containerSecurity" . | nindent 4 }}
    volumeMounts:
      - name: model
        mountPath: /models
        {{- if ($source.cache).claim }}
        subPath: {{ .name }}
        {{- end }}
      - name: manifest
        mountPath: /etc/ossia/manifest
        readOnly: true
      - name: tmp
        mountPath: /tmp
      {{- if $source.existingSecret }}
      - name: store
        mountPath: /etc/ossia/store
        readOnly: true
      {{- end }}
{{- end }}
{{- end }}
