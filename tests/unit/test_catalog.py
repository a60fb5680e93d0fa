"""What a submitted run may name: nothing that its schema calls a folder, a URL or a secret gets past the catalog."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.service.catalog import Catalog
from orchestrator.service.principals import Principal
from orchestrator.service.store.files import File, new_file_id
from orchestrator.service.store.runs import NewRun
from potstill.config import RunConfig
from potstill.config_file import apply_override
from potstill.errors import ConfigError, ServiceError
from potstill.references import references
from tests import catalogs
from tests.catalogs import allowed, body, once, principal, watched

ANNA, BEN = principal("anna"), principal("ben")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return catalogs.furnish(tmp_path)


@pytest.fixture
def catalog(folder: Path) -> Iterator[Catalog]:
    with catalogs.catalog(folder) as opened:
        yield opened


def lines(catalog: Catalog, raw: dict[str, Any], who: Principal = ANNA) -> list[str]:
    return catalogs.lines(catalog, raw, who)


# Names that are something here


def test_names_become_places_and_nothing_else_changes(catalog: Catalog, folder: Path) -> None:
    config = catalog.resolve(body(student__model="org/large", data__path="more/code.jsonl"), ANNA)
    assert config.student.model == str(folder / "models/org/large")
    assert config.data.path == str(folder / "data/more/code.jsonl")
    assert config.runs == str(folder / "runs")
    again = body(student__model=config.student.model, data__path=config.data.path, runs=config.runs)
    assert config == RunConfig.model_validate(again)


def test_places_are_absolute_wherever_the_service_was_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    here = {name: Path(name) for name in ("uploads", "published", "runs", "secrets")}
    with catalogs.catalog(folder, models=[Path("models")], data=[Path("data")], **here) as catalog:
        config = catalog.resolve(body(data__path=uploaded(catalog, folder, ANNA)), ANNA)
    assert config.student.model == str(folder / "models/small")
    assert Path(config.data.path).parent == folder / "uploads"
    assert config.runs == str(folder / "runs")


def test_a_link_inside_the_root_is_followed_to_its_end(catalog: Catalog, folder: Path) -> None:
    assert catalog.resolve(body(student__model="alias"), ANNA).student.model == str(folder / "models/small")


def test_a_published_checkpoint_is_a_model(catalog: Catalog, folder: Path) -> None:
    assert catalog.resolve(body(student__model="mine"), ANNA).student.model == str(folder / "published/mine")


def test_what_there_is_can_be_listed(catalog: Catalog) -> None:
    assert catalog.models() == ["alias", "mine", "org/large", "small"]
    assert catalog.datasets() == ["maths.jsonl", "more/code.jsonl"]


def test_the_nearest_name_is_told(catalog: Catalog) -> None:
    assert lines(catalog, body(student__model="smal", data__path="math.jsonl")) == [
        "student.model: no model 'smal' is here; did you mean 'small'?",
        "data.path: no file 'math.jsonl' is here; did you mean 'maths.jsonl' or 'more/code.jsonl'?",
    ]


def test_only_some_of_many_names_are_told(folder: Path) -> None:
    for index in range(40):
        catalogs.model(folder / f"models/m{index:02}")
    with catalogs.catalog(folder) as catalog:
        (line,) = lines(catalog, body(student__model="zzz"))
    assert line.count(",") <= 12
    assert line.endswith("…")


def test_a_name_may_be_published_that_no_model_has(catalog: Catalog) -> None:
    catalog.check_new_model("new-1.0")
    for name, status in (("small", 409), ("alias", 409), ("..", 400), ("a/b", 400), ("run", 400), ("", 400)):
        with pytest.raises(ServiceError) as caught:
            catalog.check_new_model(name)
        assert caught.value.status == status


# Names that lead elsewhere

HOSTILE = [
    *("", ".", "..", "...", "../outside/secret", "small/../../outside/secret", "small/..", "small/.", "./small"),
    *("/etc/passwd", "//etc", "/", "//", "small/", "/small", "small//config.json", "org//large", "~", "~root", "~/x"),
    *("small\0", "\0", "small\0.jsonl", "small\n", "\nsmall", "small\r", " small", "small ", "small\t", "sm all"),
    *("small%2e%2e", "%2e%2e/outside/secret", "..%2foutside", "%2fetc%2fpasswd", "small%00", "..%c0%af..", "%"),
    *("..\\outside\\secret", "\\", "small\\config.json", "C:\\x", "C:/x", "\\\\host\\share", "file:small"),
    *("file:///etc/passwd", "http://127.0.0.1/x", "hf://x", "s3://b/x", "small#", "small?x", "small@main", "small:x"),
    *("$HOME", "${HOME}", "`id`", "$(id)", "small;id", "small|id", "small&", "-rf", "--", "*", "sm?ll", "{small}"),
    *("．．/outside/secret", "‥/outside", "․․/outside", "small／config.json", "ﬁle", "ѕmall", "ｓmall", "small\u200b"),
    *(".hidden", "small/.hidden", ".small", "org/.large", "..small", "small..", "a..b", "_small", "\u202esmall"),
    *("out", "out/", "out/config.json", "up", "up/outside/secret", "up/models", "small/config.json", "org"),
    *("run/one/step-1", "run/../step-1", "run/one/../../outside", "run/one/step-1/..", "run/one", "run", "run//step-1"),
    *("run/one/step-1/model", "RUN/one/step-1", "run/one/step--1", "run/one/step-1\n", "file-", "file-../x", "file-0"),
    *("file-0000000000000000", "file-" + "0" * 28, "FILE-" + "0" * 28, "\ud800", "a" * 129, "a/" * 5 + "a", "a" * 5000),
    *("con", "NUL", "small.", "out.jsonl", "maths.jsonl/", "maths", "/proc/self/environ", "/dev/stdin", "nul\0l"),
]
PLACES = {
    "student.model": {},
    "data.path": {},
    "rollout.snapshot": {"rollout.source": "snapshot"},
    "teacher.model": {"teacher": {"kind": "server"}},
    "teacher.tokenizer": {"teacher": {"kind": "server", "model": "small"}},
    "teacher.models.0.model": {"teacher": {"kind": "local"}},
    "teacher.members.a.teacher.model": {"teacher": {"kind": "several"}},
}


def naming(place: str, name: str) -> dict[str, Any]:
    """A config with the name in one place."""
    raw = body(**PLACES[place])
    if place == "teacher.models.0.model":
        raw["teacher"]["models"] = [{"model": name}]
    elif place.startswith("teacher.members"):
        tables = [{"kind": "server", "model": model} for model in (name, "small")]
        raw["teacher"]["members"] = {key: {"teacher": one} for key, one in zip("ab", tables, strict=True)}
    else:
        apply_override(raw, place, name)
    return raw


def test_the_list_of_hostile_names_is_long_and_has_none_twice() -> None:
    assert len(HOSTILE) == len(set(HOSTILE)) >= 100


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_name_is_refused_by_its_key_and_nothing_outside_is_opened(
    catalog: Catalog, folder: Path, place: str
) -> None:
    for name in HOSTILE:
        with watched() as opened:
            (line,) = lines(catalog, naming(place, name))
        assert line.startswith(f"{place}: "), name
        assert str(folder) not in line
        assert [path for path in opened if not path.startswith(allowed(folder))] == []


@pytest.mark.parametrize("place", PLACES)
def test_the_same_places_take_a_good_name(catalog: Catalog, place: str) -> None:
    good = "maths.jsonl" if place == "data.path" else "small"
    found = {reference.key: reference.value for reference in references(catalog.resolve(naming(place, good), ANNA))}
    assert found[place].endswith(f"/{good}")


PARTS = st.sampled_from(["..", ".", "/", "\\", "%2e", "%2f", "\0", "small", "out", "up", "outside", "secret", "~", "#"])


@given(st.lists(PARTS | st.text(max_size=4), max_size=8).map("".join) | st.text(max_size=40))
@example("up/outside/secret")
@example("up/models/small")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_name_is_it_leads_nowhere_outside(catalog: Catalog, folder: Path, name: str) -> None:
    with watched() as opened:
        try:
            config = catalog.resolve(body(student__model=name), ANNA)
        except ConfigError as error:
            assert str(error).startswith("student.model: ")  # noqa: PT017  every refusal begins with the key
        else:
            assert Path(config.student.model).is_relative_to(folder / "models")
    assert [path for path in opened if not path.startswith(allowed(folder))] == []


# What is never a client's


def test_runs_may_not_be_set(catalog: Catalog) -> None:
    assert lines(catalog, body(runs="elsewhere"))[0].startswith("runs: ")


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        (
            {"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "env:HOME", "replicas": ["http://10.0.0.1"]},
            ["teacher.url", "teacher.replicas.0", "teacher.secret_ref"],
        ),
        ({"kind": "vllm", "url": "http://127.0.0.1:1", "model": "m"}, ["teacher.url"]),
        ({"kind": "vllm", "url": "", "model": "m", "secret_ref": "file:/x"}, ["teacher.url", "teacher.secret_ref"]),
        ({"kind": "completions", "url": "https://x.example", "model": "m", "context_length": 9}, ["teacher.url"]),
        (
            {"kind": "openai", "url": "https://x.example", "model": "m", "answers": "/etc/cron.d/x"},
            ["teacher.url", "teacher.answers"],
        ),
        (
            {"kind": "self", "privileged_template": "{advice}", "advisor": {"url": "http://x", "model": "m"}},
            ["teacher.advisor.url"],
        ),
        (
            {
                "kind": "several",
                "members": {
                    "a": {"teacher": {"kind": "vllm", "url": "http://x", "model": "m"}},
                    "b": {"teacher": {"kind": "server", "model": "small"}},
                },
            },
            ["teacher.members.a.teacher.url"],
        ),
    ],
)  # fmt: skip
def test_urls_secrets_and_files_that_a_run_writes_are_never_a_clients(
    catalog: Catalog, table: dict[str, Any], keys: list[str]
) -> None:
    assert [line.partition(": ")[0] for line in lines(catalog, body(teacher=table))] == keys


@pytest.mark.parametrize("port", [1, 80, 65535])
def test_a_run_listens_on_no_port_of_its_clients_choice(catalog: Catalog, port: int) -> None:
    assert lines(catalog, body(loop__metrics_port=port)) == [
        "loop.metrics_port: over HTTP only 0, any free port, or none"
    ]
    for harmless in (0, None):
        assert catalog.resolve(body(loop__metrics_port=harmless), ANNA).loop.metrics_port == harmless


@pytest.mark.parametrize("option", ["data_file", "path", "FILE", "word_path", "url", "some_dir"])
def test_an_option_of_a_task_names_no_file(catalog: Catalog, option: str) -> None:
    """One of reasoning-gym's data sets reads its words from a file that an option names."""
    task = {"kind": "reasoning_gym", "dataset": "spell_backward", "options": {option: "/etc/passwd"}}
    assert lines(catalog, body(data=task))[0].startswith(f"data.options: {option}: ")
    task["options"] = {"min_word_len": 3, "operators": ["+", "/"]}
    assert catalog.resolve(body(data=task), ANNA).data.options["min_word_len"] == 3


@pytest.mark.parametrize(
    ("sink", "table"),
    [
        ("wandb", {"project": "p", "mode": "offline"}),
        ("wandb", {"project": "p", "secret_ref": "env:HOME", "url": "http://127.0.0.1"}),
        ("mlflow", {"tracking_uri": "file:///etc/x"}),
        ("trackio", {"project": "p", "folder": "/etc"}),
    ],
)
def test_nobody_outside_is_told_of_a_submitted_run(catalog: Catalog, sink: str, table: dict[str, Any]) -> None:
    (line,) = lines(catalog, body(sinks={sink: table}))
    assert line.startswith(f"sinks.{sink}: ")
    assert catalog.resolve(body(sinks={"tensorboard": {}}), ANNA).sinks.tensorboard is not None
    for folder in ("..", "../x", "/x", "a/../../x", ".x"):
        assert lines(catalog, body(sinks={"tensorboard": {"folder": folder}}))[0].startswith(
            "sinks.tensorboard.folder: "
        )


def test_a_config_that_is_nested_without_end_is_refused(catalog: Catalog) -> None:
    deep: Any = {}
    for _ in range(20_000):
        deep = {"x": deep}
    assert lines(catalog, body(teacher=deep)) == ["the config is nested too deeply"]


# Files that were uploaded


def uploaded(catalog: Catalog, folder: Path, who: Principal) -> str:
    file = File(
        id=new_file_id("0" * 64), owner=who.owner, key_id=who.key_id, filename="../x", purpose="prompts",
        format="jsonl", bytes=1, sha256="0" * 64, rows=1, columns=["prompt"], created_at=1.0,
    )  # fmt: skip
    catalogs.prompts(folder / "uploads" / file.id)
    return catalog._store.files.add(file, once(who=who), who.limits)[0].id


def test_an_uploaded_file_is_its_owners_to_name(catalog: Catalog, folder: Path) -> None:
    name = uploaded(catalog, folder, ANNA)
    assert catalog.resolve(body(data__path=name), ANNA).data.path == str(folder / "uploads" / name)
    assert lines(catalog, body(data__path=name), BEN)[0].startswith(
        f"data.path: no file {name!r} is here; known: maths.jsonl"
    )


def test_a_run_reads_what_was_made_of_a_file_where_that_is_another(catalog: Catalog, folder: Path) -> None:
    name = uploaded(catalog, folder, ANNA)
    catalogs.prompts(folder / "uploads" / f"{name}.jsonl")
    assert catalog.resolve(body(data__path=name), ANNA).data.path == str(folder / "uploads" / f"{name}.jsonl")


# Checkpoints of one's own runs


def test_a_checkpoint_is_named_by_the_owner_of_its_run(catalog: Catalog, folder: Path) -> None:
    config = catalog.resolve(body(), ANNA).model_dump(mode="json")
    new = NewRun(id="one", submitted=body(), config=config, owner="anna")
    catalog._store.runs.create(new, once("/v1/runs", ANNA))
    checkpoint = folder / "runs/one/checkpoints/step-000003"
    catalogs.model(checkpoint / "model")
    files = {f"model/{path.name}": path.read_bytes() for path in (checkpoint / "model").iterdir()}
    told = {name: {"sha256": sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 3, "files": told}))
    name = "run/one/step-000003"
    assert catalog.resolve(body(student__model=name), ANNA).student.model == str(checkpoint / "model")
    assert lines(catalog, body(student__model=name), BEN) == ["student.model: there is no such run"]
    assert "no such checkpoint" in lines(catalog, body(student__model="run/one/step-000004"))[0]


# Checked before it is stored


def test_a_plan_is_made_of_what_was_resolved(catalog: Catalog) -> None:
    assert catalog.check(catalog.resolve(body(), ANNA))["student_parameters"] == 1


@pytest.mark.parametrize("place", [place for place in PLACES if place != "data.path"])
def test_a_model_that_nobody_should_load_is_refused_by_its_key(catalog: Catalog, folder: Path, place: str) -> None:
    evil = catalogs.model(folder / "models/evil")
    (evil / "modeling.py").write_text("raise SystemExit")
    config = catalog.resolve(naming(place, "evil"), ANNA)
    with pytest.raises(ConfigError) as caught:
        catalog.check(config)
    assert str(caught.value).startswith(f"{place}: modeling.py is code")
    assert str(folder) not in str(caught.value)
