"""docs/config.md, made from the config's own docstrings: `python -m potstill.config_page > docs/config.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from potstill.config import RunConfig, ScratchConfig
from potstill.section import models_in

HEAD = """# Every setting

A config is TOML, YAML or JSON; `potstill run CONFIG optim.lr=1e-4` changes a setting on the command line. Unknown keys
are errors. This page is made from the docstrings of `potstill/config.py` and `potstill/algebra/`.
"""


def page() -> str:
    """The whole page as Markdown."""
    seen: set[type[BaseModel]] = set()
    sections = [*_sections("", RunConfig, seen), *_sections("models.toml, one table a model", ScratchConfig, seen)]
    return "\n".join([HEAD, *sections])


def _sections(path: str, model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """The table's section and those of the tables in it, each kind of table once."""
    if model in seen:
        return
    seen.add(model)
    title = f"`[{path}]`" if path and " " not in path else path or "Top level"
    kind = model.model_fields.get("kind")
    if kind is not None:
        title += f' with `kind = "{kind.default}"`'
    yield f"## {title}\n\n{_flat(model.__doc__)}\n\n| key | type | default | meaning |\n|---|---|---|---|"
    tables = []
    for name, field in model.model_fields.items():
        nested = models_in(field.annotation)
        if nested:
            place = f"{path}.{name}".lstrip(".") + (".NAME" if get_origin(field.annotation) is dict else "")
            tables += [(place, inner) for inner in nested]
        if name != "kind" and field.annotation not in nested and not (nested and field.is_required()):
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {_flat(field.description)} |"
    yield ""
    for inner_path, inner in tables:
        yield from _sections(inner_path, inner, seen)


def _type(field: FieldInfo) -> str:
    return _spelt(field.annotation).replace("|", "\\|")


def _spelt(annotation: Any) -> str:
    """A type for people: constraints left out, choices quoted, None as "none"."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if annotation is type(None):
        return "none"
    if origin is Annotated:
        return _spelt(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{argument!r}`" for argument in arguments)
    if origin in {Union, UnionType}:
        return " or ".join(_spelt(argument) for argument in arguments)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_spelt(argument) for argument in arguments if argument is not ...)}"
    return str(annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value!r}`".replace("|", "\\|")


def _flat(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
