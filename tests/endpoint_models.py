"""Scripted endpoints that answer as a model would: every log-prob follows from all tokens before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from tests.endpoints import Said
from tests.tiny_models import VOCABULARY, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
USAGE = {"prompt_tokens": 17, "total_tokens": 20, "completion_tokens": 3}


@cache
def law(prefix: tuple[int, ...]) -> np.ndarray:
    """[V] log-probs after a prefix."""
    logits = 3 * np.random.default_rng(prefix).normal(size=VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


def vllm(
    *, max_logprobs: int = 5, max_model_len: int = 64, law: Callable[[tuple[int, ...]], np.ndarray] = law
) -> Callable[[str, Any], Said]:
    """A stock vLLM server of a model named "big", without /tokenize."""

    def answer(path: str, asked: Any) -> Said:
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "big", "owned_by": "vllm", "max_model_len": max_model_len}]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if asked["prompt_logprobs"] > max_logprobs or len(asked["prompt"]) >= max_model_len:
            return 400, {"error": {"message": "too many", "code": 400}}
        rows = [_row(law(tuple(asked["prompt"][:i])), asked, i) for i in range(1, len(asked["prompt"]))]
        return 200, {"choices": [{"text": "!", "prompt_logprobs": [None, *rows]}]}

    return answer


def _row(logprobs: np.ndarray, asked: Any, place: int) -> dict[str, Any]:
    best = np.argsort(-logprobs)[: asked["prompt_logprobs"]].tolist()
    ones = dict.fromkeys([asked["prompt"][place], *best])
    return {str(one): {"logprob": float(logprobs[one]), "rank": int((logprobs >= logprobs[one]).sum())} for one in ones}


def chat(
    *, echoes: bool = False, answers: Callable[[int], str] = lambda turn: "21", key: str | None = None
) -> Callable[[str, Any], Said]:
    """An API that chats; `answers` maps the number of a turn to its answer."""
    turns = iter(range(1000))

    def answer(path: str, asked: Any) -> Said:
        if path == "/v1/chat/completions":
            message = {"role": "assistant", "content": answers(next(turns))}
            return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "gpt", "owned_by": "somebody"}]}
        if path == "/v1/completions" and echoes:
            logprobs = {"token_logprobs": [None, -1.0, -2.0, -3.0], "tokens": ["1", "2", "+", "!"]}
            return 200, {"choices": [{"text": "12+!", "logprobs": logprobs}]}
        return 404, {"error": {"message": f"no such route, {key}"}}

    return answer
