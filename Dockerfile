# syntax=docker/dockerfile:1
# Braid as an image. Targets: cpu (default) and cuda. Nothing is downloaded when a container starts: the embedded model is in
# the tree and the C++ kernels are built here for every x86 level.
#
#   docker build --target cpu -t braid:cpu .
#   docker build --target cuda -t braid:cuda .
#
# pip resolves torch from wherever its own settings point. For the small CPU build give it PyTorch's CPU wheels:
#   --build-arg TORCH_PIP_FLAGS="--extra-index-url <the index that pytorch.org names for CPU>"
# without which the default (CUDA) build is installed, which works on a CPU too but makes the image some 5 GB larger.

ARG PYTHON=3.12
ARG DEBIAN=bookworm

FROM python:${PYTHON}-slim-${DEBIAN} AS tools
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY pyproject.toml ./
# The dependencies alone, so that a change of the code does not install torch again.
RUN python -c 'import tomllib; print("\n".join(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if not d.startswith("torch=")))' > /tmp/requirements.txt

# torch comes first: the packages after it then find it installed.
FROM tools AS build-cpu
ARG TORCH=torch==2.13.0
ARG TORCH_PIP_FLAGS=""
RUN pip install ${TORCH_PIP_FLAGS} "${TORCH}+cpu" || pip install ${TORCH_PIP_FLAGS} "${TORCH}"
RUN pip install -r /tmp/requirements.txt

FROM tools AS build-cuda
ARG TORCH=torch==2.13.0
ARG TORCH_PIP_FLAGS=""
RUN pip install ${TORCH_PIP_FLAGS} "${TORCH}"
RUN pip install -r /tmp/requirements.txt

FROM tools AS tree
COPY kernels kernels
COPY scheduler scheduler
COPY server server
COPY configs configs
# Only the standard library is needed to compile them. World-readable and writable by nobody: the loader insists on it.
RUN rm -rf kernels/cpu/prebuilt \
    && python -m kernels.cpu.build --all --directory kernels/cpu/prebuilt \
    && python -m compileall -q kernels scheduler server \
    && chmod -R a+rX,go-w /app

FROM python:${PYTHON}-slim-${DEBIAN} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Braid" \
      org.opencontainers.image.description="OpenAI-compatible inference server: autoregressive, speculative and diffusion decoding in one batch" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# /models is the cache of downloaded checkpoints; group 0 may write there, as OpenShift's arbitrary user ids need.
RUN mkdir -p /models && chown 10001:0 /models && chmod 2775 /models
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /app
COPY --from=tree /app /app
EXPOSE 8000
STOPSIGNAL SIGTERM
USER 10001:0
# start-period: a large checkpoint loads for a while; the embedded model answers within seconds.
HEALTHCHECK --interval=5s --timeout=4s --start-period=120s --retries=6 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
# Exec form: the server itself is process 1 and gets the signals, so that it can drain.
ENTRYPOINT ["python", "-m", "server"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
