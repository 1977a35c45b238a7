{{/*
The settings file, and what follows from it. Values become one flat map of settings; the service reads nothing else but
KVINDEXER_REPLICA and what `extraEnv` adds.
*/}}

{{/* The namespaces that discovery looks into, and those of pools that are named with one. */}}
{{- define "kvindexer.namespaces" -}}
{{- $namespaces := .Values.discovery.namespaces | default (list .Release.Namespace) -}}
{{- range .Values.discovery.pools -}}
{{- if contains "/" . -}}
{{- $namespaces = append $namespaces (first (splitList "/" .)) -}}
{{- end -}}
{{- end -}}
{{- $namespaces | uniq | toJson -}}
{{- end -}}

{{/* "true" if the API server is asked: by discovery or by TokenReview. */}}
{{- define "kvindexer.asksKubernetes" -}}
{{- if or .Values.discovery.enabled (include "kvindexer.tokenReview" .) -}}true{{- end -}}
{{- end -}}

{{- define "kvindexer.tokenReview" -}}
{{- if and .Values.auth.enabled .Values.auth.kubernetes.audience -}}true{{- end -}}
{{- end -}}

{{/* The Secret with tokens: the given one, or the one that is made if there is no other way in. Empty: no tokens. */}}
{{- define "kvindexer.tokens.made" -}}
{{- $auth := .Values.auth -}}
{{- if and $auth.enabled (ne .Values.mode "sidecar") (not (or $auth.existingSecret $auth.kubernetes.audience $auth.certificates)) -}}true{{- end -}}
{{- end -}}

{{- define "kvindexer.tokens.secret" -}}
{{- if include "kvindexer.tokens.made" . -}}
{{- printf "%s-tokens" (include "kvindexer.fullname" .) -}}
{{- else if .Values.auth.enabled -}}
{{- .Values.auth.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "kvindexer.valkey.name" -}}
{{- printf "%s-valkey" (include "kvindexer.fullname" .) -}}
{{- end -}}

{{- define "kvindexer.valkey.secret" -}}
{{- .Values.valkey.existingSecret | default (include "kvindexer.valkey.name" .) -}}
{{- end -}}

{{- define "kvindexer.store.secret" -}}
{{- if .Values.valkey.enabled -}}
{{- include "kvindexer.valkey.secret" . -}}
{{- else -}}
{{- .Values.store.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "kvindexer.store.url" -}}
{{- if .Values.valkey.enabled -}}
{{- printf "redis://%s:6379/0" (include "kvindexer.valkey.name" .) -}}
{{- else if and .Values.store.url .Values.store.caSecret -}}
{{- printf "%s%sca_certs=/run/secrets/kvindexer/store-ca/ca.crt" .Values.store.url (ternary "&" "?" (contains "?" .Values.store.url)) -}}
{{- else -}}
{{- .Values.store.url -}}
{{- end -}}
{{- end -}}

{{/* Ports of the store, as a JSON list. A primary that sentinels name has Redis' usual port. */}}
{{- define "kvindexer.store.ports" -}}
{{- $url := .Values.store.url -}}
{{- $authority := regexReplaceAll "^[^/]*//([^@/]*@)?" $url "" | regexFind "^[^/?]*" -}}
{{- $usual := ternary 26379 6379 (contains "+sentinel" $url) -}}
{{- $ports := list -}}
{{- range splitList "," $authority -}}
{{- $port := regexFind ":[0-9]+$" . | trimPrefix ":" -}}
{{- $ports = append $ports (ternary (int $port) $usual (ne $port "")) -}}
{{- end -}}
{{- if contains "+sentinel" $url -}}{{- $ports = append $ports 6379 -}}{{- end -}}
{{- $ports | uniq | toJson -}}
{{- end -}}

{{/* Ports of what settings name by address: static sources, tokenizers' engines, the collector of traces. */}}
{{- define "kvindexer.addressed.ports" -}}
{{- $addresses := list -}}
{{- range .Values.config.sources -}}
{{- range pick . "endpoint" "replay" "replay_endpoint" -}}{{- $addresses = append $addresses . -}}{{- end -}}
{{- end -}}
{{- range .Values.config.tokenizers -}}{{- $addresses = concat $addresses (.engines | default list) -}}{{- end -}}
{{- with .Values.config.otlp_endpoint -}}{{- $addresses = append $addresses . -}}{{- end -}}
{{- $ports := list -}}
{{- range $addresses -}}
{{- $authority := regexReplaceAll "^[^/]*//" . "" | regexFind "^[^/?]*" -}}
{{- $port := regexFind ":[0-9]+$" $authority | trimPrefix ":" -}}
{{- $ports = append $ports (ternary (int $port) (ternary 443 80 (hasPrefix "https:" .)) (ne $port "")) -}}
{{- end -}}
{{- $ports | uniq | toJson -}}
{{- end -}}

{{/* All settings, a line each. Values are written as JSON, which is YAML and keeps numbers as they are. */}}
{{- define "kvindexer.config" -}}
{{- $settings := deepCopy .Values.config -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- $_ := set $settings "host" (ternary "127.0.0.1" .Values.host $sidecar) -}}
{{- $_ := set $settings "port" .Values.ports.http -}}
{{- /* kubelet and Prometheus come from outside of the pod */ -}}
{{- $_ := set $settings "probe_host" .Values.host -}}
{{- $_ := set $settings "probe_port" (include "kvindexer.probePort" . | int) -}}
{{- if and $sidecar (not (hasKey $settings "drain_s")) -}}
{{- /* a sidecar is told to end when the scheduler has ended: nobody is left to turn elsewhere */ -}}
{{- $_ := set $settings "drain_s" 0 -}}
{{- end -}}
{{- with .Values.discovery -}}
{{- if .enabled -}}
{{- $_ := set $settings "discovery" "kubernetes" -}}
{{- $_ := set $settings "discovery_namespaces" .namespaces -}}
{{- $_ := set $settings "discovery_selector" .selector -}}
{{- $_ := set $settings "discovery_pools" .pools -}}
{{- $_ := set $settings "discovery_event_port" .eventPort -}}
{{- $_ := set $settings "discovery_replay_port" .replayPort -}}
{{- $_ := set $settings "discovery_http_port" .httpPort -}}
{{- $_ := set $settings "discovery_model" .model -}}
{{- $_ := set $settings "discovery_tenant" .tenant -}}
{{- $_ := set $settings "discovery_block_size" .blockSize -}}
{{- end -}}
{{- end -}}
{{- with include "kvindexer.store.url" . -}}
{{- $_ := set $settings "store" . -}}
{{- $_ := set $settings "store_namespace" $.Values.store.namespace -}}
{{- with include "kvindexer.store.secret" $ -}}
{{- $_ := set $settings "store_password_file" "/run/secrets/kvindexer/store/password" -}}
{{- end -}}
{{- end -}}
{{- with .Values.auth -}}
{{- if not .enabled -}}
{{- $_ := set $settings "auth" "none" -}}
{{- else -}}
{{- if or (include "kvindexer.tokens.secret" $) .kubernetes.audience .certificates -}}
{{- $_ := set $settings "auth" "required" -}}
{{- end -}}
{{- if include "kvindexer.tokens.secret" $ -}}
{{- $_ := set $settings "auth_tokens_file" "/run/secrets/kvindexer/tokens/tokens.yaml" -}}
{{- end -}}
{{- if .kubernetes.audience -}}
{{- $_ := set $settings "auth_kubernetes_audience" .kubernetes.audience -}}
{{- $_ := set $settings "auth_kubernetes_roles" .kubernetes.roles -}}
{{- end -}}
{{- if .certificates -}}{{- $_ := set $settings "auth_certificates" .certificates -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.tls -}}
{{- if .existingSecret -}}
{{- $_ := set $settings "tls_cert_file" "/run/secrets/kvindexer/tls/tls.crt" -}}
{{- $_ := set $settings "tls_key_file" "/run/secrets/kvindexer/tls/tls.key" -}}
{{- end -}}
{{- if .clientCASecret -}}{{- $_ := set $settings "tls_client_ca_file" "/run/secrets/kvindexer/client-ca/ca.crt" -}}{{- end -}}
{{- end -}}
{{- range $name, $value := $settings }}
{{ $name }}: {{ $value | toRawJson }}
{{- end }}
{{- end -}}

{{/* Seconds that an end may take: the farewell, open requests, closing after them, the last spans, the last writes. */}}
{{- define "kvindexer.leaving" -}}
{{- $config := .Values.config -}}
{{- $drain := $config.drain_s | default 3 -}}
{{- if hasKey $config "drain_s" -}}{{- $drain = $config.drain_s -}}{{- end -}}
{{- $grace := $config.shutdown_grace_s | default 5 -}}
{{- $spans := 0 -}}
{{- if $config.otlp_endpoint -}}{{- $spans = $config.otlp_timeout_s | default 5 -}}{{- end -}}
{{- addf $drain (mulf 2 $grace) $spans 7 | ceil | int -}}
{{- end -}}

{{/* Bytes of an amount of memory, as Kubernetes or Valkey writes it; 0 if it can't be told. */}}
{{- define "kvindexer.bytes" -}}
{{- $text := toString . | lower -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $kilo := dict "k" 1000 "m" 1000000 "g" 1000000000 -}}
{{- $kibi := dict "ki" 1024 "mi" 1048576 "gi" 1073741824 "kb" 1024 "mb" 1048576 "gb" 1073741824 -}}
{{- $unit := get (merge (dict "" 1) $kilo $kibi) (trimPrefix $number $text) -}}
{{- if and $number $unit -}}{{- mulf (float64 $number) $unit | int64 -}}{{- else -}}0{{- end -}}
{{- end -}}
