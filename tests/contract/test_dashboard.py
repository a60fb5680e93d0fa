"""The dashboard over HTTP: who gets in, what every page is made of, and what it shows of runs, teachers and recipes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from random import Random

import httpx2
import pytest
import sqlalchemy as sa

from orchestrator.reporting import Report
from orchestrator.service.app import create_app
from orchestrator.service.dashboard.signing_in import WRONG_KEYS, local
from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.schema import RUNS
from tests.launchers import AwayLauncher
from tests.plain import PLAIN
from tests.services import Service, serving
from tests.shown_runs import STEPS, sample, shown, token

NASTY = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\u202egnp.exe\u200b"
SHOWN = "&lt;img src=x onerror=alert(1)&gt;&lt;/script&gt;&lt;script&gt;alert(2)&lt;/script&gt;⟨U+202E⟩gnp.exe⟨U+200B⟩"
TABS = ("", "/events", "/timeline", "/samples", "/checkpoints", "/config", "/logs")
PAGES = ("/", "/compare", "/teachers", "/submit")
PROBED = {
    "problems": [],
    "notes": ["it claims a top-k of 256 and gives 128"],
    "claims": {"model": "big", "revision": "r1", "tier": 3, "context_length": 4096, "vocabulary": 1000},
    "tier": "TOPK",
    "measured": {"noise": 0.002},
    "max_top_k": 128,
    "latency_ms": 38.2,
}


class Page(HTMLParser):
    """What a browser would build: elements, attributes, text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._chunks: list[str] = []
        self.feed(source)
        self.words = " ".join(" ".join(self._chunks).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._chunks.append(data)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Its cluster is away, so that runs stay as they were stored."""
    with serving(tmp_path_factory.mktemp("dashboard"), lambda _url: AwayLauncher()) as running:
        store, runs = running.store, running.folder / "runs"
        nobody = {"owner": "ana", "key_id": "0" * 12}
        hostile = {**sample(Random(0), 1, right=False), "prompt": NASTY, "hint": "only for teachers"}
        hostile["tokens"] = [token(NASTY, 7, -1.0, -2.5), token("ok", 8, -0.1, None, trained=False)]
        shown(store, runs, name="done", state=State.SUCCEEDED, step=120, **nobody)
        shown(store, runs, name="broken", state=State.FAILED, step=2, ago_s=60, **nobody)
        shown(store, runs, name="queued", **nobody)
        shown(
            store, runs, name="hostile", state=State.RUNNING, step=3, notes=NASTY, metadata={NASTY: NASTY},
            message=NASTY, samples=[hostile], **nobody,
        )  # fmt: skip
        once = Once(key_id="0" * 12, key=None, route="/v1/teachers", body_digest="x")
        store.teachers.add("fine", {"kind": "server", "url": "https://teacher.example"}, once)
        store.teachers.probed("fine", PROBED, revision=1)
        store.teachers.add("new", {"kind": "openai", "model": NASTY}, once)
        yield running


@contextmanager
def signed_in(service: Service, key: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, trust_env=False, verify=PLAIN, timeout=30.0) as client:
        assert client.post("/login", json={"key": key}).status_code == 204
        yield client


@pytest.fixture(scope="module")
def ana(service: Service) -> Iterator[httpx2.Client]:
    with signed_in(service, service.key_for("ana", Scope.RUNS_READ, Scope.RUNS_WRITE)) as client:
        yield client


def page_of(client: httpx2.Client, path: str, status: int = 200) -> str:
    response = client.get(path)
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("text/html")
    return response.text


# Who gets in


def test_a_key_becomes_a_cookie_that_no_script_and_no_other_site_can_use(service: Service):
    answer = service.http.post("/login", json={"key": service.key})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/" in cookie
    assert "secure" not in cookie  # over http it would not come back
    assert service.key not in answer.headers["set-cookie"]


async def test_over_https_the_cookie_is_secure(service: Service):
    transport = httpx2.ASGITransport(app=create_app(service.state))
    async with httpx2.AsyncClient(transport=transport, base_url="https://127.0.0.1") as client:
        answer = await client.post("/login", json={"key": service.key})
    assert "secure" in answer.headers["set-cookie"].lower()


def test_signing_out_ends_the_session_itself(service: Service):
    with signed_in(service, service.key) as client:
        secret = client.cookies["potstill_session"]
        assert client.get("/").status_code == 200
        assert client.post("/logout", json={}).status_code == 200
        assert "potstill_session" not in client.cookies
        assert client.get("/", headers={"cookie": f"potstill_session={secret}"}).status_code == 303


def test_an_address_that_guesses_keys_has_to_wait(tmp_path):
    with (
        serving(tmp_path, lambda _url: AwayLauncher()) as running,
        httpx2.Client(base_url=running.url, trust_env=False, verify=PLAIN) as guesser,
    ):
        answers = [guesser.post("/login", json={"key": f"guess {n}"}) for n in range(WRONG_KEYS)]
        assert {answer.status_code for answer in answers} == {401}
        refused = guesser.post("/login", json={"key": running.key})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_attempts")


@pytest.mark.parametrize("path", [*PAGES, *(f"/runs/done{tab}" for tab in TABS)])
def test_whoever_has_not_signed_in_is_sent_to_the_door_and_back(service: Service, path: str):
    with httpx2.Client(base_url=service.url, trust_env=False, verify=PLAIN) as stranger:
        sent = stranger.get(path)
        assert sent.status_code == 303
        assert sent.headers["location"] == "/login?" + str(httpx2.QueryParams({"next": path}))
        live = stranger.get(path, headers={"hx-request": "true"})
        assert (live.status_code, live.headers["hx-redirect"]) == (401, sent.headers["location"])
        assert "done" not in Page(stranger.get(path, follow_redirects=True).text).words


def test_a_link_on_another_site_asks_again_as_a_page_of_this_one(service: Service):
    with httpx2.Client(base_url=service.url, trust_env=False, verify=PLAIN) as stranger:
        again = stranger.get("/runs/done?x=%22%3E", headers={"sec-fetch-site": "cross-site"})
        assert again.status_code == 200
        assert '<meta http-equiv="refresh" content="0; url=/runs/done?x=%22%3E">' in again.text
        assert "step" not in again.text


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("/runs/a?b=c", "/runs/a?b=c"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("javascript:alert(1)", "/"),
        ("/\tevil", "/"),
        ("", "/"),
    ],
)
def test_after_signing_in_one_stays_on_this_site(address: str, where: str):
    assert local(address) == where


# What pages are made of


@pytest.mark.parametrize(
    "path", [*PAGES, *(f"/runs/{run}{tab}" for run in ("done", "hostile", "queued") for tab in TABS)]
)
def test_no_page_has_script_or_style_of_its_own_or_asks_another_host(ana: httpx2.Client, path: str):
    response = ana.get(path)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    for tag, attributes in Page(response.text).elements:
        assert tag not in {"style", "iframe", "object", "base"}
        assert not [name for name in attributes if name == "style" or name.startswith(("on", "hx-on"))]
        assert tag != "script" or (attributes["src"] or "").startswith("/static/")
        for name in ("src", "href", "action", "hx-get"):
            assert (attributes.get(name) or "/").startswith(("/", "#")), (tag, attributes)


@pytest.mark.parametrize("path", ["/", "/login", "/nowhere", "/static/page.js", "/v1/runs", "/livez"])
def test_every_answer_carries_the_policy(ana: httpx2.Client, path: str):
    headers = ana.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'self'; base-uri 'none'; form-action 'self'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_files_are_kept_for_good_under_the_digest_of_what_is_in_them(ana: httpx2.Client):
    files = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page_of(ana, "/runs/done")))
    assert len(files) >= 8
    for file in files:
        answer = ana.get(file)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert ana.get("/static/api.js").headers["cache-control"] == "no-cache"
    assert ana.get("/static/../pages.py").status_code == 404
    assert ana.get("/static/%2e%2e/pages.py").status_code == 404


@pytest.mark.parametrize("tab", ["", "/events", "/samples"])
def test_what_models_and_people_wrote_stays_text(ana: httpx2.Client, tab: str):
    source = page_of(ana, f"/runs/hostile{tab}")
    assert SHOWN in source
    assert "img" not in {tag for tag, _ in Page(source).elements}


def test_what_a_run_reports_cannot_leave_an_attribute(service: Service, ana: httpx2.Client):
    seq = service.store.events.reported("hostile")["events"] + 1
    told = [{"step": "'\"><img src=x>", "accuracy": 0.5}, {"step": 2, "accuracy": NASTY}, {"step": 2, "accuracy": 0.25}]
    events = [
        {"seq": seq + n, "time": 1.0, "type": "eval.finished", "level": "info", "message": "evaluated", "data": data}
        for n, data in enumerate(told)
    ]
    service.store.runs.report("hostile", Report.model_validate({"events": events}))
    elements = Page(page_of(ana, "/runs/hostile")).elements
    assert "img" not in {tag for tag, _ in elements}
    assert [one["data-held-out"] for _, one in elements if "data-held-out" in one] == ["[[[0.0, 0.125], [2.0, 0.25]]]"]


def test_the_report_of_a_run_can_neither_run_nor_ask_for_anything(service: Service, ana: httpx2.Client):
    assert "The run has left no report, or not yet." in page_of(ana, "/runs/hostile/report", 404)
    (service.folder / "runs" / "done" / "report.html").write_text("<script>alert(1)</script>")
    assert 'href="/runs/done/report"' in page_of(ana, "/runs/done")
    answer = ana.get("/runs/done/report")
    assert answer.text == "<script>alert(1)</script>"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.endswith("sandbox")


def test_what_a_teacher_alone_was_shown_needs_its_scope(service: Service, ana: httpx2.Client):
    assert "lacks the scope samples:privileged" in page_of(ana, "/runs/hostile/samples")
    seeing = service.key_for("ana", Scope.RUNS_READ, Scope.SAMPLES_PRIVILEGED)
    with signed_in(service, seeing) as client:
        assert "samples:privileged" not in page_of(client, "/runs/hostile/samples")


# What they show


def test_the_table_says_who_when_how_far_and_how_well(ana: httpx2.Client):
    words = Page(page_of(ana, "/")).words
    assert f"done opd · warm-student-1b ← qwen3-32b succeeded 120 / {STEPS}" in words
    assert re.search(r"broken .* failed 2 / 600 0\.\d{3} \d+\.\d% \d+ min ago ana", words)
    assert "queued opd · warm-student-1b ← qwen3-32b queued 0 / 600 – – just now ana" in words


def test_filters_and_a_part_of_a_name_choose_runs(ana: httpx2.Client):
    assert "/runs/broken" in page_of(ana, "/?show=failed")
    assert "/runs/done" not in page_of(ana, "/?show=failed")
    assert "/runs/done" in page_of(ana, "/?named=on")
    assert "/runs/queued" not in page_of(ana, "/?named=on")
    assert "No run is like that." in page_of(ana, "/?named=100%25")
    assert "The filters are all, active" in page_of(ana, "/?show=nonsense", 400)


def test_ten_thousand_runs_come_in_pages(tmp_path):
    with serving(tmp_path, lambda _url: AwayLauncher()) as running:
        shown(running.store, running.folder / "runs", name="first", owner="operator", key_id="0" * 12)
        with running.store.database.writing() as db:
            row = dict(db.execute(sa.select(RUNS)).one()._mapping)
            del row["number"]
            many = (
                {**row, "id": f"run-{n:05d}", "submission_id": f"job-{n}", "status": "succeeded"} for n in range(9999)
            )
            db.execute(RUNS.insert(), list(many))
        with signed_in(running, running.key) as client:
            newest = page_of(client, "/")
            assert len(re.findall(r'<tr id="run-', newest)) == 50
            assert len(newest) < 60_000
            older = re.search(r'href="(/\?[^"]*after=run-09949[^"]*)"', newest)
            assert older is not None
            assert "/runs/run-09948" in page_of(client, older[1].replace("&amp;", "&"))
            assert "/runs/first" in page_of(client, "/?show=waiting")


def test_a_service_without_runs_says_what_to_do(tmp_path):
    with serving(tmp_path, lambda _url: AwayLauncher()) as running:
        with signed_in(running, running.key) as client:
            assert "There is no run yet." in page_of(client, "/")
            assert 'href="/submit"' in page_of(client, "/")
            assert "No teacher is registered yet." in page_of(client, "/teachers")
            assert "Nothing to compare yet." in page_of(client, "/compare")
        with signed_in(running, running.key_for("guest", Scope.RUNS_READ)) as guest:
            assert "one with the scope runs:write submits them" in page_of(guest, "/")


def test_a_run_that_has_not_begun_says_when_there_will_be_something(ana: httpx2.Client):
    for tab, said in zip(
        TABS,
        (
            "No step is done yet.", "the run is stored", "Nobody has worked yet.", "No rollouts were kept.",
            "There is no checkpoint yet.", "[student]", "There are no logs yet.",
        ),
        strict=True,
    ):  # fmt: skip
        assert said in page_of(ana, f"/runs/queued{tab}"), tab


def test_a_failed_run_says_why_and_what_to_do(ana: httpx2.Client):
    words = Page(page_of(ana, "/runs/broken")).words
    assert "TeacherUnavailable : teacher qwen3-32b: no answer within 600 s" in words
    assert "see that it answers, then retry the run" in words
    assert "Retry" in words
    assert "Pause" not in words


@pytest.mark.parametrize(
    ("run", "buttons"),
    [
        ("done", {"fork", "delete"}),
        ("hostile", {"pause", "fork", "cancel", "note"}),
        ("queued", {"pause", "fork", "cancel", "note"}),
    ],
)
def test_a_run_has_the_buttons_that_its_state_allows(ana: httpx2.Client, run: str, buttons: set[str]):
    elements = [attributes for tag, attributes in Page(page_of(ana, f"/runs/{run}")).elements if tag == "button"]
    opens = {one["data-opens"] for one in elements if "data-opens" in one}
    posts = {(one["data-post"] or "").rpartition("/")[2] for one in elements if "data-post" in one}
    assert opens | posts == buttons


def test_who_may_only_read_gets_no_buttons(service: Service):
    with signed_in(service, service.key_for("ana", Scope.RUNS_READ)) as reader:
        assert "data-opens" not in page_of(reader, "/runs/hostile")
        assert "that takes the scope runs:write" in page_of(reader, "/submit")


def test_another_owners_run_does_not_exist(service: Service):
    with signed_in(service, service.key_for("boris", Scope.RUNS_READ)) as boris:
        for tab in (*TABS, "/report"):
            assert "There is no such run." in page_of(boris, f"/runs/done{tab}", 404)
        assert "There is no such run." in page_of(boris, "/compare?runs=done", 404)
        assert "/runs/done" not in page_of(boris, "/")


def test_checkpoints_are_links_to_their_files(ana: httpx2.Client):
    source = page_of(ana, "/runs/done/checkpoints")
    address = "/v1/runs/done/checkpoints/step-000100/files/model/model.safetensors"
    assert f'href="{address}"' in source
    assert ana.get(address).content == b"\0" * 4096


def test_the_timeline_of_a_page_is_the_one_of_the_command(ana: httpx2.Client):
    source = page_of(ana, "/runs/done/timeline")
    assert "learner waited" in source
    assert source.count("<rect ") > 100
    assert "Show the whole run" not in source
    assert "nothing lies between" in page_of(ana, "/runs/done/timeline?from=9000", 400).lower()


def test_runs_are_compared_by_the_settings_that_differ(service: Service, ana: httpx2.Client):
    shown(service.store, service.folder / "runs", name="faster", step=3, state=State.RUNNING, lr=2e-3, owner="ana",
          key_id="0" * 12)  # fmt: skip
    words = Page(page_of(ana, "/compare?runs=done,faster&runs=done")).words
    assert re.search(
        r"Where they differ setting done faster optim.lr 0.0005 0.002 \d+ other settings are the same", words
    )


def test_a_teachers_card_shows_the_tiers_that_a_probe_saw(ana: httpx2.Client):
    source = page_of(ana, "/teachers")
    words = Page(source).words
    assert "T1 given tokens : given T2 its top-k : given T3 chosen ids : claimed T4 hidden states : lacking" in words
    assert "it claims a top-k of 256 and gives 128" in words
    assert "Not probed yet" in words
    assert SHOWN in source


def test_a_recipe_fills_the_form_and_a_text_becomes_json(ana: httpx2.Client):
    assert "method = &#34;opd&#34;" in page_of(ana, "/submit")
    assert "There is no such recipe." in page_of(ana, "/submit?recipe=none", 404)
    read = ana.post("/submit/read", json={"toml": 'name = "a"\n[optim]\nlr = 1e-4\n'})
    assert read.json() == {"name": "a", "optim": {"lr": 1e-4}}
    for text, said in (("a = ", "this is no TOML"), ("a = nan", "no nan or inf"), ("a = 2026-01-01", "no dates")):
        refused = ana.post("/submit/read", json={"toml": text})
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]


def test_times_are_relative_and_exact(ana: httpx2.Client):
    today = time.strftime("%Y-%m-%d", time.gmtime())
    times = [attributes for tag, attributes in Page(page_of(ana, "/")).elements if tag == "time"]
    assert times
    assert all(one["datetime"] == one["title"] and (one["title"] or "").endswith("Z") for one in times)
    assert any((one["title"] or "").startswith(today) for one in times)
