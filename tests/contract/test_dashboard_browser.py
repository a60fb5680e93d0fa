"""The dashboard in a real browser: it lives, it can be used with keys alone, and no text and no other site moves it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from orchestrator.reporting import Report
from orchestrator.service.runs import State
from orchestrator.service.store.idempotency import Once
from tests.browser import DESKTOP, PHONE, Browser, browser
from tests.launchers import AwayLauncher
from tests.service_configs import submitted
from tests.services import Service, serving, until
from tests.shown_runs import sample, shown, token

NASTY = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "\u202egnp.exe\u200b",
]
TABS = ("", "/events", "/timeline", "/samples", "/checkpoints", "/config", "/logs")
EVERY_PAGE = ["/", "/compare?runs=done,live", "/teachers", "/submit", *(f"/runs/done{tab}" for tab in TABS)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Its cluster is away, so that runs do what a test says."""
    with serving(tmp_path_factory.mktemp("browsed"), lambda _url: AwayLauncher()) as running:
        store, runs = running.store, running.folder / "runs"
        mine = {"owner": "operator", "key_id": "0" * 12}
        shown(store, runs, name="done", state=State.SUCCEEDED, step=120, **mine)
        hostile = sample(Random(0), 1, right=False) | {"prompt": " ".join(NASTY), "prompt_id": NASTY[0]}
        hostile["tokens"] = [token(text, place, -1.0, -2.0) for place, text in enumerate(NASTY)]
        shown(
            store, runs, name="hostile", state=State.RUNNING, step=3, notes=" ".join(NASTY), message=" ".join(NASTY),
            metadata={NASTY[0]: NASTY[1]}, samples=[hostile], **mine,
        )  # fmt: skip
        shown(store, runs, name="live", state=State.RUNNING, step=60, **mine)
        shown(store, runs, name="z" * 63, state=State.FAILED, step=2, **mine)
        assert running.http.post("/v1/runs", json=submitted(name="parent")).status_code == 201
        once = Once(key_id="0" * 12, key=None, route="/v1/teachers", body_digest="x")
        store.teachers.add("nasty", {"kind": "openai", "model": NASTY[0]}, once)
        store.teachers.probed("nasty", {"problems": [NASTY[1]], "notes": [NASTY[2]]}, revision=1)
        yield running


@pytest.fixture(scope="module")
def seen(service: Service) -> Iterator[Browser]:
    """A browser that has signed in through the form."""
    with browser({"evil.test": "127.0.0.1"}) as chromium:
        chromium.sized(DESKTOP)
        chromium.get(f"{service.url}/login?next=%2Fteachers")
        chromium.find_element(By.NAME, "key").send_keys(service.key, Keys.ENTER)
        until(lambda: chromium.current_url == f"{service.url}/teachers")
        yield chromium


@pytest.fixture
def page(seen: Browser, service: Service) -> Iterator[Browser]:
    """The same browser; whatever the test did, nothing may have been refused by the policy, and no other host asked."""
    seen.sized(DESKTOP)
    seen.requested()
    seen.complaints()
    yield seen
    assert seen.complaints() == []
    asked = [address for address in seen.requested() if not address.startswith((f"{service.url}/", "chrome", "data:"))]
    assert asked == []


def ready(page: Browser, service: Service, path: str) -> None:
    """Open a page, and wait until its scripts have run and its curves are drawn."""
    page.get(service.url + path)
    scripted = "document.readyState === 'complete' && !!document.getElementById('theme').title"
    drawn = "[...document.querySelectorAll('.curve .plot')].every((plot) => plot.children.length)"
    until(lambda: page.answer(f"{scripted} && {drawn}"))


def text_of(page: Browser, selector: str) -> str:
    return str(page.answer(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))


def press(page: Browser, label: str) -> None:
    page.find_element(By.XPATH, f"//button[normalize-space()='{label}']").click()


# It lives


def test_the_table_follows_a_run_and_keeps_what_was_ticked(page: Browser, service: Service):
    ready(page, service, "/")
    assert "60 / 600" in text_of(page, "#run-live")
    page.find_element(By.CSS_SELECTOR, "#run-live input").click()
    report_step(service, "live", 61)
    until(lambda: "61 / 600" in text_of(page, "#run-live"))
    assert page.find_element(By.CSS_SELECTOR, "#run-live input").is_selected()


def test_a_run_that_is_watched_moves_with_its_events(page: Browser, service: Service):
    ready(page, service, "/runs/live")
    page.answer("(document.querySelector('.uplot').marked = true)")
    report_step(service, "live", 62, reverse_kl=0.01234)
    until(lambda: "step 62 of 600" in text_of(page, "#head"))
    until(lambda: "0.0123" in text_of(page, "[data-key=reverse_kl]"))
    assert "0.012" in text_of(page, ".figures-now")
    service.store.runs.move("live", State.WAITING_TEACHER, "the teacher does not answer")
    until(lambda: "waiting for teacher" in text_of(page, "#head [role=status]"))
    until(lambda: "the teacher does not answer" in text_of(page, ".events"))
    service.store.runs.move("live", State.RUNNING, "it answers again")


def test_the_page_of_a_queued_run_gains_its_curves_with_the_first_step(page: Browser, service: Service):
    shown(service.store, service.folder / "runs", name="early", owner="operator", key_id="0" * 12)
    ready(page, service, "/runs/early")
    assert "No step is done yet." in text_of(page, "#overview")
    service.store.runs.move("early", State.RUNNING, "it runs")
    report_step(service, "early", 1, seq=1, reverse_kl=0.5)
    until(lambda: page.answer("!!document.querySelector('#curves .uplot canvas')"))


def test_nothing_on_a_page_jumps_while_it_loads(page: Browser, service: Service):
    for path in EVERY_PAGE:
        ready(page, service, path)
        shifts = page.answer(
            "new Promise((done) => { let sum = 0; new PerformanceObserver((list) => { for (const shift of"
            " list.getEntries()) if (!shift.hadRecentInput) sum += shift.value; }).observe({ type: 'layout-shift',"
            " buffered: true }); setTimeout(() => done(sum), 150); })"
        )
        assert shifts < 0.05, path


# It acts


def test_a_run_is_cancelled_only_after_a_question(page: Browser, service: Service):
    shown(service.store, service.folder / "runs", name="tired", state=State.RUNNING, step=1, owner="operator",
          key_id="0" * 12)  # fmt: skip
    ready(page, service, "/runs/tired")
    press(page, "Cancel …")
    press(page, "Leave it")
    assert service.store.runs.get("tired").state is State.RUNNING
    press(page, "Cancel …")
    page.find_element(By.NAME, "reason").send_keys("enough")
    press(page, "Cancel the run")
    until(lambda: service.store.runs.get("tired").state is State.CANCELLING)
    until(lambda: "cancelling" in text_of(page, "#head [role=status]"))
    assert text_of(page, "#notice") == "tired is being cancelled."
    assert any("enough" in event.message for event in service.store.events.told("tired", limit=5))


def test_a_fork_opens_the_new_run_and_a_wrong_setting_is_said_in_its_place(page: Browser, service: Service):
    ready(page, service, "/runs/parent")
    press(page, "Fork …")
    form = page.find_element(By.CSS_SELECTOR, "#fork form")
    form.find_element(By.NAME, "name").send_keys("child")
    overrides = form.find_element(By.NAME, "overrides")
    overrides.send_keys("optim.lrr = 1e-3")
    press(page, "Fork")
    until(lambda: text_of(page, "#fork .problem"))
    assert "optim.lrr" in text_of(page, "#fork .problem")
    assert "did you mean" in text_of(page, "#fork .problem")
    overrides.clear()
    overrides.send_keys("optim.lr = 1e-3")
    press(page, "Fork")
    until(lambda: page.current_url == f"{service.url}/runs/child")
    assert service.store.runs.get("child").config["optim"]["lr"] == 1e-3
    assert "forked from parent" in text_of(page, "#head")
    assert any("400" in complaint for complaint in page.complaints())  # the refusal, and nothing else


def test_notes_and_priority_are_changed_in_their_place(page: Browser, service: Service):
    ready(page, service, "/runs/parent")
    press(page, "Edit")
    form = page.find_element(By.CSS_SELECTOR, "#note form")
    form.find_element(By.NAME, "notes").send_keys("for Thursday <b>")
    form.find_element(By.NAME, "priority").clear()
    form.find_element(By.NAME, "priority").send_keys("7")
    press(page, "Keep it")
    until(lambda: "for Thursday <b>" in text_of(page, "#overview .notes"))
    run = service.store.runs.get("parent")
    assert (run.notes, run.priority) == ("for Thursday <b>", 7)


def test_a_config_is_planned_before_it_can_be_sent(page: Browser, service: Service):
    ready(page, service, "/submit")
    write(page, "name = ")
    press(page, "Check and plan")
    until(lambda: "This is no TOML" in text_of(page, "#wrong"))
    write(page, CONFIG)
    press(page, "Check and plan")
    until(lambda: page.find_element(By.ID, "plan").is_displayed())
    assert "from-a-form" in text_of(page, "#planned")
    assert not service.store.runs.exists("from-a-form")
    press(page, "Submit the run")
    until(lambda: page.current_url == f"{service.url}/runs/from-a-form")
    assert service.store.runs.get("from-a-form").state is State.QUEUED
    assert any("400" in complaint for complaint in page.complaints())


CONFIG = """
name = "from-a-form"
method = "sft"
student = { model = "none" }
teacher = { kind = "none" }
data = { kind = "jsonl", path = "none.jsonl" }
rollout = { source = "reference", prompts_per_step = 1, sampling = { max_new_tokens = 4 } }
optim = { lr = 1e-4 }
loop = { steps = 3 }
"""


# It can be read and used by everybody


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_every_page_fits_a_phone(page: Browser, service: Service, path: str):
    page.sized(PHONE)
    ready(page, service, path)
    assert page.answer("document.documentElement.scrollWidth") <= PHONE[0]


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_everything_that_can_be_operated_has_a_name_and_shows_its_focus(page: Browser, service: Service, path: str):
    ready(page, service, path)
    nameless = (
        "[...document.querySelectorAll('a, button, input:not([type=hidden]), select, textarea')].filter((one) =>"
        " !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length))"
    )
    assert page.answer(f"{nameless}.map((one) => one.outerHTML)") == []
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.answer("document.activeElement.textContent") == "Skip to the content"
    assert page.answer("document.activeElement.getBoundingClientRect().top >= 0")
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.answer("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_token_tells_its_numbers_to_the_pointer_and_to_the_keys(page: Browser, service: Service):
    ready(page, service, "/runs/done/samples")
    first = page.find_element(By.CSS_SELECTOR, ".tokens span")
    page.answer("document.querySelector('.tokens span').focus()")
    told = text_of(page, "#reading")
    assert all(part in told for part in ("We", "teacher −", "student −", "written by version", "trained on"))
    first.send_keys(Keys.ARROW_RIGHT)
    assert "add" in text_of(page, "#reading b")
    assert "not trained on" in text_of(page, "#reading")
    page.switch_to.active_element.send_keys(Keys.END)
    assert text_of(page, "#reading b") == "<|im_end|>"
    assert page.answer("document.querySelectorAll('.tokens:first-of-type [tabindex=\"0\"]').length >= 1")


def test_the_chosen_colours_are_remembered(page: Browser, service: Service):
    page.prefers("light")
    ready(page, service, "/")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.answer(paper)
    page.find_element(By.ID, "theme").click()
    page.find_element(By.ID, "theme").click()
    dark = page.answer(paper)
    assert dark != light
    ready(page, service, "/teachers")
    assert page.answer(paper) == dark
    page.find_element(By.ID, "theme").click()
    assert page.answer(paper) == light
    page.prefers("dark")
    assert page.answer(paper) == dark


# Nothing moves it


@pytest.mark.parametrize("path", ["/", "/teachers", "/compare?runs=hostile", *(f"/runs/hostile{tab}" for tab in TABS)])
def test_hostile_text_is_shown_and_never_runs(page: Browser, service: Service, path: str):
    ready(page, service, path)
    with pytest.raises(NoAlertPresentException):
        _ = page.switch_to.alert.text
    assert page.answer("document.querySelectorAll('img, svg[onload], main script').length") == 0
    if path in {"/runs/hostile", "/runs/hostile/samples"}:
        said = text_of(page, "main")
        assert all(text in said for text in NASTY[:-1])
        assert "⟨U+202E⟩gnp.exe⟨U+200B⟩" in said


ATTACK = """
const run = SERVICE + "/v1/runs/live", post = { method: "POST", credentials: "include", body: "{}" };
const json = { "Content-Type": "application/json" };
const tries = {
  plain: () => fetch(run + "/cancel", { ...post, mode: "no-cors" }),
  json: () => fetch(run + "/cancel", { ...post, headers: json }),
  read: () => fetch(SERVICE + "/v1/runs", { credentials: "include" }).then((answer) => answer.text()),
};
return Promise.all(Object.entries(tries).map(async ([name, attempt]) => {
  try { const answer = await attempt(); return [name, typeof answer === "string" ? answer : answer.type]; }
  catch (error) { return [name, "refused"]; }
})).then(Object.fromEntries);
"""


@contextmanager
def another_site() -> Iterator[int]:
    """Somebody else's page, on a port of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title><form id=form method=post></form>")

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.test"])
def test_a_page_of_another_site_changes_nothing_and_reads_nothing(seen: Browser, service: Service, host: str):
    before = service.store.runs.get("live")
    with another_site() as port:
        seen.get(f"http://{host}:{port}/")
        found = seen.answer(f"(() => {{ {ATTACK.replace('SERVICE', json.dumps(service.url))} }})()")
        assert found["json"] == "refused"
        assert found["read"] == "refused"
        seen.execute_script(f"form.action = {json.dumps(service.url)} + '/v1/runs/live/cancel'; form.submit()")
        until(lambda: "error" in seen.find_element(By.TAG_NAME, "body").text)
        assert any(code in seen.page_source for code in ("origin_not_allowed", "content_type"))
    assert service.store.runs.get("live") == before


def test_a_name_that_is_pointed_here_afterwards_gets_no_answer(seen: Browser, service: Service):
    """What a page sees once its own name leads to the service: the same origin to a browser, another Host to us."""
    before = service.store.runs.get("live")
    rebound = service.url.replace("127.0.0.1", "evil.test")
    seen.get(rebound + "/v1/runs")
    assert "host_not_allowed" in seen.page_source
    found = seen.answer(
        "Promise.all([fetch('/v1/runs'), fetch('/v1/runs/live/cancel', { method: 'POST', headers: { 'Content-Type':"
        " 'application/json' }, body: '{}' }), fetch('/')]).then((answers) => answers.map((one) => one.status))"
    )
    assert found == [400, 400, 400]
    assert service.store.runs.get("live") == before


def test_another_site_cannot_put_a_page_into_a_frame(seen: Browser, service: Service):
    with another_site() as port:
        seen.get(f"http://127.0.0.1:{port}/")
        seen.complaints()
        framed = "const frame = document.createElement('iframe'); frame.src = arguments[0]; document.body.append(frame)"
        seen.execute_script(framed, service.url)
        assert until(lambda: [complaint for complaint in seen.complaints() if "frame" in complaint.lower()])


# What a run tells


def report_step(service: Service, run: str, step: int, seq: int | None = None, **values: float) -> None:
    numbers = {"loss": 0.1, "reverse_kl": 0.1, "accuracy": 0.5, "tokens_trained": 410.0 * step} | values
    record = {"seq": step if seq is None else seq, "time": 1.0, "step": step, **numbers}
    service.store.runs.report(run, Report.model_validate({"metrics": [record]}))


def write(page: Browser, text: str) -> None:
    field = "const field = document.getElementById('toml'); field.value = arguments[0];"
    page.execute_script(field + "field.dispatchEvent(new Event('input'))", text)
