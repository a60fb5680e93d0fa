"""What travels between rooms: one type per hop, in the order of the flow.

    Prompt → Rollout → ScoredRollout → (Receipt) → StepBatch → StepReport → WeightsVersion

Legend for shapes: P prompt tokens, T completion tokens, K entries of a top-k, M draws, C tokens of the teacher's own
context.
Arrays are numpy, contiguous and read-only by convention: Ray hands them out as views of shared memory.
A missing number is NaN; nothing here has a default that could pass for a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
HalfArray = NDArray[np.uint16]
"""The bits of bfloat16 numbers, which numpy cannot name: the upper half of the same number as float32."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the student wrote its end token; it is the last id of the completion
    LENGTH = "length"  # max_new_tokens was reached; no end token was seen
    ABORTED = "aborted"  # new weights came; what was written may be asked for again as the start of a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message. Example: Message(role="user", content="12 + 9 = ?")."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Hop 1, made by orchestrator/prompts.py. A question, and what only graders and teachers may know about it.

    Example:
        Prompt(id="train-7", index=7, messages=(Message(role="user", content="12 + 9 = ?"),), domain="arithmetic",
               answer="21", solution="2+9=11 carry 1\\n1+0+1=2\\nAnswer: 21", info={"source_index": 7})
    """

    id: str
    index: int  # position in the seeded stream; a run's prompt cursor is the next index
    messages: tuple[Message, ...]
    domain: str
    answer: str | None  # final answer; for the verifier and for a privileged teacher, never for the student
    solution: str | None  # reference completion with its written steps, for supervised runs
    info: Mapping[str, Any] = field(default_factory=dict)  # what the verifier wants back
    advice: str | None = None  # what a black box says about it; for a privileged teacher
    step: int | None = None  # the optimizer step that trains it, from 1; None: held out
    text: Literal["given"] | tuple[int, ...] | None = None
    """Its completion: the data's solution, or these ids, which nobody has just written. None: as [rollout] says."""
    private: tuple[str, ...] = ()  # texts that no completion of it shall teach, none of them empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Hop 2, made by rollout_worker. One completion, exactly as it was sampled.

    Example, for a completion of T=3 tokens whose last id is the end token:
        completion_ids   [50, 49, 2]
        loss_mask        [True, True, True]       False: written by an environment or a template, never trained on
        student_logprobs [-0.1, -0.7, -0.02]      under the distribution really sampled from; NaN if not sampled by it
        weight_versions  [4, 4, 4]                the student that wrote each token; -1: not written by the student.
                                                  A teacher's token in its text has that of the token it replaced
        support_ids      [[50, 53], ...]          T×K, the student's own top-k at each position, sorted by probability
    """

    id: str
    prompt_id: str
    index: int
    domain: str
    prompt_ids: IntArray  # [P]
    completion_ids: IntArray  # [T], T >= 1
    loss_mask: BoolArray  # [T]
    student_logprobs: FloatArray  # [T]
    weight_versions: IntArray  # [T]
    finish_reason: FinishReason
    temperature: float  # at which the completion was sampled; 0.0 is greedy
    reward: float  # the verifier's score in [0, 1]; NaN when there is no verifier
    teacher_context_ids: IntArray | None  # [C] what the teacher reads instead of prompt_ids; None: the same prompt
    snapshot: bool = False  # written by a student that never changes: no version of it is stale
    privileged: bool = False  # prompt_ids are the teacher's own prompt, which is learnt under and shown to nobody
    support_ids: IntArray | None = None  # [T, K]
    support_logprobs: FloatArray | None = None  # [T, K] student's log-probs of support_ids at sampling time
    draw_ids: IntArray | None = None  # [T, M] independent draws from what each token was sampled from; may repeat
    draw_logprobs: FloatArray | None = None  # [T, M] with which they were drawn
    privacy: FloatArray | None = None  # [T] in [0, 1]; None: the objective does not read it

    def __post_init__(self) -> None:
        length = len(self.completion_ids)
        if length == 0 or len(self.prompt_ids) == 0:
            raise ValueError(f"rollout {self.id}: prompt_ids and completion_ids must not be empty")
        columns = ("loss_mask", "student_logprobs", "weight_versions", "support_ids", "support_logprobs")
        for name in (*columns, "draw_ids", "draw_logprobs", "privacy"):
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise ValueError(f"rollout {self.id}: {name} has {len(value)} rows, completion_ids has {length}")

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def origin(self) -> str:
        """Who wrote it and under which prompt it is learnt: "student", "privileged" (its own, under the teacher's
        prompt) or "others" (the teacher or the data)."""
        if not (self.weight_versions >= 0).any():
            return "others"
        return "privileged" if self.privileged else "student"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherIdentity:
    """Who scored. Two scores may be mixed, cached or failed over only when their identities are equal."""

    name: str
    revision: str
    tokenizer_fingerprint: str


class ScoreStatus:
    """Per-item status on the wire (u8). Anything but OK means that every number of the item is NaN."""

    OK = 0
    FAILED = 1
    DEADLINE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """The teacher's log-probs (natural log, float32, temperature 1) for exactly the T tokens of one completion.

    Position t is scored after the teacher's context and completion tokens < t. Fields not asked for are None.
    Example with K=2: topk_ids [[50, 53], ...], topk_logprobs [[-0.05, -3.2], ...], topk_tail [-4.6, ...]
    where topk_tail is the log of the probability left outside the K entries (-inf when nothing is left).
    """

    status: int
    identity: TeacherIdentity
    sampled: FloatArray  # [T] log p(completion token)
    draws: FloatArray | None = None  # [T, M] log p of the rollout's own draws, Rollout.draw_ids
    topk_ids: IntArray | None = None  # [T, K] the teacher's own most probable ids
    topk_logprobs: FloatArray | None = None  # [T, K]
    topk_tail: FloatArray | None = None  # [T]
    ids_logprobs: FloatArray | None = None  # [T, K] log p of the ids that the caller chose
    ids_tail: FloatArray | None = None  # [T] log of the teacher's mass outside the caller's ids
    entropy: FloatArray | None = None  # [T] nats
    drawn_ids: IntArray | None = None  # [T, M] draws from the teacher outside its top-k, with replacement
    drawn_logprobs: FloatArray | None = None  # [T, M] log p of drawn_ids
    hidden: HalfArray | None = None  # [T, H] what the teacher's head reads, after the final norm; see HalfArray
    chunks: IntArray | None = None  # [T] tokens with the same number were scored together by a teacher of another
    # tokenizer: "sampled" of each is the log-prob of the whole chunk; -1: not scored (NaN)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """Hop 3. A rollout and its teacher's scores; `scores` is None where the learner itself is the teacher."""

    rollout: Rollout
    scores: TeacherScores | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Where a list[ScoredRollout] lies: in the object store, in a file of the run's spool, or in both."""

    ref: Any | None  # ray.ObjectRef; None: it is on disk alone
    path: str | None  # potstill/spool.py reads it; None: it is in memory alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the loop sees of a scored rollout: a slip of a few hundred bytes. The arrays stay where `bundle` says.

    `bundle` is a list[ScoredRollout]; this one is at `position` in it.
    """

    rollout_id: str
    prompt_id: str
    index: int
    domain: str
    oldest_version: int  # of its tokens that the student's moving weights wrote; -1: there is none
    num_prompt_tokens: int
    num_completion_tokens: int
    num_loss_tokens: int
    num_unscored_tokens: int
    finish_reason: FinishReason
    reward: float
    generate_s: float  # this rollout's share of the time that its worker's call spent writing
    score_s: float  # and waiting for the teacher
    repetition: float = math.nan  # how far zlib shrinks the end of its text; NaN: nobody looked
    bundle: Any  # a Bundle in a run; tests use the list itself
    position: int
    by_version: tuple[tuple[int, int, int], ...] = ()  # version, loss tokens, unscored ones; (): all of one version

    def fresh_tokens(self, oldest: int) -> tuple[int, int]:
        """Loss tokens, and unscored ones among them, that version `oldest` or a later one wrote, or nobody's."""
        if not self.by_version:
            stale = 0 <= self.oldest_version < oldest
            return (0, 0) if stale else (self.num_loss_tokens, self.num_unscored_tokens)
        fresh = [counts for version, *counts in self.by_version if version < 0 or version >= oldest]
        return sum(tokens for tokens, _ in fresh), sum(missing for _, missing in fresh)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Hop 4, made by orchestrator/buffer.py. References, and the one denominator that everybody uses.

    Example: step 3 with two rollouts of 5 and 7 trainable tokens has num_loss_tokens = 12 and num_sequences = 2.
    """

    step: int  # the optimizer step that this batch makes, counted from 1
    receipts: tuple[Receipt, ...]
    num_loss_tokens: int
    num_sequences: int
    oldest_version: int = 0  # tokens that an older version wrote are read and not trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """What the learner's rank 0 decides for all ranks: the checkpoint to go on from, and where they meet."""

    checkpoint: Path | None
    damaged: tuple[str, ...]  # what was wrong with each newer checkpoint
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingPoint:
    """Where an attempt of a run begins: at a checkpoint's step, or at version 0. Made by the learner, who reads it."""

    published: WeightsVersion | None  # of a rank that has no part in it: None
    extra: Mapping[str, Any]  # what the checkpoint keeps of others than the learner; empty without one
    damaged: tuple[str, ...]  # what was wrong with each newer checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Hop 5, made by the learner after the optimizer moved."""

    step: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]  # stage → wall seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor in a weights payload: where it lies in the flat buffer."""

    name: str
    dtype: str  # torch's name without the prefix, e.g. "float32"
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """Hop 6, made by learner/publish.py. Version 0 is the student as the run found it; step n makes version n."""

    version: int
    digest: str  # xxh3 of all below but the payload
    checksums: tuple[int, ...]  # xxh3 of each bucket of the payload; from device to device, a sum of each tensor
    tensors: Sequence[TensorEntry]
    payload: Any  # a transports.Payload; None: the bytes are handed over beside it
    adapter_scale: float | None = None  # the tensors are low-rank updates, added times this; None: they are all weights
    rounded: bool = False  # float32 weights that travel as bfloat16
