"""What a process and its children say ends up in the run's folder, also when they die without a word more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.errors import RunError
from potstill.process_log import begin, log_of, write_to

SPEAKER = """
import logging, os, subprocess, sys
from pathlib import Path
from potstill.process_log import log_of, write_to
run, other = Path(sys.argv[1]), Path(sys.argv[2])
print("before", flush=True)
sys.stdout.write("begun before, ")
write_to(log_of(run, "rollout-0"))
print("ended after", flush=True)
logging.warning("a warning")
subprocess.run([sys.executable, "-c", "print('a child')"])
os.write(2, b"straight to the descriptor\\n")
write_to(log_of(other, "rollout-0"))
print("of another run", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_process_is_heard_from_where_it_says_so_to_its_last_word(tmp_path: Path):
    run, other = tmp_path / "one", tmp_path / "two"
    done = subprocess.run([sys.executable, "-c", SPEAKER, run, other], capture_output=True, text=True)
    assert done.returncode == -9
    assert done.stdout == "before\nbegun before, "
    said = log_of(run, "rollout-0").read_text().splitlines()
    assert said == ["ended after", "WARNING:root:a warning", "a child", "straight to the descriptor"]
    assert log_of(other, "rollout-0").read_text() == "of another run\n"


def test_what_was_said_before_stays_and_each_attempt_has_a_line_of_its_own(tmp_path: Path):
    for attempt in (1, 2):
        begin(tmp_path, f"attempt {attempt}")
        with log_of(tmp_path).open("a") as log:
            log.write("words\n")
    assert log_of(tmp_path).read_text() == "── attempt 1\nwords\n── attempt 2\nwords\n"
    assert log_of(tmp_path) == tmp_path / "logs" / "orchestrator.log"


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    before = os.fstat(1).st_ino
    for attempted in (lambda: begin(tmp_path, "attempt 1"), lambda: write_to(log_of(tmp_path, "learner-0"))):
        with pytest.raises(RunError, match="cannot be written"):
            attempted()
    assert os.fstat(1).st_ino == before
