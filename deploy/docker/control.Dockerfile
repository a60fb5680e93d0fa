# The service and the command line, without torch: `potstill serve`, `potstill submit`, …
#
#     docker build --file deploy/docker/control.Dockerfile --tag potstill-control:0.1.0 .
#
# Nothing in it is written to: a read-only root works, with /tmp in memory and a volume at /runs.

FROM python:3.12.12-slim-bookworm AS build
ARG RAY_VERSION=2.60.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY potstill potstill
COPY orchestrator orchestrator
COPY rollout_worker rollout_worker
COPY teacher_server teacher_server
COPY learner learner
COPY deploy/recipes deploy/recipes
COPY deploy/slurm deploy/slurm
RUN python -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /dist /src
RUN python -m venv /opt/potstill \
 && /opt/potstill/bin/pip install --quiet --no-cache-dir \
      "$(echo /dist/potstill-*.whl)[orchestrator]" "ray[default]==${RAY_VERSION}"

FROM python:3.12.12-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin potstill \
 && install --directory --owner=10001 --group=10001 /runs
COPY --from=build /opt/potstill /opt/potstill
ENV PATH=/opt/potstill/bin:$PATH \
    HOME=/tmp \
    TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1
WORKDIR /runs
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=3)"]
ENTRYPOINT ["potstill"]
CMD ["serve"]
