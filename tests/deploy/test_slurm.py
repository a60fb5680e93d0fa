"""Batch scripts are made for the run and by bash's own rules: rendered, linted, and run here in Slurm's place.

shellcheck (Debian's package) lints them. Python, srun and scontrol are small scripts that write down what they were
asked; bash, its signals and exit codes are real.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator import slurm
from potstill.cli import app
from potstill.config_file import load, parse
from potstill.errors import ConfigError
from potstill.recipes import shipped
from tests.deploy import slurm_cluster
from tests.services import until

HOSTILE = 'a\'b "c" $(touch pwned) `touch pwned`; touch pwned #\\'
ONE_GPU = {"cpus": 4, "gpus": 1}
PYTHON = """#!/bin/bash
# potstill, as far as a batch script can tell; its last step takes a moment.
line=$(printf '%q ' "$@"); echo "$line" >>"$SAID/asked" # at once: others write, too
echo "${RAY_ADDRESS:-none} ${RAY_AUTH_MODE:-} ${RAY_AUTH_TOKEN:-}" >>"$SAID/environment"
[[ $* == *health-check* ]] && exit 0
[[ $* == *scripts\\ start* ]] && exec sleep 60
trap 'echo told >>"$SAID/told"; sleep 0.3; exit "${AT_TERM:-0}"' TERM
touch "$SAID/up"
until [ "$(grep -c '^-m ray.scripts.scripts start' "$SAID/asked")" -ge "${NODES:-0}" ]; do sleep 0.05; done
[ "${WAITS:-}" = "" ] && exit "${CODE:-0}"
while :; do sleep 0.05; done
"""
SRUN = """#!/bin/bash
line=$(printf '%q ' srun "$@"); echo "$line" >>"$SAID/asked"
while [[ $1 == --* ]]; do shift; done
[ "$1" = getent ] && { echo "10.0.0.7 STREAM $3"; exit; }
exec "$@"
"""
SCONTROL = """#!/bin/bash
line=$(printf '%q ' scontrol "$@"); echo "$line" >>"$SAID/asked"
[ "$1" = show ] && printf 'n1\\nn2\\nn3\\n'
exit 0
"""

SQUEUE = """#!/bin/bash
[ "$ENDS" = never ] && echo N/A || date --date="@$ENDS" +%Y-%m-%dT%H:%M:%S
"""

DRIVER = """import os, ray, time
ray.init(log_to_driver=False, logging_level="ERROR")
while ray.cluster_resources().get("CPU") != 16:
    time.sleep(0.2)
print(sum(node["Alive"] for node in ray.nodes()), "nodes of 8 cores", flush=True)
"""

BETWEEN = """#!/bin/bash
echo "$@" >>"$SAID/asked"
[ "$2" = potstill ] && exec {python} {driver}
exec {python} "$@"
"""


def config(**changes: Any) -> dict[str, Any]:
    return {
        "name": "sums",
        "method": "opd",
        "student": {"model": "models/student"},
        "teacher": {"kind": "server", "url": "http://10.0.0.9:8001", "secret_ref": "env:TEACHER_KEY"},
        "data": {"kind": "jsonl", "path": "prompts.jsonl"},
        "rollout": {"prompts_per_step": 4, "sampling": {"max_new_tokens": 8}},
        "optim": {"lr": 1e-4},
        "loop": {"steps": 2},
    } | changes


def large(**changes: Any) -> dict[str, Any]:
    """Two ranks and six workers, a GPU each."""
    rollout = {**config()["rollout"], "workers": 6, "min_workers": 2}
    resources = {"learner": ONE_GPU, "rollout": {"cpus": 2, "gpus": 1}, **changes}
    return config(learner={"ranks": 2}, rollout=rollout, resources=resources)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command is given, of a name that no shell would like."""
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def rendering(here: Path, raw: dict[str, Any], *options: str) -> Result:
    path = here / "mine.json"
    path.write_text(json.dumps(raw))
    return CliRunner().invoke(app, ["slurm", "render", str(path), *options])


def rendered(here: Path, raw: dict[str, Any], *options: str) -> Path:
    result = rendering(here, raw, *options)
    assert result.exit_code == 0, result.output
    return here / result.stdout.strip()


def asks(script: Path) -> set[str]:
    return set(re.findall(r"^#SBATCH (.+)$", script.read_text(), flags=re.MULTILINE))


def refused(here: Path, raw: dict[str, Any], *options: str) -> str:
    result = rendering(here, raw, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert not list(here.glob("*.sbatch*"))
    return result.stderr


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("options", [(), ("--nodes", "3", "--gpus-per-node", "4")], ids=["one node", "several"])
def test_the_script_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    script = rendered(tmp_path, large(), *options, "--partition", "gpu-a,gpu_b", "--account", "lab.7")
    for lint in (["bash", "-n"], ["shellcheck", "--severity=style"]):
        done = subprocess.run([*lint, script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert "{" + "{" not in script.read_text()
    assert {
        "--job-name=sums",
        "--time=24:00:00",
        "--partition=gpu-a,gpu_b",
        "--account=lab.7",
        "--requeue",
        "--signal=B:TERM@300",
    } <= asks(script)


def test_the_resolved_config_lies_beside_it_and_is_what_runs(here: Path):
    script = rendered(here, config(), "optim.lr=3e-4", "--out", "jobs.sbatch")
    beside = here / "jobs.sbatch.toml"
    assert load(beside) == load(here / "mine.json", ["optim.lr=3e-4"])
    assert tomllib.loads(beside.read_text())["rollout"]["samples_per_prompt"] == 1
    assert script.name == "jobs.sbatch"


@pytest.mark.parametrize(
    ("raw", "options", "nodes", "gpus"),
    [
        (config(), {}, 1, 0),
        (large(), {}, 1, 8),
        (large(), {"gpus_per_node": 4}, 2, 4),
        (large(), {"nodes": 3}, 3, 3),
        (large(strategy="STRICT_SPREAD"), {}, 2, 4),
        (large(strategy="STRICT_PACK"), {"nodes": 8}, 8, 2),
        (large(), {"nodes": 1, "gpus_per_node": 4}, 1, 4),  # enough to begin with
        (large(layout="colocated", learner={"gpus": 0.6}, rollout={"gpus": 0.4}), {}, 1, 4),
        (large(rollout={"gpus": 0.6}), {}, 1, 8),  # no two on one
        (large(rollout={"gpus": 2}), {"nodes": 14}, 14, 2),
    ],
)
def test_what_is_not_said_follows_from_the_resources(raw: dict[str, Any], options: Any, nodes: int, gpus: int):
    asked = {"nodes": None, "gpus_per_node": None} | options
    found = slurm.room(parse(raw), **asked)
    assert (found.nodes, found.gpus_per_node) == (nodes, gpus)


def test_a_single_node_has_cores_for_every_process_and_the_driver(here: Path):
    assert "--cpus-per-task=21" in asks(rendered(here, large()))  # 2 × 4 and 6 × 2, as [resources] says
    threads = config(learner={"threads": 8}, rollout={**config()["rollout"], "workers": 2, "threads": 3})
    assert "--cpus-per-task=15" in asks(rendered(here, threads))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--time", "1:2:3:4"), "--time '1:2:3:4'"),
        (("--time", "tomorrow"), "--time 'tomorrow'"),
        (("--time", "10\n#SBATCH --uid=0"), "--time"),
        (("--time", "5"), "--time 5"),
        (("--partition", "a b"), "--partition 'a b'"),
        (("--partition", "--uid=0"), "--partition"),
        (("--account", "x\n#SBATCH --uid=0"), "--account"),
        (("--nodes", "1", "--gpus-per-node", "3"), "needs 4 GPUs to begin with"),
        (("resources.strategy=STRICT_SPREAD", "--nodes", "1"), "STRICT_SPREAD lays 2 ranks"),
        (("resources.strategy=STRICT_PACK", "--gpus-per-node", "1"), "2 GPUs are needed on one node"),
        (("resources.learner.custom={a100: 1}",), "a100"),
        (("--out", "mine.json"), "mine.json would be overwritten"),
    ],
)
def test_what_cannot_be_is_one_line(here: Path, options: tuple[str, ...], words: str):
    assert words in refused(here, large(), *options)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-2:30", 95400), ("1-02:03:04", 93784)],
)
def test_limits_are_read_as_slurm_reads_them(time: str, seconds: int):
    assert slurm.seconds(time) == seconds


def test_templates_are_found_in_an_installed_package_too(tmp_path: Path):
    package = tmp_path / "potstill"
    with pytest.raises(ConfigError, match="reinstall potstill"):
        shipped("slurm", package)
    (package / "shipped_slurm").mkdir(parents=True)
    assert shipped("slurm", package) == package / "shipped_slurm"
    assert (shipped("slurm") / "single_node.sbatch.j2").exists()


def test_without_the_services_packages_it_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "orchestrator.slurm")
    monkeypatch.delattr("orchestrator.slurm")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "install potstill[orchestrator]" in refused(here, config())


# ------------------------------------------------------------------------------------------------------- what bash does


class Played:
    """A script that bash runs, with Slurm's programs played."""

    def __init__(self, here: Path, script: Path, **variables: str) -> None:
        self.said = here / "said"
        self.said.mkdir()
        environment = {
            **os.environ,
            "SAID": str(self.said),
            "PATH": f"{here / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_ON_NODE": "8",
            "RAY_ADDRESS": "somebody:6379",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "somebody's",
            **variables,
        }
        self.process = subprocess.Popen(["bash", str(script)], cwd=here.parent, env=environment, start_new_session=True)

    def until_up(self) -> None:
        until(lambda: (self.said / "up").exists(), 30.0)

    def told(self) -> int:
        return len(self._lines("told"))

    def asked(self) -> list[str]:
        return self._lines("asked")

    def environment(self) -> list[str]:
        return self._lines("environment")

    def end(self) -> int:
        return self.process.wait(timeout=30.0)

    def _lines(self, name: str) -> list[str]:
        path = self.said / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def played(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with programs that play Python and Slurm."""
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        path = here / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(here / "bin" / "python"))
    return here


def runs(asked: Sequence[str]) -> list[str]:
    return [line for line in asked if line.startswith("-m potstill run")]


def test_it_runs_the_config_where_it_was_rendered_and_ends_as_the_run_does(played: Path):
    job = Played(played, rendered(played, config()), CODE="3")
    assert job.end() == 3
    (line,) = runs(job.asked())
    assert "sums.sbatch.toml" in line
    assert line.rstrip().endswith("--resume-if-begun")
    assert job.environment() == ["none  "]  # no cluster that the submitting shell knew
    assert not list(played.parent.rglob("pwned"))


def test_hostile_words_of_a_config_are_words(played: Path):
    raw = config(runs=HOSTILE, data={"kind": "jsonl", "path": HOSTILE}, student={"model": HOSTILE})
    script = rendered(played, raw, "--out", f"{HOSTILE}.sbatch")
    job = Played(played, script)
    assert job.end() == 0
    assert shlex.split(runs(job.asked())[0])[3].endswith(f"{HOSTILE}.sbatch.toml")
    assert not list(played.parent.rglob("pwned"))


def test_a_signal_before_the_limit_reaches_the_run_and_the_job_is_queued_again(played: Path):
    job = Played(played, rendered(played, config()), WAITS="1", ENDS=str(int(time.time()) + 290))
    job.until_up()
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0
    assert job.told() == 1
    assert "scontrol requeue 41 " in job.asked()


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"ENDS": "9999999999"}, 0),  # somebody's scancel
        ({"ENDS": "1"}, 0),  # and when Slurm has begun to end it
        ({"ENDS": "never"}, 0),
        ({"ENDS": "soon", "AT_TERM": "1"}, 1),  # the run failed
    ],
)
def test_nothing_else_queues_it_again(played: Path, variables: dict[str, str], code: int):
    soon = str(int(time.time()) + 290)
    given = {name: soon if value == "soon" else value for name, value in variables.items()}
    job = Played(played, rendered(played, config()), WAITS="1", **given)
    job.until_up()
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == code
    assert job.told() == 1
    assert not [line for line in job.asked() if "requeue" in line]


def test_every_signal_is_passed_on_and_the_runs_own_end_counts(played: Path):
    job = Played(played, rendered(played, config()), WAITS="1", AT_TERM="7")
    job.until_up()
    for _ in range(3):
        job.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert job.end() == 7
    assert job.told() >= 1


def test_several_nodes_share_a_ray_behind_a_token_that_no_file_has(played: Path):
    script = rendered(played, large(), "--nodes", "3")
    job = Played(played, script, CODE="4", NODES="2")
    assert job.end() == 4
    heads = [line for line in job.asked() if "start" in line and "--head" in line and line.startswith("srun")]
    others = [line for line in job.asked() if "start" in line and "--address" in line and line.startswith("srun")]
    assert len(heads) == len(others) == 1
    for words in ("--nodelist=n1", "--node-ip-address=10.0.0.7", "--num-gpus=3", "--num-cpus=8"):
        assert words in heads[0]
    for words in ("--nodelist=n2\\,n3", "--nodes=2", "--address=10.0.0.7:6379"):
        assert words in others[0]
    assert "--nodelist=n3" in next(line for line in job.asked() if "getent" in line)

    environments = {tuple(line.split()) for line in job.environment()}
    ((address, mode, token),) = environments
    assert (address, mode) == ("10.0.0.7:6379", "token")
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert token not in script.read_text()
    assert token not in "\n".join(job.asked())

    temp = re.search(r"--temp-dir=(\S+)", heads[0])[1]  # type: ignore[index]
    assert any(line.startswith("srun") and f"rm -rf -- {temp}" in line for line in job.asked())


def test_two_jobs_have_two_tokens(played: Path):
    script = rendered(played, large(), "--nodes", "2")
    first = Played(played, script)
    first.end()
    one = set(first.environment())
    first.said.rename(played / "before")
    second = Played(played, script)
    second.end()
    assert not one & set(second.environment())


def test_a_head_that_does_not_start_ends_the_job(played: Path):
    python = played / "bin" / "python"
    python.write_text("#!/bin/bash\nexit 1\n")
    job = Played(played, rendered(played, large(), "--nodes", "2"))
    assert job.end() == 1
    assert not runs(job.asked())


def test_a_config_error_is_raised_for_a_limit_shorter_than_the_notice(tmp_path: Path):
    room = slurm.Room(nodes=1, gpus_per_node=0, cpus=1)
    with pytest.raises(ConfigError, match="asked to stop 5 minutes before"):
        slurm.Job(room=room, time="6", partition=None, account=None, python="p", folder=tmp_path, config=tmp_path)


# ----------------------------------------------------------------------------------------------- what Slurm makes of it


def plain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go there, with a player of Python, and names that lead to the nodes of a Slurm that is all on this machine."""
    monkeypatch.chdir(folder)
    for name, text in {"python": PYTHON, "getent": "#!/bin/bash\necho 127.0.0.2 STREAM\n"}.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (folder / "said").mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(folder / "said"))


@pytest.mark.long
def test_slurm_runs_it_on_one_node_and_on_two_and_queues_it_again_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain(tmp_path, monkeypatch)
    (tmp_path / "slurm").mkdir()
    asked = tmp_path / "said" / "asked"
    with slurm_cluster.slurm(tmp_path / "slurm") as cluster:
        several = cluster.submit(rendered(tmp_path, large(rollout={}, learner={}), "--nodes", "2"), CODE="4", NODES="2")
        until(lambda: cluster.state(several) == "FAILED")
        assert cluster.job(several)["ExitCode"] == "4:0"
        starts = [line for line in asked.read_text().splitlines() if "scripts start" in line]
        assert sorted("--head" in line for line in starts) == [False, True]
        assert all("--num-cpus=8" in line for line in starts)

        (tmp_path / "said" / "up").unlink()
        one = cluster.submit(rendered(tmp_path, config()), WAITS="1")
        until((tmp_path / "said" / "up").exists)
        until(lambda: cluster.state(one) == "RUNNING")
        cluster.limit(one, 4)
        until(lambda: cluster.job(one)["Restarts"] == "1", 180.0)
        assert (tmp_path / "said" / "told").read_text() == "told\n"
        until(lambda: cluster.state(one) == "PENDING")
        cluster.cancel(one)


@pytest.mark.long
def test_a_run_over_two_nodes_finds_a_ray_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Real Ray, and a driver in the run's place that waits for its nodes, then shows them."""
    plain(tmp_path, monkeypatch)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    (tmp_path / "bin" / "python").write_text(BETWEEN.format(python=f"{sys.prefix}/bin/python", driver=driver))
    (tmp_path / "slurm").mkdir()
    with slurm_cluster.slurm(tmp_path / "slurm") as cluster:
        job = cluster.submit(rendered(tmp_path, large(rollout={}, learner={}), "--nodes", "2"))
        until(lambda: cluster.state(job) in {"COMPLETED", "FAILED"}, 240.0)
        log = (tmp_path / f"sums-{job}.log").read_text()
        assert cluster.state(job) == "COMPLETED", log
    assert "2 nodes of 8 cores" in log
    temp = re.findall(r"--temp-dir=(\S+)", (tmp_path / "said" / "asked").read_text())
    assert len(temp) == 2
    assert not any(Path(folder).exists() for folder in temp)
