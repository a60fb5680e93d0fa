# What runs and teachers need on machines with NVIDIA GPUs: vLLM's own image, and potstill beside its torch and vLLM.
#
#     docker build --file deploy/docker/gpu.Dockerfile --tag potstill-gpu:0.1.0 .
#
# Its processes differ (a Ray node, a teacher, a run), so whoever starts one says how its health is asked for.
# Nothing in it is written to: a read-only root works, with /tmp in memory and a volume at /runs.

FROM vllm/vllm-openai:v0.33.0
ARG RAY_VERSION=2.60.0
USER root
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY potstill potstill
COPY orchestrator orchestrator
COPY rollout_worker rollout_worker
COPY teacher_server teacher_server
COPY learner learner
COPY deploy/recipes deploy/recipes
COPY deploy/slurm deploy/slurm
# torch, vLLM and CUDA's libraries stay what the image was built and tested with: another version of one is an error.
RUN uv pip list --system --format=freeze > /tmp/found.txt \
 && grep --extended-regexp '^(torch|vllm|triton|flashinfer|nvidia)' /tmp/found.txt > /tmp/kept.txt \
 && grep --quiet '^vllm==' /tmp/kept.txt \
 && grep --quiet '^torch==' /tmp/kept.txt \
 && uv pip install --quiet --no-cache --system --constraint /tmp/kept.txt "/src[gpu]" "ray[default]==${RAY_VERSION}" \
 && rm -rf /src /tmp/found.txt /tmp/kept.txt \
 && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin potstill \
 && install --directory --owner=10001 --group=10001 /runs
ENV HOME=/tmp \
    TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    OMP_WAIT_POLICY=PASSIVE
WORKDIR /runs
USER 10001:10001
ENTRYPOINT ["potstill"]
