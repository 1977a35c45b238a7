{{/* Names and labels. All of them take the chart's context. */}}

{{- define "kvindexer.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvindexer.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "kvindexer.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "kvindexer.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What a selector looks at: it can't be changed later, so it has neither versions nor labels of the user. */}}
{{- define "kvindexer.release" -}}
app.kubernetes.io/name: {{ include "kvindexer.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvindexer.selector" -}}
{{ include "kvindexer.release" . }}
app.kubernetes.io/component: indexer
{{- end -}}

{{- define "kvindexer.valkey.selector" -}}
{{ include "kvindexer.release" . }}
app.kubernetes.io/component: store
{{- end -}}

{{- define "kvindexer.test.selector" -}}
{{ include "kvindexer.release" . }}
app.kubernetes.io/component: test
{{- end -}}

{{- define "kvindexer.labels" -}}
{{ include "kvindexer.release" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The pods that the indexer runs in: ours, or those of the scheduler that takes the sidecar. */}}
{{- define "kvindexer.podLabels" -}}
{{- if eq .Values.mode "sidecar" -}}
{{- .Values.sidecar.podLabels | toYaml -}}
{{- else -}}
{{- include "kvindexer.selector" . -}}
{{- end -}}
{{- end -}}

{{- define "kvindexer.serviceAccountName" -}}
{{- if eq .Values.mode "sidecar" -}}
{{- .Values.sidecar.serviceAccountName -}}
{{- else -}}
{{- .Values.serviceAccount.name | default (include "kvindexer.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "kvindexer.priorityClassName" -}}
{{- if .Values.priorityClass.create -}}
{{- .Values.priorityClass.name | default (printf "%s-%s" .Release.Namespace (include "kvindexer.fullname" .)) -}}
{{- else -}}
{{- .Values.priorityClass.name -}}
{{- end -}}
{{- end -}}

{{- define "kvindexer.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Name of the port that has /metrics; in another's pod it must not be one that is there already. */}}
{{- define "kvindexer.probePortName" -}}
{{- ternary "kvindexer-probe" "probe" (eq .Values.mode "sidecar") -}}
{{- end -}}

{{- define "kvindexer.probePort" -}}
{{- ternary .Values.sidecar.probePort .Values.ports.probe (eq .Values.mode "sidecar") -}}
{{- end -}}
