"""What is written for people is true: links lead somewhere, commands and targets exist, shipped configs load."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer.main
from pydantic import TypeAdapter

from orchestrator.recipe_table import PREPARATIONS, RECIPES
from potstill import config_page, methods_page, recipes
from potstill.algebra.objective import Objective, Tier
from potstill.algebra.supports import StudentTopK
from potstill.cli import app
from potstill.config import RunConfig, ScratchConfig
from potstill.config_file import load, read_mapping
from potstill.config_teachers import TeacherConfig
from potstill.methods import PRESETS
from potstill.methods.method import objective

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = "models.toml"
SHIPPED = [path for path in sorted(recipes.folder().rglob("*.toml")) if path.name != MODELS]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_inside_the_repository_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in inside if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_in_examples_exist(page: Path):
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"^(?:\$ )?potstill ([a-z]+)", page.read_text(), flags=re.MULTILINE))
    assert used <= known


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_make_targets_in_examples_exist(page: Path):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"(?:^|`)(?:\$ )?make ([a-z-]+)", page.read_text(), flags=re.MULTILINE))
    assert used <= known


def test_the_page_of_settings_is_the_one_that_the_config_makes():
    assert (ROOT / "docs" / "config.md").read_text() == config_page.page()


def test_the_page_of_methods_is_the_one_that_the_presets_make():
    assert (ROOT / "docs" / "methods.md").read_text() == methods_page.page()


def test_the_page_of_methods_has_every_preset_once_in_its_family_and_once_in_the_grid():
    families = [name for _, presets in methods_page.FAMILIES for name in presets]
    assert sorted(families) == sorted(PRESETS)
    grid = methods_page.page().partition("## All of them")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`(\w+)`", grid)) == sorted(PRESETS)


@pytest.mark.parametrize(("having", "tier", "names"), [choice[:3] for choice in methods_page.CHOICES])
def test_a_recommended_method_can_run_with_the_teacher_that_one_has(having: str, tier: Tier, names: tuple[str, ...]):
    unfit = [name for name in names if PRESETS[name].objective.tier > tier]
    assert unfit == []
    assert all(PRESETS[name].objective.reads_verdict == ("verifier" in having) for name in names)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (objective(loss="likelihood"), "likelihood; by token_mean"),
        (
            objective(over="student", loss={"kind": "policy_gradient", "reward": 1.0}, judge="discriminator"),
            "on the student's text: policy_gradient (reward 1) over sampled; by token_mean; "
            "judged by discriminator (lr 1e-06, max_grad_norm 0.2)",
        ),
        (
            objective(support="full", loss="forward_kl", target="taid", weight=0.5, over="student"),
            "on the student's text: 0.5 · forward_kl over full → taid (start 0.4, rate 0.0005, momentum 0.99); "
            "by token_mean",
        ),
        (
            objective(
                over="student",
                loss={"kind": "policy_gradient", "score": "power"},
                correction={"kind": "truncated", "level": "sequence"},
                gates=["entropy_gap", {"kind": "window", "first": 3}],
                auxiliaries={
                    "text": {"over": "others", "loss": "likelihood", "aggregation": "sequence_mean"},
                    "anchor": {
                        "over": "student",
                        "loss": "k2",
                        "against": "reference",
                        "weight": {"start": 1, "end": 0},
                    },
                },
            ),
            "on the student's text: policy_gradient (score power, exponent 5) over sampled × entropy_gap "
            "× window (first 3) × truncated (cap 2, level sequence) by token_mean + "
            "(1 → 0 from step 1 to the last) · k2 over sampled against the reference by token_mean; "
            "on others' text: likelihood by sequence_mean",
        ),
    ],
)
def test_an_objective_is_said_in_the_words_of_the_config(made: Objective, said: str):
    assert methods_page.computes(made) == said


def test_the_number_of_presets_is_said_right():
    for page in ("README.md", "CHANGELOG.md"):
        said = re.findall(r"(\d+)(?: presets|\s+of\s+them, each with)", (ROOT / page).read_text())
        assert said == [str(len(PRESETS))], page


@pytest.mark.parametrize("recipe", SHIPPED, ids=names(SHIPPED))
def test_every_shipped_config_loads(recipe: Path):
    assert load(recipe).loop.steps > 0


def test_the_config_of_the_readme_is_one():
    (table,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert RunConfig.model_validate(tomllib.loads(table)).objective.support == StudentTopK(k=32)


def test_every_scratch_model_is_one():
    for name, table in read_mapping(recipes.folder() / MODELS).items():
        assert ScratchConfig.model_validate(table).hidden > 0, name


def test_every_phase_of_the_quickstart_is_shipped():
    models = read_mapping(recipes.folder() / MODELS)
    prepared = [PREPARATIONS[name] for recipe in RECIPES.values() for name in recipe.prepared]
    for phase in [*prepared, *(run for recipe in RECIPES.values() for run in recipe.runs)]:
        assert (recipes.folder() / f"{phase.config}.toml").exists(), phase
        assert phase.scratch is None or phase.scratch in models, phase


def test_every_teacher_of_the_page_is_one():
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "teachers.md").read_text(), re.DOTALL)
    kinds = {TypeAdapter(TeacherConfig).validate_python(tomllib.loads(block)["teacher"]).kind for block in blocks}
    assert kinds == {"server", "vllm", "self", "several"}
