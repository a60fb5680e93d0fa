"""The images' Dockerfiles: read, held to rules that are shown to bite, and the control image's steps done for real.

No container engine is asked: the steps run in an environment of their own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copy, copytree

import httpx2
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.deploy import compose_rules, manifests
from tests.deploy.dockerfiles import CONTROL, CPU, DOCKER, GPU, ROOT, arguments, checks_its_health, problems, values
from tests.plain import PLAIN

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ALL = sorted(DOCKER.glob("*.Dockerfile"))

GOOD = """
FROM python:3.12.12-slim-bookworm AS build
COPY pyproject.toml ./
RUN pip wheel .
FROM python:3.12.12-slim-bookworm
COPY --from=build /dist /dist
USER 10001:10001
ENTRYPOINT ["potstill"]
"""
BAD = (
    ("FROM python:3.12.12-slim-bookworm AS", "FROM python AS", "not pinned"),
    ("FROM python:3.12.12-slim-bookworm AS", "FROM python:latest AS", "not pinned"),
    ("FROM python:3.12.12-slim-bookworm AS", "FROM python:3 AS", "not pinned"),
    ("FROM python:3.12.12-slim-bookworm AS", "FROM ${BASE} AS", "not pinned"),
    ("USER 10001:10001\n", "", "nobody but root"),
    ("USER 10001:10001", "USER root", "is root"),
    ("USER 10001:10001", "USER 0", "is root"),
    ("USER 10001:10001", "USER potstill", "cannot tell from root"),
    ("USER 10001:10001\n", "USER 10001\nUSER root\n", "is root"),
    ("USER 10001:10001\n", "USER 10001\nRUN pip install x\n", "after the last USER"),
    ("RUN pip wheel .", "ADD https://models.example/weights /models", "fetches nothing"),
    ("COPY pyproject.toml ./", "COPY . .", "more than is named"),
    ("COPY pyproject.toml ./", "COPY pyproject.toml .git ./", "more than is named"),
    ("COPY pyproject.toml ./", "COPY runs /runs", "more than is named"),
    ("COPY pyproject.toml ./", "COPY ../keys ./", "more than is named"),
    ("COPY pyproject.toml ./", "COPY pyproject.tom ./", "no such file"),
    ("RUN pip wheel .", "ARG INDEX_TOKEN", "for everybody to read"),
    ("RUN pip wheel .", "ENV HF_HOME=/tmp \\\n    POSTGRES_PASSWORD=made-up", "for everybody to read"),
    ("RUN pip wheel .", "ENV POTSTILL_API_KEY=made-up", "for everybody to read"),
    ('ENTRYPOINT ["potstill"]', "ENTRYPOINT potstill serve", "in a shell"),
    ('ENTRYPOINT ["potstill"]', "", "the base's choice"),
)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_dockerfile_keeps_the_rules(path: Path):
    assert problems(path.read_text()) == []


def test_the_rules_let_a_good_one_pass():
    assert problems(GOOD) == []


@pytest.mark.parametrize(("part", "instead", "said"), BAD, ids=[f"{said}: {instead[:40]}" for _, instead, said in BAD])
def test_a_rule_bites(part: str, instead: str, said: str):
    assert part in GOOD
    found = problems(GOOD.replace(part, instead, 1))
    assert [said in one for one in found] == [True]


def test_the_service_is_asked_for_its_health():
    text = CONTROL.read_text()
    assert checks_its_health(text)
    assert not checks_its_health(re.sub(r"HEALTHCHECK[^\n]*\\\n[^\n]*", "", text))
    assert not checks_its_health(text.replace("/livez", "/"))


# ----------------------------------------------------------------------------------------------------------- versions


def test_every_ray_is_of_one_version_which_the_project_allows():
    versions = {path.name: arguments(path.read_text())["RAY_VERSION"] for path in ALL}
    for setting in manifests.SETTINGS:
        versions |= {owner: spec["rayVersion"] for owner, spec in manifests.clusters(manifests.manifests(setting))}
    assert len(versions) == len(ALL) + 2  # a cluster of the service, and one of a job
    (version,) = set(versions.values())
    (ray,) = (one for one in map(Requirement, PROJECT["optional-dependencies"]["orchestrator"]) if one.name == "ray")
    assert ray.specifier.contains(version)
    for path in ALL:
        assert '"ray[default]==${RAY_VERSION}"' in path.read_text()


def test_the_gpu_image_is_of_the_vllm_that_the_project_allows():
    (base,) = values(GPU.read_text(), "FROM")
    (vllm,) = (one for one in map(Requirement, PROJECT["optional-dependencies"]["gpu"]) if one.name == "vllm")
    assert vllm.specifier.contains(base.removeprefix("vllm/vllm-openai:v"))


def test_pythons_are_ones_that_the_project_allows():
    bases = [value.split()[0] for path in (CONTROL, CPU) for value in values(path.read_text(), "FROM")]
    versions = {base.removeprefix("python:").split("-")[0] for base in bases}
    assert len(versions) == 1
    assert SpecifierSet(PROJECT["requires-python"]).contains(versions.pop())


def test_each_image_has_the_extra_that_it_is_for():
    asked = {path.name.split(".")[0]: set(re.findall(r"\[([a-z]+)\]\"", path.read_text())) for path in ALL}
    assert asked == {"control": {"orchestrator"}, "cpu": {"cpu"}, "gpu": {"gpu"}}
    assert set.union(*asked.values()) <= set(PROJECT["optional-dependencies"])


def test_images_are_called_by_the_version_of_the_project():
    called = set()
    for path in ALL:
        called |= set(re.findall(r"--tag (potstill-\S+)", path.read_text()))
    for setting in compose_rules.SETTINGS:
        called |= {one["image"] for one in compose_rules.composed(setting)["services"].values()}
    for setting in manifests.SETTINGS:
        called |= {one["image"] for pod in manifests.pods(manifests.manifests(setting)) for one in pod.containers()}
    ours = {image for image in called if image.startswith("potstill-")}
    assert ours == {f"potstill-{path.name.split('.')[0]}:{PROJECT['version']}" for path in ALL}


def test_what_the_wheel_is_made_of_is_sent_to_the_builder_and_copied_and_nothing_else():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PROJECT["readme"], "LICENSE", *wheel["packages"], *wheel["force-include"]}
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == needed
    for path in ALL:
        copied = {source for value in values(path.read_text(), "COPY") for source in value.split()[:-1]}
        assert {source for source in copied if not source.startswith(("--from", "/"))} == needed


# ------------------------------------------------------------------------------------------------- the steps, for real


@pytest.mark.long
def test_the_control_image_has_all_that_the_service_needs_and_no_torch(tmp_path: Path):
    built = build(CONTROL, tmp_path)
    inside = json.loads(_said(built, _INSIDE, tmp_path).splitlines()[-1])
    assert inside["torch"] is False
    assert inside["ray"] == arguments(CONTROL.read_text())["RAY_VERSION"]
    assert Path(inside["potstill"]).is_relative_to(built.parents[1])
    assert set(inside["recipes"]) == {path.name for path in (ROOT / "deploy" / "recipes").glob("*.toml")}
    with serving(built, tmp_path) as url:
        with httpx2.Client(base_url=url, trust_env=False, verify=PLAIN, timeout=30.0) as http:
            assert http.get("/livez").status_code == 200
            login = http.get("/login")
            assert login.status_code == 200
            parts = re.findall(r'(?:href|src)="(/static/[^"]+)"', login.text)
            assert parts
            assert {part: http.get(part).status_code for part in parts} == dict.fromkeys(parts, 200)
            key = {"Authorization": f"Bearer {(tmp_path / 'key').read_text().strip()}"}
            assert http.get("/v1/runs", headers=key).json()["data"] == []  # its tables are there
        health = json.loads(re.search(r"CMD (\[.*livez.*\])", CONTROL.read_text())[1])[-1]
        assert _said(built, health.replace("http://127.0.0.1:8000", url), tmp_path) == ""
        with pytest.raises(AssertionError, match="HTTPError"):
            _said(built, health.replace("http://127.0.0.1:8000/livez", f"{url}/lives"), tmp_path)


_INSIDE = """
import importlib.util, json, potstill, ray
from potstill import recipes
print(json.dumps({
    "torch": importlib.util.find_spec("torch") is not None,
    "ray": ray.__version__,
    "potstill": potstill.__file__,
    "recipes": [path.name for path in recipes.folder().glob("*.toml")],
}))
"""


def build(dockerfile: Path, folder: Path) -> Path:
    """Do what the first stage does, its folders below `folder`; the environment's Python."""
    places = {place: str(folder / place.strip("/")) for place in ("/src", "/dist", "/opt/potstill")}
    first = re.split(r"^FROM ", dockerfile.read_text(), flags=re.MULTILINE)[1]
    (folder / "src").mkdir()
    for value in values(f"FROM {first}", "COPY"):
        *sources, target = value.split()
        for source in sources:
            if (ROOT / source).is_dir():
                copytree(ROOT / source, folder / "src" / target)
            else:
                copy(ROOT / source, folder / "src")
    environment = {
        **os.environ,
        **arguments(f"FROM {first}"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for step in values(f"FROM {first}", "RUN"):
        for place, instead in places.items():
            step = re.sub(rf"(?<![\w/]){place}\b", instead, step)
        done = subprocess.run(
            ["sh", "-c", step], cwd=folder / "src", env=environment, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return Path(places["/opt/potstill"]) / "bin" / "python"


def _said(python: Path, program: str, folder: Path) -> str:
    done = subprocess.run([str(python), "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@contextmanager
def serving(python: Path, folder: Path) -> Iterator[str]:
    """`potstill serve`, started as the image starts it: nothing but /runs and /tmp is written to."""
    command = [
        str(python.with_name("potstill")),
        "serve",
        "--port=0",
        f"--runs={folder / 'runs'}",
        f"--key-file={folder / 'key'}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POTSTILL_"))}
    environment |= {"HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            said = next((line for line in process.stdout if "potstill serves at" in line), None)
            assert said is not None, (folder / "log").read_text()[-2000:]
            yield said.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
