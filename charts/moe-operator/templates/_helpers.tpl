{{- define "moe-operator.labels" -}}
app.kubernetes.io/name: moe-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Where telemetry.otlpEndpoint listens: the port in it, or OTLP's own. */ -}}
{{- define "moe-operator.otlpPort" -}}
{{- regexFind ":[0-9]+" (last (splitList "://" .Values.telemetry.otlpEndpoint)) | trimPrefix ":" | default "4317" -}}
{{- end }}
