"""Whole runs on tiny models: Ray, a real teacher server over HTTP, both engines, and what is left on disk."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.buffer import Closed
from orchestrator.launch import Site
from orchestrator.report import write_report
from orchestrator.run import execute, last_checkpoint
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError, TokenizerMismatch
from potstill.journal import Journal, Status, read_jsonl
from potstill.tokenization import load_tokenizer
from tests.builders_teacher import KEY, teacher_server
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="session")

REPORTED = {
    "run_id", "method", "engine", "seed", "steps", "seconds_total", "tokens_trained", "tokens_per_second",
    "student_before", "student_after", "teacher", "metric", "reverse_kl_first", "reverse_kl_last", "weights_version",
    "peak_rss_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models that share a tokenizer, and some sums."""
    place = tmp_path_factory.mktemp("runs")
    save_tiny_model(place / "student", seed=1)
    save_tiny_model(place / "teacher", seed=2, layers=1)
    rows = [{"prompt": f"{n} + {n + 3} = ?", "answer": str(2 * n + 3), "solution": f"{2 * n + 3}"} for n in range(40)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[dict[str, str]]:
    """The config of a teacher that runs already: starting one takes longer than a run."""
    (folder / "key").write_text(KEY)
    with teacher_server(folder / "teacher") as server:
        yield {"kind": "server", "url": server.url, "secret_ref": f"file:{folder / 'key'}"}


def make_config(folder: Path, name: str, *changes: str, method: str = "opd", teacher: Any = None) -> RunConfig:
    """Three steps of two prompts, of at most twelve tokens each; the run starts its own teacher unless told."""
    return parse(
        {
            "name": name,
            "runs": str(folder),
            "seed": 5,
            "method": method,
            "student": {"model": str(folder / "student")},
            "teacher": teacher or {"kind": "server", "model": str(folder / "teacher")},
            "data": {"kind": "jsonl", "path": str(folder / "sums.jsonl"), "holdout": 8, "verifier": "last_number"},
            "rollout": {"prompts_per_step": 2, "max_prompt_tokens": 64, "sampling": {"max_new_tokens": 12}},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 3},
            "eval": {"items": 4},
        },
        changes,
    )


async def run(opened: Site, config: RunConfig) -> Path:
    journal = Journal(Path(config.runs) / config.name)
    try:
        await execute(config, opened, journal)
    finally:
        journal.close()
    return journal.folder


def events(run_folder: Path) -> dict[str, dict[str, Any]]:
    return {event["type"]: event["data"] for event in read_jsonl(run_folder / "events.jsonl")}


def read(run_folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_folder / name).read_text())
    return found


def weights(run_folder: Path) -> str:
    return sha256((last_checkpoint(run_folder) / "model.safetensors").read_bytes()).hexdigest()


def check_what_is_left(run_folder: Path, config: RunConfig) -> None:
    """A run that succeeded has said so, has moved its student, and left a checkpoint that loads."""
    steps = config.loop.steps
    report, lines = read(run_folder, "report.json"), list(read_jsonl(run_folder / "metrics.jsonl"))
    assert read(run_folder, "status.json")["status"] == Status.SUCCEEDED.value
    assert report.keys() >= REPORTED
    assert (report["steps"], report["weights_version"], report["method"]) == (steps, steps, config.method)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert report["tokens_trained"] == lines[-1]["tokens_trained"] > 0
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert 0 <= report["student_before"] <= 1
    assert report["peak_rss_bytes"] > 0
    assert RunConfig(**read(run_folder, "config.json")) == config
    model = AutoModelForCausalLM.from_pretrained(last_checkpoint(run_folder))
    before = load_file(Path(config.student.model) / "model.safetensors")
    moved = [name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])]
    assert len(moved) > len(before) / 2
    assert load_tokenizer(last_checkpoint(run_folder)).chat_template


async def test_opd_with_the_transformers_engine_is_bit_equal_from_run_to_run(
    opened: Site, folder: Path, served: dict[str, str]
):
    config = make_config(folder, "opd")
    first = await run(opened, config)
    check_what_is_left(first, config)
    told = events(first)
    assert told["canaries.passed"]["sampler_gap"] < 1e-4
    assert told["canaries.passed"]["scramble_change"] > 0.01
    assert told["checkpoint.saved"]["step"] == 3
    report = read(first, "report.json")
    assert report["reverse_kl_first"] > 0
    again = await run(opened, make_config(folder, "opd-again", teacher=served))
    other = await run(opened, make_config(folder, "opd-other", "seed=6", teacher=served))
    assert weights(first) == weights(again) != weights(other)
    write_report(first)
    assert (first / "report.html").stat().st_size > 1000


async def test_a_student_in_bfloat16_is_the_same_in_learner_and_engine_and_keeps_what_was_learnt_in_float32(
    opened: Site, folder: Path, served: dict[str, str]
):
    config = make_config(folder, "half", "student.dtype=bfloat16", teacher=served)
    found = await run(opened, config)
    check_what_is_left(found, config)
    assert events(found)["canaries.passed"]["sampler_gap"] < 1e-2
    half = load_file(last_checkpoint(found) / "model.safetensors")
    kept = load_file(last_checkpoint(found).parent / "trainer" / "masters.safetensors")
    assert half.keys() == kept.keys()
    for name, weight in kept.items():
        assert weight.dtype == torch.float32
        assert torch.equal(half[name], weight.bfloat16())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("memory", "weights.transport=shared_memory"),
        ("device", "weights.transport=device"),
        pytest.param("two", "rollout.vllm.tensor_parallel=2", marks=pytest.mark.long),
    ],
)
async def test_opd_with_vllm_uses_each_new_version(
    opened: Site, folder: Path, served: dict[str, str], name: str, setting: str
):
    config = make_config(folder, f"opd-vllm-{name}", "rollout.engine=vllm", setting, teacher=served)
    left = await run(opened, config)
    check_what_is_left(left, config)
    assert events(left)["canaries.passed"]["sampler_gap"] < 1e-4
    for sample in read_jsonl(left / "samples.jsonl"):
        assert {token["version"] for token in sample["tokens"]} == {sample["step"] - 1}


@pytest.mark.parametrize("method", ["opd_sampled", "gkd_topk"])
async def test_other_methods_with_a_served_teacher(opened: Site, folder: Path, served: Any, method: str):
    config = make_config(folder, method, "loop.steps=2", method=method, teacher=served)
    left = await run(opened, config)
    check_what_is_left(left, config)
    assert "canaries.passed" in events(left)


async def test_opsd_with_the_student_as_its_own_teacher(opened: Site, folder: Path):
    teacher = {"kind": "self", "privileged_template": "{prompt} Hint: {answer}"}
    config = make_config(folder, "opsd", "loop.steps=2", method="opsd", teacher=teacher)
    left = await run(opened, config)
    check_what_is_left(left, config)
    assert not (left / "teacher.log").exists()


async def test_a_run_one_version_behind_reports_its_staleness(opened: Site, folder: Path, served: dict[str, str]):
    config = make_config(folder, "stale", "loop.max_staleness=1", "eval.items=0", teacher=served)
    left = await run(opened, config)
    assert [line["staleness_max"] for line in read_jsonl(left / "metrics.jsonl")] == [0.0, 1.0, 1.0]


async def test_supervision_by_what_the_teacher_writes_measures_the_teacher(opened: Site, folder: Path):
    config = make_config(folder, "sft", "rollout.source=teacher", "loop.steps=2", method="sft")
    left = await run(opened, config)
    check_what_is_left(left, config)
    assert 0 <= read(left, "report.json")["teacher"] <= 1


@pytest.mark.parametrize("moment", ["weights.route", "run.started"], ids=["opening", "evaluation"])
async def test_a_run_that_is_asked_to_stop_before_its_first_step_ends_at_once_and_can_be_resumed(
    opened: Site, folder: Path, served: dict[str, str], moment: str
):
    config = make_config(folder, f"asked-{moment.replace('.', '-')}", teacher=served)
    stopping, journal = asyncio.Event(), Journal(folder / f"asked-{moment.replace('.', '-')}")
    journal.listen(lambda stream, record: stopping.set() if record.get("type") == moment else None)
    with pytest.raises(Closed):
        await execute(config, opened, journal, stopping)
    journal.close()
    assert read(journal.folder, "status.json")["status"] == "cancelled"
    assert "eval.finished" not in events(journal.folder)
    write_report(journal.folder)
    assert "before its first step" in (journal.folder / "report.html").read_text()
    resumed = Journal(journal.folder, resume=True)
    await execute(config, opened, resumed)
    resumed.close()
    check_what_is_left(journal.folder, config)


async def test_a_teacher_of_another_tokenizer_fails_the_run_and_the_next_run_succeeds(
    opened: Site, folder: Path, served: dict[str, str]
):
    stranger = save_tiny_model(folder / "stranger", seed=3)
    settings = stranger / "tokenizer.json"
    settings.write_text(settings.read_text().replace("<|im_start|>", "<|go|>"))
    text = (stranger / "tokenizer_config.json").read_text().replace("<|im_start|>", "<|go|>")
    (stranger / "tokenizer_config.json").write_text(text)
    config = make_config(folder, "stranger-run", teacher={"kind": "server", "model": str(stranger)})
    with pytest.raises(TokenizerMismatch, match="reads other tokens"):
        await run(opened, config)
    status = read(folder / "stranger-run", "status.json")
    assert (status["status"], status["error"]["type"]) == ("failed", "TokenizerMismatch")
    assert (await run(opened, make_config(folder, "after", "loop.steps=0", teacher=served))).exists()


async def test_a_teacher_that_cannot_start_fails_the_run_with_its_own_words(opened: Site, folder: Path):
    config = make_config(folder, "no-teacher", teacher={"kind": "server", "model": str(folder / "nowhere")})
    with pytest.raises(ConfigError, match="nowhere: no such model folder"):
        await run(opened, config)
    assert read(folder / "no-teacher", "status.json")["error"]["category"] == "user"
