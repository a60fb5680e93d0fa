"""The states that a teacher server sends, and its head: every logit of a teacher that is elsewhere.

    logits = states · headᵀ      states in bfloat16, sent beside the scores; head from the folder of the teacher's model

Of that model the head alone is loaded, and only one with the digest that the teacher named: states mean nothing to
another. It refuses states of another width, and a head of another vocabulary than the student's. A rollout that was
not scored has NaN for states: no term reads them, or its loss is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from learner.facts import Logits
from learner.logprobs import upcast
from learner.model import CausalModel
from learner.targets import aligned
from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.config_teachers import ServerTeacher
from potstill.errors import AlignmentError, ConfigError
from potstill.heads import BLOCK_ROWS, head_digest
from potstill.types import BoolArray, HalfArray, ScoredRollout
from potstill.wire import MISSING_HALF, Capabilities


class SentStates:
    """A teacher whose states come with the rollouts. `head` [V, H] is multiplied with them, in its own precision."""

    def __init__(self, head: Tensor) -> None:
        self._head = head.detach()

    @classmethod
    def of(cls, config: RunConfig, met: Capabilities | None, student: CausalModel) -> SentStates | None:
        """Where the run's teacher, `met` when the run began, is asked for its states; None where it is not.

        The head is on the student's device and in its dtype. Raises ConfigError when it is not in the folder named.
        """
        if not isinstance(config.teacher, ServerTeacher) or config.objective.tier < Tier.FULL:
            return None
        folder = config.teacher.head_folder
        assert folder is not None, "checked by the plan"
        assert met is not None, "a server is met before the learner opens"
        head = find_head(Path(folder), shape=(len(student.head), met.hidden_size), digest=met.head_id)
        return cls(head.to(device=student.head.device, dtype=student.head.dtype))

    def read(self, part: Sequence[ScoredRollout], masks: Sequence[BoolArray]) -> Logits:
        """The logits of the rollouts' loss tokens, by row. Raises AlignmentError for states of another width."""
        width = self._head.shape[1]
        rows = [_states(scored, width)[mask] for scored, mask in zip(part, masks, strict=True)]
        hidden = as_tensor(np.concatenate(rows)).to(device=self._head.device, dtype=self._head.dtype)
        return lambda wanted: upcast(hidden[wanted] @ self._head.T)


def find_head(folder: Path, *, shape: tuple[int, int], digest: str) -> Tensor:
    """The matrix [V, H] in the folder's weights that has this digest: the output head, or the embedding that is tied
    to it. Raises ConfigError when there is none."""
    others = 0
    for matrix in _matrices(folder, shape):
        if head_digest(block.float().numpy() for block in torch.split(matrix, BLOCK_ROWS)) == digest:
            return matrix
        others += 1
    if others:
        raise ConfigError(
            f"the head in {str(folder)!r} is not the one that the teacher's states are for: name the folder of the "
            "model that is served, in the precision in which it is served"
        )
    raise ConfigError(
        f"{str(folder)!r} holds no head of {shape[0]} tokens, which the student has, by {shape[1]}, the width of the "
        "teacher's states"
    )


def _matrices(folder: Path, shape: tuple[int, int]) -> Iterator[Tensor]:
    """All of this shape, in the order of the files' names. Nothing else is read."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    if tuple(weights.get_slice(name).get_shape()) == shape:
                        yield weights.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{file} is not a readable safetensors file: {error}") from None


def as_tensor(states: HalfArray) -> Tensor:
    """[N, H] bfloat16 of its bits."""
    return torch.from_numpy(states).view(torch.bfloat16)


def as_bits(states: Tensor) -> HalfArray:
    """The bits of states [N, H], rounded to bfloat16 as a teacher server rounds them."""
    bits: HalfArray = states.detach().to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return bits


def _states(scored: ScoredRollout, width: int) -> HalfArray:
    """[T, width]; NaN where no term reads what the teacher says of the rollout, and it was not asked."""
    rollout = scored.rollout
    if scored.scores is None:
        return np.full((len(rollout.completion_ids), width), MISSING_HALF, np.uint16)
    states = aligned(scored).hidden
    if states is None or states.shape[1:] != (width,):
        sent = "no states" if states is None else f"states {states.shape[1:]} wide"
        raise AlignmentError(f"rollout {rollout.id} has {sent}; the head reads {width}")
    return states
