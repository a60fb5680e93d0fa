"""What a method is: its objective, where that comes from, and how its authors ran it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from potstill.algebra.objective import Objective, Tier

Signal = Literal["divergence", "sampled", "reward", "preference", "text"]
Granularity = Literal["token", "sequence", "hybrid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A preset. `objective` is all that it computes; `settings` are the paper's run, for a plan to compare with.

    Example: Method(objective=objective(support="full", loss={"kind": "jsd", "beta": 0.5}), phrase="…", source="…",
                    signal="divergence", granularity="token", settings={"rollout.sampling.temperature": 0.9})
    """

    objective: Objective
    phrase: str  # what it is, for the list
    source: str  # paper, arXiv id, equation; where paper and code differ, which was taken
    signal: Signal  # the survey's first axis (2604.00626); teacher access follows from the objective's tier
    granularity: Granularity
    context: Literal["own", "privileged"] = "own"  # what its teacher reads
    good_at: str = ""
    trap: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted key of the config → the paper's value

    @property
    def needs(self) -> Mapping[str, str]:
        """What a run must bring, in words, by what it brings it with."""
        objective = self.objective
        found = {"teacher": objective.tier.name.lower() if objective.tier > Tier.TEXT else "none"}
        found |= {"context": "privileged"} if self.context == "privileged" else {}
        by = "a verifier" if objective.reads_verdict else "a discriminator, which learns beside the student"
        found |= {"reward": by} if objective.reads_reward else {}
        found |= {"reference": "the student as it was"} if objective.reads_reference else {}
        found |= {"text": "the teacher's or the data's"} if objective.reads_others else {}
        found |= {"data": "says which text is private"} if objective.reads_privacy else {}
        found |= {"state": "kept by checkpoints"} if objective.carries_state else {}
        return found

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for people and scripts; of the objective what is not a default."""
        return {
            "phrase": self.phrase,
            "source": self.source,
            "signal": self.signal,
            "granularity": self.granularity,
            "needs": dict(self.needs),
            "good_at": self.good_at,
            "trap": self.trap,
            "settings": dict(self.settings),
            "objective": self.objective.chosen(),
        }


def objective(**choices: Any) -> Objective:
    """An objective from plain choices, as a config would write them: objective(support="full", loss="reverse_kl")."""
    return Objective.model_validate(choices)
