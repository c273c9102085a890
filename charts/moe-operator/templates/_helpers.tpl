{{- /* Labels by which Services and policies find the operator's pod. */ -}}
{{- define "moe-operator.selectorLabels" -}}
app.kubernetes.io/name: moe-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "moe-operator.labels" -}}
{{ include "moe-operator.selectorLabels" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: moe-operator
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* Where telemetry.otlpEndpoint listens: the port in it, or OTLP's own. */ -}}
{{- define "moe-operator.otlpPort" -}}
{{- regexFind ":[0-9]+$" (first (splitList "/" (last (splitList "://" .Values.telemetry.otlpEndpoint)))) | trimPrefix ":" | default "4317" -}}
{{- end }}

{{- /* What the operator may do: in the cluster, or in each of watchNamespaces. */ -}}
{{- define "moe-operator.rules" -}}
# The operator reads specs; it writes only the status and, if scaling decides, the scale.
- apiGroups: [serving.moe-operator.dev]
  resources: [moedeployments]
  verbs: [get, list, watch]
- apiGroups: [serving.moe-operator.dev]
  resources: [moedeployments/status]
  verbs: [patch]
# The scaling decision, so that it stays when scaling is turned off.
- apiGroups: [serving.moe-operator.dev]
  resources: [moedeployments/scale]
  verbs: [patch]
# Learned scaling data, so that it survives a restart of the operator.
- apiGroups: [serving.moe-operator.dev]
  resources: [scalinghistories]
  verbs: [get, create, patch]
# Needed to set blockOwnerDeletion in owner references if the API server checks that.
- apiGroups: [serving.moe-operator.dev]
  resources: [moedeployments/finalizers]
  verbs: [update]
# Children are created and changed by server-side apply (create, patch). The garbage collector deletes them with
# their owner; the operator deletes surplus replicas. It needs the right to delete the others to adopt them after
# `kubectl delete --cascade=orphan`, if the API server checks who sets owner references.
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# Routes from outside to frontends, and pools of them for inference gateways, if a deployment asks for one.
- apiGroups: [networking.k8s.io]
  resources: [ingresses]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes, grpcroutes]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, watch, create, patch, delete]
# The secret of replicas of several workers: created once with a random value, and never read.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
# The certificates of internal TLS (spec.transport): one set for each namespace, always under these names.
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [moe-internal-ca, moe-internal-worker, moe-internal-frontend]
  verbs: [get, update]
# The revision history; the oldest records are deleted.
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
# The frontends' rights, which the operator can grant only if it has them.
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
# Frontends publish their routes with rights that the operator grants; the operator reads them.
- apiGroups: [serving.moe-operator.dev]
  resources: [frontendroutes]
  verbs: [list, watch, create, patch]
# Pods are only read, because StatefulSets and Deployments create them. The operator sets their readiness gate.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
{{- if not .Values.watchNamespaces }}
# Read if a rollout finds no room, to check whether a new pod would fit in the place of an old replica.
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [events]
  # Read if a StatefulSet has no pod: only an Event says why.
  verbs: [create, list]
# Operator processes find each other here; the first one creates the object.
- apiGroups: [kopf.dev]
  resources: [{{ if .Values.watchNamespaces }}kopfpeerings{{ else }}clusterkopfpeerings{{ end }}]
  verbs: [list, watch, create]
- apiGroups: [kopf.dev]
  resources: [{{ if .Values.watchNamespaces }}kopfpeerings{{ else }}clusterkopfpeerings{{ end }}]
  resourceNames: [{{ .Values.peering | quote }}]
  verbs: [get, patch]
{{- end }}
