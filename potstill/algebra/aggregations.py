"""How the tokens of a step are added up.

Choices only; learner/aggregation.py computes them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.section import Count, Section


class TokenMean(Section):
    """Σ ℓ / tokens of the step: long completions weigh more."""

    kind: Literal["token_mean"] = "token_mean"


class SequenceMean(Section):
    """Mean over completions of each one's mean: each weighs the same."""

    kind: Literal["sequence_mean"] = "sequence_mean"


class SequenceSum(Section):
    """Mean over completions of each one's sum: the scale of a sequence's KL."""

    kind: Literal["sequence_sum"] = "sequence_sum"


class Constant(Section):
    """Σ ℓ / (completions · length): no completion's length changes another's weight (Dr. GRPO)."""

    kind: Literal["constant"] = "constant"
    length: Count
    """Usually rollout.sampling.max_new_tokens."""


class TokenBudget(Section):
    """Σ ℓ / tokens over whole completions in random order until the budget is full (C3PO, 2506.14731)."""

    kind: Literal["token_budget"] = "token_budget"
    tokens: Count
    """Φ: loss tokens of a step. The last completion is cut; what exceeds the budget is not trained."""


Aggregation = Annotated[TokenMean | SequenceMean | SequenceSum | Constant | TokenBudget, Field(discriminator="kind")]
