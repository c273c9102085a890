#!/bin/sh
# Writes the Python code of every .proto file beside it. Used by `make proto`; CI fails when the result differs.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-../.venv/bin/python}
PATH="$(dirname "$(realpath -s "$python")"):$PATH" "$python" -m grpc_tools.protoc -I . \
    --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. \
    moe_api/inference/v1/inference.proto moe_api/worker/v1/worker.proto
