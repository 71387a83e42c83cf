# The workers: torch with its CUDA runtime, triton and the C compiler that it builds launchers with; the driver comes from the node.
# Built from the root of the repository:
#   docker build --file deploy/docker/worker.Dockerfile --tag ossia/worker:0.1.0 .
# PYTHON_IMAGE may be pinned by digest. Probes belong to Kubernetes, so there is no HEALTHCHECK.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY deploy/docker/build.txt deploy/docker/worker.txt deploy/docker/
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --require-hashes --requirement deploy/docker/build.txt
RUN python -m venv /opt/ossia && /opt/ossia/bin/pip install --no-cache-dir --only-binary=:all: --require-hashes --requirement deploy/docker/worker.txt
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY services services
COPY edge edge
COPY scheduler scheduler
COPY worker worker
COPY models models
COPY cli cli
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels . && /opt/ossia/bin/pip install --no-deps --no-index /opt/wheels/ossia-*.whl && /opt/ossia/bin/pip uninstall --yes pip
RUN mkdir -p /opt/ossia/models && /opt/ossia/bin/ossia checkpoint expand /opt/ossia/models/ossia-nano

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ossia worker" \
      org.opencontainers.image.description="Workers of Ossia, which serves gpt-oss models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/ossia /opt/ossia
ENV PATH=/opt/ossia/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
EXPOSE 9002 9090
ENTRYPOINT ["ossia"]
