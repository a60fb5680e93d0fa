"""Trainers around models small enough to check by hand: eleven tokens, two layers, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from learner.aggregation import Denominators
from learner.attention import IMPLEMENTATION
from learner.model import CausalModel
from learner.ranks import Alone, Ranks
from learner.trainer import Trainer, totals
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.types import ScoredRollout, StepReport

VOCABULARY = 11
PLAIN = "sdpa"  # transformers' own attention; its eager one takes softmax in float32
SELF_TEACHER = {"kind": "self", "privileged_template": "{prompt} {answer}"}


def make_network(*, seed: int = 0, attention: str = IMPLEMENTATION, tie: bool = False) -> PreTrainedModel:
    """A random Qwen3 in float64. The same seed gives the same weights, whatever the attention."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tie,
        attn_implementation=attention,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Qwen3ForCausalLM(config).double()
    _norms_in_float64(network, config.rms_norm_eps)
    return network


def _norms_in_float64(network: PreTrainedModel, eps: float) -> None:
    """transformers' RMSNorm computes in float32 whatever the model's dtype; torch's own does not."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Qwen3RMSNorm):
            network.set_submodule(name, torch.nn.RMSNorm(len(module.weight), eps=eps, dtype=torch.float64))


def make_student(*, seed: int = 0, tie: bool = False) -> CausalModel:
    network = make_network(seed=seed, tie=tie)
    return CausalModel(network, network)


def make_config(
    *,
    method: str = "opd",
    objective: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    learner: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    steps: int = 10,
) -> RunConfig:
    """A run's config; what a trainer does not read is filled with anything valid."""
    return parse(
        {
            "name": "test",
            "method": method,
            "objective": dict(objective or {}),
            "student": {"model": "unused", **(student or {})},
            "teacher": dict(
                teacher or {"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "env:TEACHER_KEY"}
            ),
            "data": {"kind": "jsonl", "path": "unused"},
            "rollout": {"prompts_per_step": 1, "sampling": {"max_new_tokens": 1, "temperature": temperature}},
            "optim": {"lr": 1e-2, **(optim or {})},
            "learner": dict(learner or {}),
            "loop": {"steps": steps},
        }
    )


def make_trainer(*, seed: int = 0, tie: bool = False, ranks: Ranks | None = None, **config: Any) -> Trainer:
    return Trainer(make_config(**config), (ranks or Alone()).shard(make_student(seed=seed, tie=tie)))


def denominators_of(trainer: Trainer, batch: Sequence[ScoredRollout]) -> Denominators:
    """What the buffer would count: trainable tokens, and the sequences that have any."""
    counts = [int(mask.sum()) for mask in trainer.masks(batch)]
    return Denominators(num_loss_tokens=sum(counts), num_sequences=sum(count > 0 for count in counts))


def loss_and_gradient(
    trainer: Trainer,
    batch: Sequence[ScoredRollout],
    denominators: Mapping[str, Denominators] | None = None,
    *,
    step: int = 1,
) -> tuple[float, Tensor]:
    """Of the batch, without moving; by default the batch is the whole step."""
    masks = trainer.masks(batch)
    tally = trainer.accumulate(batch, masks, denominators or totals(batch, masks), step=step)
    loss = sum(loss.item() for loss in tally.losses.values())
    return loss, torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None])


def take_step(trainer: Trainer, batch: Sequence[ScoredRollout], step: int) -> StepReport:
    return trainer.step(batch, step=step, denominators=denominators_of(trainer, batch))


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy that later steps do not touch."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Equal bit for bit, name by name."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def plain_logits(network: PreTrainedModel, context: Sequence[int], completion: Sequence[int]) -> Tensor:
    """[T, V] logits that predict each completion token, from an ordinary forward pass over this one sequence."""
    ids = torch.tensor(np.concatenate([context, completion]).astype(np.int64)).unsqueeze(0)
    return network(input_ids=ids).logits[0, len(context) - 1 : -1]
