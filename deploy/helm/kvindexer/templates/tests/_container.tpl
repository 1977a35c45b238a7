{{/* What the containers of the test have in common: root, token, tls, folder. */}}
{{- define "kvindexer.test.container" -}}
image: {{ include "kvindexer.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "kvindexer.securityContext" .root | nindent 2 }}
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {memory: 256Mi}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  {{- if .token }}
  - name: token
    mountPath: {{ .folder }}/token
    readOnly: true
  {{- end }}
  {{- if .tls }}
  - name: ca
    mountPath: {{ .folder }}/ca
    readOnly: true
  {{- end }}
{{- end -}}
