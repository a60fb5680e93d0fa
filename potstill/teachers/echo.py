"""echo: the log-probs of an echoed prompt, as OpenAI-compatible servers write them, as arrays.

    tokens          ["The", " cat", …]                  or "token_id:464", where a server was asked to name ids
    token_logprobs  [null, -3.1, …]                     nothing predicts the first
    top_logprobs    [null, {" cat": -3.1, …}, …]        the K most probable, and the token itself where it is not there

Texts are brought back to ids by a local copy of the tokenizer. Whatever is not certain, whatever disagrees, gives None:
another token, a text that two ids share, an entry too few. It judges no number and knows no HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel

from potstill.teachers.foreign import Reading

_NAMED = "token_id:"


class Logprobs(BaseModel):
    """Of one choice: one entry per token of the prompt, then of what was written after it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(BaseModel):
    """One echoed prompt."""

    logprobs: Logprobs | None = None
    prompt_token_ids: list[int] | None = None


class Names:
    """Which token an entry speaks of."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def means(self, name: str, token: int) -> bool:
        """Whether `name` can be said of `token`."""
        return name == f"{_NAMED}{token}" or name == self._reading.text_of([token])

    def id_of(self, name: str) -> int | None:
        """The one token that `name` can be said of; None when there are several, or none."""
        number = name.removeprefix(_NAMED)
        if number == name or not number.isdecimal():
            return self._by_text.get(name)
        return int(number) if int(number) < self._reading.vocabulary else None

    @cached_property
    def _by_text(self) -> dict[str, int]:
        texts = [self._reading.text_of([token]) for token in range(self._reading.vocabulary)]
        times = Counter(texts)
        return {text: token for token, text in enumerate(texts) if times[text] == 1}


def read_echo(
    choice: Choice, context: Sequence[int], completion: Sequence[int], *, top_k: int, names: Names
) -> dict[str, Any] | None:
    """`sampled` [T] and, with top_k, `topk_ids` and `topk_logprobs` [T, K]; None unless all of it is certain."""
    prompt, said = [*context, *completion], choice.logprobs
    if said is None or not _is_echo(said, choice.prompt_token_ids, prompt, names):
        return None
    scored = said.token_logprobs[len(context) : len(prompt)]
    sampled = np.array([np.nan if value is None else value for value in scored], np.float32)
    if top_k == 0:
        return {"sampled": sampled}
    if said.top_logprobs is None or len(said.top_logprobs) != len(said.tokens):
        return None
    rows = said.top_logprobs[len(context) : len(prompt)]
    best = [_best(row, token, top_k, names) for row, token in zip(rows, completion, strict=True)]
    if any(row is None for row in best):
        return None
    table = np.array(best, np.float64)  # [T, K, 2]: exact for ids below 2**53
    return {
        "sampled": sampled,
        "topk_ids": table[:, :, 0].astype(np.int32),
        "topk_logprobs": table[:, :, 1].astype(np.float32),
    }


def _is_echo(said: Logprobs, echoed: Sequence[int] | None, prompt: Sequence[int], names: Names) -> bool:
    """Whether entries begin with those of `prompt`, and at most one token was written after it."""
    sizes = {len(said.tokens), len(said.token_logprobs)}
    if sizes not in ({len(prompt)}, {len(prompt) + 1}) or said.token_logprobs[0] is not None:
        return False
    if echoed is not None:
        return list(echoed) == list(prompt)
    return all(names.means(name, token) for name, token in zip(said.tokens[: len(prompt)], prompt, strict=True))


def _best(row: Mapping[str, float] | None, token: int, top_k: int, names: Names) -> list[tuple[int, float]] | None:
    """The K most probable ids of a row. `token`, when it is not one of them, may stand below them."""
    found = {names.id_of(name): logprob for name, logprob in (row or {}).items()}
    if None in found or len(found) != len(row or {}) or len(found) not in (top_k, top_k + 1):
        return None
    ordered = sorted(((key, value) for key, value in found.items() if key is not None), key=lambda entry: -entry[1])
    if len(ordered) > top_k and ordered[-1][0] != token:
        return None
    return ordered[:top_k]
