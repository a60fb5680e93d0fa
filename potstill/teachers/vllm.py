"""VllmScorer: a stock vLLM server as a teacher, through the log-probs that it gives of a prompt.

    POST /v1/completions         prompt_logprobs=k     its own top-k and each given token               all versions
    POST /inference/v1/generate  prompt_logprob_token_ids  ids of the caller's choice as well     where it has them

The prompt is token ids, context and completion together; vLLM writes one more token, which nobody reads. A row of
`prompt_logprobs` says what its own position was given, so the first is null, and every other must hold its token.
A stock server has no fingerprint: the user names a local copy of its tokenizer, which is compared where it can be.

It sends no temperature: none is ever applied to prompts. It refuses entropies, draws and hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter

from potstill.algebra.objective import Tier
from potstill.calling.outbound import Answer
from potstill.errors import AlignmentError, TeacherRefused, TokenizerMismatch
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
from potstill.teachers.prompt_logprobs import Rows, read_array, read_rows
from potstill.types import IntArray, ScoreStatus, TeacherScores
from potstill.wire import MAX_TOP_K, Ask, Capabilities, ScoreItem, unscored

_ENTRY_BYTES = 192  # of one log-prob in JSON, its text included
_SAMPLES = ("12 + 9 = 21, isn't it?", "naïve café, 你好 🙂", "def f(x):\n\treturn  x**2\n")
_NUM_SPREAD = 256  # ids from all over the vocabulary that both sides must read alike


class _Card(BaseModel):
    id: str
    max_model_len: int | None = None


class _Cards(BaseModel):
    data: list[_Card]


class _Prompt(BaseModel):
    """What both routes say of a prompt."""

    prompt_logprobs: Rows | None = None
    prompt_token_ids: list[int] | None = None
    prompt_token_id_logprobs: str | None = None  # base64 of an .npy file


class _Completion(BaseModel):
    choices: list[_Prompt]


class _Tokens(BaseModel):
    tokens: list[int]


class _Text(BaseModel):
    prompt: str


_CARDS, _COMPLETION, _PROMPT = TypeAdapter(_Cards), TypeAdapter(_Completion), TypeAdapter(_Prompt)
_TOKENS, _TEXT = TypeAdapter(_Tokens), TypeAdapter(_Text)


class VllmScorer(ForeignScorer):
    """Scorer over `python -m vllm.entrypoints.openai.api_server`.

    FAILED: an item with a log-prob that is no number, or a top-k with rows that no token has.
    """

    advice = Advice(
        ids="vLLM 0.33 with VLLM_USE_V2_MODEL_RUNNER=1 and `potstill teacher serve` do; or use the teacher's own top-k",
        top_k="start vLLM with a larger --max-logprobs",
    )

    async def _score(self, item: ScoreItem, *, ask: Ask, able: Capabilities, by: float) -> TeacherScores:
        context = self._reading.context(item)
        check_text(item, context, able)
        completion = [int(token) for token in item.completion_ids]
        said = await self._prompt(context, completion, ask.top_k, item.token_ids, by)
        columns = read_rows(said.prompt_logprobs, context, completion, top_k=ask.top_k)
        if item.token_ids is not None:
            columns["ids_logprobs"] = read_array(said.prompt_token_id_logprobs, item.token_ids.shape)
        is_known = not ask.top_k or (columns["topk_ids"] < able.vocabulary).all()  # a head may have more rows
        logprobs = [values for name, values in columns.items() if name.endswith(("sampled", "logprobs"))]
        if not is_known or not all(is_sound(values) for values in logprobs):
            return unscored(self._identity, ScoreStatus.FAILED, num_tokens=len(completion), ask=ask)
        for name in ("topk", "ids"):
            if f"{name}_logprobs" in columns:
                columns[f"{name}_tail"] = tail_of(columns[f"{name}_logprobs"])
        return TeacherScores(status=ScoreStatus.OK, identity=self._identity, **columns)

    async def _prompt(
        self, context: list[int], completion: list[int], top_k: int, token_ids: IntArray | None, by: float
    ) -> _Prompt:
        """What vLLM says of context and completion. Raises AlignmentError when it read another prompt."""
        prompt = context + completion
        answer = await self._ask(prompt, top_k, token_ids, start=len(context) - 1, by=by)
        if answer.status != 200:
            raise self._endpoint.refusal(answer)
        if token_ids is None:
            choices = parsed(_COMPLETION, answer, "/v1/completions").choices
            if len(choices) != 1:
                raise AlignmentError(f"vLLM gave {len(choices)} answers to one prompt")
            said = choices[0]
        else:
            said = parsed(_PROMPT, answer, "/inference/v1/generate")
        if said.prompt_token_ids is not None and said.prompt_token_ids != prompt:
            raise AlignmentError("vLLM read other tokens than it was sent")
        return said

    async def _ask(self, prompt: list[int], top_k: int, token_ids: IntArray | None, *, start: int, by: float) -> Answer:
        """One prompt, by the route that gives what is asked of it."""
        entries = len(prompt) * (top_k + 1) * _ENTRY_BYTES + (0 if token_ids is None else 8 * token_ids.size)
        limit = SMALL_ANSWER_BYTES + entries
        common = {"model": self._identity.name, "return_token_ids": True}
        if token_ids is None:
            asked = common | {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": top_k}
            return await self._post("/v1/completions", asked, by, limit=limit)
        sampling = {
            "max_tokens": 1,
            "prompt_logprobs": top_k,
            "prompt_logprob_token_ids": token_ids.tolist(),
            "prompt_logprob_start": start,
        }
        asked = common | {"token_ids": prompt, "sampling_params": sampling}
        return await self._post("/inference/v1/generate", asked, by, limit=limit)

    # ------------------------------------------------------------------------------------ what the server gives

    async def _find(self, by: float) -> Capabilities:
        length = await self._max_model_len(by)
        await self._compare_tokenizers(by)
        top_k = await highest(partial(self._gives_top_k, by), min(MAX_TOP_K, self._reading.vocabulary))
        if top_k is None:
            raise TeacherRefused(f"{self._endpoint.url} gives no prompt_logprobs: it is not a vLLM server that scores")
        tier = Tier.SAMPLED if top_k == 0 else Tier.IDS if await self._gives_ids(by) else Tier.TOPK
        return self._offers(tier, context_length=length, max_top_k=top_k)

    async def _max_model_len(self, by: float) -> int:
        answer = await self._endpoint.call(
            "GET", "/v1/models", accept=JSON, limit_bytes=SMALL_ANSWER_BYTES, deadline=by
        )
        if answer.status != 200:
            raise self._endpoint.refusal(answer)
        cards = {card.id: card.max_model_len for card in parsed(_CARDS, answer, "/v1/models").data}
        length = cards.get(self._identity.name)
        if length is None:
            raise TeacherRefused(f"{self._endpoint.url} is no vLLM server of a model named {self._identity.name}")
        return length

    async def _compare_tokenizers(self, by: float) -> None:
        """Raise TokenizerMismatch when the server reads text or ids differently. A server may not offer to tell."""
        reading = self._reading
        for text in (*_SAMPLES, "".join(reading.tokenizer.all_special_tokens)):
            asked: dict[str, Any] = {"model": self._identity.name, "prompt": text, "add_special_tokens": False}
            answer = await self._post("/tokenize", asked, by)
            if answer.status in {404, 405}:
                return
            self._require(answer.status == 200 and parsed(_TOKENS, answer, "/tokenize").tokens == reading.ids_of(text))
        spread = list(range(0, reading.vocabulary, max(1, reading.vocabulary // _NUM_SPREAD)))
        answer = await self._post("/detokenize", {"model": self._identity.name, "tokens": spread}, by)
        texts = (reading.tokenizer.decode(spread), reading.text_of(spread))  # some releases tidy spaces, others do not
        self._require(answer.status == 200 and parsed(_TEXT, answer, "/detokenize").prompt in texts)

    def _require(self, same: bool) -> None:
        if not same:
            raise TokenizerMismatch(
                f"{self._identity.name} at {self._endpoint.url} reads other tokens than the tokenizer folder it was "
                "given: name a copy of its own tokenizer"
            )

    async def _gives_top_k(self, by: float, top_k: int) -> bool:
        answer = await self._ask([0, 1], top_k, None, start=0, by=by)
        if answer.status == 400:
            return False
        if answer.status != 200:
            raise self._endpoint.refusal(answer)
        return all(choice.prompt_logprobs for choice in parsed(_COMPLETION, answer, "/v1/completions").choices)

    async def _gives_ids(self, by: float) -> bool:
        """Only some releases and runners have it; the others say so with one status or another."""
        answer = await self._ask([0, 1], 0, np.array([[0]], np.int32), start=0, by=by)
        return answer.status == 200 and parsed(_PROMPT, answer, "/inference").prompt_token_id_logprobs is not None

    async def _post(self, path: str, asked: Mapping[str, Any], by: float, *, limit: int = SMALL_ANSWER_BYTES) -> Answer:
        body = json.dumps(asked).encode()
        return await self._endpoint.call(
            "POST", path, body=body, content_type=JSON, accept=JSON, limit_bytes=limit, deadline=by
        )
