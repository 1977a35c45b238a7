{{/* The pod of Deployment and StatefulSet. */}}

{{- define "kvindexer.podTemplate" -}}
metadata:
  labels:
    {{- include "kvindexer.selector" . | nindent 4 }}
    {{- with mergeOverwrite (deepCopy .Values.commonLabels) .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    {{- include "kvindexer.annotations" . | nindent 4 }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "kvindexer.serviceAccountName" . }}
  automountServiceAccountToken: {{ ternary true false (ne (include "kvindexer.asksKubernetes" .) "") }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds | default (include "kvindexer.leaving" . | int) }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "kvindexer.priorityClassName" . }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  containers:
    - {{ include "kvindexer.container" . | nindent 6 | trim }}
  volumes:
    {{- include "kvindexer.volumes" . | nindent 4 }}
  {{- if or .Values.topologySpread.zone .Values.topologySpread.host }}
  topologySpreadConstraints:
    {{- range $key, $when := dict "topology.kubernetes.io/zone" .Values.topologySpread.zone "kubernetes.io/hostname" .Values.topologySpread.host }}
    {{- if $when }}
    - topologyKey: {{ $key }}
      maxSkew: 1
      whenUnsatisfiable: {{ $when }}
      labelSelector:
        matchLabels:
          {{- include "kvindexer.selector" $ | nindent 10 }}
      {{- if eq $.Values.mode "deployment" }}
      matchLabelKeys: [pod-template-hash]
      {{- end }}
    {{- end }}
    {{- end }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
