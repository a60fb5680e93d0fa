"""The scripts for bare machines: what they refuse, and a real Ray that they start on loopback and end again.

shellcheck (Debian's package) lints them.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from tests.plain import PLAIN
from tests.ports import free_port
from tests.services import until

SCRIPTS = Path(__file__).parents[2] / "deploy" / "ray"
NAMES = ["up.sh", "down.sh", "submit.sh"]
SAYS = '#!/bin/bash\nprintf "%s\\n" "${RAY_AUTH_MODE:-no mode}" "$@"\n'


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """With these variables, and none of Ray's or potstill's that are set here."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POTSTILL_"))}
    command = [str(SCRIPTS / script), *words]
    return subprocess.run(command, env=ours | variables, capture_output=True, text=True, timeout=180)


def refused(script: str, *words: str, **variables: str) -> str:
    done = run(script, *words, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("lint", [("bash", "-n"), ("shellcheck", "--severity=style")], ids=["bash", "shellcheck"])
@pytest.mark.parametrize("name", NAMES)
def test_they_are_sound(name: str, lint: tuple[str, ...]):
    done = subprocess.run([*lint, SCRIPTS / name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert os.access(SCRIPTS / name, os.X_OK)


# ------------------------------------------------------------------------------------------------------------- up, down


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say head, or worker"),
        (("tail",), "say head, or worker"),
        (("worker",), "HOST:PORT"),
        (("worker", "10.0.0.1"), "HOST:PORT"),
        (("worker", "10.0.0.1:6379"), "set POTSTILL_RAY_BIND"),
        (("head", "--num-cpus=1"), "come after --"),
    ],
)
def test_what_is_no_node_is_refused(tmp_path: Path, words: tuple[str, ...], says: str):
    assert says in refused("up.sh", *words, RAY_AUTH_TOKEN="t", POTSTILL_RAY_STATE=str(tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def test_nothing_starts_without_a_token(tmp_path: Path):
    state = {"POTSTILL_RAY_STATE": str(tmp_path / "state")}
    empty = tmp_path / "token"
    empty.touch()
    assert "set RAY_AUTH_TOKEN" in refused("up.sh", "head", **state)
    assert "set RAY_AUTH_TOKEN" in refused("up.sh", "head", **state, RAY_AUTH_TOKEN="")
    assert "no token is there" in refused("up.sh", "head", **state, RAY_AUTH_TOKEN_PATH=str(empty))
    assert "no token is there" in refused("up.sh", "head", **state, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert not (tmp_path / "state").exists()


def test_down_ends_nothing_that_it_did_not_start(tmp_path: Path):
    """A process id is given again: what has the number now began at another time."""
    assert "has started nothing" in refused("down.sh", POTSTILL_RAY_STATE=str(tmp_path))
    temp = tmp_path / "temp"
    temp.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "node").write_text(f"{other.pid} 1 {temp}\n")
        assert run("down.sh", POTSTILL_RAY_STATE=str(tmp_path)).returncode == 0
        assert other.poll() is None
        other.kill()


def test_a_ray_that_does_not_start_leaves_its_last_words_and_nothing_else(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\necho the disk is full\nexit 1\n")
    python.chmod(0o755)
    state = tmp_path / "state"
    done = run("up.sh", "head", RAY_AUTH_TOKEN="t", POTSTILL_RAY_STATE=str(state), PYTHON=str(python))
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert [path.name for path in state.iterdir()] == ["ray.log"]


class Cluster:
    """Variables of nodes on this machine, and what lives of them."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        self.folder = folder
        self.port, self.dashboard = free_port(), f"127.0.0.1:{free_port()}"

    def script(self, name: str, *words: str, node: str = "head", **more: str) -> subprocess.CompletedProcess[str]:
        return run(
            name,
            *words,
            **{
                "RAY_AUTH_TOKEN": self.token,
                "POTSTILL_RAY_STATE": str(self.folder / node),
                "POTSTILL_RAY_PORT": str(self.port),
                "POTSTILL_RAY_DASHBOARD": self.dashboard,
                "PYTHON": sys.executable,
            }
            | more,
        )

    def up(self, *words: str, node: str = "head", **more: str) -> str:
        """With ports that nobody else on this machine uses."""
        names = ["dashboard-agent-listen-port", "metrics-export-port", *(["ray-client-server-port"] * (node == "head"))]
        ports = [f"--{name}={free_port()}" for name in names]
        options = ["--", "--num-cpus=1", "--object-store-memory=100000000", *ports]
        done = self.script("up.sh", *words, *options, node=node, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, path: str, token: str | None = None) -> httpx2.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.get(
            f"http://{self.dashboard}{path}", headers=headers, trust_env=False, verify=PLAIN, timeout=30.0
        )

    @property
    def processes(self) -> list[psutil.Process]:
        """All that have the token in their environment: every process of Ray does."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_AUTH_TOKEN") == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    @property
    def listening(self) -> dict[int, str]:
        """Addresses by port."""
        return {
            connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
            for process in self.processes
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    for node in ("worker", "head"):
        if (tmp_path / node / "node").exists():
            made.script("down.sh", node=node)


def test_a_head_answers_who_has_the_token_and_is_gone_when_it_is_down(cluster: Cluster):
    said = cluster.up("head")
    assert f"RAY_ADDRESS=http://{cluster.dashboard}" in said
    assert "worker" not in said  # on loopback nobody can join it
    assert until(lambda: cluster.ask("/api/jobs/", cluster.token).is_success)
    assert cluster.ask("/api/jobs/").status_code == 401
    assert cluster.ask("/api/jobs/", "guessed").status_code == 403
    assert set(cluster.listening.values()) == {"127.0.0.1"}
    assert "is up already" in cluster.script("up.sh", "head").stderr

    state = cluster.folder / "head"
    assert cluster.token not in (state / "ray.log").read_text() + (state / "node").read_text()
    temp = Path((state / "node").read_text().split()[2])
    assert temp.is_dir()
    done = cluster.script("down.sh")
    assert done.returncode == 0, done.stderr
    until(lambda: not cluster.processes, 10.0)
    assert not temp.exists()


@pytest.mark.long
def test_a_worker_joins_and_a_run_is_submitted(cluster: Cluster, tmp_path: Path):
    """The nodes have an address each, of those that are loopback to all but Ray."""
    head = f"127.0.0.2:{cluster.port}"
    assert f"workers: up.sh worker {head}\n" in cluster.up("head", POTSTILL_RAY_BIND="127.0.0.2")
    cluster.up("worker", head, node="worker", POTSTILL_RAY_BIND="127.0.0.3")
    assert cluster.listening[int(cluster.dashboard.split(":")[1])] == "127.0.0.1"
    nodes = until(lambda: cluster.ask("/nodes?view=summary", cluster.token).json()["data"]["summary"])
    assert [node["raylet"]["state"] for node in nodes] == ["ALIVE", "ALIVE"]
    config = tmp_path / "wrong.toml"
    config.write_text("name = 7\n")
    done = cluster.script("submit.sh", str(config), RAY_ADDRESS=f"http://{cluster.dashboard}")
    assert done.returncode != 0
    assert "potstill: name: Input should be a valid string" in done.stdout + done.stderr  # it was read over there

    assert cluster.script("down.sh", node="worker").returncode == 0
    assert cluster.ask("/api/jobs/", cluster.token).is_success
    assert cluster.script("down.sh").returncode == 0
    until(lambda: not cluster.processes, 10.0)


# --------------------------------------------------------------------------------------------------------------- submit


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python that says what it was asked."""
    path = tmp_path / "python"
    path.write_text(SAYS)
    path.chmod(0o755)
    (tmp_path / "run.toml").touch()
    return str(path)


def test_a_run_is_submitted_to_the_service_where_there_is_one(tmp_path: Path, python: str):
    config = str(tmp_path / "run.toml")
    done = run("submit.sh", config, "optim.lr=1e-4", PYTHON=python, POTSTILL_URL="http://s", RAY_ADDRESS="http://r")
    assert done.stdout.splitlines()[1:] == ["-m", "potstill", "submit", config, "optim.lr=1e-4"]


def test_else_as_a_job_of_ray(tmp_path: Path, python: str):
    config = str(tmp_path / "run.toml")
    done = run("submit.sh", config, "a=1", PYTHON=python, RAY_ADDRESS="http://r:8265", RAY_AUTH_TOKEN="t")
    ray = ["token", "-m", "ray.scripts.scripts", "job", "submit", "--address", "http://r:8265", "--"]
    job = ["env", f"--chdir={Path.cwd()}", python, "-m", "potstill", "run", config, "a=1"]
    assert done.stdout.splitlines() == ray + job


def test_what_cannot_be_submitted_is_refused(tmp_path: Path, python: str):
    config = str(tmp_path / "run.toml")
    address = {"RAY_ADDRESS": "http://r:8265", "PYTHON": python}
    assert "which CONFIG" in refused("submit.sh")
    assert "cannot be read" in refused("submit.sh", str(tmp_path / "none.toml"))
    assert "set POTSTILL_URL" in refused("submit.sh", config)
    assert "set POTSTILL_URL" in refused("submit.sh", config, RAY_ADDRESS="r:6379")
    assert "RAY_AUTH_TOKEN" in refused("submit.sh", config, **address)
    for word in ("name=$(id)", "a=1;id", "a='b'", "a=b c", "a=b\nid"):
        assert "letters, digits" in run("submit.sh", config, word, **address, RAY_AUTH_TOKEN="t").stderr
