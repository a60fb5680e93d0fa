"""The [resources] table: what each process of a run holds on a Ray cluster, and how they lie on its nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.section import NotNegative, Positive, Section

RESERVED = frozenset({"CPU", "GPU", "memory", "object_store_memory"})

Needs = dict[str, float]
"""Amounts by Ray's names of resources, e.g. {"CPU": 4.0, "GPU": 1.0}; none of them 0."""


class ProcessConfig(Section):
    """What one process holds for as long as it lives. Nothing at all: it is put on any node, at once."""

    cpus: NotNegative = 0.0
    """Of a node's, as Ray counts them. Too many: no node is large enough; too few: more processes on a node than it has
    cores. Threads are another setting, e.g. rollout.threads."""
    gpus: NotNegative = 0.0
    """Whole ones, or a share of one below 1; the process sees no others. 0 where a node has GPUs: none is kept for the
    process, and it uses the first, as others may."""
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """By names that the nodes were started with, e.g. {a100 = 1}. A name that no node has: no room is ever found."""

    @model_validator(mode="after")
    def _as_ray_counts(self) -> ProcessConfig:
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus = {self.gpus:g}: whole GPUs, or a share of one below 1")
        if taken := sorted(RESERVED & self.custom.keys()):
            raise ValueError(f"custom: {', '.join(taken)} is Ray's own name; use cpus and gpus")
        return self

    @property
    def needs(self) -> Needs:
        asked = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in asked.items() if amount > 0}


class ResourcesConfig(Section):
    """Room on the cluster. As it stands by default nothing is asked for and nothing waits: right for one machine
    without GPUs."""

    layout: Literal["separate", "colocated"] = "separate"
    """separate: learner and rollout workers hold their own GPUs. colocated: worker n lies in the bundle of learner rank
    n and shares its GPU: `gpus` are then shares, and both must fit into its memory at once. Workers beyond the ranks
    are placed by themselves."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Of the learner's ranks, which are placed together or not at all. PACK: on few nodes, since they send each other
    weights all the time; SPREAD: on many; STRICT: or not at all."""
    wait_s: Positive = 300.0
    """Seconds that the learner's ranks and the first rollout workers may wait for room before the run fails. Too few: a
    cluster that grows by itself has not grown yet; too many: a request that nothing can meet holds the run up."""
    learner: ProcessConfig = ProcessConfig()
    rollout: ProcessConfig = ProcessConfig()

    @model_validator(mode="after")
    def _room_for_two(self) -> ResourcesConfig:
        shares = (self.learner.gpus, self.rollout.gpus)
        if self.layout == "separate":
            return self
        if not self.learner.needs:
            raise ValueError('layout "colocated" has workers lie where ranks do: say what resources.learner needs')
        if any(shares) and (sum(shares) > 1 or not all(shares)):
            raise ValueError(
                'layout "colocated" has a rank and a worker share one GPU: learner.gpus and rollout.gpus, both above '
                f"0, add up to 1 at most; here {shares[0]:g} and {shares[1]:g}"
            )
        return self


def worded(needs: Needs) -> str:
    """Of a bundle, for people: "4 CPU, 1 GPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(needs.items())) or "nothing"
