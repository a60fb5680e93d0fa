"""prompt_logprobs: what vLLM says of a prompt, as arrays.

One row per token of the prompt: the first is null, because nothing predicts it; every other maps ids to log-probs, the
K most probable and the row's own token, which is one more entry where it is not among the K.
It refuses, with AlignmentError, rows that belong to other tokens. It judges no number and knows no HTTP.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from potstill.errors import AlignmentError
from potstill.types import FloatArray


class Entry(BaseModel):
    """One id at one position. Rank 1 is the most probable id of the vocabulary."""

    logprob: float
    rank: int | None = None


Row = dict[int, Entry]
Rows = list[Row | None]


def read_rows(rows: Rows | None, context: Sequence[int], completion: Sequence[int], *, top_k: int) -> dict[str, Any]:
    """`sampled` [T] and, with top_k, `topk_ids` and `topk_logprobs` [T, K], out of one row per token of the prompt.

    Raises AlignmentError unless the first row is null, every other holds its own token, and those of the completion
    hold the ranks 1 to K and nothing but their token besides.
    """
    if rows is None or len(rows) != len(context) + len(completion):
        raise AlignmentError(f"vLLM gave {len(rows or ())} rows for {len(context) + len(completion)} tokens")
    if rows[0] is not None or any(
        row is None or token not in row for row, token in zip(rows[1:], [*context, *completion][1:], strict=True)
    ):
        raise AlignmentError("vLLM's prompt_logprobs are not those of the tokens sent, after a null for the first")
    scored = [row for row in rows[len(context) :] if row is not None]
    sampled = np.array([row[token].logprob for row, token in zip(scored, completion, strict=True)], np.float32)
    if top_k == 0:
        return {"sampled": sampled}
    best = [_best(row, token, top_k) for row, token in zip(scored, completion, strict=True)]
    return {
        "sampled": sampled,
        "topk_ids": np.array([[token for token, _ in row] for row in best], np.int32),
        "topk_logprobs": np.array([[logprob for _, logprob in row] for row in best], np.float32),
    }


def _best(row: Row, token: int, top_k: int) -> list[tuple[int, float]]:
    """The K most probable ids of a row, by rank. `token` may stand beside them with a later rank."""
    ranked = {entry.rank: (key, entry.logprob) for key, entry in row.items() if entry.rank and entry.rank <= top_k}
    beside = [key for key, entry in row.items() if not entry.rank or entry.rank > top_k]
    is_whole = sorted(ranked) == list(range(1, top_k + 1)) and len(ranked) + len(beside) == len(row)
    if not is_whole or beside not in ([], [token]):
        raise AlignmentError(f"a row of vLLM's prompt_logprobs does not hold the ranks 1 to {top_k} and its own token")
    return [ranked[rank] for rank in range(1, top_k + 1)]


def read_array(encoded: str | None, shape: tuple[int, ...]) -> FloatArray:
    """Log-probs [T, K] from the base64 of an .npy file. Raises AlignmentError for anything else; never unpickles."""
    try:
        array = np.load(io.BytesIO(base64.b64decode(encoded or "", validate=True)), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise AlignmentError("vLLM's prompt_token_id_logprobs is not an array of numbers") from None
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind != "f":
        raise AlignmentError(f"vLLM's prompt_token_id_logprobs is not {list(shape)} log-probs")
    logprobs: FloatArray = array.astype(np.float32)
    return logprobs
