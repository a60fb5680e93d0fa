"""Which queued runs may start now, and which must stop: priorities, and what each key may use. Pure.

The highest priority first, then the oldest; a run whose key has as many running as it may is passed over, so that it
holds nobody else up. What a key has used is counted over all its runs, the deleted ones excepted.
Refuses nothing by itself: `admit` says why a run may not even be stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.service.principals import Limits
from orchestrator.service.runs import Run, State
from potstill.errors import ServiceError

SETTLING = frozenset({State.PAUSING, State.CANCELLING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the runs of one key have used, and hold."""

    runs: int
    unfinished: int
    running: int
    gpu_hours: float
    teacher_tokens: int
    teacher_usd: float


def admit(usage: Usage, limits: Limits) -> None:
    """Raises ServiceError (429, quota_exceeded) naming the limit, when a key may not submit another run."""
    counts = {"runs": (usage.runs, limits.runs), "unfinished": (usage.unfinished, limits.unfinished)}
    reached = [name for name, (used, limit) in counts.items() if limit is not None and used >= limit]
    reached += [name for name, _ in exhausted(usage, limits)]
    if reached:
        raise ServiceError(f"this key's limit of {reached[0]} is reached", 429, "quota_exceeded")


def exhausted(usage: Usage, limits: Limits) -> list[tuple[str, str]]:
    """The budgets that are used up, each with how far, for people."""
    budgets = (
        ("gpu_hours", usage.gpu_hours, limits.gpu_hours),
        ("teacher_tokens", usage.teacher_tokens, limits.teacher_tokens),
        ("teacher_usd", usage.teacher_usd, limits.teacher_usd),
    )
    return [
        (name, f"{used:g} of {limit:g} {name}") for name, used, limit in budgets if limit is not None and used >= limit
    ]


def at_limit(active: Sequence[Run], limits: Mapping[str, Limits]) -> set[str]:
    """The keys that have as many runs at work as they may: none of their queued runs starts."""
    running = Counter(run.key_id for run in active)
    most = {key_id: limit.running for key_id, limit in limits.items()}
    return {key_id for key_id, limit in most.items() if limit is not None and running[key_id] >= limit}


def starting(
    queued: Sequence[Run], active: Sequence[Run], limits: Mapping[str, Limits], *, slots: int | None
) -> list[Run]:
    """The queued runs that may start, in order. `slots`: runs that the cluster takes at the same time; None: any."""
    running = Counter(run.key_id for run in active)
    free = None if slots is None else max(0, slots - len(active))
    chosen: list[Run] = []
    for run in sorted(queued, key=lambda run: (-run.priority, run.created_at)):
        if free is not None and len(chosen) >= free:
            break
        most = limits[run.key_id].running if run.key_id in limits else None
        if most is None or running[run.key_id] < most:
            chosen.append(run)
            running[run.key_id] += 1
    return chosen


def overspent(
    active: Sequence[Run], usages: Mapping[str, Usage], limits: Mapping[str, Limits]
) -> list[tuple[Run, str]]:
    """The runs that must stop because their key's budget is used up, each with how far; not those that stop already."""
    found = []
    for run in active:
        if run.state in SETTLING or run.key_id not in limits or run.key_id not in usages:
            continue
        spent = exhausted(usages[run.key_id], limits[run.key_id])
        if spent:
            found.append((run, "; ".join(how for _, how in spent)))
    return found
