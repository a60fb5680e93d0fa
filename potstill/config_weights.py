"""The [weights] table: how a version of the student gets from the learner to those who write with it."""

from __future__ import annotations

from typing import Literal

from potstill.section import Section

InFlight = Literal["keep", "finish", "abort"]


class WeightsConfig(Section):
    """None of these changes what a synchronous run computes, but for wire = "bfloat16"."""

    transport: Literal["auto", "shared_memory", "object_store", "disk", "device"] = "auto"
    """shared_memory: one copy in the memory of the host, for a learner and workers that share it; object_store: Ray's,
    one copy on each host; disk: files below the run's folder, for hosts that share nothing faster. auto: the first of
    them that reaches every worker; the plan says which and why. device: from the learner's GPU to the workers', which
    must write with vLLM, over NCCL or, on the same GPU, CUDA IPC; it costs a copy of the weights on the learner's GPU,
    and workers stand still while weights come. It has not been run on GPUs yet, and auto never chooses it."""
    wire: Literal["exact", "bfloat16", "delta"] = "exact"
    """exact: every bit travels. bfloat16: float32 weights are rounded on the way, half the bytes; the student that
    writes then differs from the one that learns by up to 1/256 of each weight, and importance ratios leave 1. delta:
    only what has changed since the version before, nothing is lost; it pays between hosts, for bfloat16 weights with a
    small learning rate, and costs time and a copy of the weights on both sides."""
    adapter_only: bool = True
    """Of a student with adapters: they travel alone, and a worker adds them to the base that it has on disk. False:
    they are merged before they travel, as many bytes as all weights."""
    in_flight: InFlight = "keep"
    """Completions that are being written when new weights are there. keep: they go on under the new weights, and each
    token knows its version; finish: they end under the old ones first, while no new one begins; abort: they end where
    they are, as `aborted`. Without staleness nothing is ever in flight."""
