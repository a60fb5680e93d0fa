"""Decoded rollouts as tokens coloured by how much likelier the teacher finds each one than the student did.

It prepares text and class names for the page's template, which escapes them; it writes no HTML and invents no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.metrics import MISSING, number

MAX_TOKENS = 600  # of one rollout; a page of several rollouts stays below a megabyte
MAX_SAMPLES = 6
# Nats at which the colour changes, on either side of zero: a factor of 1.3, 1.6, 2.7, 7.4 and 20 in probability.
BOUNDS = (0.25, 0.5, 1.0, 2.0, 3.0)
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {
    0x7F: "␡",
    ord("\t"): "⇥\t",
    ord("\n"): "↵\n",
    ord("\r"): "␍",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One token. Example: Cell(text=" 21", shade="minus-3", trained=True, title="teacher −1.90 · …")."""

    text: str
    shade: str  # minus-5 … minus-1, even, plus-1 … plus-5, or unscored
    trained: bool
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout as the page shows it."""

    step: str
    prompt_id: str
    prompt: str
    answer: str | None
    verdict: str
    outcome: str  # right, wrong or open: the class that the verdict is coloured by
    finish: str
    cells: Sequence[Cell]
    num_hidden: int


def choose(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first and the last rollouts of the run, so that a reader sees what changed."""
    if len(samples) <= MAX_SAMPLES:
        return list(samples)
    half = MAX_SAMPLES // 2
    return [*samples[:half], *samples[-half:]]


def read_sample(record: Mapping[str, Any]) -> Sample:
    """A line of samples.jsonl as the page shows it."""
    tokens = record.get("tokens") or []
    verdict, outcome = _verdict(number(record, "reward"))
    step = number(record, "step")
    answer = record.get("answer")
    finish = "cut at the length limit" if record.get("finish_reason") == "length" else "ended by the student"
    return Sample(
        step="step not recorded" if step is None else f"step {step:,.0f}",
        prompt_id=str(record.get("prompt_id") or "prompt not recorded"),
        prompt=str(record.get("prompt") or ""),
        answer=None if answer is None else str(answer),
        verdict=verdict,
        outcome=outcome,
        finish=finish if record.get("finish_reason") else "ending not recorded",
        cells=[_cell(*scored) for scored in zip(tokens[:MAX_TOKENS], _together(tokens), strict=False)],
        num_hidden=max(0, len(tokens) - MAX_TOKENS),
    )


def shade(difference: float | None) -> str:
    """The class of a difference in nats. Example: shade(-0.7) == "minus-2", shade(0.1) == "even"."""
    if difference is None:
        return "unscored"
    strength = sum(abs(difference) >= bound for bound in BOUNDS)
    if strength == 0:
        return "even"
    return f"{'plus' if difference > 0 else 'minus'}-{strength}"


def legend() -> list[tuple[str, str]]:
    """(class, label) of every shade, from "the teacher finds it unlikelier" to "likelier"."""
    minus = [(f"minus-{strength}", f"−{bound:g}") for strength, bound in enumerate(BOUNDS, start=1)]
    plus = [(f"plus-{strength}", f"+{bound:g}") for strength, bound in enumerate(BOUNDS, start=1)]
    return [*reversed(minus), ("even", "0"), *plus]


def _together(tokens: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
    """The student's log-probs of the tokens that the teacher scored together with each one, itself included.

    A teacher of another tokenizer scores chunks, and each token has its whole chunk's log-prob: only the student's of
    the same chunk can be compared with it.
    """
    chunks: dict[Any, list[float | None]] = {}
    found = []
    for place, token in enumerate(tokens):
        chunk = number(token, "chunk")
        key = ("alone", place) if chunk is None or chunk < 0 else ("chunk", chunk)
        chunks.setdefault(key, []).append(number(token, "student_logprob"))
        found.append(chunks[key])
    return found


def _cell(token: Mapping[str, Any], together: Sequence[float | None]) -> Cell:
    known = [logprob for logprob in together if logprob is not None]
    student, teacher = sum(known) if len(known) == len(together) else None, number(token, "teacher_logprob")
    difference = None if student is None or teacher is None else teacher - student
    trained = token.get("trained") is True
    parts = (
        *([f"{len(together)} tokens that were scored together"] if len(together) > 1 else []),
        f"teacher {_signed(teacher)}",
        f"student {_signed(student)}",
        f"difference {_signed(difference)} nats" if difference is not None else "no difference",
        f"id {token.get('id')}",
        f"written by version {token.get('version')}",
        "trained on" if trained else "not trained on",
    )
    return Cell(text=_visible(token), shade=shade(difference), trained=trained, title=" · ".join(parts))


def _visible(token: Mapping[str, Any]) -> str:
    """The token's text with control characters as pictures; a token without text of its own is shown by its id."""
    text = str(token.get("text") or "")
    return text.translate(_CONTROL_PICTURES) if text else f"⟨{token.get('id')}⟩"


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.3f}".replace("-", "−")


def _verdict(reward: float | None) -> tuple[str, str]:
    if reward is None:
        return "not graded", "open"
    if reward == 1.0:
        return "✓ correct", "right"
    return ("× wrong", "wrong") if reward == 0.0 else (f"scored {reward:.2f} of 1", "open")
