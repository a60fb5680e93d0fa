"""What a teacher server is asked and what it answers: the messages of `POST /v1/score` and `GET /v1/capabilities`.

A message that contradicts itself cannot be built: WireError names the field. How messages become bytes is in codec.py.
It knows no vocabulary, no limits and no HTTP: those belong to the server that is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.framing import Part, WireError, require
from potstill.types import FloatArray, IntArray, Message, TeacherIdentity, TeacherScores

SCHEMA_VERSION = 1
MAX_TOP_K = 128  # entries per position that a teacher server sends, of its own top-k or of ids that a caller chose

Want = Literal["sampled", "topk", "token_ids", "entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """One completion to score. The teacher reads its own context where it has one, else `context_ids`.

    Example: ScoreItem(id="r-1", context_ids=[5, 6], completion_ids=[50, 49, 2], teacher_context_ids=None,
                       teacher_messages=None, token_ids=[[50, 53], [49, 50], [2, 7]])
    """

    id: str
    context_ids: IntArray  # [P]
    completion_ids: IntArray  # [T], T >= 1
    teacher_context_ids: IntArray | None = None  # [C]
    teacher_messages: tuple[Message, ...] | None = None  # rendered by the teacher's own chat template
    token_ids: IntArray | None = None  # [T, K] ids of the caller's choice, distinct at each position


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What is asked of a teacher. `sampled` log-probs always come; `want` says what else.

    Raises WireError when its parts contradict each other.
    """

    model: str
    items: tuple[ScoreItem, ...]
    want: frozenset[Want]
    top_k: int = 0  # entries of the teacher's own top-k; 0 unless "topk" is wanted
    temperature: float = 1.0  # teachers score the distribution they have; any other value is refused
    expect_tokenizer_fingerprint: str | None = None
    expect_revision: str | None = None
    deadline_ms: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.items), "items", "must not be empty")
        require(self.temperature == 1.0, "temperature", "must be 1.0: teachers do not temper their scores")
        require(("topk" in self.want) == (self.top_k > 0), "top_k", 'is above 0 if and only if want has "topk"')
        require(self.deadline_ms is None or self.deadline_ms > 0, "deadline_ms", "must be above 0")
        require(len({item.id for item in self.items}) == len(self.items), "items", "two items have the same id")
        for index, item in enumerate(self.items):
            _check_item(item, f"items[{index}]", with_token_ids="token_ids" in self.want)
        widths = {item.token_ids.shape[1] for item in self.items if item.token_ids is not None}
        require(len(widths) <= 1, "items", "token_ids must have the same number of ids per position in every item")


def _check_item(item: ScoreItem, where: str, *, with_token_ids: bool) -> None:
    rows = len(item.completion_ids)
    has_own_context = item.teacher_context_ids is not None or item.teacher_messages is not None
    require(rows > 0, f"{where}.completion_ids", "must not be empty")
    require(len(item.context_ids) > 0 or has_own_context, f"{where}.context_ids", "must not be empty")
    for name in ("teacher_context_ids", "teacher_messages"):
        value = getattr(item, name)
        require(value is None or len(value) > 0, f"{where}.{name}", "must not be empty; leave it out instead")
    both = item.teacher_context_ids is not None and item.teacher_messages is not None
    require(not both, f"{where}.teacher_messages", "cannot be given together with teacher_context_ids")
    for name in ("context_ids", "completion_ids", "teacher_context_ids", "token_ids"):
        value = getattr(item, name)
        require(value is None or value.size == 0 or value.min() >= 0, f"{where}.{name}", "holds a negative id")
    where = f"{where}.token_ids"
    require((item.token_ids is not None) == with_token_ids, where, 'is given if and only if want has "token_ids"')
    if item.token_ids is not None:
        require(item.token_ids.ndim == 2 and item.token_ids.shape[1] > 0, where, "must be [tokens, ids]")
        require(len(item.token_ids) == rows, where, f"has {len(item.token_ids)} rows for {rows} completion tokens")
        ordered = np.sort(item.token_ids, axis=1)
        require(not bool((ordered[:, 1:] == ordered[:, :-1]).any()), where, "repeats an id within one position")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResponse:
    """The answer: one TeacherScores per item, in the order of the request. All carry the same fields."""

    request_id: str
    identity: TeacherIdentity
    ids: tuple[str, ...]
    scores: tuple[TeacherScores, ...]


def unscored(
    identity: TeacherIdentity, status: int, *, num_tokens: int, top_k: int, num_ids: int, entropy: bool
) -> TeacherScores:
    """NaN for every number that was asked for (-1 for ids): what is missing must not look like a measurement."""

    def missing(*shape: int) -> FloatArray:
        return np.full(shape, np.nan, np.float32)

    return TeacherScores(
        status=status,
        identity=identity,
        sampled=missing(num_tokens),
        topk_ids=np.full((num_tokens, top_k), -1, np.int32) if top_k else None,
        topk_logprobs=missing(num_tokens, top_k) if top_k else None,
        topk_tail=missing(num_tokens) if top_k else None,
        ids_logprobs=missing(num_tokens, num_ids) if num_ids else None,
        ids_tail=missing(num_tokens) if num_ids else None,
        entropy=missing(num_tokens) if entropy else None,
    )


class Capabilities(Part):
    """What `GET /v1/capabilities` says of a teacher server."""

    schema_version: Literal[1] = 1
    model: str
    revision: str
    tokenizer_fingerprint: str
    tier: int
    """See potstill.methods.Tier."""
    context_length: int
    """Tokens of context and completion together."""
    vocabulary: int
    """Ids from here on are refused."""
    max_items: int
    max_tokens: int
    max_top_k: int
    max_body_bytes: int

    @property
    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            name=self.model, revision=self.revision, tokenizer_fingerprint=self.tokenizer_fingerprint
        )


__all__ = [
    "MAX_TOP_K",
    "SCHEMA_VERSION",
    "Capabilities",
    "ScoreItem",
    "ScoreRequest",
    "ScoreResponse",
    "Want",
    "WireError",
    "unscored",
]
