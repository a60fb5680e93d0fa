"""The timeline names who waited for whom in a run that really waited, and its page is small, whole and harmless."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.bubbles import Bubbles, bubbles, explained
from orchestrator.gantt import duration
from orchestrator.pieces import flatten, group
from orchestrator.timeline import read_bubbles, write_timeline
from potstill.cli import app
from potstill.errors import ConfigError
from potstill.spans import Span
from tests.paced_runs import PacedRun

NASTY = "<img src=x onerror=alert(1)>"


def span(process: str, name: str, start: float, end: float, **of: int) -> Span:
    return Span(process=process, name=name, start=start, end=end, **of)


def report(*spans: Span, end: float = 10.0) -> Bubbles:
    return bubbles(explained(group(spans)), start=0.0, end=end)


def write_spans(folder: Path, spans: list[Span]) -> None:
    (folder / "spans").mkdir(parents=True)
    lines = [{"process": s.process, "name": s.name, "start": s.start, "end": s.end, "step": s.step} for s in spans]
    (folder / "spans" / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# A run that really waited.


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (
            PacedRun(generate_s=0.08, train_s=0.02, ahead=2, steps=6),
            r"The learner waited \d\d% .* for batches; generation",
        ),
        (
            PacedRun(generate_s=0.01, score_s=0.08, train_s=0.02, steps=4),
            r"learner waited \d\d% .*; scoring is the slow",
        ),
        (
            PacedRun(generate_s=0.01, train_s=0.08, ahead=1, steps=6),
            r"The rollout workers waited \d\d% .*; training is",
        ),
        (
            PacedRun(generate_s=0.04, train_s=0.04, steps=4),
            r"Both waited: the learner waited \d\d%.* workers \d\d% for grants",
        ),
    ],
    ids=["generation", "scoring", "training", "turns"],
)
def test_the_verdict_names_who_waited_and_the_slowest_stage(tmp_path: Path, run: PacedRun, verdict: str):
    run.leave_spans(tmp_path)
    assert re.search(verdict, read_bubbles(tmp_path).verdict)


def test_shares_of_every_process_add_up_to_the_whole(tmp_path: Path):
    PacedRun(ahead=1).leave_spans(tmp_path)
    found = read_bubbles(tmp_path)
    assert [account.process for account in found.accounts] == ["loop", "learner-0", "worker-0", "worker-1"]
    for account in found.accounts:
        assert sum(account.shares.values()) == pytest.approx(1.0)


def test_a_learner_without_a_word_of_its_own_waited_for_what_the_loop_waited_for(tmp_path: Path):
    PacedRun(generate_s=0.05, train_s=0.01).leave_spans(tmp_path)
    learner = read_bubbles(tmp_path).accounts[1]
    assert (learner.waits[0].name, learner.waits[0].whom, learner.waits[0].times) == (
        "wait:batch",
        "the rollout workers",
        4,
    )
    assert learner.waits[0].seconds >= 4 * 0.05
    assert learner.shares["idle"] < 0.1


# What counts, to the second.


def test_a_moment_counts_once_for_the_foremost_of_what_is_open():
    spans = [
        span("w", "wait:grant", 0, 10),
        span("w", "score", 2, 8),
        span("w", "generate", 1, 4),
        span("w", "x", 9, 10),
    ]
    pieces = [(piece.start, piece.end, piece.span.name) for piece in flatten(spans, start=0, end=10)]
    assert pieces == [
        (0, 1, "wait:grant"), (1, 4, "generate"), (4, 8, "score"), (8, 9, "wait:grant"), (9, 10, "x"),
    ]  # fmt: skip


def test_a_pause_is_what_generation_loses_and_a_transfer_beside_it_is_not():
    worker = report(
        span("worker-0", "generate", 0, 10),
        span("worker-0", "weights:load", 2, 6),
        span("worker-0", "weights:pause", 5, 6),
    ).accounts[0]
    assert (worker.shares["generate"], worker.shares["weights"]) == (0.9, 0.1)


def test_a_wait_that_work_covers_is_no_bubble():
    worker = report(span("worker-0", "wait:grant", 0, 6), span("worker-0", "score", 0, 4)).accounts[0]
    assert [(wait.seconds, wait.times, wait.longest) for wait in worker.waits] == [(2.0, 1, 2.0)]


def test_a_grant_that_one_worker_waits_for_idles_no_other():
    found = report(
        span("loop", "wait:grant", 0, 5, worker=1),
        span("worker-0", "generate", 9, 10),
        span("worker-1", "generate", 9, 10),
    )
    assert [account.shares["wait"] for account in found.accounts[1:]] == [0.0, 0.5]


def test_what_lies_outside_of_the_window_does_not_count():
    worker = report(span("worker-0", "generate", -5, 1), span("worker-0", "generate", 9, 99)).accounts[0]
    assert (worker.shares["generate"], worker.shares["idle"]) == pytest.approx((0.2, 0.8))


def test_a_run_in_which_nobody_waits_is_told_so():
    found = report(span("learner-0", "train", 0, 9.5), span("worker-0", "generate", 0, 10))
    assert found.verdict.startswith("Nobody waited long")
    assert found.remarks == []


def test_evaluations_weights_and_time_without_a_span_are_remarked_on():
    found = report(
        span("learner-0", "train", 0, 4),
        span("learner-0", "weights:publish", 4, 6),
        span("worker-0", "evaluate", 0, 10),
    )
    assert found.remarks == [
        "Weights took 20% of the time of the learner.",
        "No span tells of 40% of the time of the learner.",
        "Evaluations took 100% of the time of the rollout workers.",
    ]


def test_without_a_learner_the_verdict_does_not_guess():
    assert "not known" in report(span("worker-0", "generate", 0, 10)).verdict


# The page.


class Page(HTMLParser):
    """Text, tags and the marks of a timeline."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.marks: list[dict[str, str | None]] = []
        self.words = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "rect":
            self.marks.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(folder: Path, **window: float) -> Page:
    write_timeline(folder, folder / "timeline.html", **window)
    return Page(folder / "timeline.html")


def test_the_page_draws_every_process_and_says_what_each_mark_is(tmp_path: Path):
    PacedRun().leave_spans(tmp_path)
    page = page_of(tmp_path)
    assert {mark["class"] for mark in page.marks} == {"generate", "score", "train", "weights", "wait"}
    assert {"chunk 0", "step 1", "pause, version 1"} <= {mark.get("data-of") for mark in page.marks}
    assert all(name in page.words for name in ("learner-0", "worker-1", "step 1", read_bubbles(tmp_path).verdict))


def test_what_runs_beside_something_else_has_a_row_of_its_own_and_a_colour(tmp_path: Path):
    write_spans(tmp_path, [span("worker-0", "generate", 0, 5), span("worker-0", "checkpoint", 1, 2)])
    page = page_of(tmp_path)
    assert page.tags.count("g") == 2
    assert all(f".{mark['class']} {{ fill:" in page.source for mark in page.marks)


def test_the_page_makes_no_request_and_runs_no_script_but_its_own(tmp_path: Path):
    write_spans(tmp_path / NASTY, [span(NASTY, NASTY, 0, 1), span("learner-0", "train", 0, 1, step=1)])
    page = page_of(tmp_path / NASTY)
    assert "img" not in page.tags
    assert NASTY in page.words
    assert re.search(r"default-src 'none'.*script-src 'sha256-", page.source)
    assert not re.search(r"https?://|src=(?!x)|@import|url\(", page.source)


def test_a_long_run_shows_its_last_ten_minutes_and_says_so(tmp_path: Path):
    write_spans(tmp_path, [span("learner-0", "train", 60 * n, 60 * n + 30, step=n) for n in range(30)])
    last = page_of(tmp_path)
    assert "From 19 min 30 s to 29 min 30 s of 29 min 30 s." in last.words
    assert "--from 0" in last.words
    assert len(page_of(tmp_path, after=0.0).marks) == 30
    assert len(page_of(tmp_path, after=60.0, until=150.0).marks) == 2


def test_a_page_of_many_tiny_spans_is_small_and_its_ink_stays_true(tmp_path: Path):
    spans = [span(f"worker-{w}", "generate", n / 20, n / 20 + 0.025) for w in range(20) for n in range(2000)]
    write_spans(tmp_path, spans)
    page = page_of(tmp_path)
    lanes = len(set(re.findall(r"worker-\d+", page.words)))
    assert len(page.source) < 2_000_000
    assert lanes == 16
    assert "16 of 20 processes “worker” are shown" in page.words
    widths = [float(mark["width"] or "nan") for mark in page.marks]
    assert sum(widths) == pytest.approx(lanes * 10_000 / 2, rel=0.01)


@pytest.mark.parametrize("window", [{"after": 99.0}, {"after": 2.0, "until": 1.0}])
def test_a_window_without_a_run_is_refused(tmp_path: Path, window: dict[str, float]):
    write_spans(tmp_path, [span("learner-0", "train", 0, 5)])
    with pytest.raises(ConfigError, match=r"--from and --to.*from 0 to 5.0 seconds"):
        page_of(tmp_path, **window)


def test_people_read_durations():
    assert [duration(s) for s in (0.25, 59.0, 200.0, 3600.0, 7505.0)] == [
        "250 ms", "59 s", "3 min 20 s", "1 h", "2 h 5 min 5 s",
    ]  # fmt: skip


# The command.


def test_the_command_writes_the_page_and_prints_the_verdict(tmp_path: Path):
    PacedRun().leave_spans(tmp_path)
    told = CliRunner().invoke(app, ["timeline", str(tmp_path)])
    assert told.exit_code == 0
    assert told.stdout.splitlines()[0] == read_bubbles(tmp_path).verdict
    assert (tmp_path / "timeline.html").exists()
    elsewhere = tmp_path / "pages" / "one.html"
    assert CliRunner().invoke(app, ["timeline", str(tmp_path), "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.exists()


def test_the_command_prints_the_bubble_report_as_json(tmp_path: Path):
    PacedRun().leave_spans(tmp_path)
    told = CliRunner().invoke(app, ["timeline", str(tmp_path), "--json"])
    found = json.loads(told.stdout)
    assert {"verdict", "remarks", "seconds", "processes"} <= set(found)
    assert [process["process"] for process in found["processes"]] == ["loop", "learner-0", "worker-0", "worker-1"]
    assert not (tmp_path / "timeline.html").exists()


def test_a_folder_without_spans_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"spans holds no spans: give the folder of a run"):
        read_bubbles(tmp_path)
