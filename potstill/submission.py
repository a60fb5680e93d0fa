"""From a config file of this machine to what a service takes: its data uploaded, its models names that it knows.

The file is the one of `potstill run`. It is checked here as far as it can be, and sent as it was written, so that the
service's defaults hold. Refuses a model that is a folder here: no path travels, and no model is uploaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.config import RunConfig
from potstill.config_file import apply_override, override_value, parse, read_mapping
from potstill.errors import ConfigError
from potstill.references import Reference, Stands, put, references

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
    for reference in references(_checked(raw)):
        if reference.stands in {Stands.MODEL, Stands.TOKENIZER}:
            _refuse_a_folder_of_ours(client, reference)
        elif reference.stands is Stands.DATA and (local := Path(reference.value).expanduser()).is_file():
            put(raw, reference.place, _uploaded(client, local, say))
    return raw


def split_override(override: str) -> tuple[str, Any]:
    """A dotted key and its value, of key.path=value. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: write key.path=value")
    return key.strip(), override_value(text)


def _checked(raw: Mapping[str, Any]) -> RunConfig:
    """The config, without its teacher where that is one that only the service knows."""
    return parse({**raw, "teacher": {"kind": "none"}} if _is_registered(raw.get("teacher")) else raw)


def _is_registered(table: Any) -> bool:
    """Whether a teacher, or one of several, is the service's."""
    if not isinstance(table, Mapping):
        return False
    return table.get("kind") == "registered" or any(_is_registered(inner) for inner in table.values())


def _refuse_a_folder_of_ours(client: Client, reference: Reference) -> None:
    name = str(reference.value)
    if not name.startswith(("/", "~", "./", "../")) and not Path(name).is_dir():
        return
    known = [str(model["id"]) for model in client.list_models()["data"]]
    if name not in known:
        there = f" (it knows {', '.join(known[:5])})" if known else ""
        raise ConfigError(
            f"{reference.key}: {name} is a path on this machine: copy the folder below the service's --models root, "
            f"and write the name that it has there{there}"
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
