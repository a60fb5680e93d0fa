"""POST /v1/completions in OpenAI's shape, for clients that know no other: log-probs of a prompt, and one greedy token.

This server scores and does not write: `max_tokens` is 0 or 1, and whatever would ask for more, or for sampling, is
refused by name. `prompt_logprobs` is vLLM's extension: per prompt token {token id: {logprob, rank, decoded_token}}, the
first null. Admission, queue and limits are those of /v1/score; where that answers NaN, this refuses.

OpenAI's shape has no place for two tokens of one text: in `top_logprobs` the more probable one stands for both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, TypeAdapter
from transformers import PreTrainedTokenizerBase

from potstill.codec import JSON
from potstill.framing import Part, ids_from_list, parse
from potstill.types import ScoreStatus, TeacherScores
from potstill.wire import Ask, ScoreItem, ScoreRequest, WireError
from teacher_server.admission import Teacher, admit, answer_bytes, check_json_answer
from teacher_server.batching import Job
from teacher_server.limits import Limits, Refusal
from teacher_server.service import ScoringService, check_json, media_type, read_body

_One = TypeVar("_One")
_Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Ids = Annotated[list[_Token], Field(min_length=1, fail_fast=True)]  # the first wrong one of a million is enough
_Several = Annotated[list[_One], Field(min_length=1, fail_fast=True)]
_Count = Annotated[int, Field(strict=True, ge=0)]

_NUMBERS_PER_ENTRY = 8  # an entry of prompt_logprobs and its twin in top_logprobs, texts included


class CompletionRequest(Part):
    """OpenAI's fields that this server can honour, and vLLM's `prompt_logprobs` and `add_special_tokens`."""

    model: str
    prompt: str | _Ids | _Several[str] | _Several[_Ids]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: _Count | None = None
    prompt_logprobs: _Count | None = None
    add_special_tokens: bool = True
    user: str | None = None
    seed: int | None = None  # nothing is drawn
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: None = None
    suffix: str | None = None


_REQUEST = TypeAdapter(CompletionRequest)
_HARMLESS: dict[str, tuple[object, ...]] = {
    "max_tokens": (0, 1),
    "n": (None, 1),
    "best_of": (None, 1),
    "temperature": (None, 0.0, 1.0),  # a single greedy token has no temperature
    "top_p": (None, 1.0),
    "frequency_penalty": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "logit_bias": (None, {}),
    "stop": (None, "", []),
    "stream": (None, False),
    "suffix": (None, ""),
}


def completions(service: ScoringService) -> APIRouter:
    router = APIRouter()
    teacher, limits = service.teacher, service.limits

    @router.post("/completions")
    async def complete(request: Request) -> Response:
        deadline = time.monotonic() + limits.max_deadline_s
        media_type(request, JSON)
        with service.visit() as place:
            limit = min(limits.max_body_bytes, limits.max_json_bytes)
            body = await read_body(request, place, limit=limit, max_read_s=limits.max_read_s)
            asked, prompts, jobs = await service.aside(_understand, body, teacher, limits)
            place.reserve(_NUMBERS_PER_ENTRY * answer_bytes(jobs))
            identity, scores = await service.score(request, jobs, deadline=deadline)
            if any(one.status == ScoreStatus.DEADLINE for one in scores):
                raise Refusal(504, "deadline_exceeded", "the deadline passed before all was scored", retry_after_s=1)
            if any(one.status != ScoreStatus.OK for one in scores):
                raise Refusal(503, "scoring_failed", "a prompt could not be scored", retry_after_s=1)
            named = {
                "id": f"cmpl-{request.state.request_id}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": identity.name,
            }
            answer = await service.aside(_answer, asked, prompts, scores, teacher.tokenizer)
            return await service.aside(JSONResponse, named | answer)

    return router


# -------------------------------------------------------------------------------------------------------- requests


def _understand(body: bytes, teacher: Teacher, limits: Limits) -> tuple[CompletionRequest, list[list[int]], list[Job]]:
    """What is asked, and the ids and the job of each prompt."""
    check_json(body, limits)
    try:
        asked = parse(_REQUEST, body, "body")
        _check_scoring_only(asked)
        prompts = _prompts(asked, teacher.tokenizer)
        jobs = admit(_as_scores(asked, prompts), teacher, limits)
        check_json_answer(jobs, limits)
    except WireError as error:
        raise Refusal(400, "invalid_request", str(error), _param(error.param)) from None
    except Refusal as refusal:
        raise Refusal(refusal.status, refusal.code, refusal.message, _param(refusal.param)) from None
    return asked, prompts, jobs


def _param(inner: str | None) -> str | None:
    """A field of the scoring request in this route's words."""
    words = {"items": "prompt", "prompt": "prompt", "top_k": "logprobs"}
    return None if inner is None else words.get(inner.partition("[")[0].partition(".")[0], inner)


def _check_scoring_only(asked: CompletionRequest) -> None:
    for name, harmless in _HARMLESS.items():
        if getattr(asked, name) not in harmless:
            allowed = " or ".join(str(value) for value in harmless if value is not None)
            message = f"this server scores prompts and does not write: {name} must be {allowed}"
            raise Refusal(400, "invalid_value", message, name)


def _prompts(asked: CompletionRequest, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    given = asked.prompt
    several: Sequence[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts = [
        tokenizer.encode(one, add_special_tokens=asked.add_special_tokens) if isinstance(one, str) else list(one)
        for one in several
    ]
    if not all(prompts):
        raise Refusal(400, "invalid_value", "must not be empty", "prompt")
    return prompts


def _wants_prompt(asked: CompletionRequest) -> bool:
    return asked.prompt_logprobs is not None or (bool(asked.echo) and asked.logprobs is not None)


def _as_scores(asked: CompletionRequest, prompts: Sequence[Sequence[int]]) -> ScoreRequest:
    """The prompts as items whose completions are what is to be scored, and one row more.

    Its own id is of no account: the top of its distribution is the token that a greedy model writes next.
    """
    items = []
    for index, prompt in enumerate(prompts):
        start = 1 if _wants_prompt(asked) else len(prompt)
        context, rows = ids_from_list(prompt[:start], "prompt"), ids_from_list([*prompt[start:], 0], "prompt")
        items.append(ScoreItem(id=str(index), context_ids=context, completion_ids=rows))
    top_k = max(asked.logprobs or 0, asked.prompt_logprobs or 0, asked.max_tokens or 0)
    return ScoreRequest(model=asked.model, items=tuple(items), ask=Ask(top_k=top_k))


# --------------------------------------------------------------------------------------------------------- answers


class _Row:
    """One position: the token there, its log-prob and the teacher's most probable tokens. All None for the first."""

    def __init__(self, token: int, logprob: float | None, best: Sequence[tuple[int, float]]) -> None:
        self.token = token
        self.logprob = logprob
        self.best = best

    def top(self, count: int) -> dict[int, tuple[float, int | None]] | None:
        """Log-prob and rank by token id: its own first, then the `count` best. Rank is None beyond the known best."""
        if self.logprob is None:
            return None
        ranks = {token: rank for rank, (token, _) in enumerate(self.best, start=1)}
        own: dict[int, tuple[float, int | None]] = {self.token: (self.logprob, ranks.get(self.token))}
        return own | {token: (logprob, ranks[token]) for token, logprob in self.best[:count]}


def _answer(
    asked: CompletionRequest,
    prompts: Sequence[list[int]],
    scores: Sequence[TeacherScores],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    rows = [_rows(asked, prompt, one) for prompt, one in zip(prompts, scores, strict=True)]
    numbered = enumerate(zip(prompts, rows, strict=True))
    read = sum(len(prompt) for prompt in prompts)
    total = sum(len(positions) for positions in rows)
    return {
        "choices": [_choice(asked, index, prompt, positions, tokenizer) for index, (prompt, positions) in numbered],
        "usage": {"prompt_tokens": read, "completion_tokens": total - read, "total_tokens": total},
    }


def _rows(asked: CompletionRequest, prompt: Sequence[int], scores: TeacherScores) -> list[_Row]:
    """A row of each prompt token, and one of the token that was written, if one was."""
    sampled = scores.sampled.tolist()
    best: list[list[tuple[int, float]]] = [[] for _ in sampled]
    if scores.topk_ids is not None and scores.topk_logprobs is not None:
        columns = zip(scores.topk_ids.tolist(), scores.topk_logprobs.tolist(), strict=True)
        best = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in columns]
    start = len(prompt) + 1 - len(sampled)  # the first prompt token that was scored
    rows = [_Row(token, None, ()) for token in prompt[:start]]
    rows += [_Row(*known) for known in zip(prompt[start:], sampled[:-1], best[:-1], strict=True)]
    if asked.max_tokens:
        token, logprob = best[-1][0]
        rows.append(_Row(token, logprob, best[-1]))
    return rows


def _choice(
    asked: CompletionRequest,
    index: int,
    prompt: Sequence[int],
    rows: Sequence[_Row],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    shown = rows if asked.echo else rows[len(prompt) :]
    choice: dict[str, Any] = {
        "index": index,
        "text": tokenizer.decode([row.token for row in shown]),
        "logprobs": None if asked.logprobs is None else _logprobs(shown, asked.logprobs, tokenizer),
        "finish_reason": "length",
    }
    if asked.prompt_logprobs is not None:
        tops = [row.top(asked.prompt_logprobs) for row in rows[: len(prompt)]]
        choice["prompt_logprobs"] = [None if top is None else _entries(top, tokenizer) for top in tops]
    return choice


def _entries(top: dict[int, tuple[float, int | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    return {
        str(token): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.decode([token])}
        for token, (logprob, rank) in top.items()
    }


def _logprobs(rows: Sequence[_Row], count: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """OpenAI's four columns. Offsets count the characters of the tokens in front, as vLLM's do."""
    tokens = [tokenizer.decode([row.token]) for row in rows]
    return {
        "tokens": tokens,
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [_by_text(row.top(count), tokenizer) for row in rows],
        "text_offset": list(accumulate((len(token) for token in tokens[:-1]), initial=0)) if tokens else [],
    }


def _by_text(
    top: dict[int, tuple[float, int | None]] | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float] | None:
    if top is None:
        return None
    by_text: dict[str, float] = {}
    for token, (logprob, _) in top.items():
        text = tokenizer.decode([token])
        by_text[text] = max(logprob, by_text.get(text, logprob))
    return by_text
