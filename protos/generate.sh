#!/bin/sh
# Writes the Python code of every .proto file next to it, or below the given folder. Used by `make proto`.
set -eu
out=$(realpath "${1:-$(dirname "$0")}")
cd "$(dirname "$0")"
python=${PYTHON:-../.venv/bin/python}
PATH="$(dirname "$(realpath -s "$python")"):$PATH" "$python" -m grpc_tools.protoc -I . \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    $(find moe_api -name '*.proto')
