"""Brings what runs do into line with what their rows say: one thread, one look at the cluster, one step per run.

    row \\ job      none                       alive            ended
    queued         launch, when it has a turn → starting       → its result
    recovering     launch, to resume          nothing          → its result
    starting/run.  → its result               nothing          → its result
    pausing        → paused                   stop             → paused, or its result
    paused         nothing                    stop             nothing
    cancelling     → its result               stop             → its result

"Its result" is what the run's folder says, else cancelled where that was asked. A run that left none, because its
process or the whole cluster was lost, recovers: it is launched again and goes on from its last checkpoint. It has
failed when that has happened too often with no step done between. A job of ours that no row knows any more is stopped.
Safe to kill at any line: every step is decided anew from the database and the cluster. Of several services over one
database one holds the lease and does this; what another one that has lost it still writes is refused (Fenced).
Refuses to call a run failed while the cluster does not answer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.reporting import Report, logs_in, status_in
from orchestrator.service.jobs import Job, Launcher
from orchestrator.service.keys import Signer
from orchestrator.service.run_logs import text_at_end
from orchestrator.service.runs import Failure, Run, State, category_of_exit, rfc3339
from orchestrator.service.scheduling import at_limit, overspent, starting
from orchestrator.service.store import Store
from orchestrator.service.store.database import Lease
from potstill import process_log
from potstill.calling.meter import spent_in
from potstill.errors import Fenced, RunError, ServiceError
from potstill.journal import STOP_AT_ONCE, Status, has_begun, steps_in, write_json
from potstill.refusals import refusals

TRIES = 3  # launches in a row, with no step done between, after which a run that loses its process has failed
LEASE = "supervisor"
LEASE_S = 10.0  # what a frozen or killed service holds runs up by
RENEWALS = 4  # of a lease in its time, so that a tick over a thousand runs is not a thousand writes
LOG_TAIL_LINES = 20
CHORES_S = 30.0  # between two rounds of housekeeping
LINE = 50  # queued runs that one look considers

log = logging.getLogger(__name__)


class Supervisor:
    """`runs` holds one folder per run; the cluster's head sees the same files. `holder` names this process.

    `slots` is how many runs the cluster takes at the same time, None for any number; `chores` are done now and then by
    whoever holds the lease.
    """

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        signer: Signer,
        *,
        runs: Path,
        holder: str,
        poll_s: float,
        lease_s: float = LEASE_S,
        slots: int | None = None,
        chores: Sequence[Callable[[Store], None]] = (),
    ) -> None:
        self._shared = store
        self._store = store  # under the lease, while it is held
        self._launcher = launcher
        self._signer = signer
        self.runs = runs
        self._holder = holder
        self._poll_s = poll_s
        self._lease_s = lease_s
        self._slots = slots
        self._chores = tuple(chores)
        self._chores_due = 0.0
        self._lease: Lease | None = None
        self._renew_at = 0.0
        self._tries: dict[str, tuple[int, int]] = {}  # by run: its steps when it was lost last, and losses since then
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="potstill-supervisor", daemon=True)
        self.problem: str | None = "the cluster has not been looked at yet"  # None: all is well, or another one's task

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in, and let another service take over at once. Runs go on."""
        self._ending.set()
        self._wake.set()
        self._thread.join()
        if self._lease is not None:
            self._shared.leases.give_back(self._lease)

    def nudge(self) -> None:
        """Look now: a client has just changed a row."""
        self._wake.set()

    def hurry(self, run_id: str) -> None:
        """Have a run that is about to be stopped end at once, without a checkpoint: its process looks for the mark."""
        with contextlib.suppress(FileNotFoundError):  # it has not begun: there is nothing to hurry
            (self.runs / run_id / STOP_AT_ONCE).touch()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self.problem is None

    def check_free(self, run_id: str) -> None:
        """Raises ServiceError (409, name_taken) when the name's folder holds a run that the service did not make."""
        if (self.runs / run_id / "events.jsonl").exists() and not self._shared.runs.exists(run_id):
            raise ServiceError(f"the folder of {run_id} already holds a run: choose another name", 409, "name_taken")

    def tick(self) -> None:
        """One look at the cluster, one step for each run, when the lease can be had.

        Raises ServiceError when the cluster or the database does not answer, Fenced when another service took over.
        """
        if not self._hold():
            return
        # The cluster first: a job that has ended there had sent its reports before, so the rows read next have them.
        jobs = self._launcher.look()
        alive = {submission_id for submission_id, job in jobs.items() if job.alive}
        runs = self._store.runs.steered(alive)
        self._stop_strays(jobs, runs)
        self._watch_budgets(runs)
        turn = [run for run in self._turn(runs) if run.submission_id not in alive]
        for run in [*runs, *turn]:
            if not self._hold():
                return
            try:
                self._step(run, jobs.get(run.submission_id))
            except ServiceError as error:
                log.warning("run %s: %s", run.id, error)
        if time.monotonic() >= self._chores_due:
            self._chores_due = time.monotonic() + CHORES_S
            for chore in self._chores:
                chore(self._store)

    def _work(self) -> None:
        while not self._ending.is_set():
            try:
                self.tick()
                self.problem = None
            except Fenced as error:
                self._renew_at = 0.0
                log.warning("%s", error)
            except ServiceError as error:
                self.problem = str(error)
                log.warning("%s; the next look is in %g s", error, self._poll_s)
            except Exception:  # a mistake of ours in one look: without this thread no run would ever go on
                self.problem = "the last look at the runs failed by a mistake of the service; its log tells which"
                log.exception("the next look is in %g s", self._poll_s)
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def _hold(self) -> bool:
        """Take the lease, or renew it in time; whether it is ours. Every write asks for it again."""
        if self._lease is not None and time.monotonic() < self._renew_at:
            return True
        began = time.monotonic()
        lease = self._shared.leases.take(LEASE, self._holder, self._lease_s)
        if lease is not None and lease != self._lease:
            self._store = self._shared.under(lease)
        self._lease, self._renew_at = lease, began + self._lease_s / RENEWALS
        return lease is not None

    def _turn(self, runs: Sequence[Run]) -> list[Run]:
        """Queued runs that may start now. A queue may be long: only its beginning is read."""
        active = [run for run in runs if run.state.active]
        if self._slots is not None and len(active) >= self._slots:
            return []
        limits = {key.id: key.principal.limits for key in self._store.keys.list()}
        queued = self._store.runs.in_line(LINE, but=at_limit(active, limits))
        return starting(queued, active, limits, slots=self._slots)

    def _watch_budgets(self, runs: Sequence[Run]) -> None:
        """Note what black-box teachers have cost, and stop the runs of a key that has used up what it may."""
        active = [run for run in runs if run.state.active]
        for run in active:
            spent = spent_in(self.runs / run.id)
            if spent is not None and spent != (run.teacher_tokens, run.teacher_usd):
                self._store.runs.spent(run.id, teacher_tokens=spent[0], teacher_usd=spent[1])
        ids = {run.key_id for run in active}
        limits = {key.id: key.principal.limits for key in self._store.keys.list() if key.id in ids}
        usages = {key_id: self._store.runs.usage(key_id) for key_id in limits}
        for run, how in overspent(active, usages, limits):
            self._store.runs.move(run.id, State.PAUSING, f"its key's budget is used up ({how}): raise it, then resume")

    def _stop_strays(self, jobs: Mapping[str, Job], runs: Sequence[Run]) -> None:
        known = {run.submission_id for run in runs}
        for submission_id, job in jobs.items():
            if job.alive and job.ours and submission_id not in known:
                self._launcher.stop(submission_id)

    def _step(self, run: Run, job: Job | None) -> None:
        alive = job is not None and job.alive
        if run.state in {State.QUEUED, State.RECOVERING} and job is None:
            self._launch(run)
        elif run.state is State.PAUSED:
            if alive:  # it was paused while it was being launched
                self._launcher.stop(run.submission_id)
        elif not alive:
            self._conclude(run, job)
        elif run.state is State.QUEUED:
            self._store.runs.launched(run.id)
        elif run.state in {State.CANCELLING, State.PAUSING}:
            self._launcher.stop(run.submission_id)

    def _launch(self, run: Run) -> None:
        folder = self.runs / run.id
        try:
            with refusals(folder):
                folder.mkdir(parents=True, exist_ok=True)
            (folder / STOP_AT_ONCE).unlink(missing_ok=True)
            write_json(folder / "submitted.json", dict(self._store.runs.get(run.id).config))
            # what a process before this one wrote would otherwise pass for this one's last word, if it writes none
            write_json(folder / "status.json", {"status": Status.QUEUED.value, "time": time.time()})
            process_log.begin(folder, f"attempt {run.attempt}, {rfc3339(time.time())}")
        except RunError as error:
            self._store.runs.move(run.id, State.FAILED, str(error), _failure("RunError", None, str(error)))
            return
        token = self._signer.token(run.submission_id)
        self._launcher.launch(run, folder / "submitted.json", token, resume=has_begun(folder))
        self._store.runs.launched(run.id)

    def _conclude(self, run: Run, job: Job | None) -> None:
        """Its process is gone: take what it wrote but could not send, and settle what is still open."""
        folder = self.runs / run.id
        self._take(run, logs_in(folder, self._store.events.reported(run.id)))
        self._take(run, status_in(folder))
        run = self._store.runs.get(run.id)
        if run.state.final or run.state is State.PAUSED:
            return
        if run.state in {State.CANCELLING, State.PAUSING}:
            wanted = State.CANCELLED if run.state is State.CANCELLING else State.PAUSED
            self._store.runs.move(run.id, wanted, "its process has ended, as was asked")
            return
        message, failure = self._lost(run, job)
        if has_begun(folder) and self._may_recover(run.id, len(steps_in(folder))):
            self._store.runs.again(run.id, f"{message}; it is resumed")
        else:
            self._store.runs.move(run.id, State.FAILED, message, failure)

    def _may_recover(self, run_id: str, steps: int) -> bool:
        """Whether a run that has done so many steps may try again. A restarted service forgets earlier tries."""
        before, tries = self._tries.get(run_id, (-1, 0))
        self._tries[run_id] = (steps, 1 if steps > before else tries + 1)
        return self._tries[run_id][1] <= TRIES

    def _take(self, run: Run, reports: Iterator[Report]) -> None:
        try:
            for report in reports:
                self._store.runs.report(run.id, report)
        except (ValueError, OSError):
            log.warning("run %s: its folder holds something that is no report; it stays on disk", run.id)

    def _lost(self, run: Run, job: Job | None) -> tuple[str, Failure]:
        if job is None:
            message = "the cluster no longer knows this run's job: it was restarted, or it lost the job"
            return message, _failure("WorkerLost", None, message)
        code = "no exit code" if job.exit_code is None else f"exit code {job.exit_code}"
        message = f"the run's process ended without a final report ({code})"
        tail = text_at_end(self.runs, run.id, LOG_TAIL_LINES)
        return message, _failure("WorkerLost", job.exit_code, message, tail)


def _failure(kind: str, exit_code: int | None, message: str, log_tail: str | None = None) -> Failure:
    return Failure(type=kind, category=category_of_exit(exit_code), message=message, log_tail=log_tail)
