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

SCHEMA_VERSION = 2
MAX_TOP_K = 128  # entries per position that a teacher server sends, of its own top-k or of ids that a caller chose

MISSING_HALF = 0x7FC0  # NaN as the bits of a bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked of every completion token, beside its own log-prob, which always comes. 0 and False: not asked.

    Example: Ask(top_k=8, draws=42) asks for the eight most probable tokens and 42 draws from the others.
    """

    top_k: int = 0  # entries of the teacher's own top-k
    num_ids: int = 0  # ids of the caller's choice
    draws: int = 0  # with replacement, from the teacher's distribution outside its top-k
    entropy: bool = False
    hidden: int = 0  # width of the states that the teacher's head reads

    def __post_init__(self) -> None:
        for name in ("top_k", "num_ids", "draws", "hidden"):
            require(getattr(self, name) >= 0, name, "must not be negative")


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
    token_ids: IntArray | None = None  # [T, Ask.num_ids] ids of the caller's choice, distinct at each position
    # For whoever stands between a caller and several teachers, or one of other tokens; neither is ever sent:
    domain: str | None = None  # of the prompt
    messages: tuple[Message, ...] | None = None  # what the teacher reads, as text


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What is asked of a teacher, of several completions alike. Raises WireError when parts contradict each other."""

    model: str
    items: tuple[ScoreItem, ...]
    ask: Ask
    seed: int = 0  # of the draws; the same request draws the same ids, whatever it is batched with
    temperature: float = 1.0  # teachers score the distribution they have; any other value is refused
    expect_tokenizer_fingerprint: str | None = None
    expect_revision: str | None = None
    deadline_ms: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.items), "items", "must not be empty")
        require(self.temperature == 1.0, "temperature", "must be 1.0: teachers do not temper their scores")
        require(self.deadline_ms is None or self.deadline_ms > 0, "deadline_ms", "must be above 0")
        require(len({item.id for item in self.items}) == len(self.items), "items", "two items have the same id")
        for index, item in enumerate(self.items):
            _check_item(item, f"items[{index}]", num_ids=self.ask.num_ids)


def _check_item(item: ScoreItem, where: str, *, num_ids: int) -> None:
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
    require((item.token_ids is not None) == (num_ids > 0), where, "is given if and only if num_ids is above 0")
    if item.token_ids is not None:
        fits = item.token_ids.ndim == 2 and item.token_ids.shape[1] == num_ids
        require(fits, where, f"must be [tokens, num_ids = {num_ids}]")
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


def unscored(identity: TeacherIdentity, status: int, *, num_tokens: int, ask: Ask) -> TeacherScores:
    """NaN for every number that was asked for (-1 for ids): what is missing must not look like a measurement."""

    def missing(*shape: int) -> FloatArray:
        return np.full(shape, np.nan, np.float32)

    return TeacherScores(
        status=status,
        identity=identity,
        sampled=missing(num_tokens),
        topk_ids=np.full((num_tokens, ask.top_k), -1, np.int32) if ask.top_k else None,
        topk_logprobs=missing(num_tokens, ask.top_k) if ask.top_k else None,
        topk_tail=missing(num_tokens) if ask.top_k else None,
        ids_logprobs=missing(num_tokens, ask.num_ids) if ask.num_ids else None,
        ids_tail=missing(num_tokens) if ask.num_ids else None,
        entropy=missing(num_tokens) if ask.entropy else None,
        drawn_ids=np.full((num_tokens, ask.draws), -1, np.int32) if ask.draws else None,
        drawn_logprobs=missing(num_tokens, ask.draws) if ask.draws else None,
        hidden=np.full((num_tokens, ask.hidden), MISSING_HALF, np.uint16) if ask.hidden else None,
    )


class Capabilities(Part):
    """What `GET /v1/capabilities` says of a teacher server."""

    schema_version: Literal[2] = 2
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
    """Also of draws, and of ids that a caller chooses."""
    max_body_bytes: int
    hidden_size: int
    """Of the states that can be asked for; 0: this teacher does not send them."""
    head_id: str
    """Digest of the head's weights: whoever multiplies states with a head must have this one. Empty without states."""

    @property
    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            name=self.model, revision=self.revision, tokenizer_fingerprint=self.tokenizer_fingerprint
        )


__all__ = [
    "MAX_TOP_K",
    "MISSING_HALF",
    "SCHEMA_VERSION",
    "Ask",
    "Capabilities",
    "ScoreItem",
    "ScoreRequest",
    "ScoreResponse",
    "WireError",
    "unscored",
]
