"""A catalog over small folders, for tests: what is in them is named, what lies beside them must never be opened."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.service.catalog import Catalog
from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from potstill.calling.guard import Guard
from potstill.config_file import apply_override
from potstill.errors import ConfigError
from tests.service_configs import submitted


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


def furnish(folder: Path) -> Path:
    """Models, data and a secret that may be named, others outside, and links of all kinds."""
    model(folder / "models/small")
    model(folder / "models/org/large")
    model(folder / "outside/secret")
    model(folder / "published/mine")
    prompts(folder / "data/maths.jsonl")
    prompts(folder / "data/more/code.jsonl")
    prompts(folder / "outside/secret.jsonl")
    (folder / "models/out").symlink_to(folder / "outside/secret")
    (folder / "models/up").symlink_to("..")
    (folder / "models/alias").symlink_to("small")
    (folder / "data/out.jsonl").symlink_to(folder / "outside/secret.jsonl")
    (folder / "secrets").mkdir()
    (folder / "secrets/key").write_text("hunter2")
    return folder


def body(**overrides: Any) -> dict[str, Any]:
    """A run of what `furnish` makes; `student__model="x"` overrides student.model."""
    raw = submitted() | {"student": {"model": "small"}, "data": {"kind": "jsonl", "path": "maths.jsonl"}}
    for key, value in overrides.items():
        apply_override(raw, key.replace("__", "."), value)
    return raw


def lines(catalog: Catalog, raw: dict[str, Any], who: Principal) -> list[str]:
    """What is wrong with it, a line a mistake."""
    with pytest.raises(ConfigError) as caught:
        catalog.resolve(raw, who)
    return str(caught.value).splitlines()


def allowed(folder: Path) -> tuple[str, ...]:
    """Below which a catalog may open something."""
    return tuple(str(folder / name) for name in ("models", "data", "published", "uploads", "runs", "potstill.db"))


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
