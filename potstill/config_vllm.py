"""The [rollout.vllm] table: what each engine of vLLM is given on its worker."""

from __future__ import annotations

from potstill.section import Count, Positive, Section


class VllmConfig(Section):
    """None of these changes what is written, beyond rounding."""

    tensor_parallel: Count = 1
    """Processes of one worker that hold the student together: a share of each layer on a GPU of its own, so that
    resources.rollout.gpus is as many. They divide the student's attention heads. Too few: the student does not fit; too
    many: they wait for each other in every layer."""
    cache_gb: Positive | None = None
    """GiB of keys and values, on each of those GPUs. None: 0.5 on a CPU, and nine tenths of what a GPU has less the
    weights, which is for an engine that has it to itself. Too little: few answers are written side by side, and an
    engine that cannot hold one of full length does not start; too much: none is left for activations."""
    compiled: bool = False
    """Compile the model and, on GPUs, record CUDA graphs: more tokens a second, after a start that takes up to minutes
    longer. It has been run on CPUs, and not on GPUs yet."""
    sequences: Count = 256
    """Answers that are written side by side, at most. Too few: an idle GPU; too many: those that do not fit into the
    cache are put back and read again."""
