"""The page of a run says what report.json says, hides nothing that is missing, and executes nothing a model wrote."""

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from orchestrator import heatmap, plots
from orchestrator.report import flatten, page_of_a_bad_ending, read_folder, render, series, write_report
from potstill.errors import RunError
from potstill.journal import write_json

REPORT = {
    "run_id": "quickstart-distill",
    "recipe": "quickstart",
    "method": "opd",
    "engine": "transformers",
    "seed": 0,
    "steps": 120,
    "seconds_total": 843.2,
    "tokens_trained": 491520,
    "tokens_per_second": 583.0,
    "student_before": 0.125,
    "student_after": 0.713,
    "teacher": 0.953,
    "sft_control": {"student_after": 0.412, "tokens_trained": 491520},
    "metric": "held-out accuracy",
    "reverse_kl_first": 0.871,
    "reverse_kl_last": 0.093,
    "weights_version": 120,
    "peak_rss_bytes": 2147483648,
    "seconds_by_phase": {"generate": 401.2, "score": 120.4, "train": 262.9, "weights": 8.1},
}
DIED = {"type": "WorkerLost", "category": "system", "message": "the learner's process died"}
NASTY = "<img src=x onerror=alert(1)>"


def make_run(folder, *, report=None, num_steps=120, control=True, samples=None, events=None):
    """A run folder as a finished quickstart leaves it; every number follows from the arguments."""
    folder.mkdir(exist_ok=True)
    noise = random.Random(7)
    write_json(folder / "status.json", {"status": "succeeded"})
    write_json(folder / "report.json", REPORT if report is None else report)
    write_json(folder / "config.json", {"name": "quickstart", "optim": {"lr": 2e-4}, "student": {"model": "s" * 40}})
    steps = [make_step(step, num_steps, top=0.72, noise=noise) for step in range(1, num_steps + 1)]
    write_lines(folder / "metrics.jsonl", steps)
    write_lines(folder / "events.jsonl", make_evaluations(num_steps, top=0.713) if events is None else events)
    write_lines(folder / "samples.jsonl", make_samples(noise) if samples is None else samples)
    if control:
        below = folder / "sft_control"
        below.mkdir(exist_ok=True)
        write_json(below / "status.json", {"status": "succeeded"})
        write_lines(below / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
        write_lines(below / "events.jsonl", make_evaluations(num_steps, top=0.412))
    return folder


def make_unfinished(folder, *, status, num_steps=7, error=None):
    """A run folder as a bad ending leaves it: all but report.json, though both ends were evaluated."""
    make_run(folder, num_steps=num_steps, control=False)
    (folder / "report.json").unlink()
    write_json(folder / "config.json", {"method": "opd", "seed": 3, "loop": {"steps": 120}})
    write_json(folder / "status.json", {"status": status, **({"error": error} if error else {})})
    return folder


def make_step(step, num_steps, *, top, noise):
    done = 1 - math.exp(-4 * step / num_steps)
    return {
        "seq": step,
        "step": step,
        "reverse_kl": 0.09 + 0.78 * (1 - done) * (0.9 + 0.2 * noise.random()),
        "accuracy": min(1.0, 0.125 + (top - 0.125) * done + 0.12 * (noise.random() - 0.5)),
        "completion_tokens": 38 + 30 * (1 - done) + 4 * noise.random(),
        "truncated_fraction": max(0.0, 0.3 * (1 - done) - 0.03 * noise.random()),
        "tokens_trained": 4096 * step,
        "seconds_generate": 3.3,
        "seconds_train": 2.2,
        "seconds_weights": 0.07,
    }


def make_evaluations(num_steps, *, top, items=512):
    def evaluation(stage, step):
        accuracy = 0.125 + (top - 0.125) * (1 - math.exp(-4 * step / num_steps)) / (1 - math.exp(-4))
        data = {"stage": stage, "step": step, "accuracy": accuracy, "items": items, "tokens_trained": 4096 * step}
        return {"type": "eval.finished", "level": "info", "message": "evaluated", "data": data}

    between = [evaluation("between", step) for step in range(20, num_steps, 20)]
    return [evaluation("before", 0), *between, evaluation("after", num_steps)]


def make_token(text, id, student, teacher, *, trained=True):
    return {
        "text": text,
        "id": id,
        "student_logprob": student,
        "teacher_logprob": teacher,
        "version": 3,
        "trained": trained,
    }


def make_samples(noise):
    return [make_sample(noise, step, reward=float(step > 60)) for step in (1, 2, 3, 60, 118, 119, 120)]


def make_sample(noise, step, *, reward):
    text = "We add the ones :\n 2 + 9 = 11 , carry 1 .\n Then the tens : 1 + 0 + 1 = 2 .\n Answer : 21"
    words = re.findall(r"\S+\n?", text)
    tokens = []
    for index, word in enumerate(words):
        student = -noise.expovariate(2.0)
        teacher = student + noise.gauss(-0.6, 1.6) * (0.25 if step > 60 else 1.0)
        tokens.append(make_token(word if index == 0 else f" {word}", 100 + index, student, min(-0.001, teacher)))
    if reward:
        tokens.append(make_token("<|im_end|>", 2, -0.02, -0.01))
    else:
        tokens[-1] = make_token(" 20", 120, -1.1, -6.2)
    tokens[0] = make_token("We", 100, -0.1, None, trained=False)
    prompt = "What is 12 + 9? Write your steps, then the answer."
    return {"step": step, "prompt_id": f"train-{step}", "prompt": prompt, "answer": "21", "reward": reward,
            "finish_reason": "stop" if reward else "length", "tokens": tokens}  # fmt: skip


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(HTMLParser):
    """What a browser would see: its elements, and its text without style sheets."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self._chunks, self._hidden = [], [], [], False
        self.feed(source)
        self.text = " ".join(" ".join(self._chunks).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(name for name, _ in attrs)
        self._hidden = tag == "style"

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self._chunks.append(data)


def page_of(folder):
    write_report(folder)
    return Page((folder / "report.html").read_text())


def test_the_headline_says_what_was_achieved_in_the_numbers_of_the_report(tmp_path):
    text = page_of(make_run(tmp_path / "run")).text
    assert "The student’s held-out accuracy rose from 12.5% to 71.3%." in text
    assert "The teacher scores 95.3%: the student closed 71% of the gap." in text
    assert "Supervised training of the same student on 491,520 tokens reached 41.2%." in text
    assert "fell from 0.871 to 0.093 nats per token" in text
    assert "120 steps, 491,520 trained tokens and 14 min 3 s" in text


def test_every_number_of_report_json_stands_in_the_page_unrounded(tmp_path):
    source = page_of(make_run(tmp_path / "run")).text
    for name, value in flatten(REPORT):
        assert f"{name} {value}" in source


def test_the_four_figures_are_written_as_png_and_drawn_in_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    page = page_of(folder)
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "accuracy.png",
        "length.png",
        "reverse_kl.png",
        "time.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert page.tags.count("svg") == 4


def test_the_page_of_an_empty_folder_says_not_measured_and_no_zero(tmp_path):
    text = page_of(tmp_path).text
    assert "The run never started: its folder holds no status." in text
    assert text.count("not measured") >= 5
    assert "0%" not in text
    assert not list(tmp_path.glob("*.png"))


def test_any_value_of_the_report_may_be_absent_or_null(tmp_path):
    run = read_folder(make_run(tmp_path / "run", num_steps=2, samples=[], control=False))
    for absent in REPORT:
        without = {key: value for key, value in REPORT.items() if key != absent}
        assert "The student’s" in Page(render(replace(run, report=without), None, {})).text
        assert "The student’s" in Page(render(replace(run, report={**REPORT, absent: None}), None, {})).text


def test_a_report_of_nulls_reads_like_an_absent_one(tmp_path):
    page = page_of(make_run(tmp_path / "run", report=dict.fromkeys(REPORT), num_steps=2, control=False))
    assert "The student’s accuracy was not measured." in page.text
    assert "wall time not measured" in page.text
    assert page.text.count("not measured") >= 10


def test_a_missing_teacher_is_said_to_be_missing_and_has_no_dot(tmp_path):
    report = {key: value for key, value in REPORT.items() if key not in {"teacher", "sft_control"}}
    page = page_of(make_run(tmp_path / "run", report=report, control=False))
    assert "teacher not measured student before 12.5% student after 71.3%" in page.text
    assert "SFT control" not in page.text


def test_a_failed_run_has_a_page_that_begins_with_the_reason(tmp_path):
    error = {"type": "NonFinite", "category": "system", "message": f"loss is NaN {NASTY}"}
    page = page_of(make_unfinished(tmp_path / "run", status="failed", error=error))
    assert page.text.startswith("run · potstill potstill · run The run failed after step 7 of 120: loss is NaN")
    assert f"loss is NaN {NASTY} It has no result." in page.text
    assert "error NonFinite, a problem of the system" in page.text
    assert "img" not in page.tags


@pytest.mark.parametrize("status", ["failed", "cancelled", "running"])
def test_what_a_run_without_a_result_had_recorded_is_shown_and_is_no_result(tmp_path, status):
    page = page_of(make_unfinished(tmp_path / "run", status=status))
    assert "It has no result." in page.text
    assert f"status {status}" in page.text
    assert "last step after step 7 of 120 loss tokens trained 28,672" in page.text
    assert page.tags.count("svg") == 4
    for claim in ("student after", "The student’s", "chance", "95% interval", "wall time"):
        assert claim not in page.text


def test_a_run_whose_control_failed_keeps_its_result_and_says_so(tmp_path):
    report = {key: value for key, value in REPORT.items() if key != "sft_control"}
    folder = make_run(tmp_path / "run", report=report)
    write_json(folder / "sft_control" / "status.json", {"status": "failed", "error": DIED})
    page = page_of(folder)
    assert "The student’s held-out accuracy rose from 12.5% to 71.3%." in page.text
    assert "The supervised control failed after step 1: the learner's process died" in page.text
    assert "SFT control" not in page.text


def test_a_bad_ending_leaves_the_page_and_raises_what_ended_the_run(tmp_path):
    folder = make_unfinished(tmp_path / "run", status="failed", error=DIED)
    with pytest.raises(RunError, match="the learner's"), page_of_a_bad_ending(folder):
        raise RunError("the learner's process died")
    assert "The run failed after step 7" in (folder / "report.html").read_text()


def test_a_page_that_cannot_be_written_does_not_hide_what_ended_the_run(tmp_path):
    with pytest.raises(KeyboardInterrupt), page_of_a_bad_ending(tmp_path / "nowhere"):
        raise KeyboardInterrupt


def test_a_good_ending_leaves_the_page_to_its_own_report(tmp_path):
    with page_of_a_bad_ending(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_a_model_or_a_config_wrote_becomes_markup(tmp_path):
    token = {**make_token(NASTY, 7, -1.0, -2.0), "id": '"><script>', "version": NASTY}
    sample = {"step": 1, "prompt_id": NASTY, "prompt": NASTY, "answer": NASTY, "reward": 0.0, "finish_reason": "stop",
              "tokens": [token]}  # fmt: skip
    folder = make_run(tmp_path / "run", samples=[sample], report={"run_id": NASTY, "metric": NASTY, "method": NASTY,
                      "seconds_by_phase": {NASTY: 1.0, "$\\frac$": 2.0}, NASTY: NASTY})  # fmt: skip
    write_json(folder / "config.json", {NASTY: {"a": NASTY}})
    page = page_of(folder)
    assert not {"img", "script", "iframe", "link"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.text.count(NASTY) >= 8  # readable, every one of them


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    write_report(make_run(tmp_path / "run"))
    source = (tmp_path / "run" / "report.html").read_text()
    outside = set(re.findall(r"(?:src|href)=\"(?!#)[^\"]*|url\((?!#)[^)]*|@import[^;]*", source))
    assert outside == set()
    assert "default-src 'none'" in source


def test_ids_are_unique_on_the_page_and_every_reference_finds_its_own(tmp_path):
    write_report(make_run(tmp_path / "run"))
    source = (tmp_path / "run" / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', source)
    references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', source))
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in references} <= set(ids)


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    folder = make_run(tmp_path / "run", num_steps=5)
    write_report(folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    write_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == first


def test_a_step_without_a_number_leaves_no_point():
    records = [
        {"step": 1, "reverse_kl": 0.5},
        {"step": 2, "reverse_kl": None},
        {"step": 3},
        {"step": 4, "reverse_kl": 0},
    ]
    assert series(records, "step", "reverse_kl") == plots.Series(x=[1.0, 4.0], y=[0.5, 0.0])


@pytest.mark.parametrize(
    ("difference", "name"),
    [(None, "unscored"), (0.0, "even"), (-0.24, "even"), (0.25, "plus-1"), (-0.7, "minus-2"), (-40.0, "minus-5")],
)
def test_a_token_is_shaded_by_the_difference_and_its_sign(difference, name):
    assert heatmap.shade(difference) == name


def test_a_token_says_both_logprobs_and_a_missing_one_is_not_zero():
    record = {"tokens": [make_token("\n", 5, -0.5, -2.0), make_token("", 6, -0.5, None, trained=False)]}
    newline, empty = heatmap.read_sample(record).cells
    assert (newline.text, newline.shade) == ("↵\n", "minus-3")
    assert newline.title == (
        "teacher −2.000 · student −0.500 · difference −1.500 nats · id 5 · written by version 3 · trained on"
    )
    assert (empty.text, empty.shade, empty.trained) == ("⟨6⟩", "unscored", False)
    assert empty.title.startswith("teacher not measured · student −0.500 · no difference")


def test_tokens_that_were_scored_together_are_compared_as_the_chunk_that_they_are():
    scored = [("ab", -0.5, -1.0, 0), ("cd", -1.5, -1.0, 0), ("ef", -0.5, None, -1), ("gh", -0.5, -0.5, 1)]
    tokens = [make_token(text, 1, own, teacher) | {"chunk": chunk} for text, own, teacher, chunk in scored]
    first, second, unscored, alone = heatmap.read_sample({"tokens": tokens}).cells
    for cell in (first, second):
        together = "2 tokens that were scored together · teacher −1.000 · student −2.000 · difference +1.000 nats"
        assert (cell.title.split(" · id")[0], cell.shade) == (together, "plus-3")
    assert (unscored.shade, alone.shade) == ("unscored", "even")
    assert alone.title.startswith("teacher −0.500 · student −0.500")


@pytest.mark.parametrize(
    ("reward", "verdict"),
    [
        (1.0, "✓ correct"),
        (0.0, "× wrong"),
        (0.25, "scored 0.25 of 1"),
        (None, "not graded"),
        (float("nan"), "not graded"),
    ],
)
def test_a_rollout_is_called_what_its_reward_says(reward, verdict):
    assert heatmap.read_sample({"reward": reward}).verdict == verdict


def test_a_long_rollout_is_cut_and_says_how_much_is_hidden():
    sample = heatmap.read_sample({"tokens": [make_token("a", 1, -1.0, -1.0)] * (heatmap.MAX_TOKENS + 3)})
    assert (len(sample.cells), sample.num_hidden) == (heatmap.MAX_TOKENS, 3)


def test_the_first_and_the_last_rollouts_are_chosen():
    assert heatmap.choose(list(range(10))) == [0, 1, 2, 7, 8, 9]
    assert heatmap.choose([1, 2]) == [1, 2]


def test_a_step_that_was_done_again_is_drawn_once(tmp_path):
    run = make_run(tmp_path / "run", num_steps=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"step": step, "reverse_kl": 0.5}) + "\n" for step in (3, 4)))
    assert list(series(read_folder(run).metrics, "step", "reverse_kl").x) == [1, 2, 3, 4]


def test_labels_that_would_overlap_are_moved_apart_and_the_others_stay():
    assert plots.spread([0.1, 0.5, 0.52], 0.1) == pytest.approx([0.1, 0.5, 0.6])


def test_the_running_mean_is_the_mean_of_the_neighbours():
    values = [float(n * n % 17) for n in range(100)]
    smooth = plots.running_mean(plots.Series(x=range(100), y=values)).y
    assert smooth[50] == pytest.approx(sum(values[48:53]) / 5)
    assert smooth[0] == pytest.approx(sum(values[:3]) / 3)
