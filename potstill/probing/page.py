"""What a probe found, as lines for people: why the teacher is refused first, then what it is, does and serves. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from potstill.algebra.objective import Tier
from potstill.methods import PRESETS
from potstill.methods.classic import CLASSIC
from potstill.methods.crosstokenizer import CROSS_TOKENIZER
from potstill.methods.method import Method
from potstill.methods.multiple import MULTIPLE
from potstill.methods.offline import OFFLINE
from potstill.methods.onpolicy import ON_POLICY
from potstill.methods.rewarded import REWARDED
from potstill.methods.selfdistilled import SELF_DISTILLED
from potstill.probing.chat import ChatReport
from potstill.probing.findings import LIMITS
from potstill.probing.probe import ProbeReport

FAMILIES: Mapping[str, Mapping[str, Method]] = {
    "on-policy": ON_POLICY,
    "classic": CLASSIC,
    "self-distilled": SELF_DISTILLED,
    "rewarded": REWARDED,
    "multiple": MULTIPLE,
    "cross-tokenizer": CROSS_TOKENIZER,
    "offline": OFFLINE,
}
_WIDTH = 110
_INDENT = 12


def served(tier: Tier, *, same_tokens: bool = True) -> list[str]:
    """Names of the methods that a teacher of this tier has the scores for, beside a student of its tokens or of others.

    Whatever else a run of them needs, like a verifier or a privileged prompt, is the run's to bring.
    """
    highest = tier if same_tokens else min(tier, Tier.TOPK)
    return [
        name
        for name, method in PRESETS.items()
        if method.objective.tier <= highest
        and (same_tokens or method.objective.crosses_tokenizers or method.objective.tier == Tier.TEXT)
    ]


def scorer_lines(url: str, kind: str, report: ProbeReport) -> Iterator[str]:
    """Of a teacher that scores."""
    yield from _refusals(url, report.problems)
    able = report.able
    if able is None:
        return
    identity = able.identity
    yield _line("teacher", f"{identity.name}, revision {identity.revision}, kind {kind}, at {url}")
    yield _line("tokens", f"{able.vocabulary}, fingerprint {identity.tokenizer_fingerprint[:16]}")
    if report.tier is not None:
        yield _line("tier", f"T{report.tier.value} {report.tier.name}, of T{able.tier} that it claims")
    length = "" if report.context_length is None else ", which came back"
    top_k = "" if report.max_top_k is None else f"; top-k up to {report.max_top_k}"
    yield _line("limits", f"reads {able.context_length} tokens{length}{top_k}")
    if report.latency_ms is not None:
        together = "" if report.tokens_per_s is None else f", {report.tokens_per_s:,.0f} tokens/s together"
        yield _line("speed", f"{report.latency_ms:.1f} ms for a short text{together}")
    if report.measured:
        bounds = {name: LIMITS[name].bound for name in report.measured}
        yield _line(
            "numbers", ", ".join(f"{name} {value:.2g} ({bounds[name]})" for name, value in report.measured.items())
        )
    if report.tier == Tier.FULL:
        yield _line("note", "its T4 are hidden states: a run reads them with teacher.head, a folder with its model")
    for note in report.notes:
        yield _line("note", note)


def chat_lines(url: str, model: str, report: ChatReport) -> Iterator[str]:
    """Of an API that writes."""
    yield from _refusals(url, report.problems)
    yield _line("teacher", f"{model}, kind openai, at {url}")
    if report.problems:
        return
    yield _line("tier", "T0 TEXT: it writes")
    counted = (
        "tokens not counted" if report.tokens_in is None else f"{report.tokens_in} tokens in, {report.tokens_out} out"
    )
    yield _line("speed", f"{report.latency_ms:.1f} ms for a short answer; {counted}")
    yield _line("repeats", f"two answers at temperature 0 are {'the same' if report.repeats else 'not the same'}")
    if report.echoes:
        yield _line("note", 'it also gives log-probs of text that it is given: kind "completions" serves more methods')


def served_lines(names: Sequence[str]) -> Iterator[str]:
    """Methods by family, wrapped."""
    yield f"serves {len(names)} of {len(PRESETS)} methods:"
    for family, methods in FAMILIES.items():
        there = [name for name in names if name in methods]
        if there:
            yield textwrap.fill(
                ", ".join(there),
                _WIDTH,
                initial_indent=f"  {family:<16}",
                subsequent_indent=" " * 18,
                break_on_hyphens=False,
            )


def compared_lines(lines: Sequence[str], problem: str | None) -> Iterator[str]:
    """Of a student beside the teacher."""
    for line in lines if problem is None else (f"refused: {problem}", *lines):
        yield _line("student", line)


def _refusals(url: str, problems: Sequence[str]) -> Iterator[str]:
    for problem in problems:
        yield _line("refused", f"{url}: {problem}")


def _line(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"{name:<{_INDENT}}",
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
        break_long_words=False,
    )
