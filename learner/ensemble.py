"""Several teachers as one: averaged, routed, or weighed by how well each has done. Pure.

Legend: T teachers over one vocabulary V, C rows. Weights are ≥ 0 and sum to 1, and are refused otherwise: nothing is
normalised behind the caller's back. A teacher of weight 0 is never read, so its −inf and NaN do not spread.

This file asks no teacher of its own accord, maps no vocabularies, and takes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.facts import Logits


def average_of_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Normalised geometric mean, log softmax Σ w_k z_k: T logits [C, V] → log-probs [C, V] (Baby Llama, 2308.02019).

    It is the q with the least Σ w_k KL(q‖p_k): probable where all teachers agree; −inf where any of them has −inf, and
    NaN in a row where that leaves no token. Raises ValueError for weights that are not a distribution.

    >>> average_of_logits([torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()], [0.5, 0.5]).exp()
    tensor([[0.5000, 0.5000]])
    """
    total = torch.zeros_like(logits[0])
    for one, weight in _weighted(logits, weights):
        total = total + weight * one
    return total.log_softmax(-1)


def average_of_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mixture, log Σ w_k p_k: T logits [C, V] → log-probs [C, V], as broad as the teachers together.

    It is the q with the least Σ w_k KL(p_k‖q). Raises ValueError for weights that are not a distribution.

    >>> average_of_probabilities([torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.4, 0.6]]).log()], [0.2, 0.8]).exp()
    tensor([[0.5000, 0.5000]])
    """
    total = torch.full_like(logits[0], -torch.inf)
    for one, weight in _weighted(logits, weights):
        total = torch.logaddexp(total, one.log_softmax(-1) + math.log(weight))
    return total


def routed(teachers: Sequence[Logits], which: Tensor) -> Logits:
    """One teacher per row: `which` [N] holds its index for every row of the step. Each is asked for its own rows alone.

    Raises ValueError when an index has no teacher.
    """
    if len(which) > 0 and not 0 <= int(which.min()) <= int(which.max()) < len(teachers):
        raise ValueError(f"rows are routed to teachers {sorted(set(which.tolist()))}, but there are {len(teachers)}")

    def logits(rows: Tensor) -> Tensor:
        places = [(which[rows] == index).nonzero().squeeze(-1) for index in range(len(teachers))]
        asked = [(teacher, place) for teacher, place in zip(teachers, places, strict=True) if len(place) > 0]
        answers = torch.cat([teacher(rows[place]) for teacher, place in asked])
        return answers[torch.cat([place for _, place in asked]).argsort()]

    return logits


def teacher_of(domains: Sequence[str], teachers: Mapping[str, int]) -> Tensor:
    """The index of each completion's teacher, by its domain → [S] (MOPD, arXiv 2601.02780 §4.4).

    Raises ValueError for a domain without a teacher.

    >>> teacher_of(["code", "maths", "code"], {"maths": 0, "code": 1})
    tensor([1, 0, 1])
    """
    if unknown := sorted(set(domains) - set(teachers)):
        raise ValueError(f"no teacher is named for domain {unknown[0]!r}; there are {sorted(teachers)}")
    return torch.tensor([teachers[domain] for domain in domains], dtype=torch.int64)


class Hedge:
    """Weights that follow the teachers' losses: multiplicative weights (Freund & Schapire 1997, fig. 1).

    The weights are a softmax of scores, and a round of losses lowers each score by rate · loss. For any losses in
    [0, 1], those of an adversary too, the weighted loss of R rounds exceeds the best teacher's by at most
    ln T / rate + rate · R / 8 (Cesa-Bianchi & Lugosi 2006, thm 2.2): √(R ln T / 2) at rate = √(8 ln T / R).

    It needs the loss of every teacher in every round. What the loss is decides whom it favours: one less the verified
    score of what a teacher teaches, not the student's distance to the teacher, which is least for easy and weak ones.

    It stands in for the policy of arXiv 2012.06048, which REINFORCE trains from such feedback: it is deterministic and
    has a bound and a state of T numbers. For a choice per domain keep one per domain.

    >>> hedge = Hedge(["small", "large"], rate=math.log(3))
    >>> hedge.update({"small": 1.0, "large": 0.0})
    >>> {name: round(weight, 6) for name, weight in hedge.weights().items()}
    {'small': 0.25, 'large': 0.75}
    """

    def __init__(self, teachers: Sequence[str], *, rate: float) -> None:
        if not teachers or len(set(teachers)) < len(teachers):
            raise ValueError(f"teachers have distinct names, and there is at least one: {list(teachers)}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate is positive, not {rate}")
        self._rate = rate
        self._scores = dict.fromkeys(teachers, 0.0)

    def weights(self) -> dict[str, float]:
        """Each teacher's, summing to 1; equal before the first round."""
        highest = max(self._scores.values())
        raised = {name: math.exp(score - highest) for name, score in self._scores.items()}
        total = math.fsum(raised.values())
        return {name: value / total for name, value in raised.items()}

    def update(self, losses: Mapping[str, float]) -> None:
        """One round. Raises ValueError unless it holds every teacher's loss, each in [0, 1]."""
        self._check_names(losses)
        if outside := [name for name, loss in losses.items() if not 0 <= loss <= 1]:
            raise ValueError(f"the loss of teacher {outside[0]!r} is {losses[outside[0]]}; scale losses to [0, 1]")
        self._scores = {name: score - self._rate * losses[name] for name, score in self._scores.items()}

    def state(self) -> dict[str, float]:
        """All that decides the next weights, beside the rate."""
        return dict(self._scores)

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a `state()`. Raises ValueError for other teachers or a score that is not finite."""
        self._check_names(state)
        if broken := [name for name, score in state.items() if not math.isfinite(score)]:
            raise ValueError(f"the score of teacher {broken[0]!r} is {state[broken[0]]}")
        self._scores = {name: state[name] for name in self._scores}

    def _check_names(self, found: Mapping[str, float]) -> None:
        if set(found) != set(self._scores):
            raise ValueError(f"the teachers are {sorted(self._scores)}, not {sorted(found)}")


def _weighted(logits: Sequence[Tensor], weights: Sequence[float]) -> list[tuple[Tensor, float]]:
    """The teachers that count, with their weights."""
    if not all(weight >= 0 for weight in weights) or not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(f"the teachers' weights must be ≥ 0 and sum to 1, not {list(weights)}")
    if len(weights) != len(logits):
        raise ValueError(f"{len(logits)} teachers need as many weights, not {len(weights)}")
    return [(one, weight) for one, weight in zip(logits, weights, strict=True) if weight > 0]
