# Two images from one file:
#   docker build --target operator -t ghcr.io/moe-operator/operator:dev .   operator, frontend, moe; no torch
#   docker build --target worker   -t ghcr.io/moe-operator/worker:dev .     worker; torch with its CUDA libraries
#
# The base image is named by its digest; `docker buildx imagetools inspect python:3.12-slim-trixie` prints a newer one.
ARG PYTHON_IMAGE=python:3.12.14-slim-trixie@sha256:e5c9fa26ffb76e11e0f054f30dc2523a2f9693f0c36c0cf1e39b27e152d899fc

FROM ${PYTHON_IMAGE} AS wheel
# The build fails where the CPU kernels cannot be compiled; "optional" lets it go on without them.
ARG MOE_CPU_KERNELS=require
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/dist.txt requirements/
RUN pip install --require-hashes --requirement requirements/dist.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY operator operator
COPY worker worker
COPY protos protos
RUN python -m build --wheel --no-isolation --outdir /dist

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore HOME=/tmp

FROM base AS operator
COPY requirements/operator.txt /requirements/
RUN pip install --require-hashes --requirement /requirements/operator.txt
RUN --mount=from=wheel,source=/dist,target=/dist pip install --no-deps /dist/*.whl && pip check
USER 65532:65532
CMD ["moe", "--help"]

FROM base AS worker
# Triton compiles its interface to the driver on the machine with the GPU.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements/worker.txt /requirements/
RUN pip install --require-hashes --requirement /requirements/worker.txt
RUN --mount=from=wheel,source=/dist,target=/dist pip install --no-deps /dist/*.whl && pip check
USER 65532:65532
CMD ["moe-worker", "--help"]
