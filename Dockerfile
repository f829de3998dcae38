# An image that trains: docker build -t inrank_dist .
#   docker run --rm -v "$PWD/runs:/inrank/runs" inrank_dist       the first command of the README; the run is in ./runs
#   docker run --rm inrank_dist inrank plan --help                any other command, as it is
#   launch/container.sh train --config my.yaml                    with the GPUs, folders and network of this machine
# ./runs must be writable for the user in the image, 1000:1000; another one: --user "$(id -u):$(id -g)".
# podman and buildah build it as well.
#
# Build arguments (--build-arg NAME=VALUE):
#   BASE      A Debian or Ubuntu with Python 3.11 or newer, or without Python: its own is then installed. PyTorch's
#             wheels bring the CUDA libraries, so the default serves GPUs (given NVIDIA's container toolkit) and CPUs.
#             Only DeepSpeed's own kernels want CUDA's compiler: BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 and
#             PACKAGES as below.
#   PACKAGES  Debian packages beside: "g++ python3-dev" for train.compile and for DeepSpeed's kernels.
#   EXTRAS    Extras of the project: deepspeed (the default), hf, or deepspeed,hf; empty for none.
#   PIP_...   pip's own settings, as below: where the wheels come from. On machines without a GPU let it be an index
#             with PyTorch's CPU build, which is several GB smaller.
ARG BASE=python:3.11.13-slim-bookworm

FROM ${BASE} AS python
USER root
ARG PACKAGES=
RUN set -eu; \
    python3 -c 'import ensurepip' 2>/dev/null || PACKAGES="python3 python3-venv ca-certificates $PACKAGES"; \
    if [ -n "$PACKAGES" ]; then \
        apt-get update; \
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $PACKAGES; \
        apt-get clean; \
        rm -rf /var/lib/apt/lists/*; \
    fi

# The libraries, before the project itself: a change of its source leaves this stage, and the one big layer, in the
# cache. They are those of an empty project with our pyproject.toml. Without build isolation, so that the constraints
# hold there too; without the libraries' own tests, a sixth of the image.
FROM python AS libraries
WORKDIR /libraries
COPY pyproject.toml launch/constraints.txt ./
ARG EXTRAS=deepspeed
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
RUN --mount=type=cache,target=/root/.cache/pip set -eu; \
    python3 -m venv /opt/venv; \
    mkdir inrank_dist; \
    echo '__version__ = "0"' >inrank_dist/__init__.py; \
    touch README.md LICENSE; \
    /opt/venv/bin/pip install --constraint constraints.txt setuptools; \
    /opt/venv/bin/pip install --constraint constraints.txt --no-build-isolation --use-pep517 \
        ".${EXTRAS:+[$EXTRAS]}"; \
    /opt/venv/bin/pip uninstall --yes inrank_dist; \
    find /opt/venv/lib/*/site-packages -type d \( -name tests -o -path '*/torch/test' \) -prune -exec rm -r {} +; \
    find /opt/venv/lib/*/site-packages/torch/bin -name 'test_*' -delete

FROM libraries AS project
WORKDIR /project
COPY pyproject.toml README.md LICENSE ./
COPY inrank_dist inrank_dist
# .installed tells launch/quickstart.sh that there is nothing left to install.
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation --no-cache-dir --prefix /installed . \
    && cksum <pyproject.toml >/installed/.installed

FROM python
COPY --from=libraries /opt/venv /opt/venv
# Copied: below RUN --mount=from=project, buildah 1.28 takes the last build's project from its cache.
COPY --from=project /installed /opt/venv
WORKDIR /inrank
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY launch launch
# The modes of the checkout may be for its owner alone. Any user may write into the home and into runs.
RUN chmod -R a+rX . \
    && mkdir -m 1777 runs /home/inrank /home/inrank/.cache /home/inrank/.cache/inrank_dist
# USER: a name for those who look it up where the user's number has none. PYTHONSAFEPATH: what runs is the project in
# the image, also in a folder with a checkout of it.
ENV PATH=/opt/venv/bin:$PATH \
    INRANK_VENV=/opt/venv \
    HOME=/home/inrank \
    USER=inrank \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
# The entry point passes on any command as it is, and the base's own is gone: the command is process 1 and hears the
# signal of `docker stop` itself. To save may take longer than the 10 s that it is given: docker stop --time 120.
ENTRYPOINT []
CMD ["/inrank/launch/quickstart.sh"]
