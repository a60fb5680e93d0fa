"""What is minimised: a divergence over a support, an estimate from sampled tokens, or a likelihood of the text.

Choices only. p is the teacher, q the student. learner/divergences.py, rankings.py, estimators.py, pairs.py and spans.py
compute.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.section import NotNegative, Positive, Ramp, Section, values


class ForwardKL(Section):
    """KL(teacher ‖ student): covers what the teacher finds possible."""

    kind: Literal["forward_kl"] = "forward_kl"
    pointwise_clip: Positive | None = None
    """Cap on each outcome's term (OPSD v3, 2601.18734). Too small: only frequent tokens still teach."""
    zero_sum: bool = False
    """A clipped outcome gets no gradient at all, where the paper's clip pushes it slightly down."""

    @model_validator(mode="after")
    def _something_to_clip(self) -> ForwardKL:
        if self.zero_sum and self.pointwise_clip is None:
            raise ValueError("loss.zero_sum says how loss.pointwise_clip clips: set that too")
        return self


class ReverseKL(Section):
    """KL(student ‖ teacher): seeks a mode."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JSD(Section):
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q (GKD, 2306.13649)."""

    kind: Literal["jsd"] = "jsd"
    beta: float | Ramp = 0.5
    """0 is the forward KL, 1 the reverse KL; between, the teacher's share of the mixture."""

    @model_validator(mode="after")
    def _in_range(self) -> JSD:
        if not all(0 <= beta <= 1 for beta in values(self.beta)):
            raise ValueError("loss.beta lies in [0, 1]")
        return self


class SkewForwardKL(Section):
    """KL(p ‖ αp + (1 − α)q) (DistiLLM, 2402.03898). At most −log α, whatever the supports."""

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Teacher's share of the mixture. Large: the gradient fades as 1 − α."""


class SkewReverseKL(Section):
    """KL(q ‖ (1 − α)p + αq) (DistiLLM, 2402.03898). At most −log α."""

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Student's share of the mixture."""
    detach_mixture: bool = False
    """No gradient through the student inside the mixture, as DistiLLM-2's code has it; the paper's has one."""


class BalancedKL(Section):
    """g KL(q‖p) + (1 − g) KL(p‖q), g = σ(sharpness · (H_q − H_p)) (BD-KD, 2212.12965, token by token)."""

    kind: Literal["balanced_kl"] = "balanced_kl"
    sharpness: Positive = 1.0
    """0 would be half of each; large: one or the other."""


class PlackettLuce(Section):
    """Likelihood that the student ranks the outcomes as the teacher does (TSD-KD 2603.13260, PLD 2506.12542)."""

    kind: Literal["plackett_luce"] = "plackett_luce"
    weighted: bool = False
    """Each rank counts as much as the teacher's probability of its token (PLD); otherwise all the same (TSD-KD)."""
    gold_first: bool = False
    """The written token is ranked first whatever the teacher thinks of it (PLD). Teaches mistakes where it is wrong."""


class SortedL1(Section):
    """Σ |sorted q − sorted p|: shapes only, not which token (ULD, 2402.12030). A last resort across vocabularies."""

    kind: Literal["sorted_l1"] = "sorted_l1"


class PolicyGradient(Section):
    """−A · log q of the sampled token, A = distil · [λ log p − log q + (1 − λ) log ref] + reward · A_RL + baseline."""

    kind: Literal["policy_gradient"] = "policy_gradient"
    distil: float = 1.0
    """Of the teacher's part of the advantage. 0: reward alone."""
    extrapolation: float = 1.0
    """λ of G-OPD (2602.12125): the optimum is ref^(1−λ) · p^λ. Above 1: beyond the teacher, with more noise."""
    score: Literal["log", "power"] = "log"
    """log: log p − log q; power: p^a − q^a, which lies in [−1, 1] (PowerOPD, 2606.17199)."""
    exponent: Positive = 5.0
    """a of score = "power"."""
    student: Literal["current", "sampler"] = "current"
    """Whose log q is in the advantage. sampler: biased as soon as the weights are newer than the text."""
    baseline: Literal["none", "kl"] = "none"
    """kl adds KL(q‖p), which the teacher's part of the advantage averages to (vOPD, 2605.07865)."""
    reward: float | Ramp = 0.0
    """Of the group-normalised reward."""
    normalise: Literal["std", "mean"] = "std"
    """Of a group's rewards: less their mean, and std also over their deviation (GRPO), which prefers easy prompts."""
    kl_penalty: NotNegative = 0.0
    """Subtracted from the reward before it is normalised, times the mean of log sampler − log near (π-Distill, whose β
    it is). Too small: text drifts to where the other prompt cannot follow; too large: it outweighs the reward."""
    near: Literal["teacher", "own_prompt"] = "teacher"
    """Of kl_penalty, whom the sampler shall stay near. own_prompt: the current student under its own prompt, for text
    that it wrote under the teacher's."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """γ of the advantages of later tokens. 0: a token answers for itself; 1: the gradient of the sequence's KL."""
    length_normalised: bool = False
    """Later advantages are averaged, not summed (MiniLLM, 2306.08543), or long answers would dominate."""
    future_only: bool = False
    """Leave the token's own advantage out: an exact term beside it has it already (MiniLLM)."""


class K2(Section):
    """½ (log p − log q)² of the sampled token: its gradient is the reverse KL's, on-policy."""

    kind: Literal["k2"] = "k2"


class RatioK3(Section):
    """ρ · (p/q − 1 − log p/q): its gradient is the reverse KL's for any sampler (Skill-SD, 2604.10674)."""

    kind: Literal["ratio_k3"] = "ratio_k3"
    clamp: Positive = 20.0
    """Of |log p/q|, or one token that the teacher prefers by e^20 overflows."""


class ChunkCredit(Section):
    """−A · log q, A = share · log p(chunk) − log q: a chunk's log-prob, shared out as the student's (2606.09456)."""

    kind: Literal["chunk_credit"] = "chunk_credit"
    clamp: Positive = 10.0
    """Of |A|. Too small: what the teacher rules out is hardly pushed down; too large: one such token rules the step."""


class ChunkLikelihood(Section):
    """Cross-entropy of "the chunk comes next", at probabilities p^(1/τ) and q^(1/τ) of it (ALM, 2503.20083)."""

    kind: Literal["chunk_likelihood"] = "chunk_likelihood"
    temperature: Positive = 100.0
    """τ. Small: chunks that either side finds improbable teach nothing; large: about (log p − log q)² / log q."""


class Likelihood(Section):
    """−log q of the written token: supervised learning."""

    kind: Literal["likelihood"] = "likelihood"


class Entropy(Section):
    """The student's entropy: weight > 0 sharpens, weight < 0 explores."""

    kind: Literal["entropy"] = "entropy"


class Preference(Section):
    """−log σ(β [log q(y⁺)/ref(y⁺) − log q(y⁻)/ref(y⁻)]): DPO of two completions of a prompt."""

    kind: Literal["preference"] = "preference"
    beta: Positive = 0.1
    """Too large: the student hardly moves; too small: it forgets the reference."""
    pairs: Literal["others_over_student", "best_over_worst"] = "others_over_student"
    """others_over_student: y⁺ is the one that others wrote, y⁻ the student's (SODA). best_over_worst: of the student's
    own, those of highest and lowest reward; a prompt whose completions all earned the same teaches nothing."""


Loss = Annotated[
    ForwardKL
    | ReverseKL
    | JSD
    | SkewForwardKL
    | SkewReverseKL
    | BalancedKL
    | PlackettLuce
    | SortedL1
    | PolicyGradient
    | K2
    | RatioK3
    | ChunkCredit
    | ChunkLikelihood
    | Likelihood
    | Entropy
    | Preference,
    Field(discriminator="kind"),
]

DIVERGENCES = (ForwardKL, ReverseKL, JSD, SkewForwardKL, SkewReverseKL, BalancedKL, PlackettLuce, SortedL1)
ESTIMATES = (PolicyGradient, K2, RatioK3, ChunkCredit)  # of tokens that the student itself sampled
CHUNKED = (ChunkCredit, ChunkLikelihood)  # of tokens that were scored together; alone, each is a chunk
