# What runs and teachers need on machines without a GPU: torch, vLLM built for CPUs, Ray.
#
#     docker build --file deploy/docker/cpu.Dockerfile --tag potstill-cpu:0.1.0 .
#
# Its processes differ (a Ray node, a teacher, a run), so whoever starts one says how its health is asked for.
# Nothing in it is written to: a read-only root works, with /tmp in memory and a volume at /runs.

FROM python:3.12.12-slim-bookworm AS build
ARG RAY_VERSION=2.60.0
ARG UV_VERSION=0.13.9
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY potstill potstill
COPY orchestrator orchestrator
COPY rollout_worker rollout_worker
COPY teacher_server teacher_server
COPY learner learner
COPY deploy/recipes deploy/recipes
COPY deploy/slurm deploy/slurm
# uv, because pyproject.toml tells it which packages vLLM asks for and text does not need.
RUN python -m pip install --quiet --no-cache-dir "uv==${UV_VERSION}" \
 && python -m venv /opt/potstill \
 && uv pip install --quiet --no-cache --python /opt/potstill/bin/python --torch-backend cpu \
      "/src[cpu]" "ray[default]==${RAY_VERSION}"

FROM python:3.12.12-slim-bookworm
# vLLM's kernels are linked against libnuma.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin potstill \
 && install --directory --owner=10001 --group=10001 /runs
COPY --from=build /opt/potstill /opt/potstill
ENV PATH=/opt/potstill/bin:$PATH \
    HOME=/tmp \
    TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    OMP_WAIT_POLICY=PASSIVE
WORKDIR /runs
USER 10001:10001
ENTRYPOINT ["potstill"]
