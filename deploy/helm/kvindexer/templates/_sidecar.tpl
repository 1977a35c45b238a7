{{/*
For charts of others that take the indexer into their pods as a native sidecar. They name this chart as a dependency
with `mode: sidecar` and include, with `.Subcharts.kvindexer` as the context:

  kvindexer.sidecar.annotations   into the annotations of the pod
  kvindexer.sidecar.container     into its `initContainers`, a list of one
  kvindexer.sidecar.volumes       into its `volumes`, a list
*/}}

{{- define "kvindexer.sidecar.annotations" -}}
{{- include "kvindexer.sidecar.mode" . -}}
{{- include "kvindexer.annotations" . -}}
{{- end -}}

{{- define "kvindexer.sidecar.container" -}}
{{- include "kvindexer.sidecar.mode" . -}}
- {{ include "kvindexer.container" . | nindent 2 | trim }}
{{- end -}}

{{- define "kvindexer.sidecar.volumes" -}}
{{- include "kvindexer.sidecar.mode" . -}}
{{- include "kvindexer.volumes" . -}}
{{- end -}}

{{- define "kvindexer.sidecar.mode" -}}
{{- include "kvindexer.validate" . -}}
{{- if ne .Values.mode "sidecar" -}}
{{- fail (printf "kvindexer: the sidecar templates need mode: sidecar, and it is %s" .Values.mode) -}}
{{- end -}}
{{- end -}}
