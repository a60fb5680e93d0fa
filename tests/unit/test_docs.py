"""What is written for people is true: links lead somewhere, commands and targets exist, shipped configs load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from orchestrator import quickstart
from potstill import config_page, recipes
from potstill.cli import app
from potstill.config import ScratchConfig, load, read_mapping

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
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


@pytest.mark.parametrize("recipe", SHIPPED, ids=names(SHIPPED))
def test_every_shipped_config_loads(recipe: Path):
    assert load(recipe).loop.steps > 0


def test_every_scratch_model_is_one():
    for name, table in read_mapping(recipes.folder() / MODELS).items():
        assert ScratchConfig.model_validate(table).hidden > 0, name


def test_every_phase_of_the_quickstart_is_shipped():
    models = read_mapping(recipes.folder() / MODELS)
    for recipe in quickstart.RECIPES.values():
        for phase in (*recipe.prepared, recipe.distil, recipe.control):
            assert (recipes.folder() / f"{phase}.toml").exists(), phase
        assert set(recipe.prepared.values()) <= models.keys()
