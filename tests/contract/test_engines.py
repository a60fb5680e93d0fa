"""Both engines keep the promises of rollout_worker/engine.py, measured against transformers' own forward pass.

One engine of each kind is started for the whole file. Tests leave it on some later version of weights A or B.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from potstill.config import SamplingConfig
from potstill.config_weights import InFlight
from potstill.errors import ConfigError, NonFinite, StaleWeights, WeightsError, WorkerLost
from potstill.types import FinishReason
from potstill.weights import pack
from rollout_worker.arriving import Here
from rollout_worker.engine import Completion, GenerationRequest, build_engine
from rollout_worker.sampling import processed_logits, vllm_arguments
from tests.benches import Bench, Student, requests, sampling
from tests.tiny_models import save_tiny_model, tiny_tokenizer

# One test breaks the stepping thread of vLLM down; that it dies loudly is part of the promise.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STOP = tiny_tokenizer().eos_token_id
TOLERANCE = 2e-5  # of a log-prob against a float32 forward pass of transformers
MAX_LEN = 512
LONG = sampling(200)
NUM_DRAWS = 5  # that the benches' engines keep where log-probs are wanted


MIXED = requests((5, 130, 300, 1, 57))  # the prefix cache of vLLM on a CPU works in blocks of 128 tokens


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Student]:
    folder = tmp_path_factory.mktemp("students")
    # Tied: the head is the tensor that an update most easily forgets.
    a, b = (save_tiny_model(folder / name, seed=seed, tie_word_embeddings=True) for name, seed in (("a", 1), ("b", 2)))
    return Student(a), Student(b)


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def bench(request: pytest.FixtureRequest, students: tuple[Student, Student]) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        engine = build_engine(
            request.param,
            model=students[0].folder,
            dtype="float32",
            stop_token_id=STOP,
            version=0,
            threads=1,
            max_model_len=MAX_LEN,
            num_draws=NUM_DRAWS,
        )
        first = runner.run(engine.generate(MIXED, sampling(20), want_logprobs=True, support_k=4))
        yield Bench(request.param, engine, runner, first)
        runner.run(engine.close())


@dataclasses.dataclass
class Midway:
    """What was written while weights came, and then; and for how long nothing could be."""

    completions: list[Completion]
    after: Completion
    paused_s: float


def assert_equal(left: list[Completion], right: list[Completion]) -> None:
    """Bit for bit, versions aside."""
    for one, other in zip(left, right, strict=True):
        for field in ("token_ids", "logprobs", "support_ids", "support_logprobs", "draw_ids", "draw_logprobs"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), strict=True)
        assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize(
    "config",
    [sampling(40), sampling(40, temperature=0.7), sampling(40, temperature=1.3, top_p=0.8, top_k=20)],
    ids=["plain", "cool", "truncated"],
)
def test_log_probs_are_those_of_the_distribution_sampled_from_and_the_support_is_the_students_own(
    bench: Bench, students: tuple[Student, Student], config: SamplingConfig
) -> None:
    version = bench.load(students[0])
    for request, completion in zip(MIXED, bench.write(MIXED, config, k=6), strict=True):
        expected = students[0].logprobs(request.prompt_ids, completion.token_ids, config)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)
        own = students[0].logits(request.prompt_ids, completion.token_ids).log_softmax(-1)
        top = own.topk(6, dim=-1)
        np.testing.assert_array_equal(completion.support_ids, top.indices.int().numpy())
        np.testing.assert_allclose(completion.support_logprobs, top.values.numpy(), atol=TOLERANCE, rtol=0)
        assert completion.weight_versions.tolist() == [version] * len(completion.token_ids)


def test_greedy_follows_the_most_probable_id_and_reports_no_log_prob(
    bench: Bench, students: tuple[Student, Student]
) -> None:
    bench.load(students[0])
    for request, completion in zip(MIXED, bench.write(MIXED, sampling(25, temperature=0.0), k=1), strict=True):
        greedy = students[0].logits(request.prompt_ids, completion.token_ids).argmax(-1)
        assert completion.token_ids.tolist() == greedy.tolist() == completion.support_ids[:, 0].tolist()
        assert np.isnan(completion.logprobs).all()


def test_a_completion_ends_at_the_stop_token_or_at_the_limit_and_says_which(bench: Bench) -> None:
    completions = bench.write(requests((9, 40), copies=60), sampling(60))
    reasons = [completion.finish_reason for completion in completions]
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        ids = completion.token_ids.tolist()
        if completion.finish_reason is FinishReason.STOP:
            assert ids.index(STOP) == len(ids) - 1 < 60
        else:
            assert STOP not in ids
            assert len(ids) == 60


def test_what_nobody_asked_for_is_missing_and_not_zero(bench: Bench) -> None:
    (completion,) = bench.write(MIXED[:1], sampling(5), want=False)
    assert np.isnan(completion.logprobs).all()
    assert completion.support_ids is None
    assert completion.support_logprobs is None
    assert completion.draw_ids is None
    assert completion.draw_logprobs is None
    assert completion.token_ids.dtype == completion.weight_versions.dtype == np.int32
    assert bench.write([], sampling(5)) == []


def test_a_seed_decides_a_completion_whatever_is_written_beside_it(bench: Bench) -> None:
    together = bench.write(MIXED, sampling(20))
    alone = [bench.write([request], sampling(20))[0] for request in reversed(MIXED)]
    for one, other in zip(together, reversed(alone), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
    reseeded = [dataclasses.replace(request, seed=request.seed + 1) for request in MIXED]
    assert bench.write(reseeded, sampling(20))[0].token_ids.tolist() != together[0].token_ids.tolist()


@pytest.mark.parametrize("config", [sampling(1, temperature=0.5), sampling(1, top_p=0.7)], ids=["temperature", "top_p"])
def test_sampled_frequencies_are_the_softmax(
    bench: Bench, students: tuple[Student, Student], config: SamplingConfig
) -> None:
    bench.load(students[0])
    num_draws = 3000
    drawn = bench.write(requests((12,), copies=num_draws), config, want=False)
    counts = np.bincount([completion.token_ids[0] for completion in drawn], minlength=259)
    logits = students[0].logits(requests((12,))[0].prompt_ids, np.zeros(1, np.int32))
    expected = num_draws * processed_logits(logits, config)[0].softmax(-1).double().numpy()
    assert counts[expected == 0].sum() == 0
    frequent = expected > 8
    observed = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum())
    chi_square = float(((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum())
    freedom = int(frequent.sum())
    assert freedom > 20
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("config", [sampling(1), sampling(1, temperature=0.5, top_p=0.9)], ids=["plain", "truncated"])
def test_draws_beside_the_written_token_are_of_the_same_distribution_and_independent_of_it(
    bench: Bench, students: tuple[Student, Student], config: SamplingConfig
) -> None:
    bench.load(students[0])
    num_texts = 1500
    written = bench.write(requests((12,), copies=num_texts), config)
    drawn = np.concatenate([completion.draw_ids for completion in written])
    assert drawn.shape == (num_texts, NUM_DRAWS)
    logits = students[0].logits(requests((12,))[0].prompt_ids, np.zeros(1, np.int32))
    probs = processed_logits(logits, config)[0].softmax(-1).double().numpy()
    expected = drawn.size * probs
    counts = np.bincount(drawn.ravel(), minlength=259)
    assert counts[expected == 0].sum() == 0
    frequent = expected > 8
    chi_square = float(((counts - expected)[frequent] ** 2 / expected[frequent]).sum())
    assert chi_square < frequent.sum() + 5 * np.sqrt(2 * frequent.sum())
    columns = [*drawn.T, np.concatenate([completion.token_ids for completion in written])]
    alike = float((probs**2).sum())  # how often two independent ones are
    for one in range(NUM_DRAWS):
        share = float((columns[one] == columns[one + 1]).mean())
        assert abs(share - alike) < 5 * np.sqrt(alike / num_texts)


def test_draws_carry_their_log_probs_come_again_with_the_seed_and_change_nothing_that_is_written(
    bench: Bench, students: tuple[Student, Student]
) -> None:
    bench.load(students[0])
    config = sampling(20, temperature=0.8, top_k=40)
    completions = bench.write(MIXED, config, k=2)
    for request, completion in zip(MIXED, completions, strict=True):
        logits = students[0].logits(request.prompt_ids, completion.token_ids)
        expected = processed_logits(logits, config).log_softmax(-1)
        expected = expected.gather(-1, torch.from_numpy(completion.draw_ids.astype(np.int64))).numpy()
        np.testing.assert_allclose(completion.draw_logprobs, expected, atol=TOLERANCE, rtol=0)
    alone = [bench.write([request], config, k=2)[0] for request in reversed(MIXED)]
    for one, other in zip(completions, reversed(alone), strict=True):
        assert one.draw_ids.tolist() == other.draw_ids.tolist()
    undrawn = bench.write(MIXED, config, want=False)
    assert [c.token_ids.tolist() for c in undrawn] == [c.token_ids.tolist() for c in completions]


def test_a_request_may_ask_for_less_than_the_others(bench: Bench) -> None:
    limits = (3, 20, 1, None, 7)
    cut = [dataclasses.replace(request, max_new_tokens=n) for request, n in zip(MIXED, limits, strict=True)]
    both = bench.write(MIXED, sampling(20)), bench.write(cut, sampling(20))
    for whole, part, limit in zip(*both, limits, strict=True):
        length = min(limit or 20, len(whole.token_ids))
        assert part.token_ids.tolist() == whole.token_ids[:length].tolist()
        assert part.finish_reason == (FinishReason.STOP if part.token_ids[-1] == STOP else FinishReason.LENGTH)


def test_after_an_update_the_engine_is_a_fresh_one_on_the_new_weights(
    bench: Bench, students: tuple[Student, Student]
) -> None:
    bench.load(students[1])
    of_b = bench.write(MIXED, sampling(20), k=4)
    for request, completion in zip(MIXED, of_b, strict=True):
        expected = students[1].logprobs(request.prompt_ids, completion.token_ids, sampling(20))
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)
    bench.load(students[0])
    assert_equal(bench.write(MIXED, sampling(20), k=4), bench.first)


def test_a_cancelled_call_leaves_the_engine_serving(bench: Bench, students: tuple[Student, Student]) -> None:
    bench.load(students[0])

    async def cancel_midway(after_s: float) -> None:
        writing = asyncio.create_task(bench.engine.generate(MIXED, sampling(200), want_logprobs=True, support_k=0))
        await asyncio.sleep(after_s)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    for after_s in (0.0, 0.001, 0.05):
        bench.runner.run(cancel_midway(after_s))
    assert_equal(bench.write(MIXED, sampling(20), k=4), bench.first)


def test_weights_that_are_not_newer_are_refused(bench: Bench, students: tuple[Student, Student]) -> None:
    version = bench.load(students[0])
    for offered in (version, version - 1):
        with pytest.raises(StaleWeights):
            bench.runner.run(bench.engine.load_weights(*students[1].payload(offered)))
    assert bench.engine.version == version
    assert_equal(bench.write(MIXED, sampling(20), k=4), bench.first)


def test_damaged_and_foreign_weights_are_refused_and_the_old_ones_go_on_serving(
    bench: Bench, students: tuple[Student, Student], tmp_path: Path
) -> None:
    version = bench.load(students[0])
    damaged, payload = students[1].payload(version + 1)
    payload[len(payload) // 2] ^= 1
    tensors = {entry.name: np.zeros(entry.shape, np.float32) for entry in damaged.tensors}
    name = next(iter(tensors))
    foreign = [
        tensors | {name: tensors[name][:-1]},
        tensors | {"model.extra": tensors[name]},
        {kept: tensor for kept, tensor in tensors.items() if kept != name},
        tensors | {name: tensors[name].astype(np.float16)},
    ]
    for offered in ((damaged, payload), *(pack(some, version + 1) for some in foreign)):
        with pytest.raises(WeightsError):
            bench.runner.run(bench.engine.load_weights(*offered))
    assert bench.engine.version == version
    assert_equal(bench.write(MIXED, sampling(20), k=4), bench.first)


def update_midway(bench: Bench, student: Student, in_flight: InFlight, asked: list[GenerationRequest]) -> Midway:
    """Load new weights while `asked` is written; one more request is made just before, and one just after."""

    async def run() -> Midway:
        write = partial(bench.engine.generate, sampling=LONG, want_logprobs=True, support_k=0)
        writing = asyncio.create_task(write(asked))
        await bench.engine.generate(MIXED[:1], sampling(10), want_logprobs=True, support_k=0)
        payload = student.payload(bench.engine.version + 1)
        loading = asyncio.create_task(bench.engine.load_weights(*payload, in_flight))
        paused_s = await loading
        return Midway(await writing, (await write(MIXED[4:]))[0], paused_s)

    return bench.runner.run(run())


@pytest.mark.parametrize("in_flight", ["keep", "finish", "abort"])
def test_an_update_while_requests_run_leaves_every_token_with_the_version_that_wrote_it(
    bench: Bench, students: tuple[Student, Student], in_flight: InFlight
) -> None:
    old = bench.load(students[0])
    asked = requests((150, 20), copies=4)
    done = update_midway(bench, students[1], in_flight, asked)
    assert bench.engine.version == old + 1
    for request, completion in zip([*asked, MIXED[4]], [*done.completions, done.after], strict=True):
        assert set(np.diff(completion.weight_versions)) <= {0, 1}
        per_student = [student.logprobs(request.prompt_ids, completion.token_ids, LONG) for student in students]
        expected = np.where(completion.weight_versions == old, *per_student)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)
    assert set(done.after.weight_versions) == {old + 1}
    spanning = [completion for completion in done.completions if len(set(completion.weight_versions)) == 2]
    assert bool(spanning) == (in_flight == "keep")
    aborted = [completion for completion in done.completions if completion.finish_reason is FinishReason.ABORTED]
    assert bool(aborted) == (in_flight == "abort")
    assert all(len(completion.token_ids) < LONG.max_new_tokens for completion in aborted)
    assert 0 < done.paused_s < 5


def test_what_was_aborted_may_be_asked_for_again_with_its_text_as_the_start(
    bench: Bench, students: tuple[Student, Student]
) -> None:
    bench.load(students[0])
    asked = requests((20,), copies=4)
    done = update_midway(bench, students[1], "abort", asked)
    (request, cut) = next(
        pair for pair in zip(asked, done.completions, strict=True) if pair[1].finish_reason is FinishReason.ABORTED
    )
    prompt = np.concatenate((request.prompt_ids, cut.token_ids))
    (rest,) = bench.write([dataclasses.replace(request, prompt_ids=prompt)], sampling(20))
    expected = students[1].logprobs(prompt, rest.token_ids, sampling(20))
    np.testing.assert_allclose(rest.logprobs, expected, atol=TOLERANCE, rtol=0)


def test_rounded_weights_are_loaded_as_they_were_rounded(bench: Bench, students: tuple[Student, Student]) -> None:
    tensors = load_file(students[1].folder / "model.safetensors")
    bits = {name: tensor.bfloat16().view(torch.uint16).numpy() for name, tensor in tensors.items()}
    widened = {name: tensor.bfloat16().float().numpy() for name, tensor in tensors.items()}
    bench.runner.run(bench.engine.load_weights(*pack(bits, bench.engine.version + 1, rounded=True)))
    rounded = bench.write(MIXED, sampling(9), k=2)
    bench.runner.run(bench.engine.load_weights(*pack(widened, bench.engine.version + 1)))
    assert_equal(rounded, bench.write(MIXED, sampling(9), k=2))
    bench.load(students[0])


@pytest.mark.parametrize(
    ("changes", "config", "k", "message"),
    [
        ({"prompt_ids": np.zeros(0, np.int32)}, sampling(5), 0, "prompt is empty"),
        ({"prompt_ids": np.zeros(500, np.int32)}, sampling(13), 0, "exceed the 512 positions"),
        ({"prompt_ids": np.array([259], np.int32)}, sampling(5), 0, "outside the vocabulary of 259"),
        ({"prompt_ids": np.array([-1], np.int32)}, sampling(5), 0, "outside the vocabulary"),
        ({"seed": -1}, sampling(5), 0, "seed -1"),
        ({"max_new_tokens": 6}, sampling(5), 0, "max_new_tokens is 6, of 5 at most"),
        ({"max_new_tokens": 0}, sampling(5), 0, "max_new_tokens is 0"),
        ({}, sampling(5, temperature=0.001), 0, "temperature is 0.001"),
        ({}, sampling(5), 260, "objective.support.k is 260"),
    ],
)
def test_a_request_that_an_engine_would_silently_change_is_refused(
    bench: Bench, changes: dict[str, object], config: SamplingConfig, k: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.write([dataclasses.replace(MIXED[0], **changes)], config, k=k)


def test_no_field_of_vllms_sampling_parameters_is_left_to_a_default() -> None:
    from vllm import SamplingParams

    ours = vllm_arguments(
        sampling(5), max_new_tokens=5, seed=0, stop_token_id=STOP, want_logprobs=True, support_k=0, num_draws=0
    )
    derived = {"output_text_buffer_length"}  # filled in by vLLM from `stop`
    public = {field for field in SamplingParams.__struct_fields__ if not field.startswith("_")}
    assert ours.keys() | {"output_kind"} == public - derived


def test_bfloat16_weights_travel_as_bits_and_are_loaded_exactly(students: tuple[Student, Student]) -> None:
    tensors = load_file(students[1].folder / "model.safetensors")
    bits = {name: tensor.bfloat16().view(torch.uint16).numpy() for name, tensor in tensors.items()}
    built = [
        build_engine(
            "transformers", model=student.folder, dtype="bfloat16", stop_token_id=STOP, version=0, threads=1,
            max_model_len=MAX_LEN,
        )
        for student in students
    ]  # fmt: skip

    async def write() -> list[list[Completion]]:
        updated, fresh = built
        await updated.load_weights(*pack(bits, 1))
        outputs = [await engine.generate(MIXED, sampling(9), want_logprobs=True, support_k=2) for engine in built]
        await updated.close()
        await fresh.close()
        return outputs

    assert_equal(*asyncio.run(write()))


@pytest.mark.parametrize("bench", ["vllm"], indirect=True)
def test_vllm_writes_while_a_version_is_packed_and_keeps_one_of_them(
    bench: Bench, students: tuple[Student, Student]
) -> None:
    from rollout_worker.vllm_packing import pack as packed_by_vllm

    bench.load(students[0])
    before = bench.write(MIXED, sampling(9), k=2)
    (model,) = bench.engine._engine.collective_rpc(lambda worker: worker.get_model())
    old = [weakref.ref(parameter) for parameter in model.parameters()]
    weights = load_file(students[1].folder / "model.safetensors")
    written = threading.Event()

    def coming() -> Iterator[tuple[str, torch.Tensor]]:
        first, *others = weights.items()
        yield first
        assert written.wait(60)
        yield from others

    with ThreadPoolExecutor(1) as beside:
        packing = beside.submit(packed_by_vllm, model, coming())
        assert_equal(before, bench.write(MIXED, sampling(9), k=2))
        written.set()
        version = packing.result()
    assert_equal(before, bench.write(MIXED, sampling(9), k=2))  # packed, and not taken
    version.take()
    assert bench.engine._engine.reset_prefix_cache()
    gc.collect()
    assert [parameter for parameter in old if parameter() is not None] == []
    with pytest.raises(NonFinite, match=r"no finite weights into model\.norm\.weight$"):
        packed_by_vllm(model, ((name, one) for name, one in weights.items() if name != "model.norm.weight"))
    taken = bench.write(MIXED, sampling(9), k=2)
    bench.load(students[1])
    assert_equal(taken, bench.write(MIXED, sampling(9), k=2))


def test_layers_that_vllm_packs_in_ways_not_seen_are_loaded_in_place() -> None:
    from rollout_worker.vllm_packing import can_pack

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    assert can_pack(model)
    model[1].quant_method = object()  # holds no weights
    assert can_pack(model)
    model[0].quant_method = object()
    assert not can_pack(model)


def test_when_an_engine_ends_everybody_who_waits_is_told_and_half_a_version_ends_it(
    bench: Bench, students: tuple[Student, Student]
) -> None:
    class Torn(dict[str, torch.Tensor]):
        """Weights of which only the first can be read."""

        def items(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield next(iter(super().items()))
            raise MemoryError

    weights = Torn(load_file(students[1].folder / "model.safetensors"))
    version = bench.engine.version + 1

    async def end_midway() -> list[object]:
        writing = [
            asyncio.create_task(bench.engine.generate([request], sampling(200), want_logprobs=True, support_k=0))
            for request in MIXED
        ]
        waiting = asyncio.create_task(bench.engine.load_weights(*students[1].payload(version), "finish"))
        await asyncio.sleep(0.1)
        if bench.name == "vllm":
            with pytest.raises(WorkerLost, match="MemoryError"):
                await bench.engine._between_steps(
                    partial(bench.engine._swap, version, Here(weights), "keep", Future[float]())
                )
            with pytest.raises(WorkerLost, match=f"version {version} was loaded by half"):
                await bench.engine.generate(MIXED, sampling(5), want_logprobs=True, support_k=0)
        else:
            await bench.engine.close()
        return await asyncio.gather(*writing, waiting, return_exceptions=True)

    *_, last, load = bench.runner.run(end_midway())
    assert isinstance(last, WorkerLost)
    assert isinstance(load, WorkerLost)


def test_a_closed_engine_takes_no_more_work(bench: Bench, students: tuple[Student, Student]) -> None:
    bench.runner.run(bench.engine.close())
    with pytest.raises(WorkerLost):
        bench.write(MIXED, sampling(5))
    with pytest.raises(WorkerLost):
        bench.runner.run(bench.engine.load_weights(*students[0].payload(bench.engine.version + 1)))
