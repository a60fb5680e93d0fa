"""One token is chosen as the config says, and its log-prob is that of the distribution it was drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.config import SamplingConfig
from potstill.errors import NonFinite
from rollout_worker.sampling import Dice, choose, processed_logits, support, uniforms, vllm_arguments


def sampling(*, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=8, temperature=temperature, top_p=top_p, top_k=top_k)


def slow_distribution(logits: list[float], config: SamplingConfig) -> list[float]:
    """Temperature, then top-k, then top-p of what is left, one id at a time."""
    weights = [math.exp(logit / config.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = order[: config.top_k] if config.top_k else order
    total = sum(weights[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= config.top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


SETTINGS = [
    sampling(),
    sampling(temperature=0.6),
    sampling(temperature=1.7),
    sampling(top_k=3),
    sampling(top_p=0.55),
    sampling(temperature=0.8, top_k=5, top_p=0.8),
    sampling(top_k=99),
    sampling(top_p=1e-6),
]


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_the_processed_distribution_is_the_slow_one(config: SamplingConfig) -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(20, 11))).float() * 2
    fast = processed_logits(logits, config).softmax(-1)
    slow = torch.tensor([slow_distribution(row, config) for row in logits.tolist()])
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_evenly_spread_draws_reproduce_the_distribution_and_its_log_probs(config: SamplingConfig) -> None:
    num_draws = 20_000
    logits = torch.tensor([[1.0, -0.5, 2.0, 0.3, -3.0, 1.9]])
    draws = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    ids, logprobs = (of_row[0] for of_row in choose(logits, draws[None], config))
    expected = torch.tensor(slow_distribution(logits[0].tolist(), config))
    frequencies = torch.bincount(ids, minlength=6) / num_draws
    assert (frequencies - expected).abs().max() < 2 / num_draws
    torch.testing.assert_close(logprobs, expected.log()[ids], atol=1e-5, rtol=1e-5)


def test_an_id_of_probability_zero_is_never_drawn_at_either_end() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    ids, _ = choose(logits, torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64), sampling())
    assert ids.tolist() == [[1, 3, 3]]


def test_greedy_takes_the_most_probable_id_and_has_no_log_prob() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    ids, logprobs = choose(logits, torch.tensor([[0.9], [0.9]], dtype=torch.float64), sampling(temperature=0.0))
    assert ids.tolist() == [[1], [0]]
    assert logprobs.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_raise(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [bad, 1.0]])
    with pytest.raises(NonFinite):
        choose(logits, torch.tensor([[0.5], [0.5]], dtype=torch.float64), sampling(temperature=temperature))


def test_a_rows_draws_depend_on_its_own_seed_and_position_alone() -> None:
    long, short = uniforms([7, 8, 7], 50), uniforms([8, 7], 20)
    assert torch.equal(long[0], long[2])
    assert torch.equal(long[1, :20], short[0])
    assert not torch.equal(long[0], long[1])
    assert float(long.min()) >= 0
    assert float(long.max()) < 1


def test_draws_beside_the_text_have_a_stream_of_their_own_for_every_seed() -> None:
    dice = Dice([7, 8, 7])
    first, second = dice.throw([0, 1, 2], 4), dice.throw([2, 1], 4)
    assert torch.equal(first[0], first[2])
    assert torch.equal(Dice([8]).throw([0], 8)[0], torch.cat((first[1], second[1])))
    written = uniforms([7], 100)[0]
    assert not set(written.tolist()) & set(Dice([7]).throw([0], 100)[0].tolist())
    assert len(set(first[:2].flatten().tolist()) | set(second.flatten().tolist())) == 16


def test_the_support_is_the_students_own_top_sorted_and_untempered() -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(6, 12))).float()
    ids, logprobs = support(logits, 5)
    assert torch.equal(ids, logits.argsort(-1, descending=True)[:, :5])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, ids))


def test_every_argument_of_vllm_is_written_out() -> None:
    config = SamplingConfig(max_new_tokens=17, temperature=0.8, top_p=0.9, top_k=40)
    arguments = vllm_arguments(
        config, max_new_tokens=9, seed=5, stop_token_id=2, want_logprobs=True, support_k=0, num_draws=0
    )
    assert arguments == {
        "n": 1,
        "max_tokens": 9,
        "min_tokens": 0,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "watermarking": False,
        "seed": 5,
        "stop": None,
        "stop_token_ids": [2],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "logprobs": 0,
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


@pytest.mark.parametrize(
    ("want", "k", "draws", "asked"),
    [(False, 0, 0, None), (True, 0, 0, 0), (False, 4, 0, 4), (True, 4, 0, 4), (False, 0, 3, None), (True, 4, 3, 7)],
)
def test_vllm_is_asked_for_log_probs_only_where_somebody_wants_them(
    want: bool, k: int, draws: int, asked: int | None
) -> None:
    arguments = vllm_arguments(
        sampling(), max_new_tokens=8, seed=0, stop_token_id=2, want_logprobs=want, support_k=k, num_draws=draws
    )
    assert arguments["logprobs"] == asked
