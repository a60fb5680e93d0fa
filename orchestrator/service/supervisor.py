"""Brings what runs do into line with what their rows say: one thread, one look at the cluster, one step per run.

    row \\ job      none                alive            ended
    queued         launch              → starting       → its result
    recovering     launch, to resume   nothing          → its result
    starting/run.  → its result        nothing          → its result
    cancelling     → its result        stop             → its result

"Its result" is what the run's folder says, else cancelled where that was asked. A run that left none, because its
process or the whole cluster was lost, recovers: it is launched again and goes on from its last checkpoint. It has
failed when that has happened too often with no step done between.
Safe to kill at any line: every step is decided anew from the database and the cluster. Must be alone with its database
(service.py sees to it): a second one would replace the token of a run that the first has just launched.
Refuses to call a run failed while the cluster does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from orchestrator.reporting import Report, logs_in, status_in
from orchestrator.service.jobs import Job, Launcher
from orchestrator.service.runs import Failure, Run, State, category_of_exit
from orchestrator.service.store import Store
from potstill.errors import RunError, ServiceError
from potstill.journal import steps_in, write_json
from potstill.refusals import refusals

TRIES = 3  # launches in a row, with no step done between, after which a run that loses its process has failed

log = logging.getLogger(__name__)


class Supervisor:
    """`runs` is the folder that holds one folder per run; the cluster's head sees the same files."""

    def __init__(self, store: Store, launcher: Launcher, *, runs: Path, poll_s: float) -> None:
        self._store = store
        self._launcher = launcher
        self.runs = runs
        self._poll_s = poll_s
        self._tries: dict[str, tuple[int, int]] = {}  # by run: its steps when it was lost last, and losses since then
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="potstill-supervisor", daemon=True)
        self.problem: str | None = "the cluster has not been looked at yet"  # None: the last look was answered

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in. Runs go on."""
        self._ending.set()
        self._wake.set()
        self._thread.join()

    def nudge(self) -> None:
        """Look now: a client has just changed a row."""
        self._wake.set()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self.problem is None

    def check_free(self, run_id: str) -> None:
        """Raises ServiceError (409, name_taken) when the name's folder holds a run that the service did not make."""
        if (self.runs / run_id / "events.jsonl").exists() and not self._store.has_run(run_id):
            raise ServiceError(f"the folder of {run_id} already holds a run: choose another name", 409, "name_taken")

    def tick(self) -> None:
        """One look at the cluster, one step for each run. Raises ServiceError when the cluster does not answer."""
        # The cluster first: a job that has ended there had sent its reports before, so the rows read next have them.
        jobs = self._launcher.look()
        for run in self._store.unfinished_runs():
            try:
                self._step(run, jobs.get(run.submission_id))
            except ServiceError as error:
                log.warning("run %s: %s", run.id, error)

    def _work(self) -> None:
        while not self._ending.is_set():
            try:
                self.tick()
                self.problem = None
            except ServiceError as error:
                self.problem = str(error)
                log.warning("%s; the next look is in %g s", error, self._poll_s)
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def _step(self, run: Run, job: Job | None) -> None:
        if run.state in {State.QUEUED, State.RECOVERING} and job is None:
            self._launch(run)
        elif job is None or not job.alive:
            self._conclude(run, job)
        elif run.state is State.QUEUED:
            self._store.move(run.id, State.STARTING, "the cluster has its job")
        elif run.state is State.CANCELLING:
            self._launcher.stop(run.submission_id)

    def _launch(self, run: Run) -> None:
        folder = self.runs / run.id
        try:
            with refusals(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "submitted.json", run.config)
        except RunError as error:
            self._store.move(run.id, State.FAILED, str(error), _failure("RunError", None, str(error)))
            return
        token = self._store.mint_token(run.id)
        self._launcher.launch(run, folder / "submitted.json", token, resume=_has_begun(folder))
        self._store.move(run.id, State.STARTING, "the job is submitted to the cluster")

    def _conclude(self, run: Run, job: Job | None) -> None:
        """Its process is gone: take what it wrote but could not send, and settle what is still open."""
        folder = self.runs / run.id
        self._take(run, logs_in(folder, self._store.reported(run.id)))
        self._take(run, status_in(folder))
        run = self._store.get_run(run.id)
        if run.state.final:
            return
        if run.state is State.CANCELLING:
            self._store.move(run.id, State.CANCELLED, "its process has ended, as was asked")
            return
        message, failure = self._lost(run, job)
        if _has_begun(folder) and self._may_recover(run.id, len(steps_in(folder))):
            self._store.relaunch(run.id, f"{message}; it is resumed")
        else:
            self._store.move(run.id, State.FAILED, message, failure)

    def _may_recover(self, run_id: str, steps: int) -> bool:
        """Whether a run that has done so many steps may try again. A restarted service forgets earlier tries."""
        before, tries = self._tries.get(run_id, (-1, 0))
        self._tries[run_id] = (steps, 1 if steps > before else tries + 1)
        return self._tries[run_id][1] <= TRIES

    def _take(self, run: Run, reports: Iterator[Report]) -> None:
        try:
            for report in reports:
                self._store.append(run.id, report)
        except (ValueError, OSError):
            log.warning("run %s: its folder holds something that is no report; it stays on disk", run.id)

    def _lost(self, run: Run, job: Job | None) -> tuple[str, Failure]:
        if job is None:
            message = "the cluster no longer knows this run's job: it was restarted, or it lost the job"
            return message, _failure("WorkerLost", None, message)
        code = "no exit code" if job.exit_code is None else f"exit code {job.exit_code}"
        message = f"the run's process ended without a final report ({code})"
        try:
            tail = self._launcher.log_tail(run.submission_id)
        except ServiceError:  # the log is gone with its node; the run has ended all the same
            tail = None
        return message, _failure("WorkerLost", job.exit_code, message, tail)


def _has_begun(folder: Path) -> bool:
    """Whether there is something to go on from."""
    return (folder / "events.jsonl").exists()


def _failure(kind: str, exit_code: int | None, message: str, log_tail: str | None = None) -> Failure:
    return Failure(type=kind, category=category_of_exit(exit_code), message=message, log_tail=log_tail)
