"""From a config file of this machine to what a service takes: its data uploaded, its models names that it knows.

The file is the one of `potstill run`. It is checked here as far as it can be, and sent as it was written, so that the
service's defaults hold. Refuses a model that is a folder here: no path travels, and no model is uploaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.config_file import apply_override, override_value, parse, read_mapping
from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.client import Client

_RECENT = 100  # files of its owner among which an uploaded one is looked for


def submission(client: Client, config: Path, overrides: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """The body of POST /v1/runs. `say` tells what was uploaded. Raises ConfigError, a line a mistake."""
    raw = read_mapping(config)
    for override in overrides:
        key, value = split_override(override)
        apply_override(raw, key, value)
    raw.pop("runs", None)  # the service has a folder of its own
    _check(raw)
    for setting, name in _models(raw):
        _refuse_a_folder_of_ours(client, setting, name)
    data = raw["data"]
    local = Path(str(data.get("path", ""))).expanduser()
    if data.get("kind") == "jsonl" and local.is_file():
        raw["data"] = {**data, "path": _uploaded(client, local, say)}
    return raw


def split_override(override: str) -> tuple[str, Any]:
    """A dotted key and its value, of key.path=value. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: write key.path=value")
    return key.strip(), override_value(text)


def _check(raw: Mapping[str, Any]) -> None:
    """All but a teacher that only the service knows."""
    teacher = raw.get("teacher")
    known_there = isinstance(teacher, dict) and teacher.get("kind") == "registered"
    parse({**raw, "teacher": {"kind": "none"}} if known_there else raw)


def _models(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where a checked config names a model, and how."""
    yield "student.model", raw["student"]["model"]
    teacher = raw["teacher"]
    if teacher.get("kind") == "server" and teacher.get("model") is not None:
        yield "teacher.model", teacher["model"]
    for place, member in enumerate(teacher.get("models", ())):
        yield f"teacher.models.{place}.model", member["model"]


def _refuse_a_folder_of_ours(client: Client, setting: str, name: str) -> None:
    written_as_path = name.startswith(("/", "~", "./", "../"))
    if not written_as_path and not Path(name).is_dir():
        return
    known = [str(model["id"]) for model in client.list_models()["data"]]
    if name in known:
        return
    there = f"; it knows {', '.join(known[:5])}" if known else ""
    raise ConfigError(
        f"{setting}: {name} is a path on this machine: copy the folder below the service's --models root, "
        f"and write its name there{there}"
    )


def _uploaded(client: Client, local: Path, say: Callable[[str], None]) -> str:
    """The file's id at the service. One that is among its owner's newest is not sent again."""
    digest = hashlib.sha256()
    with local.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    for known in client.list_files(limit=_RECENT)["data"]:
        if known["sha256"] == digest.hexdigest():
            say(f"{local} is there already, as {known['id']}")
            return known["id"]
    made = client.upload_file(local)
    say(f"{local} is uploaded, as {made['id']}")
    return made["id"]
