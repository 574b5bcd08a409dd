{{- /* Names, labels and parts of a pod shared by both deployments; COMPONENT is "service", "triton" or "build". */ -}}

{{- define "bertqa.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels that select the pods of a component: (list $ COMPONENT). */ -}}
{{- define "bertqa.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "bertqa.labels" -}}
{{- $root := index . 0 -}}
{{ include "bertqa.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{- /* One of our images: (list $ NAME). */ -}}
{{- define "bertqa.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.images.registry }}/{{ index . 1 }}:{{ $root.Values.images.tag | default $root.Chart.AppVersion }}
{{- end -}}

{{- define "bertqa.pod-security" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "bertqa.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* Pods cannot be ready before the Job has built the first engine; without this, a rollout fails after ten minutes. */ -}}
{{- define "bertqa.patience" -}}
{{- if .Values.build.enabled }}
progressDeadlineSeconds: 3600
{{- end }}
{{- end -}}

{{- define "bertqa.pull-secrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* A pod's init container that copies the repository if there is no claim. */ -}}
{{- define "bertqa.fetch-models" -}}
{{- with .Values.models.objectStorage }}
{{- if .source }}
initContainers:
  - name: fetch-models
    image: {{ $.Values.images.rclone }}
    args: [copy, --checksum, --stats-one-line, {{ .source | quote }}, /models]
    env:
      - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
      - {name: XDG_CACHE_HOME, value: /tmp}
    {{- with .secret }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    securityContext: {{- include "bertqa.container-security" $ | nindent 6 }}
    resources:
      requests: {cpu: 100m, memory: 128Mi}
      limits: {memory: 512Mi}
    volumeMounts:
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
{{- end -}}

{{- define "bertqa.models-volume" -}}
{{- if .Values.models.claim -}}
{name: models, persistentVolumeClaim: {claimName: {{ .Values.models.claim }}}}
{{- else -}}
{name: models, emptyDir: {}}
{{- end -}}
{{- end -}}

{{- /* A HorizontalPodAutoscaler: (dict "root" $ "component" C "values" V "podMetric" NAME). */ -}}
{{- define "bertqa.autoscaler" -}}
{{- $name := printf "%s-%s" (include "bertqa.name" .root) .component -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  labels: {{- include "bertqa.labels" (list .root .component) | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicas: {{ .values.minReplicas }}
  maxReplicas: {{ .values.maxReplicas }}
  metrics:
    {{- if eq .values.metric "cpu" }}
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ .values.target }}}
    {{- else }}
    - type: Pods
      pods:
        metric: {name: {{ .podMetric }}}
        target: {type: AverageValue, averageValue: {{ .values.target | quote }}}
    {{- end }}
  behavior:
    scaleUp:
      stabilizationWindowSeconds: 0
    scaleDown:
      stabilizationWindowSeconds: 300
{{- end -}}
