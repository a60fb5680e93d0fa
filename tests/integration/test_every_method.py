"""Every method, end to end on models of the quickstart's size: Ray, rollouts, scores, two steps.

What a method needs decides what its run brings: the same table that a plan refuses by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import safetensors.numpy

from orchestrator.launch import Site
from orchestrator.run import execute
from potstill import recipes
from potstill.algebra.objective import Tier
from potstill.config import RunConfig, ScratchConfig
from potstill.config_file import load, parse, read_mapping
from potstill.journal import Journal, read_jsonl
from potstill.methods import PRESETS
from tests.builders_teacher import KEY, teacher_server

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEMPLATE = "{prompt}\nReference answer: {answer}"
SUMS = load(recipes.folder() / "opd.toml").data.model_dump()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("methods")
    (place / "key").write_text(KEY)
    (place / "private.jsonl").write_text('{"prompt": "12 + 9 = ?", "private": ["1", "2"]}\n')
    return place


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def models(folder: Path, opened: Site) -> Path:
    """The quickstart's two, before any training."""
    for name in ("student", "teacher"):
        table = read_mapping(recipes.folder() / "models.toml")[name]
        texts = ["user\n123 + 456\nassistant\n"] * 8
        await opened.create(folder / name, ScratchConfig.model_validate(table), texts=texts, seed=len(name))
    sharpen(folder / "teacher" / "model.safetensors")
    return folder


def sharpen(file: Path) -> None:
    """Give the untrained teacher something to say: one that predicts nothing is refused before the run."""
    weights = safetensors.numpy.load_file(file)
    weights["lm_head.weight"] *= 20
    safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def served(models: Path, folder: Path) -> Iterator[dict[str, str]]:
    """A teacher that runs already, for all methods: starting one takes longer than a run."""
    with teacher_server(models / "teacher") as server:
        yield {"kind": "server", "url": server.url, "secret_ref": f"file:{folder / 'key'}"}


def mapping(folder: Path, method: str, teacher: dict[str, Any]) -> dict[str, Any]:
    """The smallest run that brings what the method needs."""
    objective = PRESETS[method].objective
    overs = {term.over for term in objective.terms.values()}
    rollout: dict[str, Any] = {"prompts_per_step": 2, "max_prompt_tokens": 64, "sampling": {"max_new_tokens": 12}}
    if overs == {"others"} and not objective.reads_reward:
        rollout["source"] = PRESETS[method].settings.get("rollout.source", "reference")
    elif PRESETS[method].settings.get("rollout.source") == "revision":
        rollout["source"] = "revision"
    elif objective.reads_others:
        rollout["beside"] = "reference"
    if "privileged" in overs:
        rollout["view"] = "privileged"
    if objective.reads_reward:
        rollout["samples_per_prompt"] = 2
    return {
        "name": method.replace("_", "-"),
        "runs": str(folder),
        "method": method,
        "student": {"model": str(folder / "student")},
        "teacher": teacher,
        "data": {"kind": "jsonl", "path": str(folder / "private.jsonl")} if objective.reads_privacy else SUMS,
        "rollout": rollout,
        "optim": {"lr": 1e-3},
        "loop": {"steps": 2},
    }


def config_of(folder: Path, method: str, served: dict[str, str]) -> RunConfig:
    local = {"kind": "local", "models": [{"model": str(folder / "teacher")}]}
    source = PRESETS[method].settings.get("rollout.source")
    if PRESETS[method].context == "privileged":
        teacher: dict[str, Any] = {"kind": "self", "privileged_template": TEMPLATE}
    elif source == "revision":
        teacher = {**served, "head": str(folder / "teacher")}
    elif PRESETS[method].objective.tier is Tier.TEXT and source != "handoff":
        teacher = {"kind": "none"}
    else:
        teacher = served if PRESETS[method].objective.tier in {Tier.SAMPLED, Tier.TOPK, Tier.IDS} else local
    return parse(mapping(folder, method, teacher))


@pytest.mark.parametrize("method", PRESETS)
async def test_a_method_trains_for_a_few_steps(method: str, opened: Site, folder: Path, served: dict[str, str]) -> None:
    config = config_of(folder, method, served)
    journal = Journal(folder / config.name)
    report = await execute(config, opened, journal)
    journal.close()
    steps = list(read_jsonl(journal.folder / "metrics.jsonl"))
    assert [step["step"] for step in steps] == [1, 2]
    assert report["tokens_trained"] > 0
    assert all(step["loss"] is not None and math.isfinite(step["loss"]) for step in steps)
    if not PRESETS[method].objective.reads_reward:  # an untrained model earns nothing, and then nothing moves
        assert all(step["grad_norm"] > 0 for step in steps)


async def losses_of(config: RunConfig, opened: Site) -> list[float]:
    """Of every step of the run, whose canaries passed where it is scored from outside."""
    journal = Journal(Path(config.runs) / config.name)
    await execute(config, opened, journal)
    journal.close()
    passed = [event["type"] for event in read_jsonl(journal.folder / "events.jsonl")].count("canaries.passed")
    assert passed == (config.teacher.kind == "server")
    return [step["loss"] for step in read_jsonl(journal.folder / "metrics.jsonl")]


@pytest.mark.parametrize("where", ["model", "url"])
async def test_a_server_that_sends_its_states_teaches_as_its_model_does_in_the_learner(
    where: str, opened: Site, folder: Path, served: dict[str, str]
) -> None:
    model = str(folder / "teacher")
    inside = {"kind": "local", "models": [{"model": model}]}
    sends = {"kind": "server", "model": model} if where == "model" else {**served, "head": model}
    runs = {f"inside-{where}": inside, f"sent-{where}": sends}
    configs = [parse({**mapping(folder, "gkd", teacher), "name": name}) for name, teacher in runs.items()]
    exact, found = [await losses_of(config, opened) for config in configs]
    assert len(exact) == len(found) == 2
    assert found != exact  # states are rounded
    assert found == pytest.approx(exact, rel=1e-2)
