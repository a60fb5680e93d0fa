"""Each alarm sounds on the run that it is for, and on no healthy one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.alarms import RULES, Alarm, Alarms, Rule, watch
from potstill.config import RunConfig
from potstill.config_alarms import AlarmsConfig
from potstill.config_file import parse
from potstill.errors import ConfigError

Step = dict[str, float]
Change = Callable[[float], float]

STEPS = 60
TURN = 30  # the step after which a run that falls ill does
NAMES = [rule.name for rule in RULES]


def healthy() -> Iterator[tuple[int, Step]]:
    """A student that learns: it nears its teacher in 60 steps, grows by half, and is a version or two behind."""
    noise = random.Random(0)

    def about(value: float) -> float:
        return value * noise.uniform(0.8, 1.25)

    for step in range(1, STEPS + 1):
        left = math.exp(-step / 20)
        yield (
            step,
            {
                "completion_tokens": about(200 + 100 * (1 - left)),
                "truncated_fraction": about(0.05 + 0.2 * left),
                "repetition_p90": about(2.7),
                "entropy": about(0.1 + 0.4 * left),
                "teacher_entropy": about(0.15),
                "captured_mass": 1 - about(0.01),
                "captured_mass_teacher": 1 - about(0.02 + 0.2 * left),
                "overlap": 1 - about(0.1 + 0.3 * left),
                "reverse_kl": about(0.05 + 0.8 * left),
                "unscored_fraction": about(0.002),
                "sampler_gap": about(0.008),
                "staleness_kl": about(0.004),
                "staleness_mean": about(1.2),
                "staleness_max": 2.0,
            },
        )


def falling_ill(**changes: Change) -> Iterator[tuple[int, Step]]:
    """The same until TURN; then each metric named is what `changes` makes of the steps since."""
    for step, metrics in healthy():
        if step > TURN:
            metrics |= {name: change(float(step - TURN)) for name, change in changes.items()}
        yield step, metrics


ILLNESSES: dict[str, dict[str, Change]] = {
    "length": {"completion_tokens": lambda since: 250 * 1.15**since},
    "truncation": {"truncated_fraction": lambda since: min(1.0, 0.1 + 0.05 * since)},
    "repetition": {"repetition_p90": lambda since: 2.5 * 1.2**since},
    "entropy": {"entropy": lambda since: 0.1 * 0.8**since},
    "entropy_drop": {"entropy": lambda since: 0.1 * 0.6**since, "teacher_entropy": lambda _: math.nan},
    "captured_mass": {"captured_mass": lambda since: 0.98**since},
    "captured_mass_teacher": {"captured_mass_teacher": lambda since: 0.95**since},
    "overlap": {"overlap": lambda since: 0.9**since},
    "staleness": {"staleness_kl": lambda since: 0.004 * 1.3**since},
    "sampler_gap": {"sampler_gap": lambda _: 0.3},  # an engine that missed a version
    "teacher_gap": {"reverse_kl": lambda since: 0.3 * 1.2**since},
    "unscored": {"unscored_fraction": lambda _: 0.04},
}


def heard(run: Iterator[tuple[int, Step]], alarms: Alarms | None = None, **config: Any) -> list[Alarm]:
    alarms = alarms or Alarms(AlarmsConfig.model_validate(config))
    return [alarm for step, metrics in run for alarm in alarms.look(step, metrics)]


def test_no_alarm_sounds_on_a_healthy_run() -> None:
    assert heard(healthy()) == []


def test_every_alarm_has_settings_and_a_case_here() -> None:
    assert {*NAMES, "beginning"} == AlarmsConfig.model_fields.keys()
    assert set(NAMES) == ILLNESSES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_alarm_sounds_once_where_its_run_falls_ill_and_no_other_does(name: str) -> None:
    (alarm,) = heard(falling_ill(**ILLNESSES[name]))
    assert (alarm.name, alarm.action, alarm.level) == (name, "warn", "warn")
    assert TURN + 3 <= alarm.step <= TURN + 25
    assert f"{alarm.value:.4g}" in alarm.message
    assert f"{alarm.bound:.4g}" in alarm.message


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_falls_ill_is_healthy_to_every_other_alarm(name: str) -> None:
    assert heard(falling_ill(**ILLNESSES[name]), **{name: {"action": "off"}}) == []


@pytest.mark.parametrize("action", ["warn", "pause", "stop"])
@pytest.mark.parametrize("name", NAMES)
def test_every_alarm_can_warn_pause_or_stop(name: str, action: str) -> None:
    (alarm,) = heard(falling_ill(**ILLNESSES[name]), **{name: {"action": action}})
    assert alarm.action == action
    assert alarm.level == ("warn" if action == "warn" else "error")


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_missing_rings_no_alarm(name: str) -> None:
    (rule,) = (rule for rule in RULES if rule.name == name)
    changes = {**ILLNESSES[name], rule.metric: lambda _: math.nan}
    assert heard(falling_ill(**changes)) == []


def test_an_infinite_number_is_no_missing_one() -> None:
    assert [alarm.name for alarm in heard(falling_ill(reverse_kl=lambda _: math.inf))] == ["teacher_gap"]


def test_one_odd_batch_is_no_alarm_and_steps_in_a_row_are_what_patience_counts() -> None:
    odd = {"unscored_fraction": lambda since: 0.04 if since % 3 else 0.0}  # two of three
    assert heard(falling_ill(**odd)) == []
    assert heard(falling_ill(**odd), unscored={"patience": 2})[0].step == TURN + 2


def test_an_alarm_sounds_again_only_after_it_was_quiet() -> None:
    relapse = {"unscored_fraction": lambda since: 0.0 if since == 10 else 0.04}
    assert [alarm.step for alarm in heard(falling_ill(**relapse))] == [TURN + 3, TURN + 13]


def test_a_message_says_number_bound_meaning_and_what_to_do() -> None:
    (alarm,) = heard(falling_ill(completion_tokens=lambda _: 900.0), length={"patience": 1})
    assert alarm.message.startswith(f"completion_tokens is 900, above {alarm.bound:.4g} (2 × beginning): ")
    assert "answers inflate" in alarm.message
    assert "optim.lr" in alarm.message


def test_a_run_is_measured_against_the_median_of_its_own_beginning() -> None:
    lengths = [100.0, 900.0, 100.0, 100.0, 190.0, 210.0]
    run = ((step, {"completion_tokens": n, "staleness_mean": 0.0}) for step, n in enumerate(lengths, start=1))
    (alarm,) = heard(run, beginning=3, length={"patience": 1})
    assert (alarm.step, alarm.value, alarm.bound) == (6, 210.0, 200.0)


def test_the_more_versions_the_text_is_behind_the_further_the_student_may_have_moved() -> None:
    def run(age: float) -> list[Alarm]:
        return heard(falling_ill(staleness_kl=lambda _: 0.05, staleness_max=lambda _: age))

    assert [alarm.name for alarm in run(2.0)] == ["staleness"]
    assert run(3.0) == []


def test_text_that_the_student_did_not_write_says_nothing_of_it() -> None:
    """A supervised run from random weights: its entropy falls a thousandfold, and that is what it is for."""
    steps = ((step, {"entropy": 5.6 * 0.8**step, "completion_tokens": 10.0 * step}) for step in range(1, STEPS))
    assert heard(steps) == []


def test_the_alarms_that_a_step_leaves_without_a_voice_are_named_with_the_metric() -> None:
    alarms = Alarms(AlarmsConfig.model_validate({"overlap": {"action": "off"}}), {"staleness": "nothing is stale"})
    _, metrics = next(healthy())
    del metrics["teacher_entropy"], metrics["overlap"]
    metrics["repetition_p90"] = math.nan
    assert alarms.silent(metrics) == {
        "staleness": "nothing is stale",
        "entropy": "teacher_entropy was not measured",
        "repetition": "repetition_p90 was not measured",
    }


@pytest.mark.parametrize("interrupted", [4, 20, TURN + 2])
def test_a_resumed_run_hears_what_an_undisturbed_one_does(interrupted: int) -> None:
    """Before and after its beginning is known, and in the middle of its patience."""
    run = list(falling_ill(**ILLNESSES["unscored"], **ILLNESSES["length"]))
    first, second = Alarms(AlarmsConfig()), Alarms(AlarmsConfig())
    before = heard(iter(run[:interrupted]), first)
    second.load(json.loads(json.dumps(first.state())))
    assert before + heard(iter(run[interrupted:]), second) == heard(iter(run))


def test_a_run_that_is_resumed_after_an_alarm_has_its_patience_again() -> None:
    run = list(falling_ill(**ILLNESSES["unscored"]))
    paused, resumed = Alarms(AlarmsConfig()), Alarms(AlarmsConfig())
    assert len(heard(iter(run[: TURN + 3]), paused)) == 1
    resumed.load(paused.state())
    assert [alarm.step for alarm in heard(iter(run[TURN + 3 :]), resumed)] == [TURN + 6]


def test_an_alarm_that_is_switched_on_for_a_resumed_run_begins_then() -> None:
    without, everything = Alarms(AlarmsConfig.model_validate({"length": {"action": "off"}})), Alarms(AlarmsConfig())
    everything.load(without.state())
    assert heard(healthy(), everything) == []


def config(**changes: Any) -> RunConfig:
    return parse(
        {
            "name": "watched",
            "method": "opd",
            "student": {"model": "unused"},
            "teacher": {"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "env:TEACHER_KEY"},
            "data": {"kind": "jsonl", "path": "unused"},
            "rollout": {"prompts_per_step": 1, "sampling": {"max_new_tokens": 1, **changes.get("sampling", {})}},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 1, **changes.get("loop", {})},
            "alarms": changes.get("alarms", {}),
        }
    )


@pytest.mark.parametrize(
    ("changes", "mute"),
    [
        ({"loop": {"max_staleness": 2}}, set()),
        ({}, {"staleness"}),
        ({"sampling": {"temperature": 0.7}, "loop": {"max_staleness": 2}}, {"staleness", "sampler_gap"}),
        ({"sampling": {"top_p": 0.9}}, {"staleness", "sampler_gap"}),
    ],
)
def test_an_alarm_without_a_meaning_in_a_run_is_mute_and_says_so(changes: dict[str, Any], mute: set[str]) -> None:
    alarms = watch(config(**changes))
    _, metrics = next(healthy())
    assert alarms.silent(metrics).keys() == mute
    ill = falling_ill(**ILLNESSES["staleness"], **ILLNESSES["sampler_gap"])
    assert {alarm.name for alarm in heard(ill, alarms)} == {"staleness", "sampler_gap"} - mute


def test_a_table_of_the_config_changes_one_setting_and_keeps_the_others() -> None:
    length = config(alarms={"length": {"action": "pause"}}).alarms.length
    assert (length.action, length.threshold, length.patience) == ("pause", 2.0, 3)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_page_of_alarms_has_each_with_its_defaults(rule: Rule) -> None:
    page = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text()
    times = {None: "", "beginning": " × beginning"}.get(rule.times, f" × `{rule.times}`")
    threshold = getattr(AlarmsConfig(), rule.name).threshold
    assert f"| `{rule.name}` | `{rule.metric}` | {rule.side} {threshold:g}{times} |" in page


@pytest.mark.parametrize(
    ("alarms", "named"),
    [
        ({"lenght": {}}, "lenght"),
        ({"length": {"action": "kill"}}, "action"),
        ({"length": {"threshold": 1.0}}, "threshold"),
        ({"truncation": {"threshold": 50}}, "threshold"),
        ({"unscored": {"patience": 0}}, "patience"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(alarms: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(alarms=alarms)
