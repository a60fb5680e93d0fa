"""When a request is sent again, and after how long.

Sent again: what got no answer, 425, 429, 503, and 409 with a Retry-After (the same request is still being worked on),
unless the service says otherwise (x-should-retry). What must not happen twice is sent again only when it cannot have
arrived. Retry-After is obeyed up to LONGEST_WAIT_S; a service that asks for more is not waited for. Refuses to retry
for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from potstill.client.steps import Call, Lost, Pause, Reply, Send
from potstill.errors import ServiceError

LONGEST_WAIT_S = 120.0
_AGAIN = frozenset({425, 429, 503})


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often a request is sent and how long is waited between: half to all of first_s, twice that, …, longest_s.

    The random half keeps many clients from coming back at the same moment.
    """

    tries: int = 5
    first_s: float = 0.25
    longest_s: float = 8.0
    draw: Callable[[], float] = random.random  # in [0, 1)

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, 1 for the first."""
        whole = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 30))
        return whole * (0.5 + 0.5 * self.draw())


def attempts(call: Call[Any], patience: Patience) -> Generator[Send | Pause, Any, Reply]:
    """The first answer that waiting does not improve. Raises ServiceError (unreachable) when there is none."""
    lost = False
    outcome: Reply | Lost
    for failures in range(1, patience.tries + 1):
        outcome = yield Send(call)
        if isinstance(outcome, Reply):
            if lost and outcome.status == 404 and call.method == "DELETE":
                return Reply(status=204, headers={})  # it is gone: the answer that was lost said so
            seconds = asked_to_wait(outcome)
            if seconds is None or failures == patience.tries:
                return outcome
            yield Pause(max(seconds, patience.pause(failures)))
            continue
        if outcome.sent and not call.repeatable:
            raise ServiceError(
                "the answer was lost, and the request may have been taken: look before you send it again",
                None,
                "answer_lost",
            )
        lost = lost or outcome.sent
        if failures < patience.tries:
            yield Pause(patience.pause(failures))
    assert isinstance(outcome, Lost)
    raise unreachable(outcome)


def unreachable(lost: Lost) -> ServiceError:
    return ServiceError(f"{lost.where} does not answer: is `potstill serve` running there?", None, "unreachable")


def asked_to_wait(reply: Reply) -> float | None:
    """Seconds that the service wants, 0 where it names none; None when it is not to be asked again."""
    wish = reply.headers.get("x-should-retry", "").lower()
    named = _seconds(reply.headers.get("retry-after"))
    again = reply.status in _AGAIN or (reply.status == 409 and named is not None)
    if wish in {"true", "false"}:
        again = wish == "true"
    if reply.good or not again or (named is not None and named > LONGEST_WAIT_S):
        return None
    return 0.0 if named is None else named


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds. One that is a date is not the service's: it is left out of account."""
    if header is None or not header.strip().isdecimal():
        return None
    return float(header)
