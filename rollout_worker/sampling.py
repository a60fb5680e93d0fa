"""How one token is chosen: the complete arguments for vLLM, and the same choice in torch for the other engine.

Pure. Reads no generation_config.json, keeps no random state: a uniform number per request and position goes in.
Truncation is vLLM's: temperature first, then top-k, then top-p of what top-k left.

Shapes: B rows (one per completion being written), V vocabulary, T positions, K support.
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
    sampling: SamplingConfig, *, seed: int, stop_token_id: int, want_logprobs: bool, support_k: int
) -> dict[str, Any]:
    """Every public field of vLLM's SamplingParams except `output_kind`, so that no default decides a number."""
    return {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
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
        "logprobs": support_k if want_logprobs or support_k else None,
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


def choose(logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution function, and its log-prob under what was sampled from.

    Returns ids [B] int64 and log-probs [B] float32, NaN where the choice is greedy. Raises NonFinite.
    """
    if sampling.temperature == 0:
        top_B, ids_B = logits_BV.max(dim=-1)
        _check_finite(top_B)
        return ids_B, torch.full_like(top_B, torch.nan)
    shifted_BV = processed_logits(logits_BV, sampling)
    shifted_BV = shifted_BV - shifted_BV.amax(dim=-1, keepdim=True)
    # float64: over a large vocabulary a float32 running sum loses the small probabilities.
    mass_BV = shifted_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    total_B1 = mass_BV[:, -1:]
    _check_finite(total_B1)
    # The first id whose running sum exceeds the draw: an id of probability 0 is never the first.
    ids_B1 = torch.searchsorted(mass_BV, uniforms_B[:, None] * total_B1, right=True)
    logprobs_B1 = shifted_BV.gather(-1, ids_B1) - total_B1.log()
    return ids_B1[:, 0], logprobs_B1[:, 0].float()


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
