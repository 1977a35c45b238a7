{{/*
The container and its volumes, the same in all modes but for what a sidecar does otherwise: it is restarted for itself
and ends after the scheduler, listens on loopback, and names ports and volumes so that they clash with nobody's.
*/}}

{{- define "kvindexer.securityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "kvindexer.container" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- $probe := include "kvindexer.probePortName" . -}}
name: kvindexer
image: {{ include "kvindexer.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- if $sidecar }}
restartPolicy: Always
{{- end }}
command: [kvindexer]
args: [serve, --config, /etc/kvindexer/config.yaml]
env:
  - name: KVINDEXER_REPLICA
    valueFrom:
      fieldRef:
        fieldPath: metadata.name
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  {{- if not $sidecar }}
  - name: http
    containerPort: {{ .Values.ports.http }}
  {{- end }}
  - name: {{ $probe }}
    containerPort: {{ include "kvindexer.probePort" . }}
startupProbe:
  httpGet: {path: /health, port: {{ $probe }}}
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /health, port: {{ $probe }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- if or (not $sidecar) .Values.sidecar.readiness }}
readinessProbe:
  httpGet: {path: /ready, port: {{ $probe }}}
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}
securityContext:
  {{- include "kvindexer.securityContext" . | nindent 2 }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
volumeMounts:
  - name: kvindexer-config
    mountPath: /etc/kvindexer
    readOnly: true
  - name: kvindexer-tmp
    mountPath: /tmp
  {{- if include "kvindexer.store.secret" . }}
  - name: kvindexer-store
    mountPath: /run/secrets/kvindexer/store
    readOnly: true
  {{- end }}
  {{- if .Values.store.caSecret }}
  - name: kvindexer-store-ca
    mountPath: /run/secrets/kvindexer/store-ca
    readOnly: true
  {{- end }}
  {{- if include "kvindexer.tokens.secret" . }}
  - name: kvindexer-tokens
    mountPath: /run/secrets/kvindexer/tokens
    readOnly: true
  {{- end }}
  {{- if .Values.tls.existingSecret }}
  - name: kvindexer-tls
    mountPath: /run/secrets/kvindexer/tls
    readOnly: true
  {{- end }}
  {{- if .Values.tls.clientCASecret }}
  - name: kvindexer-client-ca
    mountPath: /run/secrets/kvindexer/client-ca
    readOnly: true
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/*
A volume of one Secret: name, secret, items, mode. Not by subPath, so that a changed Secret is seen. The group of our
own pods may read it; the group of another's pod is not known, but nobody mounts this volume but our container.
*/}}
{{- define "kvindexer.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    defaultMode: {{ .mode }}
    items:
      {{- range $key, $path := .items }}
      - {key: {{ $key | quote }}, path: {{ $path }}}
      {{- end }}
{{- end -}}

{{- define "kvindexer.volumes" -}}
{{- $mode := ternary "0444" "0440" (eq .Values.mode "sidecar") -}}
- name: kvindexer-config
  configMap:
    name: {{ include "kvindexer.fullname" . }}
- name: kvindexer-tmp
  emptyDir:
    sizeLimit: 16Mi
{{- with include "kvindexer.store.secret" . }}
{{- $key := ternary "password" $.Values.store.existingSecretKey $.Values.valkey.enabled }}
{{ include "kvindexer.secretVolume" (dict "name" "kvindexer-store" "secret" . "mode" $mode "items" (dict $key "password")) }}
{{- end }}
{{- with .Values.store.caSecret }}
{{ include "kvindexer.secretVolume" (dict "name" "kvindexer-store-ca" "secret" . "mode" $mode "items" (dict "ca.crt" "ca.crt")) }}
{{- end }}
{{- with include "kvindexer.tokens.secret" . }}
{{- $key := ternary "tokens.yaml" $.Values.auth.existingSecretKey (ne (include "kvindexer.tokens.made" $) "") }}
{{ include "kvindexer.secretVolume" (dict "name" "kvindexer-tokens" "secret" . "mode" $mode "items" (dict $key "tokens.yaml")) }}
{{- end }}
{{- with .Values.tls.existingSecret }}
{{ include "kvindexer.secretVolume" (dict "name" "kvindexer-tls" "secret" . "mode" $mode "items" (dict "tls.crt" "tls.crt" "tls.key" "tls.key")) }}
{{- end }}
{{- with .Values.tls.clientCASecret }}
{{ include "kvindexer.secretVolume" (dict "name" "kvindexer-client-ca" "secret" . "mode" $mode "items" (dict "ca.crt" "ca.crt")) }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Changes with the settings, so that a change of them rolls the pods. Secrets are read again by the service itself. */}}
{{- define "kvindexer.annotations" -}}
checksum/kvindexer-config: {{ include "kvindexer.config" . | sha256sum }}
{{- end -}}
