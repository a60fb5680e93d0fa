"""vLLM's sampler, reporting two distributions at once. It chooses tokens exactly as vLLM does.

vLLM reports either the model's own log-probs or those after temperature and truncation, for the sampled token and the
top-k alike. Distillation wants the sampled token's under what it was sampled from, and the top-k of the student itself.
It also wants further draws from what the token was sampled from, which vLLM does not make: they are reported between
the two. Ranks, which nobody reads and which cost a compiled kernel, are not computed: they are reported as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from rollout_worker.sampling import Dice, draw


class StudentSampler(Sampler):  # type: ignore[misc]  # vLLM is not typed
    """`num_draws` of every row that is asked for log-probs, which must then ask for as many more."""

    def __init__(self, num_draws: int) -> None:
        super().__init__(logprobs_mode="processed_logprobs")
        self._num_draws = num_draws
        self._untempered_BV: Tensor | None = None
        self._generators: dict[int, Generator] = {}  # by row, of those that sample

    def forward(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        supported = (sampling_metadata.max_num_logprobs or 0) > self._num_draws
        # Before the base class divides the logits by the temperature in place.
        self._untempered_BV = self.compute_logprobs(logits) if supported else None
        self._generators = sampling_metadata.generators
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def gather_logprobs(self, logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """[B, 1 + M + K]: the sampled token and M draws under `logprobs`, then the K most probable of the untempered
        distribution."""
        ids, values = token_ids[:, None], logprobs.gather(-1, token_ids[:, None])
        if self._num_draws:
            drawn, drawn_values = draw(logprobs, self._uniforms(len(logprobs)).to(logprobs.device))
            ids, values = torch.cat((ids, drawn), dim=1), torch.cat((values, drawn_values), dim=1)
        if self._untempered_BV is not None:
            top_BK, top_ids_BK = self._untempered_BV.topk(num_logprobs - self._num_draws, dim=-1)
            ids, values = torch.cat((ids, top_ids_BK), dim=1), torch.cat((values, top_BK), dim=1)
        ranks_B = torch.zeros_like(token_ids)
        return LogprobsTensors(ids.int(), values, ranks_B)

    def _uniforms(self, num_rows: int) -> Tensor:
        """[B, M]: by where each row's generator stands, which is left there; 0 for a row that does not sample."""
        found = torch.zeros(num_rows, self._num_draws, dtype=torch.float64)
        rows = sorted(self._generators)
        seeds = [_next_seed(self._generators[row]) for row in rows]
        if rows:
            found[rows] = Dice(seeds).throw(range(len(rows)), self._num_draws)
        return found


def _next_seed(generator: Generator) -> int:
    """A number that the generator, left untouched, stands for: by request and position alone."""
    ahead = generator.clone_state()
    return int(torch.randint(2**62, (1,), generator=ahead, device=ahead.device))
