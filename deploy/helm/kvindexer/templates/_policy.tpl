{{/* Parts of policies that concern engines. */}}

{{/* "true" if a policy can say which pods are engines: by names and values alone. */}}
{{- define "kvindexer.engines.known" -}}
{{- $terms := "^[^=!(),]+==?[^=!(),]+(,[^=!(),]+==?[^=!(),]+)*$" -}}
{{- with .Values.discovery -}}
{{- if and .enabled (not .pools) (regexMatch $terms (nospace .selector)) -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* Pods of engines as discovery finds them; all pods where a policy can't say the same: sets, and pools. */}}
{{- define "kvindexer.engines.selector" -}}
{{- $selector := .Values.discovery.selector | nospace -}}
{{- if include "kvindexer.engines.known" . -}}
matchLabels:
{{- range splitList "," $selector }}
{{- $pair := splitn "=" 2 (replace "==" "=" .) }}
  {{ $pair._0 }}: {{ $pair._1 | quote }}
{{- end }}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/* Events and replay of all ranks. */}}
{{- define "kvindexer.engines.eventPorts" -}}
{{- $further := sub .Values.networkPolicy.engines.ranks 1 | int -}}
{{- range compact (list .Values.discovery.eventPort .Values.discovery.replayPort) }}
- {protocol: TCP, port: {{ . }}{{ if $further }}, endPort: {{ add . $further }}{{ end }}}
{{- end -}}
{{- end -}}
