"""A real vLLM engine takes its weights from a learner's device, in another process, over gloo; one of the two breaks.

What it serves is compared with what it serves of weights that came through memory, and with transformers. One engine
serves the whole file, and is given up by the last test; the others leave it whole, on a later version of A or B.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.config_weights import InFlight
from potstill.errors import StaleWeights, WeightsError, WorkerLost
from potstill.transports.device import Stream
from potstill.types import FinishReason, WeightsVersion
from rollout_worker.engine import Completion, build_engine
from tests.benches import Bench, Student, requests, sampling
from tests.device_learner import DeviceLearner
from tests.tiny_models import save_tiny_model, tiny_tokenizer

MIXED = requests((5, 130, 300, 1, 57))  # vLLM's prefix cache works in blocks of 128 tokens
TOLERANCE = 2e-5  # of a log-prob against a float32 forward pass of transformers
MAX_LEN = 512


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[Student]:
    folder = tmp_path_factory.mktemp("students")
    return [Student(save_tiny_model(folder / name, seed=ord(name), tie_word_embeddings=True)) for name in "abc"]


@pytest.fixture(scope="module")
def bench(students: list[Student]) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        engine = build_engine(
            "vllm",
            model=students[0].folder,
            dtype="float32",
            stop_token_id=tiny_tokenizer().eos_token_id,
            version=0,
            threads=1,
            max_model_len=MAX_LEN,
        )
        first = runner.run(engine.generate(MIXED, sampling(20), want_logprobs=True, support_k=4))
        yield Bench("vllm", engine, runner, first)
        runner.run(engine.close())


class Learners:
    """The learner of the file, and after it is killed, the next."""

    def __init__(self) -> None:
        self.living = DeviceLearner()

    def publish(self, student: Student, version: int) -> WeightsVersion:
        return self.living.publish(student.folder, version)

    def kill(self) -> None:
        self.living.kill()
        self.living = DeviceLearner()


@pytest.fixture(scope="module")
def learner() -> Iterator[Learners]:
    made = Learners()
    yield made
    made.living.close()


@dataclasses.dataclass
class Interrupted:
    """A stream in the middle of which something happens."""

    stream: Stream
    event: Callable[[], None]

    def begin(self) -> None:
        self.stream.begin()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, piece in enumerate(self.stream):
            yield piece
            if number == 1:  # of 25
                self.event()

    def end(self) -> None:
        self.stream.end()

    def drop(self) -> None:
        self.stream.drop()


def load(bench: Bench, version: WeightsVersion, event: Callable[[], None] | None = None) -> None:
    stream = version.payload.open({})
    bench.runner.run(bench.engine.load_weights(version, stream if event is None else Interrupted(stream, event)))


def assert_equal(left: list[Completion], right: list[Completion]) -> None:
    for one, other in zip(left, right, strict=True):
        for field in ("token_ids", "logprobs", "support_ids", "support_logprobs"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), strict=True)


def test_an_engine_is_what_it_would_be_had_the_weights_come_through_memory(
    bench: Bench, students: list[Student], learner: Learners
) -> None:
    bench.load(students[1])
    through_memory = bench.write(MIXED, sampling(20), k=4)
    bench.load(students[0])
    version = bench.engine.version + 1
    load(bench, learner.publish(students[1], version))
    written = bench.write(MIXED, sampling(20), k=4)
    assert_equal(written, through_memory)
    assert {token_version for one in written for token_version in one.weight_versions} == {version}
    for request, one in zip(MIXED, written, strict=True):
        expected = students[1].logprobs(request.prompt_ids, one.token_ids, sampling(20))
        np.testing.assert_allclose(one.logprobs, expected, atol=TOLERANCE, rtol=0)
    load(bench, learner.publish(students[0], version + 1))
    assert_equal(bench.write(MIXED, sampling(20), k=4), bench.first)


@pytest.mark.parametrize("in_flight", ["keep", "finish", "abort"])
def test_what_is_being_written_is_kept_finished_or_aborted_as_for_any_other_transport(
    bench: Bench, students: list[Student], learner: Learners, in_flight: InFlight
) -> None:
    old = bench.load(students[0])
    asked, config = requests((150, 20), copies=4), sampling(200)
    version = learner.publish(students[1], old + 1)

    async def run() -> list[Completion]:
        writing = asyncio.create_task(bench.engine.generate(asked, config, want_logprobs=True, support_k=0))
        await bench.engine.generate(MIXED[:1], sampling(10), want_logprobs=True, support_k=0)
        await bench.engine.load_weights(version, version.payload.open({}), in_flight)
        return await writing

    written = bench.runner.run(run())
    for request, one in zip(asked, written, strict=True):
        per_student = [student.logprobs(request.prompt_ids, one.token_ids, config) for student in students[:2]]
        expected = np.where(one.weight_versions == old, *per_student)
        np.testing.assert_allclose(one.logprobs, expected, atol=TOLERANCE, rtol=0)
    assert any(len(set(one.weight_versions)) == 2 for one in written) == (in_flight == "keep")
    assert any(one.finish_reason is FinishReason.ABORTED for one in written) == (in_flight == "abort")


def test_versions_that_are_past_or_not_the_students_leave_the_old_one_serving(
    bench: Bench, students: list[Student], learner: Learners, tmp_path: Path
) -> None:
    current = bench.load(students[0])
    past = learner.publish(students[1], current)
    with pytest.raises(StaleWeights, match="already loaded"):
        load(bench, past)
    foreign = learner.publish(
        Student(save_tiny_model(tmp_path, seed=3, layers=1, tie_word_embeddings=True)), current + 1
    )
    with pytest.raises(WeightsError, match="missing tensors"):
        load(bench, foreign)
    other = dataclasses.replace(foreign, version=current + 2)
    with pytest.raises(WeightsError, match="table is not the one"):
        load(bench, other)
    gone = learner.publish(students[1], current + 1)
    learner.publish(students[1], current + 2)
    with pytest.raises(StaleWeights, match=f"the learner has {current + 2} now"):
        load(bench, gone)
    assert bench.engine.version == current
    assert_equal(bench.write(MIXED, sampling(20), k=4), bench.first)


@pytest.mark.parametrize(
    "in_flight", ["keep", *(pytest.param(how, marks=pytest.mark.long) for how in ("finish", "abort"))]
)
@pytest.mark.parametrize("broken", ["the learner is killed", "a bit flips"])
def test_after_half_of_a_version_nothing_is_written_until_one_is_whole(
    bench: Bench, students: list[Student], learner: Learners, broken: str, in_flight: InFlight
) -> None:
    """Half of C takes the place of A, then B. Had the engine served in between, or kept any of C, texts show it."""
    old = bench.load(students[0])
    half = learner.publish(students[2], old + 1)
    event, expected = learner.kill, StaleWeights
    if broken == "a bit flips":
        learner.living.damage("model.layers.1.self_attn.v_proj.weight")  # queries and keys wait for it in one matrix
        event, expected = (lambda: None), WeightsError

    async def run() -> tuple[list[Completion], list[Completion]]:
        early = asyncio.create_task(
            bench.engine.generate(requests((40,), copies=4), sampling(200), want_logprobs=True, support_k=0)
        )
        await bench.engine.generate(MIXED[:1], sampling(10), want_logprobs=True, support_k=0)
        with pytest.raises(expected, match=f"version {old + 1}"):
            await bench.engine.load_weights(half, Interrupted(half.payload.open({}), event), in_flight)
        assert bench.engine.version == old
        late = asyncio.create_task(bench.engine.generate(MIXED, sampling(20), want_logprobs=True, support_k=4))
        whole = learner.publish(students[1], old + 1)  # one that resumed makes the same version anew
        await bench.engine.load_weights(whole, whole.payload.open({}), in_flight)
        return await early, await late

    early, late = bench.runner.run(run())
    assert {version for one in late for version in one.weight_versions} == {old + 1}
    assert_equal(late, bench.write(MIXED, sampling(20), k=4))
    for request, one in zip(MIXED, late, strict=True):
        truth = students[1].logprobs(request.prompt_ids, one.token_ids, sampling(20))
        np.testing.assert_allclose(one.logprobs, truth, atol=TOLERANCE, rtol=0)
    for request, one in zip(requests((40,), copies=4), early, strict=True):
        per_student = [student.logprobs(request.prompt_ids, one.token_ids, sampling(200)) for student in students[:2]]
        truth = np.where(one.weight_versions == old, *per_student)
        np.testing.assert_allclose(one.logprobs, truth, atol=TOLERANCE, rtol=0)


def test_an_engine_that_only_ever_gets_halves_is_given_up(
    bench: Bench, students: list[Student], learner: Learners
) -> None:
    version = learner.publish(students[1], bench.load(students[0]) + 1)
    for error, message in ((StaleWeights, "stopped"), (StaleWeights, "stopped"), (WorkerLost, "3 versions in a row")):
        stream = version.payload.open({})
        with pytest.raises(error, match=message):
            bench.runner.run(bench.engine.load_weights(version, Interrupted(stream, stream.drop)))
    with pytest.raises(WorkerLost, match="3 versions in a row"):
        bench.write(MIXED, sampling(5))
