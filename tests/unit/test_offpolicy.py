"""DistiLLM's schedule: φ rises only when validation worsens, and decides how much text is new, replayed or given.

Whoever is faster, generation or training, a step's decision is the same, and a checkpoint brings it back.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import pytest

from learner.trainer import Trainer
from orchestrator.offpolicy import Kept, OffPolicy
from potstill.config import AdaptiveConfig
from potstill.errors import NonFinite
from tests.rollouts import random_batch
from tests.trainers import SELF_TEACHER, VOCABULARY, loss_and_gradient, make_trainer, same, take_step, weights_of

STEPS = 20_000


def make_schedule(
    *,
    num_rises: int = 0,
    kept: Sequence[Kept] = (),
    steps: int = STEPS,
    prompts_per_step: int = 1,
    max_staleness: int = 0,
    **config: float,
) -> OffPolicy:
    """A schedule whose validation loss has risen so often before the first step, which made the texts `kept`."""
    schedule = OffPolicy(
        AdaptiveConfig.model_validate({"validate_every": 1, **config}),
        steps=steps,
        prompts_per_step=prompts_per_step,
        max_staleness=max_staleness,
        seed=0,
    )
    for loss in range(num_rises + 1):
        schedule.validated(float(loss))
    schedule.trained(0, kept)
    return schedule


def texts(count: int) -> list[Kept]:
    return [Kept(prompt=number, ids=(number, 2)) for number in range(count)]


def sources(schedule: OffPolicy, steps: int = STEPS, *, ahead: int = 2) -> list[str]:
    """Of the steps that are decided while the run goes on."""
    found = []
    for step in range(1, steps - ahead + 1):
        schedule.trained(step, [])
        text = schedule.text(step + ahead, 0)
        found.append(text if isinstance(text, str) else "replayed")
    return found


def replays(schedule: OffPolicy, step: int, count: int) -> list[Kept]:
    """What the step at `step` + 2 learns, which must be replayed."""
    schedule.trained(step, [])
    found = [schedule.text(step + 2, place) for place in range(count)]
    return [text for text in found if isinstance(text, Kept)]


def test_until_validation_worsens_all_text_is_given() -> None:
    assert set(sources(make_schedule(kept=texts(5)))) == {"given"}


def test_the_share_rises_only_when_the_loss_rises_by_more_than_the_tolerance() -> None:
    schedule = make_schedule(rises=4, tolerance=0.5)
    found = []
    for loss in (0.4, 0.9, 1.5, 0.3, 0.9, 0.9, 0.2):
        schedule.validated(loss)
        found.append(schedule.share)
    assert found == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.5]


def test_the_share_ends_at_one_exactly() -> None:
    shares = [make_schedule(num_rises=n).share for n in range(13)]
    assert shares == sorted(shares)
    assert shares[9:] == [0.9, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("num_rises", [2, 7, 10])
def test_text_is_new_and_the_students_as_often_as_expected(num_rises: int) -> None:
    """E[new] is the mean of φ(1 − t/T), E[new or replayed] is φ."""
    share, found = num_rises / 10, Counter(sources(make_schedule(num_rises=num_rises, kept=texts(5))))
    deviation = 0.5 / STEPS**0.5
    new = sum(share * (1 - t / STEPS) for t in range(STEPS)) / STEPS
    assert found["new"] / STEPS == pytest.approx(new, abs=4 * deviation)
    assert 1 - found["given"] / STEPS == pytest.approx(share, abs=4 * deviation)


def test_new_text_becomes_rarer() -> None:
    found = sources(make_schedule(num_rises=10, kept=texts(5)))
    quarter = STEPS // 4
    counts = [found[start : start + quarter].count("new") for start in range(0, STEPS, quarter)]
    assert counts == sorted(counts, reverse=True)


def test_a_buffer_that_cannot_fill_a_step_is_not_replayed() -> None:
    few = make_schedule(num_rises=5, kept=texts(3), prompts_per_step=4)
    enough = make_schedule(num_rises=5, kept=texts(4), prompts_per_step=4)
    assert (set(sources(few)), set(sources(enough))) == ({"new", "given"}, {"new", "replayed", "given"})


def test_the_buffer_forgets_the_oldest_first() -> None:
    schedule = make_schedule(num_rises=10, kept=texts(63), capacity=60, prompts_per_step=60, steps=100)
    assert sorted(replays(schedule, 98, 60)) == texts(63)[3:]


def test_draws_are_without_repetition_and_differ_from_step_to_step() -> None:
    schedule = make_schedule(num_rises=10, kept=texts(50), prompts_per_step=20, steps=100)
    first, second = (replays(schedule, step, 20) for step in (97, 98))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_what_is_heard_after_a_step_holds_from_the_first_step_that_cannot_have_been_granted(max_staleness: int) -> None:
    """The version s of step s grants the steps up to s + 1 + S."""
    schedule = make_schedule(max_staleness=max_staleness, rises=1, steps=10_000)
    before = [schedule.text(step, 0) for step in range(1, max_staleness + 3)]
    schedule.validated(9.0)
    schedule.trained(1, [])
    granted = [schedule.text(step, 0) for step in range(2, max_staleness + 3)]
    assert set(before) == set(granted) == {"given"}
    assert schedule.text(max_staleness + 3, 0) == "new"


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_every_step_that_can_be_granted_is_decided(max_staleness: int) -> None:
    """Weights are out, and their grant given, before the chores of their step are done."""
    schedule = OffPolicy(
        AdaptiveConfig(validate_every=1), steps=9, prompts_per_step=1, max_staleness=max_staleness, seed=0
    )
    for version in range(9):
        for step in range(version + 1, version + 2 + max_staleness):
            assert schedule.text(step, 0) == "given"
        schedule.trained(version, [])


def test_a_schedule_that_went_through_json_decides_and_draws_the_same() -> None:
    options = {"capacity": 20, "prompts_per_step": 3, "max_staleness": 1, "steps": 60}
    through = make_schedule(num_rises=10, kept=texts(30), **options)  # type: ignore[arg-type]
    for step in range(1, 31):
        through.trained(step, [])
    resumed = make_schedule(**options)  # type: ignore[arg-type]
    resumed.load(json.loads(json.dumps(through.state())))
    found: list[list[object]] = []
    for schedule in (through, resumed):
        schedule.validated(99.0)
        found.append([])
        for step in range(31, 58):
            found[-1] += [schedule.text(step, place) for place in range(3)]
            schedule.trained(step, texts(2))
    assert found[0] == found[1]
    assert {type(text) for text in found[0]} == {str, Kept}
    assert resumed.state() == through.state()
    assert resumed.share == 1.0


def full_trainer() -> Trainer:
    return make_trainer(method="distillm", teacher=SELF_TEACHER, objective={}, learner={"micro_batch_tokens": 12})


def test_the_validation_loss_is_the_steps_own_and_moves_nothing() -> None:
    batch = random_batch([(3, 4), (1, 6), (5, 2)], vocabulary=VOCABULARY, seed=1, by="others")
    trainer = full_trainer()
    for step in (1, 2):
        take_step(trainer, batch, step)
    before, moments = weights_of(trainer.student), len(trainer.optimizer.state)
    found = trainer.validate(batch)
    assert same(weights_of(trainer.student), before)
    assert (trainer.version, len(trainer.optimizer.state)) == (2, moments)
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    assert found == pytest.approx(loss_and_gradient(trainer, batch, step=3)[0], rel=1e-12)
    assert found > 1e-6


def test_a_validation_that_is_not_finite_stops_the_run() -> None:
    trainer = full_trainer()
    batch = random_batch([(3, 4)], vocabulary=VOCABULARY, seed=1, by="others")
    trainer.student.head.data[0, 0] = float("nan")
    with pytest.raises(NonFinite):
        trainer.validate(batch)
