"""Two real processes that make one step (FSDP2 over gloo on the loopback) give what one process gives.

What each found is written down as JSON and safetensors, and compared here with one process's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner import canaries, checkpoint
from learner.logprobs import Tally
from learner.model import CausalModel, load_student, recompute_layers
from learner.outbox import Outbox
from learner.parallel import Joined, meeting
from learner.publish import DevicePublisher, gathered, snapshot
from learner.ranks import Alone, Ranks
from learner.targets import budgeted
from learner.trainer import Trainer, totals
from potstill.errors import NonFinite
from potstill.transports import rows
from potstill.transports.route import Route
from potstill.types import ScoredRollout
from potstill.weights import unpack
from rollout_worker.tensors import as_tensor
from tests.presets import EVERY, STEP, batch_for, make_batch, trainer_of
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import SELF_TEACHER, VOCABULARY, make_config, make_trainer, take_step

STEPS = 3
TIMEOUT_S = 30.0
LORA = {"rank": 2, "alpha": 4.0}


def some_batch(step: int) -> list[ScoredRollout]:
    return random_batch([(3, 4), (1, 6), (5, 2), (2, 9), (1, 2)], vocabulary=VOCABULARY, seed=step)


def one_text(step: int) -> list[ScoredRollout]:
    """There is nothing for the second rank."""
    return random_batch([(3, 4)], vocabulary=VOCABULARY, seed=step)


@dataclass(frozen=True)
class Run:
    """A few steps, in float32 unless its config says otherwise."""

    config: dict[str, Any]
    batch: Callable[[int], list[ScoredRollout]] = some_batch
    tie: bool = False
    learner: dict[str, int] = field(default_factory=lambda: {"micro_batch_tokens": 12})
    recompute: bool = False
    metrics: float = 1e-4  # what rounding may change: of a metric, as a share
    weights: float = 5e-5  # and of a weight


RUNS = {
    "sampled": Run({"method": "opd_sampled"}),
    "sampled, tied": Run({"method": "opd_sampled"}, tie=True),
    "top-k": Run({"method": "opd", "objective": {"support": {"k": 3}}}),
    "frozen teacher": Run({"method": "opsd", "teacher": SELF_TEACHER}),
    "average, tied": Run({"method": "opsd", "teacher": {**SELF_TEACHER, "weights": "ema"}}, tie=True),
    "taid": Run({"method": "taid", "teacher": SELF_TEACHER}),
    "rewards": Run({"method": "kdrl"}, batch=lambda step: make_batch()),
    "pairs": Run({"method": "soda", "teacher": {"kind": "none"}}, batch=lambda step: make_batch(own=1)),
    "one text": Run({"method": "opd_sampled"}, batch=one_text),
    "one text, live teacher": Run({"method": "opsd", "teacher": {**SELF_TEACHER, "weights": "live"}}, batch=one_text),
    "adapter": Run({"method": "opd_sampled", "student": {"lora": LORA}}),
    "recomputed": Run({"method": "opsd", "teacher": SELF_TEACHER}, recompute=True),
    "bfloat16": Run({"method": "opd_sampled", "student": {"dtype": "bfloat16"}}, metrics=1e-2, weights=2**-8),
    "adapter on bfloat16": Run({"method": "opd_sampled", "student": {"lora": LORA, "dtype": "bfloat16"}}),
    "adapter, average": Run(
        {"method": "opsd", "teacher": {**SELF_TEACHER, "weights": "ema"}, "student": {"lora": LORA}}
    ),
}
PRESETS = (
    *("minillm", "iw_opd", "paced", "tsd_kd", "rlsd"),  # what a token counts for depends on its text, or on its prompt
    *("ranked_preference", "soda", "alm", "cross_tokenizer"),  # a loss of several tokens or texts at once
    *("pi_distill", "sdpo", "random_sampling_kd", "dac_kl"),  # texts under two prompts, two models in one, draws
)


def trainer_for(run: Run, models: Path, ranks: Ranks) -> Trainer:
    model = {"model": str(models / ("tied" if run.tie else "untied")), **run.config.get("student", {})}
    config = make_config(**{**run.config, "student": model, "optim": {"lr": 1e-3}, "learner": run.learner})
    student = load_student(config.student, seed=0, device=ranks.home)
    return Trainer(config, ranks.shard(recompute_layers(student) if run.recompute else student))


def train(run: Run, models: Path, ranks: Ranks) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Each step's metrics, the loss of a held-out text last; and the published weights, which rank 0 alone has."""
    trainer = trainer_for(run, models, ranks)
    metrics = [dict(take_step(trainer, run.batch(step), step).metrics) for step in range(1, STEPS + 1)]
    held_out = {"validation": trainer.validate(run.batch(STEPS + 1))}
    if ranks.rank > 0:
        for _ in ("through memory", "from the device"):
            gathered(trainer.student)
        return [*metrics, held_out], {}
    arrays = unpack(*snapshot(trainer.student, version=STEPS))
    weights = {name: as_tensor(array.copy()) for name, array in arrays.items()}
    assert_equal_on_device(trainer.student, dict(weights))
    return [*metrics, held_out], weights


def assert_equal_on_device(student: CausalModel, weights: dict[str, Tensor]) -> None:
    """What a worker would be sent from there, bit for bit."""
    outbox = Outbox("127.0.0.1")
    route = Route(transport="device", wire="exact", adapter_only=False, reason="")
    for entry in DevicePublisher(route, outbox).publish(student, version=STEPS).tensors:
        assert torch.equal(rows.tensor(outbox._room, entry), weights.pop(entry.name))
    assert not weights
    outbox.close()


def derive(name: str, ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a preset in float64; the gradient is rank 0's."""
    kind = "self" if EVERY[name].reads_teacher else "server"
    trainer, batch = trainer_of(name, teacher=kind, ranks=ranks, micro_batch_tokens=16), batch_for(name)
    masks = budgeted(batch, trainer.masks(batch), trainer.config.objective, step=STEP)
    tally = trainer.accumulate(batch, masks, totals(batch, masks), step=STEP)
    gradient = {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}
    return sum(loss.item() for loss in tally.losses.values()), ranks.whole(gradient)


def ask(ranks: Ranks) -> dict[str, list[float]]:
    """What is asked of a trainer beside its steps."""
    batch = some_batch(1)
    reader = make_trainer(ranks=ranks, method="opsd", teacher=SELF_TEACHER)
    checked = make_trainer(ranks=ranks, method="opd", objective={"support": {"k": 3}}, temperature=0.5)
    return {
        "canaries": list(canaries.check(checked, batch).values())[1:],  # the sampler was not at temperature 1
        "annotation": [number for scored in batch for number in reader.teacher_logprobs(scored) or []],
    }


def resume(models: Path, folder: Path, ranks: Ranks) -> dict[str, float]:
    """The step after the one that `folder` keeps."""
    trainer = trainer_for(RUNS["average, tied"], models, ranks)
    checkpoint.restore(trainer, folder)
    return dict(take_step(trainer, some_batch(STEPS + 1), STEPS + 1).metrics)


def keep(models: Path, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Steps, a checkpoint, and one step more."""
    trainer = trainer_for(RUNS["average, tied"], models, ranks)
    for step in range(1, STEPS + 1):
        take_step(trainer, some_batch(step), step)
    if ranks.rank == 0:
        checkpoint.save(trainer, folder, card="", tokenizer=models / "tied", extra={})
    else:
        checkpoint.capture(trainer)
    ranks.total(Tally())  # it is written
    return dict(take_step(trainer, some_batch(STEPS + 1), STEPS + 1).metrics)


def fail(ranks: Joined) -> tuple[str, float]:
    """Which error each has, and after how long, where a score is missing in the second rank's text alone."""
    trainer = make_trainer(ranks=ranks, method="opd", objective={"support": {"k": 3}})
    long, short = random_batch([(3, 9), (3, 4)], vocabulary=VOCABULARY, seed=1)
    assert short.scores is not None
    assert short.scores.ids_logprobs is not None
    spoilt = dataclasses.replace(short.scores, ids_logprobs=short.scores.ids_logprobs * math.nan)
    started = time.perf_counter()
    try:
        take_step(trainer, [long, ScoredRollout(rollout=short.rollout, scores=spoilt)], 1)
    except (NonFinite, RuntimeError) as error:
        ranks.leave()
        return type(error).__name__, time.perf_counter() - started
    raise AssertionError("a step with a missing score was made")


def work(rank: int, port: int, models: Path, results: Path) -> None:
    """One of the two processes: everything, in the same order as the other."""
    torch.set_num_threads(1)
    ranks = Joined.join(rank=rank, size=2, host="127.0.0.1", port=port, timeout_s=TIMEOUT_S)
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, run in RUNS.items():
        numbers[name], weights = train(run, models, ranks)
        tensors |= {f"{name}/{key}": weight for key, weight in weights.items()}
    for name in PRESETS:
        numbers[f"preset {name}"], gradient = derive(name, ranks)
        tensors |= {f"preset {name}/{key}": value.contiguous() for key, value in gradient.items()}
    numbers["asked"] = ask(ranks)
    numbers["kept"] = keep(models, results / "checkpoints" / "step-000003", ranks)
    numbers["resumed"] = resume(models, results / "checkpoints" / "step-000003", ranks)
    numbers["failed"] = fail(ranks)
    (results / f"{rank}.json").write_text(json.dumps(numbers))
    save_file(tensors, results / f"{rank}.safetensors")


@dataclass(frozen=True)
class Found:
    """What the two processes found."""

    folder: Path
    models: Path
    numbers: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    def of(self, name: str) -> dict[str, Tensor]:
        return {key.split("/", 1)[1]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each of the two has: so small a model is not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("run")
    models = tmp_path_factory.mktemp("models")
    for name, tie in {"tied": True, "untied": False}.items():
        save_tiny_model(models / name, seed=0, hidden=32, layers=2, tie_word_embeddings=tie)
    store = meeting("127.0.0.1")
    mp.spawn(work, (store.port, models, folder), nprocs=2)
    numbers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert not load_file(folder / "1.safetensors"), "weights and gradients are put together once"
    return Found(folder, models, numbers, load_file(folder / "0.safetensors"))


@pytest.mark.parametrize("name", RUNS)
def test_steps_of_two_ranks_are_those_of_one(found: Found, name: str) -> None:
    """To float32's rounding: found here were 6e-6 of a metric, and 8e-6 of a weight, where AdamW moves each by 3e-3.

    In bfloat16 each pass's gradient is rounded, and ranks cut a step into other passes.
    """
    run = RUNS[name]
    metrics, weights = train(run, found.models, Alone())
    own = found.numbers[0][name]
    assert [step.keys() for step in own] == [step.keys() for step in metrics]
    for one, two in zip(metrics, own, strict=True):
        assert two == pytest.approx(one, rel=run.metrics, abs=run.metrics / 10, nan_ok=True)
    assert found.of(name).keys() == weights.keys()
    for key, weight in found.of(name).items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=run.weights)


@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient_of_a_preset_are_those_of_one_rank(found: Found, name: str) -> None:
    loss, gradient = derive(name, Alone())
    assert found.numbers[0][f"preset {name}"] == pytest.approx(loss, rel=1e-10, abs=1e-12)
    own = found.of(f"preset {name}")
    assert own.keys() == gradient.keys()
    for key, value in own.items():
        torch.testing.assert_close(value, gradient[key], rtol=1e-8, atol=1e-12)


def test_ranks_agree_to_the_last_bit(found: Found) -> None:
    """Whatever learns from a loss, and whatever is written down, is the same on each."""
    one, two = found.numbers
    for name in [*RUNS, "asked", "kept", "resumed", *(f"preset {name}" for name in PRESETS)]:
        assert repr(one[name]) == repr(two[name])


def test_canaries_and_annotations_are_those_of_one_rank(found: Found) -> None:
    expected = ask(Alone())
    for name, numbers in found.numbers[0]["asked"].items():
        assert numbers == pytest.approx(expected[name], rel=1e-9, abs=1e-12)


def test_a_checkpoint_of_two_ranks_continues_on_two_and_on_one(found: Found) -> None:
    kept = found.numbers[0]["kept"]
    assert found.numbers[0]["resumed"] == kept
    alone = resume(found.models, found.folder / "checkpoints" / "step-000003", Alone())
    assert alone == pytest.approx(kept, rel=1e-4, abs=1e-5)


def test_a_rank_that_fails_lets_the_others_fail_at_once(found: Found) -> None:
    errors, seconds = zip(*(numbers["failed"] for numbers in found.numbers), strict=True)
    assert errors[1] == "NonFinite"
    assert max(seconds) < TIMEOUT_S / 3
