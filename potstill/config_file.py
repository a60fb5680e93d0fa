"""From a file, or a mapping such as an HTTP body, to a RunConfig or to one line per mistake.

A config is a TOML, YAML or JSON file, then dotted overrides (`optim.lr=1e-4`). A misspelt key is an error that names
the nearest real one. It knows no setting and no default: those are config.py's.
"""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from potstill.config import RunConfig
from potstill.errors import ConfigError
from potstill.nearest import hint, similar
from potstill.section import models_in

MOST_MISTAKES = 100


def parse(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Make a RunConfig of a plain mapping and dotted overrides.

    Raises ConfigError with one line per mistake, each naming the key and, for a misspelt one, the nearest real key.
    """
    merged = copy.deepcopy(dict(raw))
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(json.loads(json.dumps(merged, default=str)))
    except ValidationError as error:
        raise ConfigError(first_mistakes(_lines(error))) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a .toml, .yaml, .yml or .json file. Raises ConfigError when it is missing, unreadable or wrong."""
    return parse(read_mapping(Path(path)), overrides)


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's content as a plain mapping. Raises ConfigError naming the file and, where known, the line."""
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".json": json.loads,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise ConfigError(f"{path}: a config ends in {', '.join(readers)}")
    try:
        raw = reader(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a table of settings, not a {type(raw).__name__}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: write key.path=value")
    try:
        apply_override(raw, key.strip(), override_value(text))
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def apply_override(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a plain mapping. Raises ConfigError where a part of the key is a value, not a table."""
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a table")
    raw[last] = value


def override_value(text: str) -> Any:
    """What the text behind the = of an override means: a number, true or false, a list, a table, else the text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not isinstance(value, str):
        return value
    try:
        return float(value)  # YAML 1.1 reads 1e-4 as text
    except ValueError:
        return text


def first_mistakes(lines: Iterator[str]) -> str:
    """As many as somebody reads, a line each: to find the nearest name for each of thousands takes minutes."""
    told = list(islice(lines, MOST_MISTAKES))
    return "\n".join([*told, "and more"] if next(lines, None) is not None else told)


def _lines(error: ValidationError) -> Iterator[str]:
    guessed: set[tuple[int | str, ...]] = {("objective",)}  # missing where the method is
    for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"):
        loc = problem["loc"]
        where, known = _place(loc)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"no such setting{hint(where[-1], known)}"
            guessed |= {(*loc[:-1], name) for name in similar(where[-1], known)}
        elif problem["type"] == "missing" and loc in guessed:  # said already: it is there, but misspelt
            continue
        elif problem["type"] == "union_tag_not_found":
            message = "the table names no kind"
        elif problem["type"] == "union_tag_invalid":
            known = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
            message = f"kind {problem['ctx']['tag']!r} is not known{hint(problem['ctx']['tag'], known)}"
        yield f"{'.'.join(where)}: {message}" if where else message


def _place(loc: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """Where a problem is, as a user writes it, and the real keys of the table that it is in.

    pydantic puts the kind of a table into its path, and the place in a list.
    """
    where: list[str] = []
    models: list[type[BaseModel]] = [RunConfig]
    inside = models
    for part in loc:
        named = [
            model for model in models if "kind" in model.model_fields and model.model_fields["kind"].default == part
        ]
        if named:
            models = inside = named
            continue
        where.append(str(part))
        field = next((model.model_fields[str(part)] for model in models if str(part) in model.model_fields), None)
        inside = models
        models = models if field is None else models_in(field.annotation)
    return where, list(dict.fromkeys(name for model in inside for name in model.model_fields))
