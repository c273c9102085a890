#!/bin/sh
# Writes the chart, rendered with its defaults and the model root of the example, to standard output: what charts/install.yaml holds. HELM names the helm to use.
set -eu
cd "$(dirname "$0")"
cat <<'HEADER'
# Everything of the operator, for `kubectl apply -f` without helm. MoEDeployments may mount /mnt/models of the nodes (the example
# does): change MOE_OPERATOR_MODEL_ROOTS for other directories.
# Generated from charts/moe-operator by charts/render.sh. Do not edit.
---
apiVersion: v1
kind: Namespace
metadata:
  name: moe-system
  labels:
    pod-security.kubernetes.io/enforce: restricted
HEADER
"${HELM:-helm}" template moe-operator moe-operator --namespace moe-system --skip-tests --set "modelRoots={/mnt/models}"
