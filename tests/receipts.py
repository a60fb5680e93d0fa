"""Receipts by hand: a test names what it is about and leaves the rest."""

from __future__ import annotations

import math

from potstill.types import FinishReason, Receipt


def make_receipt(
    prompt: int,
    *,
    version: int = 0,
    sample: int = 0,
    tokens: int = 5,
    unscored: int = 0,
    reward: float = 1.0,
    finish_reason: FinishReason = FinishReason.STOP,
    repetition: float = math.nan,
) -> Receipt:
    """A completion of training prompt `prompt` that was trained on everywhere; it took 0.1 s to write, 0.2 to score."""
    return Receipt(
        rollout_id=f"train-{prompt}/{sample}",
        prompt_id=f"train-{prompt}",
        index=prompt,
        domain="test",
        oldest_version=version,
        num_prompt_tokens=3,
        num_completion_tokens=tokens,
        num_loss_tokens=tokens,
        num_unscored_tokens=unscored,
        finish_reason=finish_reason,
        reward=reward,
        generate_s=0.1,
        score_s=0.2,
        repetition=repetition,
        bundle=None,
        position=sample,
    )
