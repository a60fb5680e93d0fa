"""The student as the learner sees it: packed, adapted, optimised, and refused where packing would be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner.model import CausalModel, learning_rate, load_student, make_optimizer
from learner.packing import pack
from learner.trainer import Trainer
from potstill.config import OptimConfig, StudentConfig
from potstill.errors import ConfigError
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import (
    VOCABULARY,
    make_config,
    make_network,
    make_student,
    plain_logits,
    same,
    take_step,
    weights_of,
)

CPU = torch.device("cpu")
LENGTHS = [(3, 4), (1, 1), (4, 2)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def optim(**changes: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, **changes})


def rates(config: OptimConfig, *, steps: int) -> list[float]:
    return [learning_rate(config, step=step, steps=steps) for step in range(1, steps + 1)]


def adapted_student(folder: Path, *, seed: int = 0) -> CausalModel:
    config = StudentConfig(model=str(folder), lora={"rank": 4, "alpha": 8.0})
    return load_student(config, seed=seed, device=CPU)


def logits_of(student: CausalModel, seed: int = 1) -> torch.Tensor:
    rollouts = [scored.rollout for scored in random_batch(LENGTHS, vocabulary=VOCABULARY, seed=seed)]
    packed = pack(
        [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts], [r.loss_mask for r in rollouts]
    )
    return (student(packed) @ student.head.T).detach()


def plain_logits_of(network: PreTrainedModel, seed: int = 1) -> torch.Tensor:
    rollouts = [scored.rollout for scored in random_batch(LENGTHS, vocabulary=VOCABULARY, seed=seed)]
    return torch.cat([plain_logits(network, r.prompt_ids, r.completion_ids) for r in rollouts]).detach()


@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_a_loaded_folder_gives_the_logits_of_plain_transformers(config: Any, kind: Any, tmp_path: Path) -> None:
    kind(config(**SIZES)).save_pretrained(tmp_path)
    student = load_student(StudentConfig(model=str(tmp_path)), seed=0, device=CPU)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(student), plain_logits_of(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_full_weights_are_every_parameter_once_by_the_transformers_own_name(tie: bool) -> None:
    student = make_student(tie=tie)
    names = {name for name, _ in make_network(tie=tie).named_parameters()}
    assert student.full_weights().keys() == names
    assert ("lm_head.weight" in names) == (not tie)


def test_warm_up_is_linear_and_then_constant() -> None:
    assert rates(optim(lr=0.4, warmup_steps=4), steps=6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_linear_falls_towards_the_ratio_and_its_last_step_still_moves() -> None:
    found = rates(optim(schedule="linear", warmup_steps=1, min_lr_ratio=0.2), steps=5)
    assert found == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_way_in_the_middle_and_falls_towards_the_ratio() -> None:
    found = rates(optim(schedule="cosine", min_lr_ratio=0.1), steps=4)
    assert found == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in (0, 0.25, 0.5, 0.75)])
    assert found[2] == pytest.approx(0.55)
    assert found[3] > 0.1


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_that_is_all_warm_up_divides_by_nothing(schedule: str) -> None:
    assert rates(optim(schedule=schedule, warmup_steps=2), steps=2) == pytest.approx([0.5, 1.0])


def test_weight_decay_is_on_matrices_only() -> None:
    student = make_student()
    before = weights_of(student.network)
    optimizer = make_optimizer(student.parameters(), optim(lr=0.1, weight_decay=0.5))
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, after in weights_of(student.network).items():
        torch.testing.assert_close(after, before[name] * (0.95 if before[name].ndim == 2 else 1))
    assert {tensor.ndim for tensor in before.values()} == {1, 2}


def test_a_fresh_adapter_changes_nothing(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0, layers=1)
    plain = load_student(StudentConfig(model=str(folder)), seed=0, device=CPU)
    assert torch.equal(logits_of(adapted_student(folder)), logits_of(plain))


def test_an_adapter_is_drawn_from_the_seed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0, layers=1)
    first, again, other = (weights_of(adapted_student(folder, seed=seed).network) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_training_an_adapter_moves_it_and_not_the_base(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", seed=0, layers=1)
    student = adapted_student(folder)
    trainer = Trainer(make_config(objective={"support": {"k": 3}}), student)
    before = weights_of(student.network)
    for step in (1, 2):
        take_step(trainer, random_batch(LENGTHS, vocabulary=VOCABULARY, seed=step), step)
    after = weights_of(student.network)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(moved) == 2 * 7  # two matrices for each of the seven linear layers


@pytest.mark.parametrize("tie", [False, True])
def test_merged_weights_are_the_adapted_model(tie: bool, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", seed=0, tie_word_embeddings=tie)
    student = adapted_student(folder)
    trainer = Trainer(make_config(objective={"support": {"k": 3}}, optim={"lr": 0.05}), student)
    take_step(trainer, random_batch(LENGTHS, vocabulary=VOCABULARY, seed=1), 1)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    base = plain_logits_of(plain)
    with torch.no_grad():
        own = dict(plain.named_parameters())
        assert own.keys() == student.full_weights().keys()
        for name, weight in student.full_weights().items():
            own[name].copy_(weight)
    torch.testing.assert_close(logits_of(student), plain_logits_of(plain), rtol=1e-4, atol=1e-5)
    assert (plain_logits_of(plain) - base).abs().max() > 0.01


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        load_student(StudentConfig(model=str(tmp_path / "nowhere")), seed=0, device=CPU)


def test_a_folder_with_pickled_weights_alone_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0, layers=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_student(StudentConfig(model=str(folder)), seed=0, device=CPU)


def test_a_folder_that_wants_its_own_code_run_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ConfigError, match="auto_map"):
        load_student(StudentConfig(model=str(tmp_path)), seed=0, device=CPU)


def test_a_student_with_a_sliding_window_is_refused() -> None:
    config = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    network = Qwen3ForCausalLM(config)
    with pytest.raises(ConfigError, match="layers of sliding_attention"):
        CausalModel(network, network)


def test_a_student_whose_head_has_a_bias_is_refused() -> None:
    network = make_network()
    network.lm_head = torch.nn.Linear(16, VOCABULARY, bias=True)
    with pytest.raises(ConfigError, match="without a bias"):
        CausalModel(network, network)


def test_a_student_that_caps_its_logits_is_refused() -> None:
    network = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0))
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        CausalModel(network, network)
