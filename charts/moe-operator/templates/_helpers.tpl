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
{{- regexFind ":[0-9]+" (last (splitList "://" .Values.telemetry.otlpEndpoint)) | trimPrefix ":" | default "4317" -}}
{{- end }}
