"""A child process is ready, or its parent knows why not; and it ends when it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from potstill import processes
from potstill.errors import ConfigError, WorkerLost
from potstill.processes import Child, start

READY = """print('{"event": "ready", "url": "http://here"}', flush=True)\n"""


async def begin(tmp_path: Path, script: str, *, timeout_s: float = 20.0, env: dict[str, str] | None = None) -> Child:
    """Start `script` as the module `child`."""
    (tmp_path / "child.py").write_text(script)
    env = {"PYTHONPATH": str(tmp_path), **(env or {})}
    return await start("helper", "child", ["--flag"], log=tmp_path / "child.log", env=env, timeout_s=timeout_s)


async def test_the_ready_line_is_found_among_other_lines(tmp_path: Path):
    child = await begin(tmp_path, "print('loading'); print('{odd')\n" + READY + "import time; time.sleep(60)")
    assert child.ready == {"event": "ready", "url": "http://here"}
    await child.stop()
    assert child.process.returncode == -signal.SIGTERM


async def test_arguments_and_environment_arrive_and_stderr_is_the_log(tmp_path: Path):
    script = "import os, sys; print(sys.argv[1:], os.environ['SECRET'], file=sys.stderr)\n" + READY + "sys.stdin.read()"
    child = await begin(tmp_path, script, env={"SECRET": "sesame"})
    await child.process.wait()  # its stdin is empty
    assert child.log.read_text() == "['--flag'] sesame\n"


async def test_the_child_has_a_session_of_its_own(tmp_path: Path):
    child = await begin(tmp_path, READY + "import time; time.sleep(60)")
    assert os.getsid(child.process.pid) == child.process.pid
    await child.stop()


async def test_exit_code_2_is_a_config_error_with_the_childs_last_line(tmp_path: Path):
    script = "import sys; print('first', file=sys.stderr)\n"
    script += "print('models/x: no such model folder', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ConfigError, match=r"^the helper did not start: models/x: no such model folder$"):
        await begin(tmp_path, script)


async def test_any_other_end_before_it_is_ready_is_a_lost_worker(tmp_path: Path):
    with pytest.raises(WorkerLost, match=r"^the helper did not start: ValueError: too hot$"):
        await begin(tmp_path, "raise ValueError('too hot')")


async def test_a_child_that_says_nothing_is_said_to_have_said_nothing(tmp_path: Path):
    with pytest.raises(WorkerLost, match="it said nothing"):
        await begin(tmp_path, "raise SystemExit(0)")


async def test_a_silent_child_is_stopped_and_lost_after_the_timeout(tmp_path: Path):
    script = (
        "import os, pathlib, time; pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    with pytest.raises(WorkerLost, match="was not ready after 2 s"):
        await begin(tmp_path, script, timeout_s=2.0)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_a_cancelled_start_leaves_no_child(tmp_path: Path):
    script = (
        "import os, pathlib, time; pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    starting = asyncio.create_task(begin(tmp_path, script))
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        await asyncio.sleep(0.02)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path):
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(60)"
    child = await begin(tmp_path, script)
    started = time.monotonic()
    await child.stop(grace_s=0.5)
    assert child.process.returncode == -signal.SIGKILL
    assert 0.5 <= time.monotonic() - started < processes.GRACE_S


async def test_an_unexpected_death_is_a_lost_worker(tmp_path: Path):
    child = await begin(tmp_path, READY + "import time; time.sleep(60)")
    watching = asyncio.create_task(child.died())
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match=r"the helper ended with exit code -9; its log is child\.log"):
        await asyncio.wait_for(watching, 10)


async def test_a_death_that_was_asked_for_is_none(tmp_path: Path):
    child = await begin(tmp_path, READY + "import time; time.sleep(60)")
    watching = asyncio.create_task(child.died())
    await child.stop()
    await child.stop()
    assert await asyncio.wait_for(watching, 10) is None
