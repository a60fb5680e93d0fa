"""How one token is chosen: the complete arguments for vLLM, and the same choice in torch for the other engine.

Pure. Reads no generation_config.json, keeps no random state: a uniform number per request and position goes in.
Truncation is vLLM's: temperature first, then top-k, then top-p of what top-k left.

Shapes: B rows (one per completion being written), V vocabulary, T positions, K support, M draws of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.config import SamplingConfig
from potstill.errors import NonFinite


def vllm_arguments(
    sampling: SamplingConfig,
    *,
    max_new_tokens: int,
    seed: int,
    stop_token_id: int,
    want_logprobs: bool,
    support_k: int,
    num_draws: int,
) -> dict[str, Any]:
    """Every public field of vLLM's SamplingParams except `output_kind`, so that no default decides a number.

    Its `logprobs` counts what vllm_sampler.py reports at a position beside the sampled token.
    """
    return {
        "n": 1,
        "max_tokens": max_new_tokens,
        "min_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "watermarking": False,
        "seed": seed,
        "stop": None,
        "stop_token_ids": [stop_token_id],
        "ignore_eos": True,  # the model's own idea of its end token; ours is in stop_token_ids
        "include_stop_str_in_output": True,
        "logprobs": num_draws + support_k if want_logprobs or support_k else None,
        "flat_logprobs": True,
        "logprob_token_ids": None,
        "prompt_logprobs": None,
        "prompt_logprob_token_ids": None,
        "prompt_logprob_start": None,
        "detokenize": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "stream_interval": None,
        "skip_clone": False,
        "structured_outputs": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "extra_args": None,
        "bad_words": None,
        "skip_reading_prefix_cache": False,
        "thinking_token_budget": None,
        "repetition_detection": None,
        "routed_experts_prompt_start": 0,
        "trace_decode_token_ids": None,
    }


def uniforms(seeds: Sequence[int], num_positions: int) -> Tensor:
    """[B, T] float64 in [0, 1). Row b depends on seeds[b] alone, and a longer row begins with the shorter one."""
    rows = [np.random.Generator(np.random.Philox(seed)).random(num_positions) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


class Dice:
    """Uniform numbers for draws that nobody writes: a stream of its own for each seed, beside that of `uniforms`."""

    def __init__(self, seeds: Sequence[int]) -> None:
        streams = (np.random.SeedSequence(seed, spawn_key=(1,)) for seed in seeds)
        self._dice = [np.random.Generator(np.random.Philox(stream)) for stream in streams]

    def throw(self, rows: Sequence[int], num_draws: int) -> Tensor:
        """[len(rows), M] float64 in [0, 1): the next of each row's stream."""
        return torch.from_numpy(np.stack([self._dice[row].random(num_draws) for row in rows]))


def choose(logits_BV: Tensor, uniforms_BM: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens of each row, one for each uniform number, and their log-probs under what was sampled from.

    Returns ids [B, M] int64 and log-probs [B, M] float32, NaN where the choice is greedy. Raises NonFinite.
    """
    if sampling.temperature == 0:
        top_B, ids_B = logits_BV.max(dim=-1)
        _check_finite(top_B)
        ids_BM = ids_B[:, None].expand(uniforms_BM.shape)
        return ids_BM, torch.full(ids_BM.shape, torch.nan)
    ids_BM, logprobs_BM = draw(processed_logits(logits_BV, sampling), uniforms_BM)
    _check_finite(logprobs_BM)
    return ids_BM, logprobs_BM


def draw(logits_BV: Tensor, uniforms_BM: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M] ids by inverting the distribution function, and their log-probs: NaN where the logits are not finite."""
    shifted_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    # float64: over a large vocabulary a float32 running sum loses the small probabilities.
    mass_BV = shifted_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    total_B1 = mass_BV[:, -1:]
    # The first id whose running sum exceeds the draw: an id of probability 0 is never the first.
    ids_BM = torch.searchsorted(mass_BV, uniforms_BM * total_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return ids_BM, (shifted_BV.gather(-1, ids_BM) - total_B1.log()).float()


def processed_logits(logits_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits of the distribution that is sampled from at temperature > 0: cut-off ids are -inf."""
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = sorted_BV.softmax(dim=-1, dtype=torch.float64)
        before_BV = probs_BV.cumsum(dim=-1) - probs_BV  # mass of everything more probable
        beyond_BV = (before_BV >= sampling.top_p).scatter(-1, order_BV, before_BV >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(beyond_BV, -torch.inf)
    return logits_BV


def support(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable ids of the student itself and their log-probs, most probable first: [B, K] each."""
    top_BK, ids_BK = logits_BV.topk(k, dim=-1)
    return ids_BK, top_BK - logits_BV.logsumexp(dim=-1, keepdim=True)


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NonFinite("the student's logits are NaN or infinite: its weights are not usable")
