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

{{/* First ports of events and of replay: that of all pods, or the one at which pods may have it. A JSON list. */}}
{{- define "kvindexer.engines.firstPorts" -}}
{{- list .Values.discovery.eventPort (.Values.discovery.replayPort | default .Values.networkPolicy.engines.replayPort) | compact | toJson -}}
{{- end -}}

{{/* Events and replay of all ranks; where discovery looks, a pod may also have named their ports. */}}
{{- define "kvindexer.engines.eventPorts" -}}
{{- $further := sub .Values.networkPolicy.engines.ranks 1 | int -}}
{{- range include "kvindexer.engines.firstPorts" . | fromJsonArray }}
- {protocol: TCP, port: {{ . }}{{ if $further }}, endPort: {{ add . $further }}{{ end }}}
{{- end }}
{{- if .Values.discovery.enabled }}
- {protocol: TCP, port: kv-events}
- {protocol: TCP, port: kv-replay}
{{- end -}}
{{- end -}}
