"""Alerts and dashboard speak of numbers that exist: every metric and label that they name is one that is served.

promtool (Debian's package prometheus) reads rules and config, and runs the rules on the series of alerts_test.yml.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from orchestrator.service.runs import State
from potstill.errors import ServiceError
from teacher_server.batching import ScoringQueue
from teacher_server.limits import Limits
from teacher_server.metrics import Metrics
from teacher_server.places import Places
from tests.launchers import AwayLauncher
from tests.left_behind import begin
from tests.services import serving

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "grafana" / "potstill.json").read_text())
PANELS = DASHBOARD["panels"]
RUN = next(variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run")
STEP = {"reverse_kl": 0.25, "seconds_train": 1.5, "worker_seconds_score": 0.75, "seconds_step": 2.0}
SCRAPED = {"job", "instance"}  # labels that Prometheus gives to all that it reads
GROUPING = re.compile(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?(?!\w*\s*\()")
WORDS = {"and", "bool", "offset", "or", "unless"}

Labels = Mapping[str, frozenset[str]]
"""By metric: its labels."""


def labels_of(registry: CollectorRegistry) -> dict[str, frozenset[str]]:
    return {sample.name: frozenset(sample.labels) for family in registry.collect() for sample in family.samples}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """What a service with a run at work, and a teacher that was asked and refused, tell Prometheus."""
    with serving(tmp_path_factory.mktemp("service"), lambda _url: AwayLauncher()) as service:
        begin(service, "works", state=State.RUNNING)
        alarm = {"seq": 1, "time": 1.0, "type": "alarm.length", "level": "warning", "message": "it sounded", "data": {}}
        told = {"metrics": [{"seq": 1, "time": 1.0, "step": 7, **STEP}], "events": [alarm]}
        token = service.state.signer.token(service.store.runs.get("works").submission_id)
        headers = {"Authorization": f"Bearer {token}"}
        service.http.post("/v1/runs/works/events", json=told, headers=headers).raise_for_status()
        found = labels_of(service.measures.registry)

    def score(jobs: object) -> list[Any]:
        raise ServiceError("nothing is scored here")

    queue = ScoringQueue(score, capacity=1, batch_tokens=1, window_s=0.0)
    try:
        teacher = Metrics(queue, Places(Limits(), lambda: 1))
        teacher.answers.labels(status="503").inc()
        teacher.refusals.labels(code="overloaded").inc()
        return found | labels_of(teacher.registry) | {"up": frozenset()}
    finally:
        queue.close()


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Every metric of a PromQL expression, with the labels that are asked of it."""
    bare = re.sub(r"\[[^\]]*\]", "", expression)
    grouped = {label.strip() for labels in GROUPING.findall(bare) for label in labels.split(",")}
    bare = GROUPING.sub(" ", bare)
    strings = re.sub(r'"[^"]*"', '""', bare)
    for name, matchers in SELECTOR.findall(re.sub(r"\b\d[\w.]*", "", strings)):
        if name not in WORDS:
            yield name, {matcher.split("=")[0].strip("!~ ") for matcher in matchers.split(",") if matcher} | grouped


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", RUN["query"]).groups()  # type: ignore[union-attr]
    yield "variable run", f'{metric}{{{label}=""}}'


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ('sum by (a, le) (rate(x_bucket{b=~"c|d", e!="f"}[5m])) > 1', {"x_bucket": {"a", "le", "b", "e"}}),
        ("increase(x[10m]) > 0\n or y unless z offset 10m", {"x": set(), "y": set(), "z": set()}),
        ("histogram_quantile(0.99, sum by (le) (rate(x[$__rate_interval])))", {"x": {"le"}}),
    ],
)
def test_an_expression_is_read_right(expression: str, found: dict[str, set[str]]):
    assert dict(selectors(expression)) == found


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_and_label_is_served(served: Labels, where: str, expression: str):
    named = list(selectors(expression))
    assert named
    for metric, labels in named:
        assert metric in served, f"{where}: nobody serves {metric}"
        assert labels <= served[metric] | SCRAPED, f"{where}: {metric} has {sorted(served[metric])}"


def test_what_people_watch_has_a_panel():
    shown = {metric for panel in PANELS for target in panel["targets"] for metric, _ in selectors(target["expr"])}
    wanted = {
        "potstill_runs",
        "potstill_run_tokens_per_second",
        "potstill_run_last_stage_seconds",
        "potstill_run_reverse_kl_nats",
        "potstill_run_completion_tokens",
        "potstill_run_truncated_ratio",
        "potstill_run_entropy_nats",
        "potstill_run_staleness_mean_versions",
        "potstill_run_staleness_max_versions",
        "potstill_run_queue_rollouts",
        "potstill_run_teacher_usd_total",
        "potstill_run_alarms_total",
        "potstill_api_request_seconds_bucket",
        "potstill_api_requests_total",
        "teacher_refusals_total",
        "teacher_score_seconds_bucket",
    }
    assert wanted - shown == set()


# -------------------------------------------------------------------------------------------------------------- alerts


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]):
    done = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_every_alert_is_tested_both_ways():
    tests = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    seen = [
        (test["name"], case["alertname"], bool(case["exp_alerts"]))
        for test in tests
        for case in test["alert_rule_test"]
    ]
    assert sorted(seen) == sorted(
        (f"{rule['alert']} {how}", rule["alert"], sounds)
        for rule in RULES
        for how, sounds in (("sounds", True), ("is quiet", False))
    )
    assert all(test["input_series"] for test in tests)


def test_a_rule_that_never_sounds_is_found_out(tmp_path: Path):
    """The tests of the alerts would notice a threshold out of reach."""
    for name in ("alerts.yml", "alerts_test.yml"):
        text = (MONITORING / name).read_text()
        (tmp_path / name).write_text(
            text.replace("potstill_run_silent_seconds > 300", "potstill_run_silent_seconds > 3e9")
        )
    command = ["promtool", "test", "rules", "alerts_test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "PotstillRunSilent" in done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(rule: dict[str, Any]):
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"].endswith(".")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor in anchors(ROOT / page)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ----------------------------------------------------------------------------------------------------------- dashboard


def test_every_panel_says_what_it_shows():
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_lie_beside_each_other():
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_the_source_is_whichever_one_chooses():
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert RUN["datasource"] == chosen
    for panel in PANELS:
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen] * (
            1 + len(panel["targets"])
        )
    assert [v["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"] == ["prometheus"]


def test_grafana_is_given_the_source_and_the_folder():
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "potstill.yml").read_text())["providers"]
    assert (provider["type"], provider["options"]) == ("file", {"path": "/var/lib/grafana/dashboards"})
