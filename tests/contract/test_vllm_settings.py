"""A student that two processes hold together, or that is compiled, writes as it would, and takes new versions whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from learner.publish import as_numpy
from potstill.config_vllm import VllmConfig
from potstill.errors import WeightsError, WorkerLost
from potstill.weights import pack
from rollout_worker.engine import Completion, build_engine
from tests.benches import Bench, Student, requests, sampling
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer

# One test breaks the stepping thread of vLLM down; that it dies loudly is part of the promise.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

MIXED = requests((5, 130, 300, 57))
NUM_DRAWS = 2
TOLERANCE = 2e-5  # of a log-prob against a float32 forward pass of transformers


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Student]:
    folder = tmp_path_factory.mktemp("students")
    a, b = (save_tiny_model(folder / name, seed=seed, tie_word_embeddings=True) for name, seed in (("a", 1), ("b", 2)))
    return Student(a), Student(b)


@pytest.fixture(
    scope="module",
    params=[VllmConfig(compiled=True), VllmConfig(tensor_parallel=2)],
    ids=["compiled", "two processes"],
)
def bench(request: pytest.FixtureRequest, students: tuple[Student, Student]) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        engine = build_engine(
            "vllm", model=students[0].folder, dtype="float32", stop_token_id=tiny_tokenizer().eos_token_id, version=0,
            threads=1, max_model_len=512, num_draws=NUM_DRAWS, vllm=request.param,
        )  # fmt: skip
        first = runner.run(engine.generate(MIXED, sampling(20), want_logprobs=True, support_k=4))
        yield Bench("vllm", engine, runner, first)
        runner.run(engine.close())


def check_written_by(student: Student, version: int, completions: list[Completion]) -> None:
    """By the log-probs, the support and the draws, which its own forward pass in transformers gives as well."""
    for request, completion in zip(MIXED, completions, strict=True):
        assert set(completion.weight_versions.tolist()) == {version}
        expected = student.logprobs(request.prompt_ids, completion.token_ids, sampling(20))
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)
        own = student.logits(request.prompt_ids, completion.token_ids).log_softmax(-1)
        np.testing.assert_allclose(completion.support_logprobs, own.topk(4, dim=-1).values, atol=TOLERANCE, rtol=0)
        assert completion.draw_ids is not None
        assert completion.draw_ids.shape == (len(completion.token_ids), NUM_DRAWS)
        drawn = own.gather(-1, torch.from_numpy(completion.draw_ids).long())
        np.testing.assert_allclose(completion.draw_logprobs, drawn, atol=TOLERANCE, rtol=0)


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "VLLM" in child.name()]


def test_it_writes_as_the_student_would(bench: Bench, students: tuple[Student, Student]) -> None:
    check_written_by(students[0], 0, bench.first)


def test_it_takes_each_new_version(bench: Bench, students: tuple[Student, Student]) -> None:
    for student in (students[1], students[0]):
        version = bench.load(student)
        check_written_by(student, version, bench.write(MIXED, sampling(20), k=4))


def test_damaged_weights_leave_the_old_ones_serving(bench: Bench, students: tuple[Student, Student]) -> None:
    before = bench.load(students[0])
    version, payload = students[1].payload(before + 1)
    payload[7] ^= 1
    with pytest.raises(WeightsError):
        bench.runner.run(bench.engine.load_weights(version, payload))
    check_written_by(students[0], before, bench.write(MIXED, sampling(20), k=4))


def test_a_version_is_loaded_though_whoever_asked_has_gone(bench: Bench, students: tuple[Student, Student]) -> None:
    """The swap waits for what is in flight; the caller does not."""
    bench.load(students[0])
    version, payload = students[1].payload(bench.engine.version + 1)

    async def abandoned() -> None:
        writing = asyncio.ensure_future(bench.engine.generate(MIXED, sampling(200), want_logprobs=True, support_k=4))
        await asyncio.sleep(0.3)
        loading = asyncio.ensure_future(bench.engine.load_weights(version, payload, "finish"))
        await asyncio.sleep(0.3)
        assert not loading.done()
        loading.cancel()
        await writing

    bench.runner.run(abandoned())
    check_written_by(students[1], version.version, bench.write(MIXED, sampling(20), k=4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_which_vllm_remembers_apart_are_each_versions_own(tmp_path: Path, dtype: str) -> None:
    """Packed beside the writing; an untied head."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=VOCABULARY, attention_bias=True, mlp_bias=True)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path / name)
    students = [Student(tmp_path / name) for name in "ab"]

    async def written() -> list[list[Completion]]:
        engine = build_engine(
            "vllm", model=students[0].folder, dtype=dtype, stop_token_id=tiny_tokenizer().eos_token_id, version=0,
            threads=1, max_model_len=512, num_draws=0,
        )  # fmt: skip
        found = []
        for version in (1, 2, 3):
            tensors = load_file(students[version % 2].folder / "model.safetensors")
            bits = {name: as_numpy(tensor) for name, tensor in tensors.items()}
            await engine.load_weights(*pack(bits, version))
            found.append(await engine.generate(MIXED, sampling(20), want_logprobs=True, support_k=0))
        await engine.close()
        return found

    for version, completions in enumerate(asyncio.run(written()), start=1):
        for request, one in zip(MIXED, completions, strict=True):
            expected = students[version % 2].logprobs(request.prompt_ids, one.token_ids, sampling(20))
            atol = TOLERANCE if dtype == "float32" else 0.1
            np.testing.assert_allclose(one.logprobs, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("bench", [VllmConfig(tensor_parallel=2)], ids=["two processes"], indirect=True)
def test_the_loss_of_one_process_is_the_loss_of_the_worker_and_leaves_nobody(bench: Bench) -> None:
    """The last test: nobody writes with this engine any more."""
    one, other = processes()

    async def killed_midway() -> None:
        writing = asyncio.ensure_future(bench.engine.generate(MIXED, sampling(200), want_logprobs=True, support_k=4))
        await asyncio.sleep(1.0)
        one.kill()
        await writing

    with pytest.raises(WorkerLost, match="vLLM engine died"):
        bench.runner.run(killed_midway())
    _, left = psutil.wait_procs([one, other], timeout=30.0)
    assert left == []
