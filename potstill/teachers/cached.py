"""CachedScorer: a scorer that is not asked twice for the same scores of the same tokens.

Worth its memory where text comes back: references over several epochs, replayed rollouts, a step that is done again.
What is new every step is only passed on. Scores are kept under the identity that gave them, never under another.
"""

from __future__ import annotations

from collections.abc import Sequence

from potstill.errors import TeacherRefused
from potstill.teachers.cache import ScoreCache, score_key
from potstill.teachers.scorer import Scorer
from potstill.types import Message, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem


class CachedScorer:
    """Owns the scorer, and closes it. Draws are never kept: asked again, they would be the same dice."""

    def __init__(self, scorer: Scorer, cache: ScoreCache) -> None:
        self._scorer = scorer
        self._cache = cache

    async def capabilities(self) -> Capabilities:
        return await self._scorer.capabilities()

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """As Scorer. Without `expect` nobody knows whose scores would do: they are asked for."""
        if expect is None or ask.draws:
            return await self._scorer.score(items, ask, expect)
        keys = [_key(item, ask, expect) for item in items]
        found = {key: self._cache.get(key) for key in keys}
        missing = [(key, item) for key, item in zip(keys, items, strict=True) if found[key] is None]
        answers = await self._scorer.score([item for _, item in missing], ask, expect) if missing else []
        for (key, _), scores in zip(missing, answers, strict=True):
            self._cache.put(key, scores)
            found[key] = scores
        return [_there(found[key]) for key in keys]

    async def aclose(self) -> None:
        await self._scorer.aclose()


def _key(item: ScoreItem, ask: Ask, identity: TeacherIdentity) -> bytes:
    context = item.context_ids if item.teacher_context_ids is None else item.teacher_context_ids
    return score_key(
        identity=identity,
        context_ids=context,
        completion_ids=item.completion_ids,
        chosen_ids=item.token_ids,
        asked=repr((ask, item.domain, _text(item.teacher_messages), _text(item.messages))),
    )


def _text(messages: tuple[Message, ...] | None) -> list[tuple[str, str]] | None:
    """All that can decide what a teacher reads: one that renders messages itself never sees the ids."""
    return None if messages is None else [(message.role, message.content) for message in messages]


def _there(scores: TeacherScores | None) -> TeacherScores:
    if scores is None:
        raise TeacherRefused("a teacher left out the scores of an item")
    return scores
