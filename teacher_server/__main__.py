"""`python -m teacher_server MODEL`: serve a model folder as a teacher over HTTP.

Prints one JSON line on stdout when it listens: {"event": "ready", "url": ..., "pid": ...}. Logs go to stderr.
Ends with exit code 0 on SIGTERM and SIGINT, once the requests it has accepted are answered; with 2 on a wrong setting.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.errors import ConfigError, PotstillError
from potstill.model_folder import check_model_folder
from potstill.processes import end_with_parent
from teacher_server import logs
from teacher_server.limits import Limits

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from teacher_server.backbone import Backbone

VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin slow every other process on shared cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the ready line
}
"""Of a process that runs vLLM, set before torch and vllm are imported."""

_GRACE_S = 20
_KEEP_ALIVE_S = 30  # longer than clients keep an idle connection, so that none is closed just as it is used again


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.exit_with_parent:
        end_with_parent(os.getppid())
    try:
        _serve(options)
    except PotstillError as error:
        _say(str(error))
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m teacher_server", description="Serve a model folder as a teacher.")
    parser.add_argument("model", type=Path, help="folder with config.json, *.safetensors, tokenizer and chat template")
    parser.add_argument("--name", help="how clients call the model (default: the folder's name)")
    parser.add_argument("--revision", help="of the weights (default: a digest of their bytes)")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="who runs the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one; the ready line says which")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--key-env", metavar="NAME", help="environment variable that holds the bearer key")
    key.add_argument("--key-file", type=Path, metavar="PATH", help="file that holds the bearer key")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="tokens read at a time, shared contexts once")
    parser.add_argument("--chunk-rows", type=int, default=1024, help="rows of logits that exist at a time")
    parser.add_argument("--window-ms", type=float, default=3.0, help="an idle machine waits this long to fill a batch")
    parser.add_argument("--accept-weights", action="store_true", help="let clients push new weights: POST /v1/weights")
    for name, explanation in _LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=explanation)
    parser.add_argument("--exit-with-parent", action="store_true", help="end when the process that started this ends")
    return parser


_LIMITS = {
    "max_items": "of one request",
    "max_tokens": "of one request, contexts included",
    "max_top_k": "entries of a top-k, and ids per position that a caller chooses",
    "max_body_bytes": "of one request",
    "queue_tokens": "waiting and being scored; beyond it requests get 503",
    "inflight_requests": "from headers to answer; beyond it requests get 503",
    "inflight_bytes": "of bodies and answers; beyond it requests get 503",
}


def _serve(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in _LIMITS if getattr(options, name) is not None}
    limits = Limits(**given)
    key = _key(options)
    check_model_folder(options.model)
    listener = _bind(options.host, options.port)
    app = _build(options, limits, key)

    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            sys.stdout.write(json.dumps({"event": "ready", "url": url, "pid": os.getpid()}) + "\n")
            sys.stdout.flush()

    # uvicorn raises the signal it was stopped by once more when it is done: by then there is nothing left to do.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        log_level="critical",  # its tracebacks quote what errors say; logs.py writes ours
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    gc.freeze()  # what is loaded by now stays: to look through it again would stop every answer for a while
    Server(config).run(sockets=[listener])
    gc.unfreeze()


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known before the model is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def _build(options: argparse.Namespace, limits: Limits, key: str) -> ASGIApp:
    """Load what is heavy, only after the options were found sound."""
    if options.engine == "vllm":
        os.environ.update(VLLM_ENVIRONMENT, OMP_NUM_THREADS=str(options.threads))
    import torch
    import transformers

    logs.start()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    from teacher_server.app import create_app
    from teacher_server.batching import ScoringQueue
    from teacher_server.engine import ScoringTeacher
    from teacher_server.weights_route import Versions

    teacher = ScoringTeacher(
        _backbone(options),
        options.model,
        name=options.name or options.model.resolve().name,
        revision=options.revision,
        chunk_rows=options.chunk_rows,
    )
    queue = ScoringQueue(
        teacher.score,
        capacity=limits.queue_tokens,
        batch_tokens=options.batch_tokens,
        window_s=options.window_ms / 1000,
    )
    versions = Versions(teacher, options.model) if options.accept_weights else None
    return create_app(teacher, queue, limits, key, versions)


def _backbone(options: argparse.Namespace) -> Backbone:
    if options.engine == "vllm":
        from teacher_server.vllm_backbone import VllmBackbone

        return VllmBackbone(options.model, dtype=options.dtype, batch_tokens=options.batch_tokens)
    from teacher_server.transformers_backbone import TransformersBackbone

    return TransformersBackbone(options.model, dtype=options.dtype)


def _key(options: argparse.Namespace) -> str:
    """The bearer key. One is made up, and printed this once, when none was given."""
    if options.key_env:
        key = os.environ.get(options.key_env, "")
        where = f"environment variable {options.key_env}"
    elif options.key_file:
        where = str(options.key_file)
        try:
            key = options.key_file.read_text().strip()
        except OSError as error:
            raise ConfigError(f"{where}: the key cannot be read: {error.strerror}") from None
    else:
        key = secrets.token_urlsafe(24)
        _say(f"no key was given; until it stops, this server's is {key}")
        return key
    if not key:
        raise ConfigError(f"{where}: holds no key")
    return key


def _say(line: str) -> None:
    sys.stderr.write(f"teacher_server: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
