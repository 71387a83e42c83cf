# Edge, scheduler and command line: no torch. Built from the root of the repository:
#   docker build --file deploy/docker/control.Dockerfile --tag ossia/control:0.1.0 .
# PYTHON_IMAGE may be pinned by digest. Probes belong to Kubernetes, so there is no HEALTHCHECK.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY deploy/docker/build.txt deploy/docker/control.txt deploy/docker/
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --require-hashes --requirement deploy/docker/build.txt
RUN python -m venv /opt/ossia && /opt/ossia/bin/pip install --no-cache-dir --only-binary=:all: --require-hashes --requirement deploy/docker/control.txt
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY services services
COPY edge edge
COPY scheduler scheduler
COPY worker worker
COPY models models
COPY cli cli
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels . && /opt/ossia/bin/pip install --no-deps --no-index /opt/wheels/ossia-*.whl && /opt/ossia/bin/pip uninstall --yes setuptools pip

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ossia control" \
      org.opencontainers.image.description="Edge, scheduler and command line of Ossia, which serves gpt-oss models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/ossia /opt/ossia
ENV PATH=/opt/ossia/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 9000 9001 9090
ENTRYPOINT ["ossia"]
