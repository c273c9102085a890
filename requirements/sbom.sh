#!/usr/bin/env bash
# Writes an SBOM (CycloneDX, JSON) of each image beside the wheel in the folder $1. Both are read from an environment
# that is installed as the Dockerfile does it: the locked packages, then the wheel. uv links files instead of copying.
set -euo pipefail
cd "$(dirname "$0")/.."
dist=$1
wheel=$(echo "$dist"/*.whl)
version=$(basename "$wheel" | cut -d- -f2)
work=$(mktemp -d -p "$dist")
trap 'rm -rf "$work"' EXIT
for image in operator worker; do
    uv venv --quiet --python "$(command -v python)" "$work/$image"
    python=$work/$image/bin/python
    uv pip install --quiet --python "$python" --require-hashes --requirement "requirements/$image.txt"
    uv pip install --quiet --python "$python" --no-deps "$wheel"
    cyclonedx-py environment "$python" --pyproject pyproject.toml --mc-type application --output-reproducible \
        --output-file "$dist/moe-operator-$version-$image.cdx.json"
    rm -rf "$work/${image:?}"
done
