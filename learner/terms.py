"""One term of an objective at one step: what each row counts for, settled before the loss, and the loss of a row.

    weight · aggregation · gates · sequence-level correction     [N] constants, here
    token-level correction · loss                                [C] chunk by chunk, with gradient

The formulas are elsewhere; this file only says which of them a choice means.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner import divergences, estimators, outcomes, pairs, rankings, spans
from learner.aggregation import Denominators, token_weights
from learner.chunk import Chunk
from learner.corrections import sequence_factor, token_factor
from learner.facts import Facts, Moment, read_by
from learner.gates import gate_factor
from potstill.algebra.corrections import Ignored
from potstill.algebra.losses import (
    JSD,
    K2,
    BalancedKL,
    ChunkCredit,
    ChunkLikelihood,
    Entropy,
    ForwardKL,
    Likelihood,
    Loss,
    PlackettLuce,
    PolicyGradient,
    Preference,
    RatioK3,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SortedL1,
)
from potstill.algebra.objective import Term
from potstill.algebra.supports import Samples
from potstill.algebra.targets import Standardised, Tempered
from potstill.errors import NonFinite


class PreparedTerm:
    """`weights` [N] are final; rows where they are 0 are never given to `loss`. `credit` [N]: of a "chunk_credit"."""

    def __init__(
        self, name: str, term: Term, facts: Facts, *, denominators: Mapping[str, Denominators], moment: Moment
    ) -> None:
        self._name = name
        self._term = term
        self._facts = facts
        self._moment = moment
        self._read = read_by(term.over, facts.origin)
        self.weights = self._weights(denominators)
        self._future = estimators.future_advantage(term.loss, facts) if isinstance(term.loss, PolicyGradient) else None
        self._whole = _linearised(term.loss, facts)
        self.credit = spans.credit(facts) if isinstance(term.loss, ChunkCredit) else None

    def _weights(self, denominators: Mapping[str, Denominators]) -> Tensor:
        term, facts = self._term, self._facts
        scale = self._moment.at(term.weight)
        if scale == 0 or not bool(self._read.any()):
            return torch.zeros_like(facts.origin, dtype=torch.float64)
        lengths = [int(part.sum()) for part in torch.split(self._read, list(facts.lengths))]
        weights = torch.zeros(len(self._read), dtype=torch.float64, device=self._read.device)
        weights[self._read] = scale * token_weights(
            lengths, aggregation=term.aggregation, denominators=denominators[term.over]
        ).to(weights.device)
        for gate in term.gates:
            weights = weights * gate_factor(gate, facts, self._read)
        weights = weights * sequence_factor(term.correction, facts, self._read)
        if not bool(weights.isfinite().all()):
            raise NonFinite(f"term {self._name!r}: a gate or correction gives a weight that is not finite")
        return weights

    def loss(self, chunk: Chunk) -> Tensor:
        """[C] of the chunk's rows. Raises NonFinite when one of them is not finite."""
        loss = self._loss(chunk)
        if not bool(loss.isfinite().all()):
            raise NonFinite(f"term {self._name!r}: a row that counts has a loss that is not finite; is a score NaN?")
        return loss

    def _loss(self, chunk: Chunk) -> Tensor:
        match self._term.loss:
            case Likelihood():
                return self._corrected(chunk, estimators.negative_log_likelihood(chunk.written))
            case Entropy():
                return divergences.entropy(chunk.logq)
            case Preference() | ChunkLikelihood():
                assert self._whole is not None
                return self._whole.loss(chunk.written, chunk.rows)
            case ChunkCredit(clamp=clamp):
                assert self.credit is not None
                advantage = self.credit[chunk.rows].clamp(-clamp, clamp)
                return self._corrected(chunk, estimators.policy_gradient(chunk.written, advantage), advantage)
            case PolicyGradient():
                return self._policy_gradient(chunk)
            case K2():
                return self._corrected(chunk, estimators.k2(chunk.written, self._other(chunk)))
            case RatioK3(clamp=clamp):
                return estimators.ratio_k3(chunk.written, self._other(chunk), chunk.fact("behaviour"), clamp=clamp)
        return self._corrected(chunk, self._divergence(chunk))

    def _divergence(self, chunk: Chunk) -> Tensor:
        logq, logp = outcomes.compare(self._term, self._name, chunk, self._moment)
        match self._term.loss:
            case ForwardKL(pointwise_clip=clip, zero_sum=zero_sum):
                loss = divergences.forward_kl(logq, logp, pointwise_clip=clip, zero_sum=zero_sum)
            case ReverseKL():
                loss = divergences.reverse_kl(logq, logp)
            case JSD(beta=beta):
                loss = divergences.jsd(logq, logp, beta=self._moment.at(beta))
            case SkewForwardKL(alpha=alpha):
                loss = divergences.skew_forward_kl(logq, logp, alpha=alpha)
            case SkewReverseKL(alpha=alpha, detach_mixture=detach):
                loss = divergences.skew_reverse_kl(logq, logp, alpha=alpha, detach_mixture=detach)
            case BalancedKL(sharpness=sharpness):
                loss = divergences.balanced_kl(logq, logp, sharpness=sharpness)
            case PlackettLuce(weighted=weighted, gold_first=gold_first):
                order = outcomes.teacher_order(self._term, chunk, logp, gold_first=gold_first)
                loss = rankings.plackett_luce(logq, logp, order, weighted=weighted)
            case SortedL1():
                loss = rankings.sorted_l1(logq, logp)
        match self._term.target:
            case Tempered(student=temperature, times_square=True) | Standardised(temperature=temperature):
                loss = loss * temperature**2
        return loss

    def _policy_gradient(self, chunk: Chunk) -> Tensor:
        term = self._term
        assert isinstance(term.loss, PolicyGradient)
        if isinstance(term.support, Samples):
            ids = chunk.fact("sample_ids")
            if ids.shape[-1] != term.support.m:
                raise ValueError(f"support.m is {term.support.m}, but facts.sample_ids has {ids.shape[-1]} draws")
            return estimators.sampled_actions(
                chunk.logq.gather(-1, ids),
                self._of_draws(chunk, ids),
                chunk.fact("sample_behaviour"),
                scale=term.loss.distil,
                factor=lambda ratio, advantage: token_factor(term.correction, ratio, advantage),
            )
        advantage = estimators.advantage(term.loss, chunk, moment=self._moment)
        if self._future is not None:
            own = 0.0 if term.loss.future_only else advantage
            advantage = own + self._future[chunk.rows]
        return self._corrected(chunk, estimators.policy_gradient(chunk.written, advantage), advantage)

    def _of_draws(self, chunk: Chunk, ids: Tensor) -> Tensor:
        """[C, M] the teacher's log-probs of the draws."""
        if chunk.has_logits("teacher"):
            return chunk.other_logits("teacher").log_softmax(-1).gather(-1, ids)
        return chunk.fact("sample_teacher")

    def _other(self, chunk: Chunk) -> Tensor:
        return chunk.fact(self._term.against)

    def _corrected(self, chunk: Chunk, loss: Tensor, advantage: Tensor | None = None) -> Tensor:
        if isinstance(self._term.correction, Ignored):
            return loss
        log_ratio = (chunk.written - chunk.fact("behaviour")).detach()
        return token_factor(self._term.correction, log_ratio, advantage) * loss


def _linearised(loss: Loss, facts: Facts) -> pairs.Linearised | None:
    """A loss of several tokens at once, at the current weights."""
    match loss:
        case Preference():
            return pairs.preference(facts, loss)
        case ChunkLikelihood(temperature=temperature):
            return spans.likelihood(facts, temperature=temperature)
    return None
