"""Several teachers as one: each for the domains it was given, or the mean of all that know a prompt.

    p(token) = Σ_k w_k p_k(token)        the arithmetic mean of probabilities, w scaled to sum to 1 over those who score

A mean is exact for the completion's tokens and for ids that the caller chose. Its own top-k is found among the members'
top-k's, each of which is asked for all of them. It refuses a prompt whose domain nobody has, and what a mean cannot
be made of: entropies, draws and states.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from potstill.algebra.objective import Tier
from potstill.errors import ConfigError, TeacherRefused, TokenizerMismatch
from potstill.teachers.chosen_ids import among, filled
from potstill.teachers.scorer import Scorer
from potstill.types import FloatArray, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem, unscored

Group = tuple[str, ...]
"""Names of the members that score an item together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One member: who scores, how much it counts beside others, and the domains that it scores (none: all)."""

    scorer: Scorer
    weight: float
    domains: frozenset[str]


class Several:
    """A scorer made of others. Every item must say its domain."""

    def __init__(self, seats: Mapping[str, Seat]) -> None:
        self._seats = seats
        self._able: dict[str, Capabilities] = {}

    async def capabilities(self) -> Capabilities:
        """What all of the members offer. Raises TokenizerMismatch when they read different tokens."""
        found = await asyncio.gather(*(seat.scorer.capabilities() for seat in self._seats.values()))
        self._able = dict(zip(self._seats, found, strict=True))
        if len({able.tokenizer_fingerprint for able in found}) > 1:
            raise TokenizerMismatch(
                f"teachers {', '.join(self._seats)} read different tokens: their mean has no meaning"
            )
        whole = _identity([able.identity for able in found], [seat.weight for seat in self._seats.values()])
        return Capabilities(
            model=whole.name,
            revision=whole.revision,
            tokenizer_fingerprint=whole.tokenizer_fingerprint,
            tier=min(Tier.IDS, *(able.tier for able in found)),
            context_length=min(able.context_length for able in found),
            vocabulary=min(able.vocabulary for able in found),
            max_items=min(able.max_items for able in found),
            max_tokens=min(able.max_tokens for able in found),
            max_top_k=min(able.max_top_k for able in found) // len(found),
            max_body_bytes=min(able.max_body_bytes for able in found),
            hidden_size=0,
            head_id="",
        )

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """Scores in the order of `items`. Each member is held to the identity that `capabilities` found."""
        able = await self.capabilities()
        if expect not in {None, able.identity}:
            raise TeacherRefused(f"teachers {', '.join(self._seats)} are no longer those that the run began with")
        groups: dict[Group, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            groups[self._group(item)].append(index)
        answers = await asyncio.gather(
            *(self._together(group, [items[i] for i in members], ask) for group, members in groups.items())
        )
        found = {
            i: scores
            for members, part in zip(groups.values(), answers, strict=True)
            for i, scores in zip(members, part, strict=True)
        }
        return [found[index] for index in range(len(items))]

    async def aclose(self) -> None:
        for seat in self._seats.values():
            await seat.scorer.aclose()

    def _group(self, item: ScoreItem) -> Group:
        names = tuple(name for name, seat in self._seats.items() if not seat.domains or item.domain in seat.domains)
        if not names:
            raise ConfigError(f"teacher.members: none has the domain {item.domain!r} of prompt {item.id}")
        return names

    async def _together(self, group: Group, items: Sequence[ScoreItem], ask: Ask) -> list[TeacherScores]:
        """Scores of items that the same members score."""
        if len(group) == 1:
            return await self._ask(group[0], items, ask)
        if ask.entropy or ask.draws or ask.hidden:
            raise TeacherRefused("a mean of teachers has no entropy, draws or states: give each domain one teacher")
        given = np.array([self._seats[name].weight for name in group], np.float32)
        weights = given / given.sum()
        chosen = list(items)
        if ask.top_k:
            tops = await self._each(group, items, replace(ask, num_ids=0), strip=True)
            known = min(self._able[name].vocabulary for name in group)
            chosen = [_with_ids(item, [column[i] for column in tops], known) for i, item in enumerate(items)]
        width = max((0 if item.token_ids is None else item.token_ids.shape[1]) for item in chosen)
        columns = await self._each(group, chosen, Ask(num_ids=width), strip=False)
        identity = _identity(
            [self._able[name].identity for name in group], [self._seats[name].weight for name in group]
        )
        return [
            _mean(item, wide, [column[i] for column in columns], weights, ask, identity)
            for i, (item, wide) in enumerate(zip(items, chosen, strict=True))
        ]

    async def _each(
        self, group: Group, items: Sequence[ScoreItem], ask: Ask, *, strip: bool
    ) -> list[list[TeacherScores]]:
        asked = [replace(item, token_ids=None) for item in items] if strip else items
        return list(await asyncio.gather(*(self._ask(name, asked, ask) for name in group)))

    async def _ask(self, name: str, items: Sequence[ScoreItem], ask: Ask) -> list[TeacherScores]:
        return await self._seats[name].scorer.score(items, ask, self._able[name].identity)


def _identity(members: Sequence[TeacherIdentity], weights: Sequence[float]) -> TeacherIdentity:
    """Of a mean: it changes when any member, revision or weight does."""
    shares = [f"{weight:g}*{one.revision}" for one, weight in zip(members, weights, strict=True)]
    return TeacherIdentity(
        name="+".join(one.name for one in members),
        revision="+".join(shares),
        tokenizer_fingerprint=members[0].tokenizer_fingerprint,
    )


def _with_ids(item: ScoreItem, tops: Sequence[TeacherScores], vocabulary: int) -> ScoreItem:
    """The item with the ids that its caller chose and every member's top-k, distinct at each position.

    A member without an answer contributes no ids.
    """
    parts = [] if item.token_ids is None else [item.token_ids]
    parts += [top.topk_ids for top in tops if top.topk_ids is not None and top.status == ScoreStatus.OK]
    if not parts:
        parts = [item.completion_ids[:, None]]
    width = min(vocabulary, sum(part.shape[1] for part in parts))
    return replace(item, token_ids=filled(np.concatenate(parts, axis=1), width))


def _mean(
    item: ScoreItem,
    wide: ScoreItem,
    members: Sequence[TeacherScores],
    weights: FloatArray,
    ask: Ask,
    identity: TeacherIdentity,
) -> TeacherScores:
    """The members' mean for one item; without one there is none. `wide` holds the ids that were asked of all."""
    if any(one.status != ScoreStatus.OK for one in members):
        status = max(one.status for one in members)
        return unscored(identity, status, num_tokens=len(item.completion_ids), ask=ask)
    sampled = _log_mean([one.sampled for one in members], weights)
    scores = TeacherScores(status=ScoreStatus.OK, identity=identity, sampled=sampled)
    if wide.token_ids is None:
        return scores
    logprobs = _log_mean([_known(one.ids_logprobs) for one in members], weights)
    rest = _log_mean([_known(one.ids_tail) for one in members], weights)
    if item.token_ids is not None:
        kept, tail = among(wide.token_ids, logprobs, rest, item.token_ids)
        scores = replace(scores, ids_logprobs=kept, ids_tail=tail)
    if ask.top_k:
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, : ask.top_k]
        top = np.take_along_axis(wide.token_ids, order, axis=1)
        kept, tail = among(wide.token_ids, logprobs, rest, top)
        scores = replace(scores, topk_ids=top, topk_logprobs=kept, topk_tail=tail)
    return scores


def _log_mean(columns: Sequence[FloatArray], weights: FloatArray) -> FloatArray:
    """log Σ w_k exp(column_k), in float64."""
    scaled = [column.astype(np.float64) + np.log(weight) for column, weight in zip(columns, weights, strict=True)]
    mean: FloatArray = np.logaddexp.reduce(np.stack(scaled), axis=0).astype(np.float32)
    return mean


def _known(column: FloatArray | None) -> FloatArray:
    if column is None:
        raise TeacherRefused("a teacher left out log-probs that it was asked for")
    return column
