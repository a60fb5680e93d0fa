"""Where a run's time went, from its spans: the share of each process, what it waited for, which stage is the slowest.

    spans, and waits that the loop's spans imply ──► pieces, one after another ──► shares and waits ──► verdict

An instant counts once, so that a process's shares add up to 1. A time without a span is a wait for what the loop was
waiting for then, where that explains it; what is left is idle. Pure: it reads no file and draws nothing.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.pieces import STAGES, Piece, flatten, number_of, role_of, stage_of
from potstill.spans import Span

STILL = ("wait", "idle")
WHOM = {
    "wait:batch": "the rollout workers",
    "wait:chunk": "a rollout worker",
    "wait:grant": "the learner",
    "wait:bundles": "rollouts on their way",
    "wait:evaluate": "an evaluation elsewhere",
    "wait:weights": "weights on their way",
    "wait:checkpoint": "a checkpoint elsewhere",
}
MAIN_WAIT = {"learner": "wait:batch", "worker": "wait:grant"}
_CHORES = {chore: f"wait:{chore}" for chore in ("evaluate", "weights", "checkpoint")}
IMPLIED = {role: {wait: wait, **_CHORES} for role, wait in MAIN_WAIT.items()}  # by role, of the loop's spans
ASIDES = {
    "weights": "Weights took",
    "checkpoint": "Checkpoints took",
    "evaluate": "Evaluations took",
    "idle": "No span tells of",
}
LITTLE = 0.1  # a share below which a wait is not worth a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """All that a process waited for one thing. `seconds` and `longest` are of the waiting that no work covered."""

    name: str
    whom: str
    seconds: float
    share: float
    times: int
    longest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One process: the share of the time that each stage and idling had, which add up to 1, and its waits."""

    process: str
    shares: Mapping[str, float]
    waits: Sequence[Wait]

    @property
    def still(self) -> float:
        """Share in which it did nothing."""
        return sum(self.shares[stage] for stage in STILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubbles:
    """The report of one window of a run, in seconds since 1970."""

    start: float
    end: float
    accounts: Sequence[Account]
    verdict: str
    remarks: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        processes = [
            {
                "process": account.process,
                "shares": dict(account.shares),
                "waits": [asdict(wait) for wait in account.waits],
            }
            for account in self.accounts
        ]
        window = {"start": self.start, "end": self.end, "seconds": self.end - self.start}
        return {**window, "verdict": self.verdict, "remarks": list(self.remarks), "processes": processes}


def bubbles(by_process: Mapping[str, Sequence[Span]], *, start: float, end: float) -> Bubbles:
    """The report of [start, end], which holds some time, on processes as `explained` leaves them."""
    accounts = [_account(process, own, start=start, end=end) for process, own in by_process.items()]
    return Bubbles(start=start, end=end, accounts=accounts, verdict=verdict(accounts), remarks=remarks(accounts))


def explained(by_process: Mapping[str, Sequence[Span]]) -> dict[str, list[Span]]:
    """With each process's spans, as waits, those of the loop in which a process of its role has nothing to do."""
    of_worker: dict[int | None, list[Span]] = defaultdict(list)
    for span in by_process.get("loop", ()):
        of_worker[span.worker].append(span)
    found = {}
    for process, own in by_process.items():
        reasons = IMPLIED.get(role_of(process), {})
        told = [*of_worker[None], *(of_worker[number_of(process)] if role_of(process) == "worker" else ())]
        implied = [replace(s, process=process, name=reasons[_reason(s)]) for s in told if _reason(s) in reasons]
        found[process] = [*own, *implied]
    return found


def verdict(accounts: Sequence[Account]) -> str:
    """Who waited for whom, and which stage is the slowest, in a sentence."""
    learners, workers = _of(accounts, "learner"), _of(accounts, "worker")
    if not learners or not workers:
        return "Who waited for whom is not known: spans of a learner and of a rollout worker are needed."
    batches, grants = _waited(learners), _waited(workers)
    writing = max(("generate", "score"), key=lambda stage: _share(workers, stage))
    slowest = {"generate": "generation", "score": "scoring"}[writing] if batches > grants else "training"
    learner = f"the learner waited {batches:.0%} of the time for batches"
    crew = f"the rollout workers {grants:.0%} for grants"
    if max(batches, grants) < LITTLE:
        return f"Nobody waited long: {learner}, {crew}."
    if min(batches, grants) >= LITTLE:
        return f"Both waited: {learner}, {crew}; {slowest} is the slower stage."
    if batches > grants:
        return f"The{learner[3:]}; {slowest} is the slowest stage."
    return f"The rollout workers waited {grants:.0%} of the time for grants; {slowest} is the slowest stage."


def remarks(accounts: Sequence[Account]) -> list[str]:
    """What else took a share that is worth a sentence."""
    said = []
    for role, who in (("learner", "the learner"), ("worker", "the rollout workers")):
        of_role = _of(accounts, role)
        for stage, what in ASIDES.items():
            share = _share(of_role, stage) if of_role else 0.0
            if share >= LITTLE:
                said.append(f"{what} {share:.0%} of the time of {who}.")
    return said


def _account(process: str, own: Sequence[Span], *, start: float, end: float) -> Account:
    pieces = flatten(own, start=start, end=end)
    seconds = dict.fromkeys(STAGES, 0.0)
    for piece in pieces:
        seconds[stage_of(piece.span)] += piece.seconds
    seconds["idle"] = max(0.0, end - start - sum(seconds.values()))
    return Account(
        process=process,
        shares={stage: value / (end - start) for stage, value in seconds.items()},
        waits=_waits([piece for piece in pieces if stage_of(piece.span) == "wait"], window=end - start),
    )


def _reason(span: Span) -> str:
    stage = stage_of(span)
    return span.name if stage == "wait" else stage


def _waits(pieces: Sequence[Piece], *, window: float) -> list[Wait]:
    """Pieces of waiting by what was waited for, the most time first."""
    by_name: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for piece in pieces:
        by_name[piece.span.name][id(piece.span)] += piece.seconds  # a wait that work cut in two is one
    waits = [
        Wait(
            name=name,
            whom=WHOM.get(name, name.partition(":")[2]),
            seconds=sum(found.values()),
            share=sum(found.values()) / window,
            times=len(found),
            longest=max(found.values()),
        )
        for name, found in by_name.items()
    ]
    return sorted(waits, key=lambda wait: wait.seconds, reverse=True)


def _of(accounts: Sequence[Account], role: str) -> list[Account]:
    return [account for account in accounts if role_of(account.process) == role]


def _share(accounts: Sequence[Account], stage: str) -> float:
    return statistics.fmean(account.shares[stage] for account in accounts)


def _waited(accounts: Sequence[Account]) -> float:
    """Mean share of the wait that is this role's."""
    name = MAIN_WAIT[role_of(accounts[0].process)]
    return statistics.fmean(sum(wait.share for wait in account.waits if wait.name == name) for account in accounts)
