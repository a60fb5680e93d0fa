"""docs/add_a_method.md does what it says: its config, its entry and, in a copy of the tree, its patch are executed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from potstill.algebra.objective import Objective, Tier, lay_over
from potstill.methods import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text()


def section(title: str) -> str:
    """The section whose heading begins so."""
    (found,) = (part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if part.startswith(title))
    return found


def blocks(language: str, *, title: str) -> list[str]:
    """The section's fenced blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), flags=re.MULTILINE | re.DOTALL)


def files(room: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (ROOT / room).glob("*.py")}


def patch(text: str, hunk: str) -> str:
    """The text with a hunk's + lines instead of its - lines, at the one place where its other lines are."""
    lines = hunk.splitlines()[1:]
    old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert text.count(old) == 1, f"not once in the file:\n{old}"
    return text.replace(old, new)


def patched_files(tree: Path, diff: str) -> list[str]:
    """Apply a diff without line numbers; the files that it changed."""
    changed = []
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"^@@", part, flags=re.MULTILINE)
        file = tree / name.strip()
        text = file.read_text()
        for hunk in hunks:
            text = patch(text, hunk)
        file.write_text(text)
        changed.append(name.strip())
    return changed


def test_a_presets_choices_are_changed_by_a_table():
    config = tomllib.loads(blocks("toml", title="# Add")[0])
    preset = PRESETS[config["method"]].objective
    made = Objective.model_validate(lay_over(preset.model_dump(), config["objective"]))
    assert made.chosen() == {
        "over": "student",
        "support": {"kind": "student_topk", "k": 64},
        "loss": "skew_reverse_kl",
        "gates": [{"kind": "window", "last": 512}],
    }


def test_the_entry_from_existing_parts_is_its_equation():
    names: dict[str, Any] = {}
    for block in blocks("python", title="From existing parts"):
        exec(block, names)  # noqa: S102
    names["test_opd_sure_is_its_equation"]()
    entry = names["ON_POLICY"]["opd_sure"]
    assert "opd_sure" not in PRESETS
    assert entry.objective.tier is Tier.TOPK
    assert entry.objective.reads_others
    assert len(entry.phrase) <= 110


def test_the_new_part_works_in_a_copy_of_the_tree(tmp_path: Path):
    for room in ("potstill", "learner"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "golden.py", tmp_path / "tests")
    (diff,) = blocks("diff", title="A new part")
    changed = patched_files(tmp_path, diff)
    assert changed == ["potstill/algebra/losses.py", "learner/divergences.py", "learner/terms.py"]
    (golden,) = blocks("python", title="A new part")
    (tmp_path / "tests" / "test_golden.py").write_text(golden)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_golden.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_the_files_and_names_of_its_last_table_exist():
    rows = re.findall(r"^\| .*$", section("Where the other parts"), flags=re.MULTILINE)[2:]
    choices, formulas = files("potstill/algebra"), files("learner")
    written = "\n".join([*choices.values(), *formulas.values()])
    for _, choice, formula, further in (row.strip("| ").split(" | ") for row in rows):
        assert set(re.findall(r"\w+\.py", choice)) <= choices.keys()
        assert set(re.findall(r"\w+\.py", formula)) <= formulas.keys()
        assert set(re.findall(r"\w+\.py", further)) <= choices.keys() | formulas.keys()
        for name in re.findall(r"`(\w+)`", further):
            assert re.search(rf"^(def {name}\(|{name} =)", written, flags=re.MULTILINE), name
