"""A Dockerfile as a list of instructions, and what is wrong with one.

Reads what ours use: comments, continued lines, stages. Refuses nothing: every rule that is broken is one line of text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
CONTROL, CPU, GPU = (DOCKER / f"{name}.Dockerfile" for name in ("control", "cpu", "gpu"))

PINNED = re.compile(r"[a-z0-9./-]+(:v?\d+\.\d+(\.\d+)?[a-z0-9.-]*|@sha256:[0-9a-f]{64})")
"""An image by a tag that starts with a version, or by its digest."""
SECRET = re.compile(r"(?i)token|secret|passw|credential|(^|_)key$")
"""Names of what must not be written down."""

NEVER_COPIED = {".", "./", "*", "/", ".git", "runs", ".venv", "deploy/compose/secrets"}


class Instruction(NamedTuple):
    name: str
    value: str


def instructions(text: str) -> list[Instruction]:
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", lines)
    return [Instruction(*line.strip().split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def values(text: str, name: str) -> list[str]:
    return [one.value for one in instructions(text) if one.name == name]


def arguments(text: str) -> dict[str, str]:
    """Of ARG, with their defaults."""
    return dict(value.split("=", 1) for value in values(text, "ARG") if "=" in value)


def problems(text: str) -> list[str]:
    return [*_bases(text), *_user(text), *_copies(text), *_secrets(text), *_forms(text)]


def _bases(text: str) -> Iterator[str]:
    stages: set[str] = set()
    for value in values(text, "FROM"):
        base, *rest = value.split()
        if base not in stages and not PINNED.fullmatch(base):
            yield f"FROM {base} is not pinned to a version"
        if rest:
            stages.add(rest[-1])


def _user(text: str) -> Iterator[str]:
    last = text[text.rindex("FROM") :]
    users = values(last, "USER")
    if not users:
        yield "nobody but root runs the image"
    elif not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]):
        yield f"USER {users[-1]} is root, or a name that Kubernetes cannot tell from root"
    elif any(one.name in ("RUN", "COPY") for one in instructions(last[last.rindex("USER") :])):
        yield "something is installed after the last USER"


def _copies(text: str) -> Iterator[str]:
    for value in values(text, "ADD"):
        yield f"ADD {value}: COPY says what is copied, and fetches nothing"
    for value in values(text, "COPY"):
        words = value.split()
        if words[0].startswith("--from="):
            continue
        for source in words[:-1]:
            if source in NEVER_COPIED or ".." in source:
                yield f"COPY {source} takes more than is named"
            elif not (ROOT / source).exists():
                yield f"COPY {source}: there is no such file"


def _secrets(text: str) -> Iterator[str]:
    for instruction in instructions(text):
        if instruction.name in ("ARG", "ENV", "LABEL"):
            for name in re.findall(r"([A-Za-z_][\w.]*)(?==|$)", instruction.value):
                if SECRET.search(name):
                    yield f"{instruction.name} {name} stays in the image for everybody to read"


def _forms(text: str) -> Iterator[str]:
    for name in ("ENTRYPOINT", "CMD"):
        for value in values(text, name):
            if not value.startswith("["):
                yield f"{name} {value} runs in a shell, which keeps signals to itself"
    if not values(text, "ENTRYPOINT"):
        yield "what the image starts is the base's choice"


def checks_its_health(text: str) -> bool:
    """Whether the last stage asks a route of ours, without a shell."""
    for value in values(text[text.rindex("FROM") :], "HEALTHCHECK"):
        command = re.search(r"CMD (\[.*\])", value)
        if command is not None and "/livez" in json.loads(command[1])[-1]:
            return True
    return False
