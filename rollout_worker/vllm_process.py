"""What of ours runs in each process that vLLM computes in: this one, or as many as hold a student together.

vLLM imports this file by name before it builds its worker; with it comes the engine by which weights are loaded.
"""

from __future__ import annotations

from typing import Any

import rollout_worker.vllm_loading  # noqa: F401  # registers its engine in this process as well
from rollout_worker.vllm_sampler import StudentSampler


class Extension:
    """Becomes a base of vLLM's worker."""

    model_runner: Any

    def report_draws(self, num_draws: int) -> None:
        self.model_runner.sampler = StudentSampler(num_draws)


NAME = f"{Extension.__module__}.{Extension.__qualname__}"
