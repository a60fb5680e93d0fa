"""What a program asks of the client that drives it. Everything that a sync and an async client do differently is here.

    step     the driver                                                    answers with
    Ask      sends a request, again where that helps                       Reply
    Send     sends a request once                                          Reply | Lost
    Save     sends a request once and feeds its body to a sink             Reply | Lost
    Pause    waits                                                         None
    Aside    works on this machine, where others need not wait for it      what the work returns
    Listen   opens an event stream in place of the one before              Reply | Lost
    Hear     takes the stream's next message                               Message | Lost | None at its end
    Give     hands an item to whoever iterates                             None

A program is a generator of steps; one that gives items, and so may listen, is a flow. Neither does network input or
output or knows a clock, so one text serves both clients, and a test can drive it with answers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from potstill.errors import ServiceError

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

Parameter: TypeAlias = str | int | float | bool | list[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file of this machine as a request's body. Opened anew for each try, and never held in memory."""

    path: Path
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """There was no answer, or it broke off. `where`: the service's URL; `sent`: whether the request may be there."""

    where: str
    sent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One of an event stream."""

    event: str
    data: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[R]):
    """One request, and how its answer is read."""

    method: str
    path: str  # its parts quoted: see `path`
    reads: Callable[[Reply], R]
    params: Mapping[str, Parameter] = field(default_factory=dict)  # None: left out
    body: Mapping[str, Any] | None = None  # sent as JSON
    upload: Upload | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True  # whether to send it twice does no more than to send it once
    timeout_s: float | None = None  # None: the client's


class Sink(Protocol):
    """Where a body goes that is too large to be held."""

    def begin(self, reply: Reply) -> bool:
        """Whether the body of this answer is wanted; it has not been read yet."""

    def write(self, chunk: bytes) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ask:
    call: Call[Any]


@dataclass(frozen=True, slots=True)
class Send:
    call: Call[Any]


@dataclass(frozen=True, slots=True)
class Save:
    call: Call[Any]
    sink: Sink


@dataclass(frozen=True, slots=True)
class Listen:
    call: Call[Any]


@dataclass(frozen=True, slots=True)
class Hear:
    pass


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Aside:
    work: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Give(Generic[T]):
    item: T


Step: TypeAlias = Ask | Send | Save | Pause | Aside
Program: TypeAlias = Generator[Step, Any, R]
Flow: TypeAlias = Generator[Step | Listen | Hear | Give[T], Any, None]


def advance(program: Generator[S, Any, R], answer: Any) -> S:
    """The program's next step, after the answer to its last; None at the beginning. Raises StopIteration at its end.

    A ServiceError is raised where the program waits, which may catch it.
    """
    return program.throw(answer) if isinstance(answer, ServiceError) else program.send(answer)
