# Two images from one file:
#   docker build --target operator -t ghcr.io/moe-operator/operator:dev .   operator, frontend, moe; no torch
#   docker build --target worker   -t ghcr.io/moe-operator/worker:dev .     worker; torch with its CUDA libraries
FROM python:3.12-slim AS wheel
WORKDIR /src
RUN pip install --no-cache-dir build
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY worker worker
COPY protos protos
RUN python -m build --wheel --outdir /dist

FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp

FROM base AS operator
RUN --mount=from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/*.whl)[operator]"
USER 65532:65532
CMD ["moe", "--help"]

FROM base AS worker
RUN --mount=from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/*.whl)[worker]"
USER 65532:65532
CMD ["moe-worker", "--help"]
