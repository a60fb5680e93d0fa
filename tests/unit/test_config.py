"""A config is strict about names, values and contradictions, and says in one line what to write instead."""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from potstill import config as config_module
from potstill.algebra import aggregations, corrections, gates, losses, objective, supports, targets
from potstill.algebra.objective import Objective
from potstill.config import RunConfig, SamplingConfig
from potstill.config_file import load, parse, read_mapping
from potstill.errors import ConfigError
from potstill.methods import PRESETS
from potstill.section import Section

ROOT = Path(__file__).parents[2]
ROOMS = ("potstill", "orchestrator", "rollout_worker", "teacher_server", "learner")
TOML = """
name = "one"
method = "gkd_topk"
[objective]
support.k = 8
[student]
model = "models/s"
[teacher]
kind = "server"
model = "models/t"
[data]
kind = "reasoning_gym"
dataset = "chain_sum"
[data.options]
min_terms = 2
[rollout]
prompts_per_step = 4
[rollout.sampling]
max_new_tokens = 8
[optim]
lr = 1e-4
betas = [0.9, 0.99]
[loop]
steps = 3
"""


def raw(*, method: str = "sft", teacher: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> Any:
    """The smallest mapping that is a config, unless said otherwise."""
    return {
        "name": "one",
        "method": method,
        "student": {"model": "models/s"},
        "teacher": teacher or {"kind": "none"},
        "data": data or {"kind": "jsonl", "path": "data.jsonl"},
        "rollout": {"source": "reference", "prompts_per_step": 1, "sampling": {"max_new_tokens": 4}},
        "optim": {"lr": 1e-4},
        "loop": {"steps": 3},
    }


def full(*, teacher: str = "server", data: str = "reasoning_gym") -> dict[str, Any]:
    """Every key that a config can have, at every depth, for these kinds of teacher and data."""
    teachers = {
        "server": {"kind": "server", "model": "t"},
        "self": {"kind": "self", "privileged_template": "{prompt}"},
        "none": {"kind": "none"},
    }
    kinds = {"reasoning_gym": {"kind": "reasoning_gym", "dataset": "d"}, "jsonl": {"kind": "jsonl", "path": "p"}}
    base = raw(teacher=teachers[teacher], data=kinds[data])
    base["student"]["lora"] = {"rank": 4, "alpha": 8.0}
    return parse(base).model_dump(mode="json")


def key_paths(table: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict) and key != "options":  # its keys are the data set's
            yield from key_paths(value, (*above, key))


FULL = [full(teacher=teacher) for teacher in ("server", "self", "none")] + [full(data="jsonl")]
PATHS = [(table, path) for table in FULL for path in key_paths(table)]


def complaint(mapping: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(mapping, overrides)
    return str(caught.value)


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """A full config in which one character of one key was changed, dropped or doubled; the key's path; its old name."""
    table, path = draw(st.sampled_from(PATHS))
    table, name = deepcopy(table), path[-1]
    place = table
    for part in path[:-1]:
        place = place[part]
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    wrong = draw(
        st.sampled_from(
            [name[:at] + letter + name[at + 1 :], name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:]]
        )
    )
    if wrong in place or not wrong:
        wrong = name + "_x"
    place[wrong] = place.pop(name)
    return table, (*path[:-1], wrong), name


@given(misspelt())
def test_every_misspelt_key_at_any_depth_gives_one_line_that_names_the_real_one(case: Any):
    table, path, name = case
    said = complaint(table)
    assert said.count("\n") == 0
    if name == "kind" and path[0] != "objective":  # without it nobody knows which keys are real
        assert said == f"{path[0]}: the table names no kind"
        return
    where, _, advice = said.partition(": ")
    assert where == ".".join(path)
    assert advice.startswith("no such setting; ")
    assert name in advice.replace("'", " ").replace(",", " ").split()


def test_a_misspelt_key_names_its_nearest_neighbour():
    assert complaint(raw(), "optim.warmup_step=3") == "optim.warmup_step: no such setting; did you mean 'warmup_steps'?"


def test_a_name_like_no_other_gets_the_list_of_all():
    said = complaint(raw(), "checkpoint.zzz=3")
    assert said == "checkpoint.zzz: no such setting; known: every, keep"


def test_an_unknown_method_names_the_nearest():
    assert complaint(raw(method="opsdd")) == "method 'opsdd' is not known; did you mean 'opsd' or 'opsd_jsd'?"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("loop.steps=many", "loop.steps"),
        ("loop.steps=-1", "loop.steps"),
        ("loop.steps=1.5", "loop.steps"),
        ("optim.lr=0", "optim.lr"),
        ("optim.lr=inf", "optim.lr"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.betas=[0.9]", "optim.betas.1"),
        ("optim=3", "optim"),
        ("objective=opd", "objective"),
        ("method=[opd]", "method"),
        ("student.model=[a]", "student.model"),
        ("rollout.engine=tgi", "rollout.engine"),
        ("rollout.sampling.top_p=0", "rollout.sampling.top_p"),
        ("teacher.kind=oracle", "teacher"),
        ("name=Not_a_name", "name"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(override: str, where: str):
    said = complaint(raw(), override)
    assert said.startswith(f"{where}: ")
    assert "\n" not in said


def test_two_mistakes_are_two_lines():
    lines = complaint(raw(), "loop.steps=many", "optim.lr=0").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["loop.steps", "optim.lr"]


def test_a_missing_method_is_said_once():
    mapping = raw()
    del mapping["method"]
    assert complaint(mapping) == "method: Field required"


def test_toml_yaml_and_json_give_the_same_config(tmp_path: Path):
    (tmp_path / "a.toml").write_text(TOML)
    mapping = read_mapping(tmp_path / "a.toml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(mapping))
    (tmp_path / "a.json").write_text(json.dumps(mapping))
    from_toml, from_yaml, from_json = (load(tmp_path / f"a.{kind}") for kind in ("toml", "yaml", "json"))
    assert from_toml == from_yaml == from_json
    assert from_toml.data.options == {"min_terms": 2}


def test_overrides_reach_numbers_lists_tables_and_texts(tmp_path: Path):
    (tmp_path / "a.toml").write_text(TOML)
    changes = [
        "optim.lr=3e-5",
        "optim.betas=[0.8, 0.9]",
        "rollout.sampling.max_new_tokens=99",
        "student.lora={rank: 2, alpha: 4}",
        "student.lora.alpha=16",
        "data.options.max_terms=7",
        "teacher.privileged_template={prompt} Hint: {answer}",
        "eval.items=5",
    ]
    changed = load(tmp_path / "a.toml", changes)
    assert changed.optim.lr == 3e-5
    assert changed.optim.betas == (0.8, 0.9)
    assert changed.rollout.sampling.max_new_tokens == 99
    assert changed.student.lora is not None
    assert (changed.student.lora.rank, changed.student.lora.alpha) == (2, 16.0)
    assert changed.data.options == {"min_terms": 2, "max_terms": 7}
    assert changed.teacher.privileged_template == "{prompt} Hint: {answer}"
    assert changed.eval.items == 5


def test_overrides_leave_the_mapping_that_they_were_given():
    mapping = raw()
    parse(mapping, ["optim.lr=1", "eval.items=3"])
    assert mapping == raw()


@pytest.mark.parametrize("override", ["optim.lr", "=3", "loop.steps.x=3"])
def test_an_override_that_cannot_be_laid_over_says_so(override: str):
    assert complaint(raw(), override).startswith(f"override {override!r}: ")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", b"name = \n", "line 1"),
        ("a.yaml", b"a: [1\n", "line 2"),
        ("a.json", b'{"a": }', "line 1"),
        ("a.toml", b"name = \xff", "decode"),
        ("a.json", b"[1]", "not a list"),
        ("a.ini", b"", "ends in .toml, .yaml, .yml, .json"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_is_frozen_to_its_leaves():
    config = parse(raw())
    for table, field in ((config, "seed"), (config.optim, "lr"), (config.rollout.sampling, "top_k")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, field, 1)


@pytest.mark.parametrize("table", FULL, ids=["server", "self", "none", "jsonl"])
def test_a_resolved_config_comes_back_from_json_as_it_was(table: dict[str, Any]):
    config = parse(table)
    assert parse(json.loads(config.model_dump_json())) == config


def test_the_objective_is_the_preset_with_the_files_changes():
    plain = parse(raw(method="gkd_topk"))
    changed = parse(raw(method="gkd_topk"), ["objective.support.k=4", "objective.aggregation=sequence_mean"])
    assert plain.objective == PRESETS["gkd_topk"].objective
    preset = PRESETS["gkd_topk"].objective.model_dump()
    expected = {**preset, "support": {**preset["support"], "k": 4}, "aggregation": "sequence_mean"}
    assert changed.objective == Objective(**expected)


def test_a_part_of_another_kind_replaces_the_presets_and_one_of_the_same_kind_changes_it():
    other = parse(raw(method="gkd_topk"), ["objective.loss.kind=forward_kl"]).objective.loss
    same = parse(raw(method="gkd_topk"), ["objective.loss.beta=0.2"]).objective.loss
    assert other.model_dump() == {"kind": "forward_kl", "pointwise_clip": None, "zero_sum": False}
    assert same.model_dump() == {"kind": "jsd", "beta": 0.2}


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("opd", "objective.support.k=null", "objective.support.k: "),
        ("opd_sampled", "objective.support.k=4", "objective.support.k: no such setting"),
        ("opd", "objective.loss.beta=0.5", "objective.loss.beta: no such setting"),
        ("gkd", "objective.loss.beta=2", "objective.loss: loss.beta lies in [0, 1]"),
        ("opd", "objective.correction=clipped", 'objective: correction "clipped" needs the sign of an advantage'),
        ("opd_sampled", "objective.loss=forward_kl", 'objective: loss "forward_kl" compares distributions'),
        ("opd", "objective.loss=likelihood", 'objective: loss "likelihood" is of the written tokens'),
        ("opd", "objective.target=taid", 'objective: target "taid" needs support "full"'),
        ("gkd", "objective.loss=jsdd", "objective.loss: kind 'jsdd' is not known; did you mean 'jsd'?"),
        ("opd", "objective.gates=[evidence]", 'objective: gate "evidence" scales a reward'),
        ("gkd", "objective.loss={kind: forward_kl, zero_sum: true}", "loss.zero_sum says how"),
        ("sft", "objective.auxiliaries.kl={loss: k2}", "objective.auxiliaries.kl: loss "),
        ("opd", "objective.weight={start: 1, end: 0, from_step: 5, to_step: 5}", "objective.weight"),
    ],
)
def test_a_contradictory_objective_is_refused_with_its_field_and_the_way_out(method: str, change: str, says: str):
    assert says in complaint(raw(method=method), change)


@pytest.mark.parametrize("source", [{}, {"url": "http://127.0.0.1:1", "model": "t"}])
def test_a_server_teacher_has_one_source(source: dict[str, str]):
    assert "exactly one of teacher.url" in complaint(raw(teacher={"kind": "server", **source}))


def test_a_key_is_never_part_of_a_config():
    teacher = {"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "sk-12345"}
    assert complaint(raw(teacher=teacher)).startswith("teacher.secret_ref: ")


def sections() -> list[type[Section]]:
    modules = (config_module, aggregations, corrections, gates, losses, objective, supports, targets)
    found = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    ]
    return [section for section in found if section is not Section]


def holds_sections(annotation: Any) -> bool:
    own = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return own or any(holds_sections(part) for part in get_args(annotation))


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_setting_is_described(section: type[Section]):
    assert section.__doc__
    for name, field in section.model_fields.items():
        if name != "kind" and not holds_sections(field.annotation):  # these are described by the section itself
            assert field.description, f"{section.__name__}.{name}"


def test_every_default_that_changes_a_number_lives_in_the_config_alone():
    """No function elsewhere takes a setting by its name and has a value of its own for when it is left out."""
    numbers = {
        name
        for section in sections()
        for name, field in section.model_fields.items()
        if isinstance(field.default, int | float) and name not in {"seed", "deadline_s"}
    }
    assert {"temperature", "top_p", "max_staleness", "max_grad_norm"} <= numbers
    assert [found for room in ROOMS for file in (ROOT / room).glob("*.py") for found in _defaults(file, numbers)] == []


def _defaults(file: Path, names: set[str]) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            with_default = positional[len(positional) - len(node.args.defaults) :]
            with_default += [
                argument
                for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                if default is not None
            ]
            found += [f"{file.name}: {node.name}({a.arg}=…)" for a in with_default if a.arg in names]
    return found


def test_sampling_has_no_length_of_its_own():
    with pytest.raises(ValidationError):
        SamplingConfig()  # type: ignore[call-arg]


def test_a_run_config_names_every_choice():
    required = {name for name, field in RunConfig.model_fields.items() if field.is_required()}
    assert required == {"name", "method", "objective", "student", "teacher", "data", "rollout", "optim", "loop"}
