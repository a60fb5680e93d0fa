"""Float32 weights behind a bfloat16 student: small updates and late gradients count, and it is always them, rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.masters import Masters
from learner.model import CausalModel, load_student, make_optimizer
from learner.trainer import Trainer
from potstill.config import StudentConfig
from potstill.errors import ConfigError
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import VOCABULARY, make_config, make_network, make_trainer, take_step

SMALL = 1e-5  # of weights around 0.3: a hundredth of what bfloat16 can tell apart
STEPS = 20


def student_of(dtype: torch.dtype) -> CausalModel:
    network = make_network().to(dtype)
    return CausalModel(network, network)


def trained(dtype: torch.dtype, *, lr: float, steps: int = STEPS, **config: object) -> Trainer:
    trainer = Trainer(make_config(method="opd_sampled", optim={"lr": lr}, steps=steps, **config), student_of(dtype))
    for step in range(1, steps + 1):
        take_step(trainer, random_batch([(3, 4), (1, 6), (5, 2)], vocabulary=VOCABULARY, seed=step), step)
    return trainer


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])


def rounded(student: CausalModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in student.network.named_parameters()}


def test_steps_that_bfloat16_would_lose_are_those_of_float32() -> None:
    """They add up to what float32 finds, though no single one of them could be seen in a bfloat16 weight."""
    start = flat(Masters(student_of(torch.bfloat16)).weights)
    exact = flat(trained(torch.float32, lr=SMALL).masters.weights) - flat(Masters(student_of(torch.float32)).weights)
    moved = flat(trained(torch.bfloat16, lr=SMALL).masters.weights) - start
    assert torch.cosine_similarity(moved, exact, dim=0) > 0.95
    assert moved.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)


def test_without_masters_they_are_lost() -> None:
    """What the test above would find of an optimizer that moves bfloat16 weights themselves."""
    student = student_of(torch.bfloat16)
    before = flat(rounded(student)).clone()
    optimizer = make_optimizer(student.parameters(), make_config(optim={"lr": SMALL}).optim)
    for _ in range(STEPS):
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert (flat(rounded(student)) == before).float().mean() > 0.95


def test_the_student_is_the_masters_rounded_after_every_step() -> None:
    trainer = trained(torch.bfloat16, lr=1e-2, steps=3)
    for name, parameter in trainer.student.network.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert trainer.masters.weights[name].dtype == torch.float32
        assert torch.equal(parameter, trainer.masters.weights[name].bfloat16())
    assert not torch.equal(flat(trainer.masters.weights), flat(rounded(trainer.student)))


def test_gradients_of_many_passes_add_up_in_float32() -> None:
    """256 passes that each add 1: a sum in bfloat16 would stay at 256 once it is there."""
    student = student_of(torch.bfloat16)
    masters = Masters(student)
    for _ in range(300):
        student.head.sum().backward()  # type: ignore[no-untyped-call]
    assert student.head.grad is None
    (gradient,) = masters.gradients()
    assert gradient.dtype == torch.float32
    assert bool((gradient == 300).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precise_weights_are_their_own_masters_and_cost_nothing(dtype: torch.dtype) -> None:
    student = student_of(dtype)
    masters = Masters(student)
    assert all(masters.weights[name] is parameter for name, parameter in student.network.named_parameters())
    assert masters.state() == {}


def test_an_adapter_on_a_bfloat16_base_is_float32_already(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=0)
    lora = {"rank": 2, "alpha": 4.0}
    config = StudentConfig.model_validate({"model": str(tmp_path), "dtype": "bfloat16", "lora": lora})
    student = load_student(config, seed=0, device=torch.device("cpu"))
    assert student.head.dtype == torch.bfloat16
    assert {weight.dtype for weight in Masters(student).weights.values()} == {torch.float32}
    assert Masters(student).state() == {}


def test_a_checkpoint_of_another_dtype_is_refused_by_name() -> None:
    wide, narrow = make_trainer().masters, trained(torch.bfloat16, lr=SMALL, steps=1).masters
    for one, other in ((wide, narrow), (narrow, wide)):
        with pytest.raises(ConfigError, match=r"student\.dtype"):
            one.load(other.state())
