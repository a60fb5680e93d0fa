"""Patience with a service that restarts under whoever waits for a run or follows one: minutes, not seconds."""

from __future__ import annotations

from typing import TypeVar

from potstill.client.answers import ask
from potstill.client.patience import Patience
from potstill.client.steps import Call, Pause, Program
from potstill.errors import ServiceError

R = TypeVar("R")

FOLLOWING = Patience(tries=15, first_s=0.25, longest_s=10.0)  # at least 50 s when every try fails at once
_AWAY = frozenset({502, 503, 504})  # the outer two are a proxy's, behind which nobody is


def is_away(error: ServiceError) -> bool:
    """Whether it is worth waiting for another answer."""
    return error.code == "unreachable" or error.status in _AWAY


def enduring(call: Call[R]) -> Program[R]:
    """Like `ask`, for a service that may be away for a while."""
    failures = 0
    while True:
        try:
            return (yield from ask(call))
        except ServiceError as error:
            failures += 1
            if failures == FOLLOWING.tries or not is_away(error):
                raise
        yield Pause(FOLLOWING.pause(failures))
