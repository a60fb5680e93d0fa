"""What each completion of a step earned beside the others of its prompt, as the objective reads it.

Groups lie across micro-batches, so this is settled once for the whole step. Refuses a completion without a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from learner import rewards
from learner.judge import Judge
from learner.nearness import Near
from potstill.algebra.gates import PassRate
from potstill.algebra.losses import PolicyGradient
from potstill.algebra.objective import Objective, Term
from potstill.types import BoolArray, ScoredRollout


def credit(
    batch: Sequence[ScoredRollout], masks: Sequence[BoolArray], objective: Objective, *, judge: Judge, near: Near
) -> dict[str, list[float]]:
    """Fields of Facts by name, one number a rollout; empty for an objective without reward, whose judge is not asked.

    masks  trained tokens
    near   whom the sampler shall stay near, asked only where a penalty is taken

    Raises ValueError for a reward that is NaN. Text of others earns nothing (NaN, never read); the pass rate of its
    prompt is that of the student's answers in the same step.
    """
    if not objective.reads_reward:
        return {}
    own = [i for i, scored in enumerate(batch) if scored.rollout.origin != "others"]
    given = judge.rewards(batch)
    groups = [batch[i].rollout.prompt_id for i in own]
    earned = rewards.judged(torch.tensor([given[i] for i in own], dtype=torch.float64), groups)
    found: dict[str, list[float]] = {}
    for term in objective.terms.values():
        if term.rewarded:
            penalised = earned
            if isinstance(term.loss, PolicyGradient) and term.loss.kl_penalty:
                sampled = [_sampled(batch[i], masks[i]) for i in own]
                others = near.logprobs([batch[i] for i in own], [masks[i] for i in own])
                penalised = rewards.penalised(earned, sampled, others, kl_penalty=term.loss.kl_penalty)
            centred, deviation = rewards.centred(penalised, groups)
            found["reward"] = _placed(centred.tolist(), own, len(batch))
            found["reward_deviation"] = _placed(deviation.tolist(), own, len(batch))
        for gate in term.gates:
            if isinstance(gate, PassRate):
                rates = rewards.pass_rates(earned, groups, smoothing=gate.smoothing)
                of_prompt = dict(zip(groups, rates.tolist(), strict=True))
                whole = found.setdefault("pass_rate_weight", [math.nan] * len(batch))
                for place, weight in _weights(batch, term, of_prompt, gate).items():
                    whole[place] = weight
    return found


def tied(earned: Mapping[str, Sequence[float]]) -> dict[str, torch.Tensor]:
    """A measure by its name: per judged completion, whether all of its prompt earned the same and none stands out."""
    judged = [deviation for deviation in earned.get("reward_deviation", ()) if not math.isnan(deviation)]
    return {"tied_fraction": torch.tensor(judged) == 0} if judged else {}


def _weights(
    batch: Sequence[ScoredRollout], term: Term, of_prompt: Mapping[str, float], gate: PassRate
) -> dict[int, float]:
    """The prompt's weight for every completion that the term reads, whoever wrote it; their mean is 1."""
    read = [i for i, scored in enumerate(batch) if term.over in {"all", scored.rollout.origin}]
    if not read:
        return {}
    if unknown := [prompt for i in read if (prompt := batch[i].rollout.prompt_id) not in of_prompt]:
        raise ValueError(f'gate "pass_rate": the student did not answer prompt {unknown[0]} in this step')
    rates = torch.tensor([of_prompt[batch[i].rollout.prompt_id] for i in read], dtype=torch.float64)
    return dict(zip(read, rewards.pass_rate_weights(rates, a=gate.a, b=gate.b).tolist(), strict=True))


def _sampled(scored: ScoredRollout, mask: BoolArray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(scored.rollout.student_logprobs)[mask])


def _placed(values: Sequence[float], places: Sequence[int], length: int) -> list[float]:
    whole = [math.nan] * length
    for place, value in zip(places, values, strict=True):
        whole[place] = value
    return whole
