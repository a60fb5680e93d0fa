"""What a teacher can really be used for, found by asking it: `potstill teacher probe URL`.

Capabilities are claims; a probe sends tiny requests and looks at the numbers. It raises only when no report is
possible; a teacher that is away, refuses or answers nonsense is a finding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.algebra.objective import Tier
from potstill.errors import AlignmentError, TeacherError
from potstill.teacher_client import TeacherClient
from potstill.types import FloatArray, IntArray, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Capabilities, ScoreItem, Want

_NUM_TOKENS = 32
_NUM_IDS = 4
_NUM_GREEDY = 4
_UNIFORM_RATIO = 0.995


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Findings; None where the teacher did not get that far."""

    url: str
    reachable: bool
    problem: str | None = None  # why it is not reachable, or what its scores get wrong
    identity: TeacherIdentity | None = None
    context_length: int | None = None  # tokens
    max_top_k: int | None = None
    tier: Tier | None = None  # the highest that worked
    greedy_gap: float | None = None  # nats between a top-1 and the sampled log-prob of the same token; 0 is right
    mass_error: float | None = None  # |probabilities and tail - 1|, worst position
    noise: float | None = None  # nats between two answers to the same request, worst position
    entropy_ratio: float | None = None  # mean entropy / ln V; near 1 the weights are blank
    latency_ms: float | None = None
    tokens_per_s: float | None = None

    @property
    def uniform(self) -> bool | None:
        """Does it predict nothing at all, as a model without its weights does?"""
        return None if self.entropy_ratio is None else self.entropy_ratio > _UNIFORM_RATIO


async def probe(url: str, key: str, deadline_s: float = 30.0) -> ProbeReport:
    """Ask the teacher server at `url` for its capabilities and a handful of scores."""
    async with TeacherClient(url, key, deadline_s, 1) as client:
        try:
            able = await client.capabilities()
        except (TeacherError, AlignmentError) as error:
            return ProbeReport(url=url, reachable=False, problem=str(error))
        tier, problem = await _working_tier(client, able)
        facts: dict[str, float] = {}
        if tier >= Tier.TOPK:
            try:
                facts = await _measure(client, able)
            except (TeacherError, AlignmentError) as error:
                problem = str(error)
    return ProbeReport(
        url=url,
        reachable=True,
        problem=problem,
        identity=able.identity,
        context_length=able.context_length,
        max_top_k=able.max_top_k,
        tier=tier,
        **facts,
    )


async def _working_tier(client: TeacherClient, able: Capabilities) -> tuple[Tier, str | None]:
    """The highest tier that answers soundly, and why the next one does not."""
    rungs: tuple[tuple[Tier, Want], ...] = ((Tier.SAMPLED, "sampled"), (Tier.TOPK, "topk"), (Tier.IDS, "token_ids"))
    best = Tier.TEXT
    for tier, want in rungs:
        item = _item(able, _filler(able), with_ids=want == "token_ids")
        try:
            (scores,) = await client.score([item], frozenset({want}), int(want == "topk"), able.identity)
        except (TeacherError, AlignmentError) as error:
            return best, str(error)
        if scores.status != ScoreStatus.OK:
            return best, f"{want}: the item came back with status {scores.status}"
        best = tier
    return best, None


async def _measure(client: TeacherClient, able: Capabilities) -> dict[str, float]:
    item = _item(able, _filler(able), with_ids=False)
    want: frozenset[Want] = frozenset({"topk", "entropy"})
    first = await _score(client, able, item, want)
    started = time.monotonic()
    again = await _score(client, able, item, want)
    seconds = time.monotonic() - started
    mass = np.exp(np.float64(_some(again.topk_logprobs))).sum(axis=1) + np.exp(np.float64(_some(again.topk_tail)))
    return {
        "greedy_gap": await _greedy_gap(client, able),
        "mass_error": float(np.abs(mass - 1).max()),
        "noise": float(np.abs(first.sampled - again.sampled).max()),
        "entropy_ratio": float(_some(again.entropy).mean()) / math.log(able.vocabulary),
        "latency_ms": 1000 * seconds,
        "tokens_per_s": (len(item.context_ids) + len(item.completion_ids)) / seconds,
    }


async def _greedy_gap(client: TeacherClient, able: Capabilities) -> float:
    """Let the teacher write a few tokens by its top-1, then score them: both must give the same log-probs."""
    written: list[int] = []
    expected: list[float] = []
    for _ in range(_NUM_GREEDY):
        scores = await _score(client, able, _item(able, [*written, 0], with_ids=False), frozenset({"topk"}))
        written.append(int(_some(scores.topk_ids)[-1, 0]))
        expected.append(float(_some(scores.topk_logprobs)[-1, 0]))
    scores = await _score(client, able, _item(able, written, with_ids=False), frozenset({"sampled"}))
    return float(np.abs(scores.sampled - np.array(expected, np.float32)).max())


async def _score(client: TeacherClient, able: Capabilities, item: ScoreItem, want: frozenset[Want]) -> TeacherScores:
    (scores,) = await client.score([item], want, int("topk" in want), able.identity)
    return scores


def _item(able: Capabilities, completion: Sequence[int], *, with_ids: bool) -> ScoreItem:
    """A context of one token, the completion and, for the caller's ids, the first few of the vocabulary."""
    ids = np.tile(np.arange(min(_NUM_IDS, able.vocabulary), dtype=np.int32), (len(completion), 1))
    return ScoreItem(
        id="probe",
        context_ids=np.array([able.vocabulary // 2], np.int32),
        completion_ids=np.array(completion, np.int32),
        token_ids=ids if with_ids else None,
    )


def _filler(able: Capabilities) -> list[int]:
    """Some tokens that any teacher knows, as many as it can read."""
    return [index % able.vocabulary for index in range(min(_NUM_TOKENS, able.context_length - 1))]


def _some(array: FloatArray | IntArray | None) -> NDArray[Any]:
    """An array that was asked for; the client has made sure that it came."""
    if array is None:
        raise AlignmentError("a score that was asked for is missing")
    return array
