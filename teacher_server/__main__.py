"""`python -m teacher_server MODEL`: serve a model folder as a teacher over HTTP.

Prints one JSON line on stdout when it listens: {"event": "ready", "url": ..., "pid": ...}. Logs go to stderr.
Ends with exit code 0 on SIGTERM and SIGINT, once the requests it has accepted are answered; with 2 on a wrong setting.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.errors import ConfigError, PotstillError
from potstill.tokenization import check_model_folder
from teacher_server.limits import Limits

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_PARENT_POLL_S = 0.5
_GRACE_S = 20


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.exit_with_parent:
        _end_with_parent(os.getppid())
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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one; the ready line says which")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--key-env", metavar="NAME", help="environment variable that holds the bearer key")
    key.add_argument("--key-file", type=Path, metavar="PATH", help="file that holds the bearer key")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="padded tokens of one forward pass")
    parser.add_argument("--chunk-rows", type=int, default=1024, help="rows of logits that exist at a time")
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
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S)
    Server(config).run(sockets=[listener])


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
    import structlog
    import torch
    import transformers

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    from teacher_server.app import create_app
    from teacher_server.batching import ScoringQueue
    from teacher_server.engine import TransformersTeacher

    teacher = TransformersTeacher(
        options.model,
        name=options.name or options.model.resolve().name,
        dtype=options.dtype,
        revision=options.revision,
        chunk_rows=options.chunk_rows,
    )
    queue = ScoringQueue(teacher.score, capacity=limits.queue_tokens, batch_tokens=options.batch_tokens)
    return create_app(teacher, queue, limits, key)


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


def _end_with_parent(parent: int) -> None:
    """Send ourselves SIGTERM once `parent` is gone.

    Asking for our parent's id needs no privileges and works everywhere. Linux's PR_SET_PDEATHSIG does not fit: it
    fires when the *thread* that started us ends, which may be long before its process does.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _say(line: str) -> None:
    sys.stderr.write(f"teacher_server: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
