"""An objective over a chunk of rows: each term's loss, times all that a row counts for, summed; and what is measured.

Reads the choices (potstill/algebra) and the facts of the step. A row that counts for nothing is never computed, so a
closed gate costs nothing and may hide what is missing behind it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner import divergences, measures, outcomes
from learner.aggregation import Denominators
from learner.chunk import Chunk
from learner.facts import Facts, Moment
from learner.logprobs import RowLoss
from learner.terms import PreparedTerm
from potstill.algebra.objective import ESTIMATES, Objective
from potstill.algebra.supports import TopK

OF_TEACHER = "reverse_kl_of_"
"""Before a teacher's name: that measure of the rows that it scored."""


def row_loss(
    objective: Objective, facts: Facts, *, denominators: Mapping[str, Denominators], moment: Moment
) -> RowLoss:
    """The objective over these facts. `denominators` of the whole step, by what a term is over ("all", "student", …).

    Raises ValueError for a field that a term reads and that is missing, NonFinite for a NaN in a row that counts.
    """
    terms = {
        name: PreparedTerm(name, term, facts, denominators=denominators, moment=moment)
        for name, term in objective.terms.items()
        if any(facts.lengths)  # a pass without a row is only company
    }

    def loss(logits: Tensor, rows: slice) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        chunk = Chunk(logits, torch.arange(rows.start, rows.stop, device=logits.device), facts)
        losses = {}
        for name, term in terms.items():
            weights = term.weights[rows]
            counts = weights != 0
            if bool(counts.any()):
                losses[name] = (weights[counts] * term.loss(chunk.where(counts))).sum()
        main = terms["main"]
        return losses, _measured(objective, main, chunk.where(main.weights[rows] != 0), moment)

    return loss


@torch.no_grad()
def _measured(objective: Objective, main: PreparedTerm, chunk: Chunk, moment: Moment) -> Mapping[str, Tensor]:
    """What is worth watching of the rows that the main term reads, in nats; some rows each, no denominators."""
    if len(chunk.rows) == 0:
        return {}
    metrics = {"entropy": divergences.entropy(chunk.logq), **_of_sampler(chunk), **_beside(objective, chunk, moment)}
    if objective.reads_distribution and objective.sees_all_mass:
        metrics["reverse_kl"] = divergences.reverse_kl(*outcomes.compare(objective, "main", chunk, moment))
    elif main.credit is not None:
        metrics["reverse_kl"] = -main.credit[chunk.rows]
    elif isinstance(objective.loss, ESTIMATES) and getattr(objective.loss, "distil", 1.0) != 0:
        metrics["reverse_kl"] = chunk.written - chunk.fact(objective.against)
    if "reverse_kl" in metrics:
        kl = metrics["reverse_kl"]
        metrics |= {f"{OF_TEACHER}{name}": kl[scored] for name, scored in chunk.scored_by().items()}
    if objective.needs_sampler:
        metrics["ratio_mean"] = (chunk.written - chunk.fact("behaviour")).exp()
    return metrics


def _of_sampler(chunk: Chunk) -> Mapping[str, Tensor]:
    behaviour, age = chunk.known("behaviour"), chunk.known("age")
    return {} if behaviour is None or age is None else measures.of_sampler(chunk.written, behaviour, age)


def _beside(objective: Objective, chunk: Chunk, moment: Moment) -> Mapping[str, Tensor]:
    """What whoever the student is compared with would say there, and how much of both the top-k holds."""
    if not objective.reads_distribution:
        entropy = chunk.known("teacher_entropy")
        return {} if entropy is None else {"teacher_entropy": entropy}
    both = outcomes.whole(objective, "main", chunk, moment)
    if both is None:
        return {}
    logq, logp = both
    found = {"teacher_entropy": divergences.entropy(logp), "overlap": measures.overlap(logq, logp)}
    if isinstance(objective.support, TopK):
        found |= {"captured_mass": 1 - logq[..., -1].exp(), "captured_mass_teacher": 1 - logp[..., -1].exp()}
    return found
