"""A client in a process of its own: it is asked there, it can be ended there, and it finds nothing there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from potstill.calling.guard import LOOPBACK, Guard
from potstill.errors import SinkError
from potstill.sinks.feed import Feed
from potstill.sinks.process import ProcessSink, judge
from potstill.sinks.sink import Note, Rewind, SinkLost
from tests.sinks import CANARY, ending, facts_of, running, step, wait_until


def child(tmp_path: Path, body: str, **options: Any) -> ProcessSink:
    """A client whose process runs `body` with `answer(error)` and `lines` at hand."""
    script = (
        "import json, os, sys, time\n"
        "def answer(error=None): print(json.dumps({'error': error}), flush=True)\n"
        f"lines = iter(sys.stdin.readline, '')\n{body}"
    )
    return ProcessSink("wandb", {"project": "p"}, command=(sys.executable, "-c", script), **options)


def test_a_client_is_asked_in_its_process_and_its_refusals_are_answers(tmp_path: Path):
    sink = child(
        tmp_path,
        "for line in lines:\n"
        "    asked = json.loads(line)\n"
        "    open(os.environ['HOME'] + '/asked', 'a').write(asked['do'] + '\\n')\n"
        "    answer('HTTP 500' if asked['do'] == 'step' else None)\n"
        "    if asked['do'] == 'finish': break\n",
    )
    sink.open(facts_of(tmp_path))
    with pytest.raises(SinkError, match=r"^HTTP 500$"):
        sink.step(step(1, loss=1.0))
    sink.note(Note(step=1, time=0.0, level="warn", type="alarm.length", message="answers grow"))
    sink.rewind(Rewind(step=0, time=0.0))
    sink.finish(ending())
    assert (tmp_path / "sinks" / "asked").read_text().split() == ["open", "step", "note", "rewind", "finish"]


def test_a_client_that_dies_is_lost_with_its_last_words_and_without_its_secret(tmp_path: Path):
    sink = child(tmp_path, f"next(lines); answer(); next(lines); sys.exit('no such key: {CANARY}')", secret=CANARY)
    sink.open(facts_of(tmp_path))
    with pytest.raises(SinkLost, match=r"no such key: …$"):
        sink.step(step(1, loss=1.0))


def test_a_client_that_hangs_is_ended_with_everything_in_its_session(tmp_path: Path):
    body = (
        "import subprocess\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(os.environ['HOME'] + '/pids', 'w').write(f'{os.getpid()} {other.pid}')\n"
        "next(lines); answer(); time.sleep(600)\n"
    )
    sink = child(tmp_path, body)
    feed = Feed("wandb", sink, facts_of(tmp_path), capacity=10, abandon=sink.kill)
    feed.put(step(1, loss=1.0))
    wait_until(lambda: (tmp_path / "sinks" / "pids").exists())
    pids = [int(pid) for pid in (tmp_path / "sinks" / "pids").read_text().split()]
    feed.end(ending())
    feed.join(time.monotonic() + 0.2)
    wait_until(lambda: not any(running(pid) for pid in pids))
    assert list(feed.troubles()) == ["it was not done when the time for it was over (sinks.close_s)"]


def test_a_client_finds_no_variable_of_the_run_and_no_home_of_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    sink = child(tmp_path, "next(lines); answer(json.dumps(dict(os.environ)))")
    with pytest.raises(SinkError) as refused:
        sink.open(facts_of(tmp_path))
    found = json.loads(str(refused.value))
    assert CANARY not in found.values()
    assert found["HOME"] == str((tmp_path / "sinks").resolve())


def test_the_process_of_a_client_ends_with_the_run_that_was_killed(tmp_path: Path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.sinks import facts_of\n"
        "from tests.unit.test_sink_process import child\n"
        "sink = child(Path(sys.argv[1]), 'from potstill.processes import end_with_parent\\n'\n"
        "    'end_with_parent(os.getppid())\\nnext(lines); answer(); time.sleep(600)')\n"
        "sink.open(facts_of(Path(sys.argv[1]))); print(sink._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    wait_until(lambda: not running(int(done.stdout)))


def test_a_name_is_judged_by_what_it_resolves_to_when_a_client_is_about_to_call_it():
    async def metadata(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1", "169.254.169.254"]

    guard = Guard(LOOPBACK, resolve=metadata)
    guard.check("http://tracking.example:5000")
    with pytest.raises(SinkError, match=r"tracking\.example: 169\.254\.169\.254 is a metadata"):
        judge("http://tracking.example:5000", guard)
    judge("http://127.0.0.1:5000", Guard(LOOPBACK))
