"""The command line: instant, one line for a mistake of the user, exit codes that scripts can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from potstill import __version__
from potstill.algebra.objective import Objective
from potstill.config_file import load
from potstill.methods import PRESETS
from tests.builders_teacher import KEY, teacher_server
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "vllm", "fastapi", "transformers", "pydantic", "numpy", "httpx2", "reasoning_gym"}
HELP = f"""
import sys
sys.argv = ["potstill", "--help"]
from potstill.cli import main
try:
    main()
except SystemExit as done:
    sys.exit(f"exit {{done.code}}, loaded {{sorted({HEAVY} & set(sys.modules))}}")
"""


def potstill(*arguments: str | Path, at: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "potstill", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=at, env=environment)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a data file and run.toml."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "student", seed=0)
    (folder / "data.jsonl").write_text('{"prompt": "12 + 9 = ?", "answer": "21"}\n')
    (folder / "run.toml").write_text(
        'name = "one"\nmethod = "opd"\n[student]\nmodel = "student"\n[teacher]\nmodel = "student"\nkind = "server"\n'
        '[data]\nkind = "jsonl"\npath = "data.jsonl"\n[rollout]\nprompts_per_step = 2\nmax_prompt_tokens = 64\n'
        "[rollout.sampling]\nmax_new_tokens = 4\n[optim]\nlr = 1e-4\n[loop]\nsteps = 3\n"
    )
    return folder


def contents(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_help_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.strip() == "exit 0, loaded []"
    for command in ("run", "check", "methods", "doctor", "quickstart", "serve", "submit", "teacher"):
        assert f"  {command} " in done.stdout


def test_the_version_is_the_packages(place: Path):
    assert potstill("--version", at=place).stdout == f"{__version__}\n"


def test_check_prints_config_plan_and_one_sample_and_starts_nothing(place: Path):
    before = contents(place)
    for_people = potstill("check", "run.toml", "optim.lr=3e-5", at=place)
    for_programs = potstill("check", "run.toml", "optim.lr=3e-5", "--json", at=place)
    assert (for_people.returncode, for_people.stderr, for_programs.returncode) == (0, "", 0)
    found = json.loads(for_programs.stdout)
    assert found["config"] == {**load(place / "run.toml", ["optim.lr=3e-5"]).model_dump(mode="json")}
    assert found["plan"]["tier_needed"] == "IDS"
    assert "<|im_start|>user\n12 + 9 = ?<|im_end|>" in found["sample"]["prompt"]
    assert found["sample"]["answer"] == "21"
    assert "lr: 3.0e-05" in for_people.stdout
    assert "plan (sizes are estimates):" in for_people.stdout
    assert "[[whatever the student writes]]" in for_people.stdout
    assert contents(place) == before


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_misspelt_key_is_one_line_and_nothing_is_written(place: Path, command: str):
    before = contents(place)
    done = potstill(command, "run.toml", "optim.warmup_step=3", at=place)
    assert_one_line(done, 2, "potstill: optim.warmup_step: no such setting; did you mean 'warmup_steps'?")
    assert contents(place) == before


def test_a_run_that_cannot_work_is_refused_before_anything_is_written(place: Path):
    before = contents(place)
    assert_one_line(potstill("run", "run.toml", "method=opsd", at=place), 2, "teacher.privileged_template")
    assert_one_line(potstill("run", "run.toml", "data.path=none.jsonl", at=place), 2, "none.jsonl")
    assert_one_line(potstill("run", "run.toml", "eval.items=3", at=place), 2, "eval.items = 3", "data.holdout")
    assert_one_line(potstill("run", "none.toml", at=place), 2, "none.toml: cannot be read")
    assert contents(place) == before


def test_methods_are_listed_with_what_they_need(place: Path):
    for_people, for_programs = potstill("methods", at=place), potstill("methods", "--json", at=place)
    found = json.loads(for_programs.stdout)
    assert {name: row["needs"] for name, row in found.items()} == {
        name: dict(method.needs) for name, method in PRESETS.items()
    }
    for name, method in PRESETS.items():
        assert name in for_people.stdout
        assert method.phrase in for_people.stdout


def test_a_method_is_shown_whole_and_its_objective_can_be_pasted_into_a_config(place: Path):
    shown = yaml.safe_load(potstill("methods", "tsd_kd", at=place).stdout)["tsd_kd"]
    assert Objective.model_validate(shown["objective"]) == PRESETS["tsd_kd"].objective
    assert_one_line(potstill("methods", "tsd", at=place), 2, "did you mean", "tsd_kd")


def test_doctor_says_what_there_is_and_its_exit_code_whether_it_is_enough(place: Path):
    done = potstill("doctor", "--json", at=place)
    found = {row["what"]: row for row in json.loads(done.stdout)}
    assert {"python", "torch", "ray", "vllm", "memory", "loopback"} <= found.keys()
    assert found["python"]["found"] == ".".join(str(part) for part in sys.version_info[:3])
    assert done.returncode == (0 if all(row["ok"] for row in found.values()) else 1)


def test_a_teacher_that_cannot_be_served_gives_its_exit_code(place: Path):
    done = potstill("teacher", "serve", "nowhere", at=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere: no such model folder" in done.stderr


def test_a_probe_says_what_a_teacher_can_be_used_for(place: Path):
    assert_one_line(
        potstill("teacher", "probe", "http://127.0.0.1:1", "--key-env", "NONE", at=place), 2, "no variable NONE"
    )
    with teacher_server(place / "student") as server:
        asked = ("teacher", "probe", server.url, "--key-env", "SECRET")
        done = potstill(*asked, "--student", "student", "--json", at=place, SECRET=KEY)
        refused = potstill(*asked, at=place, SECRET="wrong")
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"], found["kind"], found["tier"]) == (0, [], "server", "FULL")
    assert found["student"]["lines"][0] == "the same tokenizer as the student's"
    assert {"opd", "opd_sampled", "gkd_topk", "gkd", "sft"} <= set(found["methods"])
    assert refused.returncode == 3
    assert refused.stdout.startswith("refused ")
    assert "401" in refused.stdout


def test_a_probe_of_a_run_needs_a_teacher_that_is_there_and_is_told_of_none(place: Path):
    own = potstill("teacher", "probe", "run.toml", at=place)
    assert_one_line(own, 2, "nobody to probe")
    both = potstill("teacher", "probe", "run.toml", "--kind", "vllm", at=place)
    assert_one_line(both, 2, "run.toml names its own teachers")
    assert_one_line(potstill("teacher", "probe", "nowhere.toml", at=place), 2, "nowhere.toml")


def test_an_unknown_command_or_option_is_no_traceback(place: Path):
    for arguments in (["distill"], ["check", "run.toml", "--jsn"], ["check"]):
        done = potstill(*arguments, at=place)
        assert done.returncode == 2
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr
