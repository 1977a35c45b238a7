{{/*
Values that contradict each other end the rendering, with a message that names them and says what to do. What a schema
can say (types, ranges, unknown names) stands in values.schema.json.
*/}}

{{/* Settings that other values decide, and which. */}}
{{- define "kvindexer.owned" -}}
host: host
port: ports.http
probe_host: host
probe_port: ports.probe or sidecar.probePort
replica: nothing; it is the pod's name
store: store.url or valkey.enabled
store_namespace: store.namespace
store_password: store.existingSecret
store_password_file: store.existingSecret
discovery: discovery.enabled
discovery_namespaces: discovery.namespaces
discovery_selector: discovery.selector
discovery_pools: discovery.pools
discovery_event_port: discovery.eventPort
discovery_replay_port: discovery.replayPort
discovery_http_port: discovery.httpPort
discovery_model: discovery.model
discovery_tenant: discovery.tenant
discovery_block_size: discovery.blockSize
auth: auth.enabled
auth_tokens_file: auth.existingSecret
auth_kubernetes_audience: auth.kubernetes.audience
auth_kubernetes_roles: auth.kubernetes.roles
auth_certificates: auth.certificates
tls_cert_file: tls.existingSecret
tls_key_file: tls.existingSecret
tls_client_ca_file: tls.clientCASecret
tokenizer_api_key: extraEnv, as KVINDEXER_TOKENIZER_API_KEY from a Secret
{{- end -}}

{{- define "kvindexer.validate" -}}
{{- $owned := include "kvindexer.owned" . | fromYaml -}}
{{- $wrong := list -}}
{{- range $name, $_ := .Values.config -}}
{{- with index $owned $name -}}
{{- $wrong = append $wrong (printf "config.%s: set %s instead" $name .) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- $name := .name | default "" -}}
{{- $setting := $name | trimPrefix "KVINDEXER_" | lower -}}
{{- if and (hasPrefix "KVINDEXER_" $name) (hasKey $.Values.config $setting) -}}
{{- $wrong = append $wrong (printf "extraEnv %s: config.%s wins over it; give one of the two" $name $setting) -}}
{{- else if and (hasPrefix "KVINDEXER_" $name) (hasKey $owned $setting) (ne $setting "tokenizer_api_key") -}}
{{- $wrong = append $wrong (printf "extraEnv %s: set %s instead" $name (index $owned $setting)) -}}
{{- end -}}
{{- end -}}

{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- $loopback := or (hasPrefix "127." .Values.host) (has .Values.host (list "localhost" "::1" "[::1]")) -}}
{{- if $loopback -}}
{{- $wrong = append $wrong (printf "host: at %s neither callers nor the kubelet reach the pod; in sidecar mode the service binds to loopback by itself, and host is for its probes" .Values.host) -}}
{{- end -}}
{{- $probe := include "kvindexer.probePort" . | int -}}
{{- if eq (int .Values.ports.http) $probe -}}
{{- $wrong = append $wrong (printf "%s: %d is ports.http already; give another port" (ternary "sidecar.probePort" "ports.probe" $sidecar) $probe) -}}
{{- end -}}

{{- with .Values.discovery -}}
{{- if .enabled -}}
{{- if not (or .selector .pools) -}}
{{- $wrong = append $wrong "discovery.selector: give a label selector, or discovery.pools, or discovery.enabled: false" -}}
{{- end -}}
{{- $ranks := int $.Values.networkPolicy.engines.ranks -}}
{{- $apart := sub (int (.replayPort | default 0)) (int .eventPort) -}}
{{- if and .replayPort (lt (max $apart (sub 0 $apart)) $ranks) -}}
{{- $wrong = append $wrong (printf "discovery.replayPort: %d must be at least %d ports away from discovery.eventPort %d, for each of the networkPolicy.engines.ranks has both" (int .replayPort) $ranks (int .eventPort)) -}}
{{- end -}}
{{- else -}}
{{- if or .namespaces .pools -}}
{{- $wrong = append $wrong "discovery.enabled: false, and discovery.namespaces or discovery.pools is given; nobody would look there" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- with .Values.store -}}
{{- if and .url $.Values.valkey.enabled -}}
{{- $wrong = append $wrong "valkey.enabled: there is a store.url, too; give one of the two" -}}
{{- end -}}
{{- if and .existingSecret $.Values.valkey.enabled -}}
{{- $wrong = append $wrong "store.existingSecret: the password of the Valkey beside the service is valkey.existingSecret" -}}
{{- else if and .existingSecret (not .url) -}}
{{- $wrong = append $wrong "store.existingSecret: there is no store.url that the password is for" -}}
{{- end -}}
{{- if and .caSecret (not (hasPrefix "rediss" .url)) -}}
{{- $wrong = append $wrong "store.caSecret: store.url does not begin with rediss, so there is no certificate to check" -}}
{{- end -}}
{{- if regexMatch "^[^/]*//[^@/]*:[^@/]+@" .url -}}
{{- $wrong = append $wrong "store.url: has a password, which would stand in a ConfigMap; put it into a Secret and name that in store.existingSecret" -}}
{{- end -}}
{{- end -}}

{{- with .Values.valkey -}}
{{- $limit := dig "limits" "memory" "" .resources | include "kvindexer.bytes" | int64 -}}
{{- if and .enabled $limit (ge (include "kvindexer.bytes" .maxmemory | int64) $limit) -}}
{{- $wrong = append $wrong (printf "valkey.maxmemory: %s does not fit into valkey.resources.limits.memory %v; leave a third of it for the server" .maxmemory .resources.limits.memory) -}}
{{- end -}}
{{- end -}}

{{- with .Values.auth -}}
{{- $ways := or .existingSecret .kubernetes.audience .certificates -}}
{{- if and (not .enabled) $ways -}}
{{- $wrong = append $wrong "auth.enabled: false, and a way for callers to say who they are is given; take one of the two back" -}}
{{- end -}}
{{- if and .kubernetes.audience (not .kubernetes.roles) -}}
{{- $wrong = append $wrong "auth.kubernetes.roles: nobody has a role; give some to users or groups, such as system:serviceaccounts:llm-d: [query]" -}}
{{- end -}}
{{- if and .kubernetes.roles (not .kubernetes.audience) -}}
{{- $wrong = append $wrong "auth.kubernetes.audience: there are roles, and no audience that tokens must have" -}}
{{- end -}}
{{- if and .certificates (not $.Values.tls.clientCASecret) -}}
{{- $wrong = append $wrong "auth.certificates: needs tls.clientCASecret, the authority that clients' certificates come from" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.clientCASecret (not .Values.tls.existingSecret) -}}
{{- $wrong = append $wrong "tls.clientCASecret: needs tls.existingSecret, for client certificates are shown within TLS only" -}}
{{- end -}}

{{- with .Values.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- $wrong = append $wrong (printf "autoscaling.minReplicas: %d is more than maxReplicas %d" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if and .enabled (not (dig "requests" "cpu" "" $.Values.resources)) -}}
{{- $wrong = append $wrong "autoscaling.enabled: needs resources.requests.cpu, of which targetCPUUtilizationPercentage is a share" -}}
{{- end -}}
{{- end -}}
{{- with .Values.podDisruptionBudget -}}
{{- $fewest := ternary (int $.Values.autoscaling.minReplicas) (int $.Values.replicas) $.Values.autoscaling.enabled -}}
{{- if and .enabled (not (kindIs "invalid" .minAvailable)) (not (kindIs "invalid" .maxUnavailable)) -}}
{{- $wrong = append $wrong "podDisruptionBudget: give minAvailable or maxUnavailable, not both" -}}
{{- end -}}
{{- if and .enabled (not $sidecar) (or (eq (toString .minAvailable) "100%") (and (kindIs "float64" .minAvailable) (ge (int .minAvailable) $fewest))) -}}
{{- $wrong = append $wrong (printf "podDisruptionBudget.minAvailable: %v of %d replicas would let no node be drained" .minAvailable $fewest) -}}
{{- end -}}
{{- if and .enabled (has (toString .maxUnavailable) (list "0" "0%")) -}}
{{- $wrong = append $wrong "podDisruptionBudget.maxUnavailable: 0 would let no node be drained" -}}
{{- end -}}
{{- end -}}
{{- if .Values.terminationGracePeriodSeconds -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) (include "kvindexer.leaving" . | int) -}}
{{- $wrong = append $wrong (printf "terminationGracePeriodSeconds: %d s are less than the %s s that drain_s, shutdown_grace_s and the last writes need" (int .Values.terminationGracePeriodSeconds) (include "kvindexer.leaving" .)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.priorityClass.create (not .Values.priorityClass.value) -}}
{{- $wrong = append $wrong "priorityClass.value: is 0, as without a class; give one" -}}
{{- end -}}

{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled -}}
{{- $wrong = append $wrong "metrics: serviceMonitor and podMonitor would both scrape every pod; enable one" -}}
{{- end -}}
{{- if and .Values.metrics.prometheusRule.enabled (not .Values.metrics.prometheusRule.runbookBaseUrl) -}}
{{- $wrong = append $wrong "metrics.prometheusRule.runbookBaseUrl: give the address before docs/runbooks.md, or the links of alerts lead nowhere" -}}
{{- end -}}
{{- with .Values.networkPolicy.protectEngines -}}
{{- if .enabled -}}
{{- if not $.Values.discovery.enabled -}}
{{- $wrong = append $wrong "networkPolicy.protectEngines: discovery is off, so it is not known which pods are engines" -}}
{{- else if not (include "kvindexer.engines.known" $) -}}
{{- $wrong = append $wrong "networkPolicy.protectEngines: needs a discovery.selector of the form name=value,... and no pools, to know which pods to close" -}}
{{- end -}}
{{- if and $sidecar (not $.Values.sidecar.podLabels) -}}
{{- $wrong = append $wrong "networkPolicy.protectEngines: needs sidecar.podLabels, to know which pods to let in" -}}
{{- end -}}
{{- $ranks := int $.Values.networkPolicy.engines.ranks -}}
{{- range $port := .openPorts -}}
{{- range $first := include "kvindexer.engines.firstPorts" $ | fromJsonArray -}}
{{- if and (ge (int $port) (int $first)) (lt (int $port) (add $first $ranks | int)) -}}
{{- $wrong = append $wrong (printf "networkPolicy.protectEngines.openPorts: %d is a port of events or replay, which was to be closed" (int $port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- if $sidecar -}}
{{- if .Values.autoscaling.enabled -}}
{{- $wrong = append $wrong "autoscaling.enabled: in sidecar mode there is no workload to scale; scale the scheduler" -}}
{{- end -}}
{{- if gt (int .Values.replicas) 1 -}}
{{- $wrong = append $wrong (printf "replicas: %d, and in sidecar mode each pod of the scheduler has its own indexer; leave it away" (int .Values.replicas)) -}}
{{- end -}}
{{- if .Values.metrics.serviceMonitor.enabled -}}
{{- $wrong = append $wrong "metrics.serviceMonitor: in sidecar mode there is no Service; use metrics.podMonitor" -}}
{{- end -}}
{{- if and .Values.metrics.podMonitor.enabled (not .Values.sidecar.podLabels) -}}
{{- $wrong = append $wrong "metrics.podMonitor: in sidecar mode it needs sidecar.podLabels, to know which pods to scrape" -}}
{{- end -}}
{{- if .Values.priorityClass.create -}}
{{- $wrong = append $wrong "priorityClass.create: in sidecar mode the pod is the scheduler's" -}}
{{- end -}}
{{- if and (include "kvindexer.asksKubernetes" .) .Values.rbac.create (not .Values.sidecar.serviceAccountName) -}}
{{- $wrong = append $wrong "sidecar.serviceAccountName: name the ServiceAccount of the pods that take the sidecar, which needs the right to see engines' pods; or rbac.create: false if it has it" -}}
{{- end -}}
{{- if .Values.serviceAccount.name -}}
{{- $wrong = append $wrong "serviceAccount.name: in sidecar mode the account is the scheduler's; set sidecar.serviceAccountName" -}}
{{- end -}}
{{- else -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- $wrong = append $wrong "serviceAccount.name: none is to be made, so name the one to use" -}}
{{- end -}}
{{- if .Values.sidecar.serviceAccountName -}}
{{- $wrong = append $wrong (printf "sidecar.serviceAccountName: is for mode: sidecar, and it is %s; set serviceAccount.name" .Values.mode) -}}
{{- end -}}
{{- end -}}

{{- if $wrong -}}
{{- fail (printf "\n\nThese values of kvindexer can't be used:\n  - %s\n" (join "\n  - " $wrong)) -}}
{{- end -}}
{{- end -}}
