"""The Compose files, laid over each other: taken by the specification's schema, and by rules that are shown to bite.

No container engine is asked.
"""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.compose_rules import COMPOSE, MADE, RULES, SETTINGS, Composed, composed

GONE = object()

CHANGES: Sequence[tuple[str, str, Any]] = (
    ("shaped", "services.api.helthcheck", {}),
    ("shaped", "services.api.read_only", []),
    ("shaped", "services.head.deploy.resources.limits.cpu", "1"),
    ("on_loopback", "services.api.ports.0", "8000:8000"),
    ("on_loopback", "services.grafana.ports.0", "0.0.0.0:3000:3000"),
    ("on_loopback", "services.head.network_mode", "host"),
    ("on_loopback", "services.prometheus.networks", ["inside"]),
    ("on_loopback", "networks.inside.internal", False),
    ("apart", "services.head.ports", ["127.0.0.1:8265:8265"]),
    ("apart", "services.postgres.networks", ["inside", "published"]),
    ("pinned", "services.api.image", "potstill-control:latest"),
    ("pinned", "services.postgres.image", "postgres"),
    ("pinned", "services.grafana.image", "grafana/grafana:main"),
    ("confined", "services.head.user", GONE),
    ("confined", "services.postgres.user", "0:0"),
    ("confined", "services.teacher.user", "potstill"),
    ("confined", "services.api.read_only", GONE),
    ("confined", "services.teacher.cap_drop", ["NET_RAW"]),
    ("confined", "services.head.security_opt", GONE),
    ("confined", "services.head.privileged", True),
    ("confined", "services.prometheus.volumes.0", "/var/run/docker.sock:/var/run/docker.sock"),
    ("bounded", "services.teacher.deploy.resources.limits.memory", GONE),
    ("bounded", "services.grafana.deploy", GONE),
    ("healthy", "services.head.healthcheck", GONE),
    ("healthy", "services.api.healthcheck.test", "curl localhost"),
    ("healthy", "services.api.depends_on.postgres.condition", "service_started"),
    ("secretive", "services.postgres.environment.POSTGRES_PASSWORD", "made up"),
    ("secretive", "services.grafana.environment.GF_SECURITY_ADMIN_PASSWORD__FILE", "made up"),
    ("secretive", "services.head.environment.RAY_AUTH_TOKEN", "made up"),
    ("secretive", "services.api.environment.POTSTILL_DATABASE", "postgresql://a:b@postgres/potstill"),
    ("secretive", "services.api.secrets.0", "ray_tokens"),
    ("secretive", "services.api.env_file.0", ".env"),
    ("secretive", "secrets.ray_token.file", "ray_token"),
    ("authenticated", "services.head.environment.RAY_AUTH_MODE", "disabled"),
    ("authenticated", "services.head.secrets.0", "teacher_key"),
    ("authenticated", "services.api.environment.RAY_AUTH_TOKEN_PATH", GONE),
    ("authenticated", "services.teacher.environment", {"VLLM_SERVER_DEV_MODE": "1"}),
    ("agreed", "services.head.volumes.0", "runs:/data"),
    ("agreed", "services.head.user", "10002:10002"),
    ("agreed", "services.head.secrets.1.target", "/etc/key"),
    ("agreed", "services.api.command.9", "--report-url=http://127.0.0.1:8000"),
    ("agreed", "services.api.environment.RAY_ADDRESS", "http://ray:8265"),
    ("there", "services.prometheus.volumes.1.source", "../monitoring/alarms.yml"),
    ("there", "services.api.volumes.0", "run:/runs"),
    ("there", "services.api.build.dockerfile", "deploy/docker/service.Dockerfile"),
    ("there", "services.api.user", "1000:1000"),
    ("commanded", "services.api.command.1", "--hots=0.0.0.0"),
    ("commanded", "services.head.command.1", "--tail"),
    ("commanded", "services.teacher.command.4", "--hots=0.0.0.0"),
)


@pytest.fixture(params=SETTINGS)
def whole(request: pytest.FixtureRequest) -> Composed:
    return composed(request.param)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_kept(whole: Composed, rule: str):
    assert list(RULES[rule](whole)) == []


@pytest.mark.parametrize("change", CHANGES, ids=[f"{rule} {place}" for rule, place, _ in CHANGES])
def test_a_rule_bites(change: tuple[str, str, Any]):
    rule, place, value = change
    whole = composed("cpu")
    where: Any = whole
    *path, last = place.split(".")
    for step in path:
        where = where[int(step)] if isinstance(where, list) else where.setdefault(step, {})
    if value is GONE:
        del where[last]
    else:
        where[int(last) if isinstance(where, list) else last] = value
    assert list(RULES[rule](whole)) != []


def test_every_rule_is_shown_to_bite():
    assert {change[0] for change in CHANGES} == set(RULES)


def test_gpus_are_held_by_runs_and_by_the_teacher_each_their_own():
    held = {}
    for setting in SETTINGS:
        for name, service in composed(setting)["services"].items():
            for device in service["deploy"]["resources"].get("reservations", {}).get("devices", []):
                held[setting, name] = (device["driver"], device["device_ids"], device["capabilities"])
    assert held == {("gpu", "head"): ("nvidia", ["1"], ["gpu"]), ("gpu", "teacher"): ("nvidia", ["0"], ["gpu"])}
    images = {name: service["image"].split(":")[0] for name, service in composed("gpu")["services"].items()}
    assert (images["head"], images["teacher"], images["api"]) == ("potstill-gpu", "potstill-gpu", "potstill-control")


def test_what_is_watched_is_what_listens():
    scraped = yaml.safe_load((COMPOSE / "../monitoring/prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    command = composed("cpu")["services"]["api"]["command"]
    assert {"api:9090", "teacher:8001"} <= targets
    assert {"--admin-host=0.0.0.0", "--admin-port=9090"} <= set(command)


def test_grafana_lets_nobody_in_without_a_password():
    given = composed("cpu")["services"]["grafana"]["environment"]
    assert (given["GF_AUTH_ANONYMOUS_ENABLED"], given["GF_USERS_ALLOW_SIGN_UP"]) == ("false", "false")


def test_every_secret_is_made_once_and_kept_to_its_owner(tmp_path: Path):
    made = _make(tmp_path / "secrets")
    assert made.returncode == 0, made.stderr
    whole = composed("cpu")
    files = {one["file"] for one in whole["secrets"].values()} | set(whole["services"]["api"]["env_file"])
    assert {f"{MADE}{path.name}" for path in (tmp_path / "secrets").iterdir()} == files
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    texts = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    database = texts.pop("database.env")
    assert texts["postgres_password"] in database
    assert len(set(texts.values())) == len(texts)
    assert {len(bytes.fromhex(text)) for text in texts.values()} == {32}
    again = _make(tmp_path / "secrets")
    assert again.returncode != 0
    assert (tmp_path / "secrets" / "ray_token").read_text() == texts["ray_token"]


def _make(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(COMPOSE / "secrets.sh"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_made_secrets_stay_out_of_the_repository():
    assert (COMPOSE / ".gitignore").read_text().split() == [MADE]
