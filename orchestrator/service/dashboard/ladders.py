"""A registered teacher as a card: its tier as a ladder of five rungs, and what its last probe found. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.service.dashboard.words import Moment, moment
from orchestrator.service.store.teachers import Teacher
from potstill.algebra.objective import Tier
from potstill.metrics import number
from potstill.probing.findings import LIMITS
from potstill.probing.page import FAMILIES, served

_RUNGS = {
    Tier.TEXT: "text",
    Tier.SAMPLED: "given tokens",
    Tier.TOPK: "its top-k",
    Tier.IDS: "chosen ids",
    Tier.FULL: "hidden states",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """T0 … T4. `standing`: given (a probe saw it), claimed, or lacking."""

    tier: str
    words: str
    standing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One teacher. Without a probe, `rungs` are lacking and `facts` empty."""

    id: str
    kind: str
    model: str
    registered: Moment | None
    probed: Moment | None
    verdict: str
    usable: bool
    rungs: Sequence[Rung]
    facts: Sequence[tuple[str, str]]
    problems: Sequence[str]
    notes: Sequence[str]
    serves: Sequence[tuple[str, Sequence[str]]]
    num_served: int


def card(teacher: Teacher, now: float) -> Card:
    probe = teacher.probe or {}
    problems = [str(problem) for problem in probe.get("problems") or ()]
    tier = _tier(probe)
    names = served(tier) if tier is not None and not problems else []
    return Card(
        id=teacher.id,
        kind=str(teacher.config.get("kind", "")),
        model=str(teacher.config.get("model") or (probe.get("claims") or {}).get("model") or ""),
        registered=moment(teacher.created_at, now),
        probed=moment(teacher.probed_at, now),
        verdict=_verdict(teacher, tier, problems),
        usable=not problems,
        rungs=_rungs(tier, _claimed(probe)),
        facts=_facts(probe),
        problems=problems,
        notes=[str(note) for note in probe.get("notes") or ()],
        serves=_by_family(names),
        num_served=len(names),
    )


def _verdict(teacher: Teacher, tier: Tier | None, problems: Sequence[str]) -> str:
    if teacher.probe is None:
        return "Not probed yet: what it can be used for is only claimed."
    if problems:
        return "No run should learn from it."
    return "It writes text." if tier in {None, Tier.TEXT} else f"It gives log-probs up to T{int(tier)}, {_RUNGS[tier]}."


def _tier(probe: Mapping[str, Any]) -> Tier | None:
    """As the probe names it; an API that writes has no tier of its own there, and is text."""
    name = probe.get("tier")
    if name in Tier.__members__:
        return Tier[str(name)]
    return Tier.TEXT if probe and not probe.get("problems") else None


def _claimed(probe: Mapping[str, Any]) -> int:
    claimed = number(probe.get("claims") or {}, "tier")
    return -1 if claimed is None else int(claimed)


def _rungs(tier: Tier | None, claimed: int) -> list[Rung]:
    def standing(rung: Tier) -> str:
        if tier is not None and rung <= tier:
            return "given"
        return "claimed" if rung <= claimed else "lacking"

    return [Rung(tier=f"T{int(rung)}", words=words, standing=standing(rung)) for rung, words in _RUNGS.items()]


def _facts(probe: Mapping[str, Any]) -> list[tuple[str, str]]:
    claims = probe.get("claims") or {}
    shown = (
        ("model", claims.get("model")),
        ("revision", claims.get("revision")),
        ("vocabulary", _whole(claims, "vocabulary", "tokens")),
        ("reads", _whole(probe, "context_length", "tokens") or _whole(claims, "context_length", "tokens, claimed")),
        ("top-k", _whole(probe, "max_top_k", "a position") or _whole(claims, "max_top_k", "a position, claimed")),
        ("latency", _plain(probe, "latency_ms", "ms for a short text")),
        ("throughput", _whole(probe, "tokens_per_s", "tokens/s together")),
    )
    measured = probe.get("measured") or {}
    findings = [
        (name.replace("_", " "), f"{value:.2g} ({LIMITS[name].bound})")
        for name in LIMITS
        if (value := number(measured, name)) is not None
    ]
    return [(name, str(value)) for name, value in shown if value] + findings


def _whole(record: Mapping[str, Any], name: str, unit: str) -> str | None:
    value = number(record, name)
    return None if value is None else f"{value:,.0f} {unit}"


def _plain(record: Mapping[str, Any], name: str, unit: str) -> str | None:
    value = number(record, name)
    return None if value is None else f"{value:,.1f} {unit}"


def _by_family(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    found = [(family, [name for name in names if name in methods]) for family, methods in FAMILIES.items()]
    return [(family, methods) for family, methods in found if methods]
