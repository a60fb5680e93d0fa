"""DistiLLM with its schedule of texts, and a hint that fades, as runs: what steps learn, what a checkpoint keeps."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.launch import Site
from orchestrator.offpolicy import Kept, OffPolicy
from orchestrator.run import execute
from potstill.config import RunConfig
from potstill.config_file import load
from potstill.journal import Journal, read_jsonl
from rollout_worker.actor import HIDDEN
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="session")

STEPS = 9  # few enough for every step to be sampled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adaptive")
    save_tiny_model(place / "student", seed=1)
    save_tiny_model(place / "teacher", seed=2, layers=1)
    rows = [{"prompt": f"{n} + 3 = ?", "answer": f"{n + 3}", "solution": f"Add. It is {n + 3}."} for n in range(40)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


DISTILLM = """
method = "distillm"
[teacher]
kind = "local"
models = [{ model = "FOLDER/teacher" }]
[rollout.adaptive]
validate_every = 1
validate_items = 4
rises = 1
tolerance = 0.0
[optim]
lr = 0.05
"""
"""At a learning rate at which the loss of the held-out solutions rises; one rise makes all text the student's."""
SKINTERN = """
method = "skintern"
[teacher]
kind = "self"
privileged_template = "{prompt} {solution}"
fade_steps = 4
[rollout]
source = "reference"
privileged_share = 1.0
[optim]
lr = 1e-3
"""
COMMON = f"""
[student]
model = "FOLDER/student"
[data]
kind = "jsonl"
path = "FOLDER/sums.jsonl"
holdout = 8
[rollout.sampling]
max_new_tokens = 6
[loop]
steps = {STEPS}
"""


def make_config(folder: Path, name: str, table: str, *changes: str) -> RunConfig:
    """Of a file, as a user writes it."""
    path = folder / f"{name}.toml"
    path.write_text(f'name = "{name}"\n' + (table + COMMON).replace("FOLDER", str(folder)))
    return load(path, [f"runs={folder}", "rollout.prompts_per_step=2", "rollout.max_prompt_tokens=64", *changes])


async def run(opened: Site, config: RunConfig) -> Path:
    journal = Journal(Path(config.runs) / config.name)
    try:
        await execute(config, opened, journal)
    finally:
        journal.close()
    return journal.folder


def learnt(run_folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The sampled rollouts by step."""
    found = defaultdict(list)
    for sample in read_jsonl(run_folder / "samples.jsonl"):
        found[sample["step"]].append(sample)
    return found


def ids(sample: dict[str, Any]) -> tuple[int, ...]:
    return tuple(token["id"] for token in sample["tokens"])


def check_schedule(config: RunConfig, left: Path) -> list[str]:
    """Replay the run's validations through a schedule of our own: step by step, it is what was sampled.

    Returns the sources of the sampled steps.
    """
    schedule = OffPolicy.of(config)
    assert schedule is not None
    losses = [e["data"] for e in read_jsonl(left / "events.jsonl") if e["type"] == "validation.finished"]
    assert [loss["step"] for loss in losses] == list(range(STEPS + 1))
    schedule.validated(losses[0]["loss"])
    samples, sources = learnt(left), []
    for step in range(1, STEPS + 1):
        expected = [schedule.text(step, place) for place in range(2)]
        found = [(sample["tokens"][0]["version"], ids(sample)) for sample in samples[step]]
        for text, (version, completion) in zip(expected, found, strict=True):
            assert (version >= 0) == (text == "new")
            assert not isinstance(text, Kept) or completion == text.ids
        sources.append("replayed" if isinstance(expected[0], Kept) else expected[0])
        schedule.validated(losses[step]["loss"])
        written = [ids(sample) for sample in samples[step]] if sources[-1] == "new" else []
        places = range(2 * (step - 1), 2 * step)
        schedule.trained(step, [Kept(prompt=p, ids=text) for p, text in zip(places, written, strict=bool(written))])
    saved = left / "checkpoints" / f"step-{STEPS:06d}" / "trainer" / "state.json"
    resumed = OffPolicy.of(config)
    assert resumed is not None
    resumed.load(json.loads(saved.read_text())["extra"]["offpolicy"])
    assert resumed.state() == schedule.state()
    return sources


@pytest.mark.parametrize("max_staleness", [0, 1])
async def test_distillm_learns_given_then_new_and_replayed_text_as_its_schedule_says(
    opened: Site, folder: Path, max_staleness: int
) -> None:
    config = make_config(folder, f"distillm-{max_staleness}", DISTILLM, f"loop.max_staleness={max_staleness}")
    sources = check_schedule(config, await run(opened, config))
    assert sources[: 2 + max_staleness] == ["given"] * (2 + max_staleness)
    assert {"given", "new", "replayed"} == set(sources)


async def test_skintern_ends_on_the_question_alone(opened: Site, folder: Path) -> None:
    left = await run(opened, make_config(folder, "skintern", SKINTERN))
    for step, samples in learnt(left).items():
        for sample in samples:
            hidden = sample["prompt"] == HIDDEN  # something of the hint is left, which no sample shows
            assert hidden == (step < 4)
            assert hidden or sample["prompt"].startswith("<|im_start|>user\n")
            assert not any(piece in sample["prompt"] for piece in ("Add.", "It is"))
            assert {token["version"] for token in sample["tokens"]} == {-1}
