"""One driver at a time, and nothing of an attempt that is over."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from potstill.errors import ConfigError, Fenced, RunError
from potstill.fencing import Fence, hold, newest_attempt, next_attempt

HOLDER = """
import sys, time
from pathlib import Path
from potstill.fencing import hold

with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that drives the run in `folder`."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_attempts_are_counted_from_one(tmp_path: Path) -> None:
    assert newest_attempt(tmp_path) == 0
    assert [next_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    assert newest_attempt(tmp_path) == 3


def test_no_two_callers_begin_the_same_attempt(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: next_attempt(tmp_path), range(40)))
    assert sorted(found) == list(range(1, 41))


def test_the_newest_attempt_passes_and_every_earlier_one_is_stopped(tmp_path: Path) -> None:
    first, second = Fence(tmp_path, next_attempt(tmp_path)), Fence(tmp_path, next_attempt(tmp_path))
    second.check()
    with pytest.raises(Fenced, match="attempt 2 has begun; this process belongs to 1"):
        first.check()


def test_a_fence_travels_and_its_error_too(tmp_path: Path) -> None:
    fence = pickle.loads(pickle.dumps(Fence(tmp_path, next_attempt(tmp_path))))  # noqa: S301
    fence.check()
    next_attempt(tmp_path)
    with pytest.raises(Fenced) as caught:
        fence.check()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


@pytest.mark.parametrize("content", ["", "two\n"])
def test_an_attempt_without_a_number_is_an_error_and_not_the_first(tmp_path: Path, content: str) -> None:
    (tmp_path / "attempt").write_text(content)
    with pytest.raises(RunError, match="holds no number: write one"):
        Fence(tmp_path, 1).check()
    with pytest.raises(RunError, match="holds no number"):
        next_attempt(tmp_path)


def test_a_second_process_is_told_who_holds_the_run_and_what_to_do(tmp_path: Path) -> None:
    with holder(tmp_path) as process, pytest.raises(ConfigError) as caught, hold(tmp_path):
        pass
    assert f"process {process.pid} on {socket.gethostname()} is at work on this run" in str(caught.value)
    assert f"kill {process.pid}" in str(caught.value)


def test_a_run_is_free_again_when_its_driver_is_done(tmp_path: Path) -> None:
    for _ in range(2):
        with hold(tmp_path):
            assert (tmp_path / "lock").read_text().split()[0] == str(os.getpid())
    assert (tmp_path / "lock").read_text() == ""


def test_a_run_is_free_again_when_its_driver_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(tmp_path):
            pass


def test_a_run_is_not_free_while_its_driver_is_frozen(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError, match=str(process.pid)), hold(tmp_path):
            pass


def test_two_runs_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    with hold(tmp_path / "one"), hold(tmp_path / "two"):
        assert next_attempt(tmp_path / "one") == next_attempt(tmp_path / "two") == 1
