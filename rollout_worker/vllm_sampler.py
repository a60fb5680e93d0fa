"""vLLM's sampler, reporting two distributions at once. It chooses tokens exactly as vLLM does.

vLLM reports either the model's own log-probs or those after temperature and truncation, for the sampled token and the
top-k alike. Distillation wants the sampled token's under what it was sampled from, and the top-k of the student itself.
Ranks, which nobody reads and which cost a compiled kernel, are not computed: they are reported as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler


class StudentSampler(Sampler):  # type: ignore[misc]  # vLLM is not typed
    def __init__(self) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        self._untempered_BV: Tensor | None = None

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        # Before the base class divides the logits by the temperature in place.
        self._untempered_BV = self.compute_logprobs(logits) if sampling_metadata.max_num_logprobs else None
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """[B, 1 + K]: the sampled token under `logprobs`, then the K most probable of the untempered distribution."""
        ids, values = token_ids[:, None], logprobs.gather(-1, token_ids[:, None])
        if num_logprobs and self._untempered_BV is not None:
            top_BK, top_ids_BK = self._untempered_BV.topk(num_logprobs, dim=-1)
            ids, values = torch.cat((ids, top_ids_BK), dim=1), torch.cat((values, top_BK), dim=1)
        ranks_B = torch.zeros_like(token_ids)
        return LogprobsTensors(ids.int(), values, ranks_B)
