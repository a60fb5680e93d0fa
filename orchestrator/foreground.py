"""`potstill run`: one run in this process, with a display. Ctrl-C ends it; SIGTERM ends it with a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.buffer import Closed
from orchestrator.launch import site
from orchestrator.report import page_of_a_bad_ending, write_report
from orchestrator.run import execute
from orchestrator.standing_in import with_a_student
from potstill.config import RunConfig
from potstill.display import make_display
from potstill.environments import open_environment
from potstill.errors import ConfigError
from potstill.journal import STOP_AT_ONCE, Journal
from potstill.planner import plan
from potstill.sinks.opening import ready, told

GRACE_S = 30.0  # after SIGTERM: for the step that is being made and its checkpoint

Result = TypeVar("Result")


def run(config: RunConfig, *, report_to: str | None, quiet: bool, resume: bool) -> dict[str, Any] | None:
    """Run to the end, good or bad, and write the report; `resume`: the run that is in the config's folder already.

    None when it was asked to stop before its end and can be resumed. Refuses before anything is written when
    config, plan and sinks do not fit.
    """
    config = with_a_student(config) if resume else config
    plan(config)
    open_environment(config.data).held_out(config.eval.items)
    if report_to is not None and "POTSTILL_RUN_TOKEN" not in os.environ:
        raise ConfigError("--report-to: the variable POTSTILL_RUN_TOKEN, which the service sets, is missing")
    sinks = ready(config.sinks)
    journal = Journal(Path(config.runs) / config.name, resume=resume)
    with page_of_a_bad_ending(journal.folder), contextlib.ExitStack() as stack:
        stack.callback(journal.close)
        if report_to is not None:
            journal.listen(_reporter(stack, report_to, config.name, journal.folder))
        if not quiet:
            out = sys.stdout
            journal.listen(stack.enter_context(make_display(config.loop.steps, config.name, file=out)))
        stack.enter_context(told(sinks, config, journal, resumed=resume))
        try:
            report = asyncio.run(_run(config, journal))
        except Closed:
            report = None
        write_report(journal.folder)
    return report


def until_done(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """asyncio.run with SIGTERM treated as Ctrl-C is: the main task is cancelled and cleans up after itself."""

    async def guarded() -> Result:
        _on_sigterm(_this_task().cancel)
        return await main()

    return asyncio.run(guarded())


async def _run(config: RunConfig, journal: Journal) -> dict[str, Any]:
    """The first SIGTERM asks for the end, with a checkpoint; a second one, or GRACE_S, does not wait for it."""
    stopping, task = asyncio.Event(), _this_task()

    def asked() -> None:
        if stopping.is_set() or (journal.folder / STOP_AT_ONCE).exists():
            task.cancel()
        stopping.set()
        asyncio.get_running_loop().call_later(GRACE_S, task.cancel)

    _on_sigterm(asked)
    async with site(config) as opened:
        return await execute(config, opened, journal, stopping)


def _on_sigterm(call: Callable[[], object]) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, call)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "called inside a task"
    return task


def _reporter(stack: contextlib.ExitStack, url: str, run_id: str, folder: Path) -> Callable[..., None]:
    from orchestrator.reporting import HttpReporter

    reporter = HttpReporter(url, run_id, os.environ["POTSTILL_RUN_TOKEN"], folder)
    stack.callback(reporter.close, 10.0)
    return reporter
