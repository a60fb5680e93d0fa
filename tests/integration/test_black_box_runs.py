"""A teacher of which only text can be had, in each of its uses: a real vLLM chat server and the shipped configs.

Its model is untrained, so nothing is learnt here; `make black-box` shows that something is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from orchestrator.chat_endpoint import answering
from orchestrator.launch import ACTOR_ENV, Site
from orchestrator.quickstart import filled
from orchestrator.recipe_table import PREPARATIONS, RECIPES
from orchestrator.run import execute
from potstill import recipes
from potstill.config import RunConfig, ScratchConfig
from potstill.config_file import load, read_mapping
from potstill.errors import BudgetExhausted
from potstill.journal import Journal, read_jsonl

pytestmark = pytest.mark.asyncio(loop_scope="session")

USES = [name for name, recipe in RECIPES.items() if recipe.distil.apis]
STEPS = 3
PROMPTS = 2
SHORT = [f"loop.steps={STEPS}", f"rollout.prompts_per_step={PROMPTS}", "rollout.sampling.max_new_tokens=12"]
SHORT += ["eval.items=0", "eval.every=0"]
CUT = 8  # tokens of an answer
TEXTS = ["user\nWhat is 123 + 456?\nassistant\n"] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uses")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def prepared(folder: Path, opened: Site) -> Path:
    """An untrained model in the place of every preparation."""
    for name in PREPARATIONS:
        made = folder / name / "checkpoints" / "step-000001" / "model"
        table = "teacher" if name == "teacher" else "student"
        architecture = ScratchConfig.model_validate(read_mapping(recipes.folder() / "models.toml")[table])
        await opened.create(made, architecture, texts=TEXTS, seed=len(name))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def url(prepared: Path, folder: Path) -> AsyncIterator[str]:
    """Somebody's API."""
    model = folder / "teacher" / "checkpoints" / "step-000001" / "model"
    async with answering(model, log=folder / "api.log", environment=ACTOR_ENV) as found:
        yield found


def config_of(use: str, folder: Path, url: str, *changes: str, name: str) -> RunConfig:
    phase = RECIPES[use].distil
    folders = {name: folder / name for name in PREPARATIONS}
    here = filled(phase, folders=folders, urls={"teacher": url})
    (box,) = phase.apis
    kept = [f"{box}.answers={folder / use}.sqlite", f"{box}.max_tokens={CUT}"]
    where = [f"name={name}", f"runs={folder}"]
    return load(recipes.folder() / f"{phase.config}.toml", [*SHORT, *here, *kept, *where, *changes])


async def run(config: RunConfig, opened: Site) -> dict[str, Any]:
    journal = Journal(Path(config.runs) / config.name)
    try:
        return await execute(config, opened, journal)
    finally:
        journal.close()


def spent(report: dict[str, Any]) -> dict[str, Any]:
    """Of the one black box."""
    (totals,) = report["teacher_spent"].values()
    return dict(totals)


@pytest.mark.parametrize("use", USES)
async def test_a_use_trains_pays_once_and_says_what_it_paid(use: str, opened: Site, folder: Path, url: str):
    first = await run(config_of(use, folder, url, name=f"{use}-first"), opened)
    steps = list(read_jsonl(folder / f"{use}-first" / "metrics.jsonl"))
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert first["tokens_trained"] > 0
    paid = spent(first)
    assert paid["requests"] == paid["answers_asked"] == STEPS * PROMPTS
    assert 0 < paid["tokens_out"] <= STEPS * PROMPTS * CUT
    assert 0 < Decimal(paid["cost_usd"]) <= Decimal(paid["budget_usd"])
    assert 0 < steps[0]["teacher_usd"] <= steps[-1]["teacher_usd"] <= float(paid["cost_usd"])
    assert steps[-1]["teacher_tokens"] <= paid["tokens_in"] + paid["tokens_out"]

    again = await run(config_of(use, folder, url, name=f"{use}-again"), opened)
    kept = spent(again)
    assert (kept["requests"], kept["tokens_out"], kept["cost_usd"]) == (0, 0, "0")
    assert kept["answers_kept"] >= STEPS * PROMPTS
    assert again["tokens_trained"] > 0


async def test_a_run_ends_before_it_would_pay_more_than_its_budget(opened: Site, folder: Path, url: str):
    changes = ["teacher.price_in=0", "teacher.price_out=1", f"teacher.budget={3 * CUT / 1e6}", "teacher.concurrency=1"]
    with pytest.raises(BudgetExhausted, match="raise the budget"):
        await run(config_of("seqkd", folder, url, f"teacher.answers={folder}/b", *changes, name="poor"), opened)
    (counted,) = (folder / "poor").glob("spent-teacher-*.json")
    assert 0 < load_count(counted) <= 3 * CUT


def load_count(path: Path) -> int:
    return int(read_mapping(path)["tokens_out"])
