"""What the text of a setting stands for, said in its type: a folder, a URL, a secret, a file that the run writes.

Whoever takes a config from somebody else finds all of them here, by the config's own schema, and forgets none. It
changes nothing for a run that its own user starts, and it opens nothing that it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

Place = tuple[str | int, ...]
"""Where a setting stands in a config: keys, and numbers within a list."""


class Stands(Enum):
    """What the value of a marked setting stands for."""

    MODEL = "model"  # a folder with weights and a tokenizer
    TOKENIZER = "tokenizer"  # a folder of which the tokenizer alone is read
    DATA = "data"  # a file of prompts
    URL = "url"  # where something is called
    KEY = "key"  # where a key is kept
    STATE = "state"  # a file or folder that the run writes
    PORT = "port"  # a port that the run listens on
    OPTIONS = "options"  # settings of somebody else's code, which may name files
    BELOW = "below"  # a folder that by its own pattern stays below the run's
    OUTSIDE = "outside"  # a table that has somebody outside told what the run does
    FOREIGN = "foreign"  # a name that only the other side of a call knows: it stands for nothing here


ModelRef = Annotated[str, Stands.MODEL]
TokenizerRef = Annotated[str, Stands.TOKENIZER]
DataRef = Annotated[str, Stands.DATA]
Url = Annotated[str, Stands.URL]
SecretRef = Annotated[str, Field(pattern=r"^(env|file):.+$"), Stands.KEY]
StateFile = Annotated[str, Stands.STATE]
Port = Annotated[int, Field(ge=0, le=65535), Stands.PORT]
ForeignName = Annotated[str, Stands.FOREIGN]
Options = Annotated[dict[str, bool | int | float | str | tuple[int | str, ...]], Stands.OPTIONS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One value of a marked setting. `is_given`: it was written, and is not the setting's default."""

    place: Place
    stands: Stands
    value: Any
    is_given: bool

    @property
    def key(self) -> str:
        """As a user writes it: `teacher.members.maths.teacher.url`."""
        return dotted(self.place)


def references(section: BaseModel, place: Place = ()) -> Iterator[Reference]:
    """Every value in `section` whose setting is marked; of a list, each of its values. None stands for nothing."""
    for name, stands in _marked(type(section)).items():
        for where, value in _spread(getattr(section, name), (*place, name)):
            if stands is not None:
                yield Reference(place=where, stands=stands, value=value, is_given=name in section.model_fields_set)
            elif isinstance(value, BaseModel):
                yield from references(value, where)


def stands_for(field: FieldInfo) -> Stands | None:
    """What a setting is marked with; also of `Url | None` and `tuple[Url, ...]`."""
    marks = [mark for mark in (*field.metadata, *_marks(field.annotation)) if isinstance(mark, Stands)]
    return marks[0] if marks else None


def dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def put(raw: dict[str, Any], place: Place, value: Any) -> None:
    """Set the value at `place` of a plain mapping, as `model_dump(mode="json")` makes it."""
    inside: Any = raw
    for part in place[:-1]:
        inside = inside[part]
    inside[place[-1]] = value


@cache
def _marked(model: type[BaseModel]) -> Mapping[str, Stands | None]:
    return {name: stands_for(field) for name, field in model.model_fields.items()}


def _marks(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return
    yield from getattr(annotation, "__metadata__", ())
    for argument in get_args(annotation):
        yield from _marks(argument)


def _spread(value: Any, place: Place) -> list[tuple[Place, Any]]:
    """The value itself, or what it holds where it is a list of values, or a table of tables."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [found for index, inner in enumerate(value) for found in _spread(inner, (*place, index))]
    if isinstance(value, dict) and any(isinstance(inner, BaseModel) for inner in value.values()):
        return [found for key, inner in value.items() for found in _spread(inner, (*place, key))]
    return [(place, value)]
