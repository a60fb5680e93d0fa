"""EchoScorer: any OpenAI-compatible endpoint as a teacher, as far as it scores text that it is given.

    POST /v1/completions   echo=true, logprobs=k      the log-probs of the prompt itself, if the endpoint has them

Endpoints differ in what they take, so the first call finds out, with a prompt of a few tokens: token ids whose answers
name ids, token ids, or text. One that takes none of them writes text only, and its capabilities say so.
What comes back is matched with a local copy of the tokenizer, token by token; an item that differs comes back FAILED.

It refuses entropies, draws, hidden states, and ids that a caller chooses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from potstill.algebra.objective import Tier
from potstill.calling.outbound import Answer, Endpoint
from potstill.errors import AlignmentError
from potstill.teachers.echo import Choice, Names, read_echo
from potstill.teachers.foreign import (
    JSON,
    SMALL_ANSWER_BYTES,
    Advice,
    ForeignScorer,
    check_text,
    highest,
    is_sound,
    parsed,
    tail_of,
)
from potstill.types import ScoreStatus, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem, unscored

MOST_TOP_K = 20  # of any OpenAI-compatible API
_REFUSED = {400, 404, 405, 422, 501}  # this endpoint, or this model of it, has no such thing
_ENTRY_BYTES = 192  # of one log-prob in JSON, its text included
_TRIAL = "The answer is 21."


class _Completion(BaseModel):
    choices: list[Choice]


_COMPLETION = TypeAdapter(_Completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialect:
    """How an endpoint is spoken to."""

    takes_ids: bool
    names_ids: bool  # vLLM's and SGLang's extension: tokens come back as "token_id:464"


_DIALECTS = (
    _Dialect(takes_ids=True, names_ids=True),
    _Dialect(takes_ids=True, names_ids=False),
    _Dialect(takes_ids=False, names_ids=False),
)


class EchoScorer(ForeignScorer):
    """Scorer over `/v1/completions`. `context_length` is the model's, in tokens: the API has no word for it.

    FAILED: an item whose answer cannot be matched with its tokens.
    """

    advice = Advice(
        ids="use the teacher's own top-k, or serve its weights with `potstill teacher serve`",
        top_k="use a smaller top-k, or a server that gives more",
    )

    def __init__(
        self, endpoint: Endpoint, *, model: str, revision: str | None, tokenizer: Path, context_length: int
    ) -> None:
        super().__init__(endpoint, model=model, revision=revision, tokenizer=tokenizer)
        self._names = Names(self._reading)
        self._context_length = context_length
        self._dialect = _DIALECTS[-1]

    async def _score(self, item: ScoreItem, *, ask: Ask, able: Capabilities, by: float) -> TeacherScores:
        context = self._reading.context(item)
        check_text(item, context, able)
        completion = [int(token) for token in item.completion_ids]
        answer = await self._echo(self._dialect, context + completion, ask.top_k, by)
        if answer is not None and answer.status != 200:
            raise self._endpoint.refusal(answer)
        columns = None if answer is None else self._read(answer, context, completion, ask.top_k)
        if columns is None:
            return unscored(self._identity, ScoreStatus.FAILED, num_tokens=len(completion), ask=ask)
        if ask.top_k:
            columns["topk_tail"] = tail_of(columns["topk_logprobs"])
        return TeacherScores(status=ScoreStatus.OK, identity=self._identity, **columns)

    async def _echo(self, dialect: _Dialect, ids: list[int], top_k: int, by: float) -> Answer | None:
        """The endpoint's answer to a prompt; None when it takes text, and no text reads as these ids."""
        prompt: list[int] | str = ids
        if not dialect.takes_ids:
            prompt = self._reading.text_of(ids)
            if self._reading.ids_of(prompt) != ids:
                return None
        asked: dict[str, Any] = {
            "model": self._identity.name,
            "prompt": prompt,
            "echo": True,
            "logprobs": top_k,
            "max_tokens": 1,  # some endpoints refuse 0; the token is not read
            "temperature": 1.0,  # some endpoints temper the prompt's log-probs too
        }
        if dialect.names_ids:
            asked |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
        return await self._endpoint.call(
            "POST",
            "/v1/completions",
            body=json.dumps(asked).encode(),
            content_type=JSON,
            accept=JSON,
            limit_bytes=SMALL_ANSWER_BYTES + (len(ids) + 1) * (top_k + 2) * _ENTRY_BYTES,
            deadline=by,
        )

    def _read(
        self, answer: Answer, context: Sequence[int], completion: Sequence[int], top_k: int
    ) -> dict[str, Any] | None:
        """The columns of an answer; None unless every token is certain and every log-prob a number."""
        choices = parsed(_COMPLETION, answer, "/v1/completions").choices
        if len(choices) != 1:
            raise AlignmentError(f"{self._endpoint.url} gave {len(choices)} answers to one prompt")
        columns = read_echo(choices[0], context, completion, top_k=top_k, names=self._names)
        if columns is None:
            return None
        logprobs = [columns[name] for name in ("sampled", "topk_logprobs") if name in columns]
        return columns if all(is_sound(values) for values in logprobs) else None

    # ---------------------------------------------------------------------------------- what the endpoint gives

    async def _find(self, by: float) -> Capabilities:
        top_k = await self._settle(by)
        tier = Tier.TEXT if top_k is None else Tier.TOPK if top_k else Tier.SAMPLED
        return self._offers(tier, context_length=self._context_length, max_top_k=top_k or 0)

    async def _settle(self, by: float) -> int | None:
        """Take the first dialect that the endpoint understands; returns its largest top-k, None when it has none."""
        for dialect in _DIALECTS:
            most = await highest(partial(self._gives, dialect, by), min(MOST_TOP_K, self._reading.vocabulary))
            if most is not None:
                self._dialect = dialect
                return most
        return None

    async def _gives(self, dialect: _Dialect, by: float, top_k: int) -> bool:
        ids = self._reading.ids_of(_TRIAL)
        answer = await self._echo(dialect, ids, top_k, by)
        if answer is None or answer.status in _REFUSED:
            return False
        if answer.status != 200:
            raise self._endpoint.refusal(answer)
        try:
            return self._read(answer, ids[:1], ids[1:], top_k) is not None
        except AlignmentError:  # some endpoints write log-probs in a shape of their own
            return False
