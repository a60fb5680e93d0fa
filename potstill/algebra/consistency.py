"""What contradicts itself in a term, one line each, with the way out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from potstill.algebra.aggregations import TokenBudget
from potstill.algebra.corrections import Clipped, Ignored
from potstill.algebra.gates import AlignedOneToOne, AlignedSpan, Evidence, PassRate
from potstill.algebra.judges import Discriminator
from potstill.algebra.losses import (
    CHUNKED,
    ESTIMATES,
    ChunkCredit,
    ChunkLikelihood,
    Entropy,
    ForwardKL,
    Likelihood,
    Loss,
    PolicyGradient,
    Preference,
    RatioK3,
    SortedL1,
)
from potstill.algebra.supports import Full, Nucleus, RandomSampling, Sampled, Samples, Support, TeacherTopK
from potstill.algebra.targets import Standardised, Taid, Tempered
from potstill.section import Ramp

if TYPE_CHECKING:
    from potstill.algebra.objective import Objective, Term


def misfits(term: Term) -> Iterator[str]:
    """What contradicts itself, one line each, with the way out."""
    loss, support, target = term.loss, term.support, term.target
    kind, where = f'loss "{loss.kind}"', f'support is "{support.kind}"'
    if term.reads_distribution and isinstance(support, Sampled | Samples):
        yield f'{kind} compares distributions, but {where}; use "student_topk", "teacher_topk" or "full"'
    if isinstance(loss, ESTIMATES) and not isinstance(support, Sampled | Samples):
        yield f'{kind} is an estimate from sampled tokens, but {where}; use "sampled" or "samples"'
    if isinstance(loss, ESTIMATES) and term.over in {"all", "others"}:
        yield f'{kind} is an estimate from tokens that the student sampled: over is "student", not "{term.over}"'
    if isinstance(loss, Preference):
        over = "all" if loss.pairs == "others_over_student" else "student"
        if (term.over, term.aggregation.kind) != (over, "sequence_sum"):
            yield f'{kind} with pairs "{loss.pairs}" is over "{over}", with aggregation "sequence_sum"'
    if isinstance(loss, Likelihood | Preference | ChunkLikelihood) and not isinstance(support, Sampled):
        yield f'{kind} is of the written tokens, but {where}; use "sampled"'
    if isinstance(loss, Entropy | SortedL1) and not isinstance(support, Full):
        yield f'{kind} is of the whole vocabulary, but {where}; use "full"'
    if isinstance(support, Samples) and loss != _plain(loss):
        yield f'support "samples" is for loss "policy_gradient" without reward, returns or baseline, not for {kind}'
    if isinstance(support, RandomSampling) and loss != ForwardKL():
        yield f'support "random_sampling" is unbiased for loss "forward_kl" without a clip only, not for {kind}'
    if target is not None and not term.reads_distribution:
        yield f"target changes distributions, and {kind} reads none"
    elif isinstance(target, Tempered | Standardised) and not _complete(support):
        yield f'target "{target.kind}" needs support "full" or a top-k with rest = "renorm", but {where}'
    elif target is not None and not isinstance(target, Tempered | Standardised) and not isinstance(support, Full):
        yield f'target "{target.kind}" needs support "full", but {where}'
    if getattr(target, "noise", 0) and loss != ForwardKL():
        yield f'target "swing" with noise rules some outcomes out, where {kind} may be infinite; use "forward_kl"'
    if isinstance(term.correction, Clipped) and not isinstance(loss, PolicyGradient | ChunkCredit):
        yield f'correction "clipped" needs the sign of an advantage, which {kind} does not have; use "truncated"'
    if isinstance(loss, RatioK3 | Entropy | Preference | ChunkLikelihood) and not isinstance(term.correction, Ignored):
        yield f'{kind} takes no correction: remove "{term.correction.kind}"'
    if any(isinstance(gate, Evidence) for gate in term.gates) and not getattr(loss, "reward", 0):
        yield 'gate "evidence" scales a reward: it belongs to a loss "policy_gradient" with a reward'
    if isinstance(target, Taid) and isinstance(term.weight, Ramp):
        yield 'target "taid" follows the loss, which a weight that is a ramp would change by itself'
    if isinstance(loss, PolicyGradient):
        yield from _misfits_of_advantage(term, loss)
    if isinstance(loss, CHUNKED) and term.against == "reference":
        yield f'{kind} is against the teacher: the reference has the student\'s own tokens; use "k2"'
    if isinstance(loss, CHUNKED) and isinstance(term.aggregation, TokenBudget):
        yield f'{kind} is of whole chunks, which aggregation "token_budget" may cut; use "token_mean"'


def disagreements(terms: Sequence[Term]) -> Iterator[str]:
    """Terms that read one number of the step and want it different."""
    if len({(getattr(t.loss, "kl_penalty", 0.0), getattr(t.loss, "near", "teacher")) for t in terms if t.rewarded}) > 1:
        yield "terms with a reward share it: give them the same loss.kl_penalty and loss.near"
    if len({term.support.m for term in terms if isinstance(term.support, Samples)}) > 1:
        yield 'terms over "samples" share the draws: give them the same support.m'
    gates = {(gate.a, gate.b, gate.smoothing) for term in terms for gate in term.gates if isinstance(gate, PassRate)}
    if len(gates) > 1:
        yield 'terms with a gate "pass_rate" share it: give them the same a, b and smoothing'
    split = any(isinstance(gate, AlignedOneToOne | AlignedSpan) for term in terms for gate in term.gates)
    if split and not any(isinstance(term.support, TeacherTopK) for term in terms):
        yield 'gates "aligned_one_to_one" and "aligned_span" look for the teacher\'s top-k: give a term that support'


def misjudged(objective: Objective) -> Iterator[str]:
    """What a judge is asked for that it does not know."""
    if not isinstance(objective.judge, Discriminator):
        return
    terms = objective.terms.values()
    if not objective.reads_reward:
        yield 'judge "discriminator" makes a reward that no term reads: give a loss "policy_gradient" a reward'
    if any(isinstance(gate, PassRate) for term in terms for gate in term.gates):
        yield 'gate "pass_rate" counts right answers, which judge "discriminator" does not know; use "verifier"'
    if any(term.over == "privileged" for term in terms):
        yield 'judge "discriminator" reads one prompt, that of the student: no term is over "privileged"'


def _misfits_of_advantage(term: Term, loss: PolicyGradient) -> Iterator[str]:
    if term.against == "reference":
        yield 'loss "policy_gradient" is against the teacher; its loss.extrapolation is for the reference'
    if loss.score == "power" and loss.extrapolation != 1:
        yield 'loss.score "power" has no extrapolation: leave loss.extrapolation at 1'
    if loss.future_only and (loss.discount == 0 or loss.distil == 0 or loss.reward != 0):
        yield "loss.future_only needs later advantages of the teacher: loss.discount and loss.distil above 0, no reward"


def _plain(loss: Loss) -> PolicyGradient:
    """The policy gradient that several draws at a position can estimate."""
    kept = {"distil": loss.distil} if isinstance(loss, PolicyGradient) else {}
    return PolicyGradient(**kept)  # type: ignore[arg-type]


def _complete(support: Support) -> bool:
    """Whether both sides are distributions over the tokens themselves, which can be tempered."""
    return isinstance(support, Full | Nucleus) or getattr(support, "rest", "") == "renorm"
