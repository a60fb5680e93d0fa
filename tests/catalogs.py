"""A catalog over small folders, for tests: what is in them is named, what lies beside them must never be opened."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from orchestrator.service.catalog import Catalog
from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from potstill.calling.guard import Guard


def model(folder: Path) -> Path:
    """A model's folder that nothing speaks against."""
    folder.mkdir(parents=True)
    save_file({"weight": np.zeros((1, 1), dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def prompts(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"prompt": "1 + 1 = ?", "solution": "2"}) + "\n")
    return file


def principal(owner: str, *scopes: Scope) -> Principal:
    return Principal(key_id=f"key-{owner}"[:20], owner=owner, scopes=frozenset(scopes), limits=Limits())


def once(route: str = "/v1/x", who: Principal | None = None) -> Once:
    """A request that is never replayed."""
    return Once(key_id="k" if who is None else who.key_id, key=None, route=route, body_digest="")


@contextmanager
def catalog(folder: Path, **changes: Any) -> Iterator[Catalog]:
    """Over models/, data/, secrets/ of `folder`, which are made where they are not there; closes its store."""
    for name in ("models", "data", "secrets", "uploads", "published", "runs"):
        (folder / name).mkdir(exist_ok=True)
    store = Store(Database(f"sqlite:///{folder / 'potstill.db'}"))
    places: Mapping[str, Any] = {
        "models": [folder / "models"],
        "data": [folder / "data"],
        "uploads": folder / "uploads",
        "published": folder / "published",
        "runs": folder / "runs",
        "secrets": folder / "secrets",
        "store": store,
        "guard": Guard(("127.0.0.0/8", "localhost")),
    }
    try:
        yield Catalog(**{**places, **changes})
    finally:
        store.close()


_OPENED: list[str] | None = None
_EVENTS = {"open", "os.listdir", "os.scandir"}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event in _EVENTS and isinstance(arguments[0], str | bytes):
        _OPENED.append(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace"))


sys.addaudithook(_hook)  # it cannot be taken away again; outside `watched` it does nothing


@contextmanager
def watched() -> Iterator[list[str]]:
    """Every path that this process opens or lists while the block lasts, Python's own modules left out."""
    global _OPENED
    opened: list[str] = []
    _OPENED = opened
    try:
        yield opened
    finally:
        _OPENED = None
        own = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1] / "potstill"))
        opened[:] = [path for path in opened if not path.startswith(own)]
