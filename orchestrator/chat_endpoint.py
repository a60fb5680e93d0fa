"""Somebody's API, for a recipe: a stock vLLM chat server on loopback, which a run knows by its URL and its text alone.

    python -m orchestrator.chat_endpoint MODEL     prints {"event": "ready", "url": ...} on stdout when it answers

It adds nothing to vLLM but a free port, settings for a small model on a CPU, and an end with whoever started it. It
scores nothing, takes no key and listens on loopback only: it is no way to serve a model to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TextIO

import httpx2

from potstill.processes import end_with_parent, start

NAME = "teacher"  # as its users call the model
START_S = 600.0  # importing vLLM takes most of a minute from a cold disk, and more where others use the cores
STOP_S = 20.0  # it ends an engine in a process of its own first
_KV_CACHE_BYTES = 1 << 26  # else vLLM takes a share of the machine's memory
_MAX_SEQUENCES = 16
_POLL_S = 0.3
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin slow every other process on shared cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextlib.asynccontextmanager
async def answering(model: Path, *, log: Path, environment: Mapping[str, str]) -> AsyncIterator[str]:
    """The URL, without /v1, at which `model` answers as NAME until the context ends. Raises WorkerLost."""
    env = {**environment, **_ENVIRONMENT}
    child = await start("chat endpoint", __name__, [str(model)], log=log, env=env, timeout_s=START_S)
    try:
        yield str(child.ready["url"])
    finally:
        await child.stop(STOP_S)


def main() -> None:
    end_with_parent(os.getppid())
    (model,) = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = int(held.getsockname()[1])
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads on after the ready line
    url = f"http://127.0.0.1:{port}"
    threading.Thread(target=_announce, args=(url, out), name="announce", daemon=True).start()
    server = "vllm.entrypoints.openai.api_server"
    sys.argv = [
        *(server, "--model", model, "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(_KV_CACHE_BYTES)),
        *("--max-num-seqs", str(_MAX_SEQUENCES), "--generation-config", "vllm", "--disable-uvicorn-access-log"),
    ]
    runpy.run_module(server, run_name="__main__")


def _announce(url: str, out: TextIO) -> None:
    while not _answers(url):
        time.sleep(_POLL_S)
    out.write(json.dumps({"event": "ready", "url": url}) + "\n")
    out.flush()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/v1/models", trust_env=False).status_code == httpx2.codes.OK
    except httpx2.TransportError:
        return False


if __name__ == "__main__":
    main()
