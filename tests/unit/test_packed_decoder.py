"""PackedDecoder and ModelDecoder compute what transformers computes, row by row and without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from potstill.errors import WeightsError
from rollout_worker.model_decoder import ModelDecoder
from rollout_worker.packed_decoder import PREFILL_MASK_ENTRIES, PackedDecoder, can_decode

SHAPE = {
    "vocab_size": 150,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=True),
    "qwen2-bias": Qwen2Config(**SHAPE),
    "llama-bias-scaled-rope": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE),
}
LENGTHS = (9, 5, 1)


def random_model(config: PretrainedConfig) -> torch.nn.Module:
    """Biases and norms too are far from where they start, so that a forgotten one is seen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def checkpoint(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return random_model(request.param)


@pytest.mark.parametrize("kind", ["packed", "model"])
@torch.inference_mode()
def test_padded_rows_grow_as_unpadded_texts_do(model: torch.nn.Module, kind: str, tmp_path: Path) -> None:
    if kind == "packed":
        assert can_decode(model.config, "float32")
        decoder = PackedDecoder(model.config, max_model_len=32)
        decoder.swap(decoder.prepare(checkpoint(model)))
    else:
        model.save_pretrained(tmp_path)
        decoder = ModelDecoder(tmp_path, model.config, "float32")
    texts = [torch.randint(0, 150, (length,)) for length in LENGTHS]
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    real = torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]
    cache, logits = decoder.prefill(ids, real, 4)
    for kept in (None, torch.tensor([2, 0, 0]), torch.tensor([1]), None):
        expected = torch.stack([model(text[None]).logits[0, -1] for text in texts])
        torch.testing.assert_close(logits, expected, atol=5e-6, rtol=1e-5)
        if kept is not None:  # rows leave, change places and are doubled
            cache.keep(kept)
            texts = [texts[row] for row in kept]
        written = torch.randint(0, 150, (len(texts),))
        texts = [torch.cat((text, token[None])) for text, token in zip(texts, written, strict=True)]
        logits = decoder.step(cache, written)


@torch.inference_mode()
def test_prompts_too_long_for_one_mask_are_read_in_parts() -> None:
    width = 2200
    assert PREFILL_MASK_ENTRIES // width**2 < 5
    config = Qwen3Config(**SHAPE | {"max_position_embeddings": 4096, "num_hidden_layers": 1}, head_dim=24)
    model = random_model(config)
    decoder = PackedDecoder(config, max_model_len=width + 1)
    decoder.swap(decoder.prepare(checkpoint(model)))
    ids = torch.randint(0, 150, (5, width))
    _, logits = decoder.prefill(ids, torch.ones_like(ids, dtype=torch.bool), 1)
    torch.testing.assert_close(logits[[0, 4]], model(ids[[0, 4]]).logits[:, -1], atol=5e-6, rtol=1e-5)


def test_missing_and_unknown_tensors_are_named_and_nothing_is_replaced() -> None:
    model = random_model(CONFIGS["qwen2-bias"])
    decoder = PackedDecoder(model.config, max_model_len=32)
    decoder.swap(decoder.prepare(checkpoint(model)))
    ids = torch.tensor([[3, 1, 4]])
    real = torch.ones_like(ids, dtype=torch.bool)
    _, before = decoder.prefill(ids, real, 1)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in checkpoint(model).items()}
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is missing"):
        decoder.prepare({name: tensor for name, tensor in zeros.items() if name != "model.norm.weight"})
    with pytest.raises(WeightsError, match=r"does not have: model\.extra"):
        decoder.prepare(zeros | {"model.extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match="some but not all"):
        decoder.prepare(
            {name: tensor for name, tensor in zeros.items() if not name.endswith("0.self_attn.k_proj.bias")}
        )
    _, after = decoder.prefill(ids, real, 1)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (CONFIGS["qwen3-tied"], "bfloat16"),
        (Qwen2Config(**SHAPE, use_sliding_window=True), "float32"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "float32"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "float32"),
    ],
    ids=["bfloat16", "sliding", "gelu", "dynamic-rope"],
)
def test_what_it_would_compute_wrongly_it_refuses(config: PretrainedConfig, dtype: str) -> None:
    assert not can_decode(config, dtype)
