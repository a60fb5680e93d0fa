"""The configs for GPUs: each is one that the planner takes; what it says of memory and speed follows from its model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from potstill import recipes
from potstill.config import RunConfig
from potstill.config_file import load
from potstill.planner import plan

RECIPES = sorted((recipes.folder() / "gpu").glob("*.toml"))
PARAMETERS = {  # of the models that they name, the input embedding once where the output shares it
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}
BFLOAT16_FLOPS, FLOAT32_FLOPS, USED = 990e12, 67e12, 0.4  # an H100's, dense, and what of it a good learner reaches


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def planned(recipe: Path, folder: Path) -> tuple[RunConfig, dict[str, object]]:
    """As on a machine that has the model: its files have a header, and holes for weights."""
    config = load(recipe)
    name = Path(config.student.model).name
    header = {"weight": {"dtype": "BF16", "shape": [PARAMETERS[name]], "data_offsets": [0, 2 * PARAMETERS[name]]}}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + 2 * PARAMETERS[name])
    config = load(recipe, [f"student.model={folder}"])
    return config, dict(plan(config).as_dict())


def test_there_are_some_for_one_gpu_for_a_node_and_for_several():
    assert {path.stem.rpartition("_")[2] for path in RECIPES} == {"1gpu", "2gpu", "8gpu", "4x8gpu"}


def test_its_name_says_what_it_is(recipe: Path):
    student, _, method, _ = recipe.stem.split("_")
    config = load(recipe)
    assert Path(config.student.model).name == student
    assert {"seqkd": "sft", "opsd": "opsd_reverse"}.get(method, method) == config.method


def test_its_memory_is_what_the_planner_estimates(recipe: Path, tmp_path: Path):
    config, found = planned(recipe, tmp_path)
    said = re.search(r"# Memory, estimated: ([\d.]+) GB a rank .*, ([\d.]+) GB a worker;", recipe.read_text())
    assert said is not None
    per_rank = int(str(found["learner_bytes"])) / config.learner.ranks / 1e9
    assert float(said[1]) == pytest.approx(per_rank, abs=0.05)
    assert float(said[2]) == pytest.approx(int(str(found["engine_bytes"])) / 1e9, abs=0.05)


def test_its_speed_is_what_products_allow(recipe: Path, tmp_path: Path):
    """Two FLOP a weight forward, as often as that is computed, and two each for the gradients of what it reads and,
    where it learns, of itself."""
    config, found = planned(recipe, tmp_path)
    said = re.search(
        r"# Speed, estimated and not measured: the learner at most ([\d,]+) tokens a second", recipe.read_text()
    )
    assert said is not None
    products = (4 if config.student.lora is not None else 6) + (2 if config.learner.recompute else 0)
    flops = BFLOAT16_FLOPS if config.student.dtype == "bfloat16" else FLOAT32_FLOPS
    allowed = USED * flops * config.learner.ranks / (products * int(str(found["student_parameters"])))
    assert float(said[1].replace(",", "")) == pytest.approx(allowed, rel=0.05)


def test_it_asks_for_no_more_gpus_than_its_name_says(recipe: Path):
    config = load(recipe)
    nodes, _, each = recipe.stem.rpartition("_")[2].removesuffix("gpu").rpartition("x")
    asked = (
        config.resources.learner.gpus * config.learner.ranks + config.resources.rollout.gpus * config.rollout.workers
    )
    assert 0 < asked <= int(nodes or 1) * int(each)
