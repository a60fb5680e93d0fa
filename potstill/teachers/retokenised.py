"""A teacher of another tokenizer: what it is asked about a completion, and its answer in the student's own tokens.

What cannot be aligned is no loss token; nothing is guessed for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.algebra.objective import Tier
from potstill.byte_alignment import (
    Retokenised,
    byte_vocabulary,
    chunk_scores,
    map_topk,
    retokenise,
    translation,
    whole_chunks,
)
from potstill.errors import AlignmentError, TeacherRefused, TokenizerMismatch
from potstill.teachers.scorer import Scorer
from potstill.tokenization import fingerprint, render
from potstill.types import IntArray, Rollout, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class RetokenisedScorer:
    """A scorer of other tokens, as one that reads the student's. Owns it, and closes it."""

    def __init__(self, scorer: Scorer, *, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self._scorer = scorer
        self._reads = fingerprint(teacher)
        self._seems = fingerprint(student)
        self._between = Retokeniser(student=student, teacher=teacher)

    async def capabilities(self) -> Capabilities:
        """The teacher's, under the student's tokenizer. Raises TokenizerMismatch when it reads yet others."""
        able = await self._scorer.capabilities()
        if able.tokenizer_fingerprint != self._reads:
            raise TokenizerMismatch(f"teacher {able.model} reads other tokens than those of teacher.tokenizer")
        return able.model_copy(
            update={
                "tokenizer_fingerprint": self._seems,
                "tier": min(Tier.TOPK, able.tier),
                "hidden_size": 0,
                "head_id": "",
            }
        )

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        """As Scorer, with `chunks`. Raises TeacherRefused for what is of one vocabulary only, and AlignmentError for an
        item without messages."""
        if ask.num_ids or ask.entropy or ask.draws or ask.hidden:
            raise TeacherRefused("a teacher of other tokens gives log-probs of text and its own top-k, and no more")
        if expect is not None and expect.tokenizer_fingerprint != self._seems:
            raise TokenizerMismatch(f"teacher {expect.name} is expected to read other tokens than this run's student")
        theirs = None if expect is None else replace(expect, tokenizer_fingerprint=self._reads)
        answers = await self._scorer.score([self._between.request(item) for item in items], ask, theirs)
        return [
            self._seen(self._between.scores(item.completion_ids, scores))
            for item, scores in zip(items, answers, strict=True)
        ]

    async def aclose(self) -> None:
        await self._scorer.aclose()

    def _seen(self, scores: TeacherScores) -> TeacherScores:
        return replace(scores, identity=replace(scores.identity, tokenizer_fingerprint=self._seems))


class Retokeniser:
    """Between two tokenizers. Raises ConfigError when the tokens of one have no known bytes."""

    def __init__(self, *, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self._teacher_tokenizer = teacher
        self._student = byte_vocabulary(student)
        self._teacher = byte_vocabulary(teacher)
        self._encoder = _verbatim(teacher)
        self._translated = translation(teacher=self._teacher, student=self._student)

    def request(self, item: ScoreItem) -> ScoreItem:
        """What to ask: the item's conversation in the teacher's own template, and its completion in its tokens.

        Raises AlignmentError for an item that does not say what the teacher reads as text.
        """
        if item.messages is None:
            raise AlignmentError(f"item {item.id}: a teacher of other tokens reads messages, and there are none")
        return ScoreItem(
            id=item.id,
            context_ids=np.array(render(self._teacher_tokenizer, item.messages), dtype=np.int32),
            completion_ids=self.teacher_ids(item.completion_ids),
            domain=item.domain,
        )

    def teacher_ids(self, completion_ids: IntArray) -> IntArray:
        """[U] the student's completion [T] in the teacher's tokens, U >= 1."""
        return self._read(completion_ids).teacher_ids

    def scores(self, completion_ids: IntArray, scores: TeacherScores) -> TeacherScores:
        """The teacher's scores of its U tokens as scores of the student's T.

        `sampled` is the log-prob of each token's whole chunk (`chunks`). The teacher's top-k is in the student's ids,
        at tokens that are one token on both sides; elsewhere its ids are -1. Entropies, and log-probs of chosen ids,
        are of another vocabulary and left out. Raises AlignmentError for scores of another number of tokens.
        """
        read = self._read(completion_ids)
        if len(scores.sampled) != len(read.teacher_ids):
            raise AlignmentError(
                f"{len(scores.sampled)} scores of a teacher that reads {len(read.teacher_ids)} tokens for the "
                f"student's {len(completion_ids)}"
            )
        sampled, chunks = chunk_scores(read.alignment, scores.sampled)
        return TeacherScores(
            status=scores.status,
            identity=scores.identity,
            sampled=sampled,
            chunks=chunks,
            **self._topk(completion_ids, read, scores),
        )

    def _topk(self, ids: IntArray, read: Retokenised, scores: TeacherScores) -> dict[str, NDArray[Any]]:
        """The teacher's top-k where it can be compared; ids of -1 and NaN elsewhere."""
        if scores.topk_ids is None or scores.topk_logprobs is None or scores.topk_tail is None:
            return {}
        columns = map_topk(scores.topk_ids, scores.topk_logprobs, scores.topk_tail, self._translated)
        partners = self._same_token(ids, read)
        there = (partners >= 0) & (columns[0][partners] >= 0).any(axis=1)
        found = {}
        for name, values in zip(("topk_ids", "topk_logprobs", "topk_tail"), columns, strict=True):
            missing = -1 if values.dtype == np.int32 else np.nan
            found[name] = np.full((len(partners), *values.shape[1:]), missing, values.dtype)
            found[name][there] = values[partners[there]]
        return found

    def _same_token(self, ids: IntArray, read: Retokenised) -> IntArray:
        """[T] the teacher's token of the same bytes, or -1.

        A first token may write the same text with a space that only one side removes. What might have stood there
        instead then begins with a space on that side alone: no candidates could be compared.
        """
        partners = read.alignment.partners
        pairs = zip(ids.tolist(), partners.tolist(), strict=True)
        same = [
            other >= 0 and self._student.raw(own) == self._teacher.raw(int(read.teacher_ids[other]))
            for own, other in pairs
        ]
        return np.where(same, partners, np.int32(-1))

    def _read(self, ids: IntArray) -> Retokenised:
        return retokenise(ids.tolist(), student=self._student, teacher=self._teacher, encode=self._encode)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids


def masked(rollout: Rollout, scores: TeacherScores) -> tuple[Rollout, TeacherScores]:
    """Both without the tokens that have no chunk, or one with a token that is no loss token.

    Those are never asked for again. A chunk whose score is missing keeps its loss tokens, to be counted as unscored.
    """
    if scores.status != ScoreStatus.OK or scores.chunks is None:
        return rollout, scores
    kept = whole_chunks(scores.chunks, rollout.loss_mask)
    scores = replace(
        scores,
        sampled=np.where(kept, scores.sampled, np.float32(np.nan)),
        chunks=np.where(kept, scores.chunks, np.int32(-1)),
    )
    return replace(rollout, loss_mask=kept), scores


_FAITHFUL = {"Replace", "Prepend", "ByteLevel"}  # normalisers that only spell the text in the vocabulary's characters


def _verbatim(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer without what changes a text (NFC, lower case), reading a special token's name as text."""
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = description["normalizer"]
    if steps is not None:
        every = steps["normalizers"] if steps["type"] == "Sequence" else [steps]
        kept = [step for step in every if step["type"] in _FAITHFUL]
        description["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    core: Tokenizer = Tokenizer.from_str(json.dumps(description | {"truncation": None, "padding": None}))
    core.encode_special_tokens = True
    return core
