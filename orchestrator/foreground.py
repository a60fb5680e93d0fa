"""`potstill run`: one run in this process, with a display, ended cleanly by Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.launch import site
from orchestrator.report import page_of_a_bad_ending, write_report
from orchestrator.run import execute
from potstill.config import RunConfig
from potstill.display import make_display
from potstill.environments import open_environment
from potstill.errors import ConfigError
from potstill.journal import Journal
from potstill.planner import plan

Result = TypeVar("Result")


def run(config: RunConfig, *, report_to: str | None, quiet: bool) -> dict[str, Any]:
    """Run to the end, good or bad, and write the report.

    Refuses before anything is written when config and plan do not fit.
    """
    plan(config)
    open_environment(config.data).held_out(config.eval.items)
    if report_to is not None and "POTSTILL_RUN_TOKEN" not in os.environ:
        raise ConfigError("--report-to: the variable POTSTILL_RUN_TOKEN, which the service sets, is missing")
    journal = Journal(Path(config.runs) / config.name)
    with page_of_a_bad_ending(journal.folder), contextlib.ExitStack() as stack:
        stack.callback(journal.close)
        if report_to is not None:
            journal.listen(_reporter(stack, report_to, config.name, journal.folder))
        if not quiet:
            out = sys.stdout
            journal.listen(stack.enter_context(make_display(config.loop.steps, config.name, file=out)))
        report = until_done(lambda: _run(config, journal))
        write_report(journal.folder)
    return report


def until_done(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """asyncio.run with SIGTERM treated as Ctrl-C is: the main task is cancelled and cleans up after itself."""

    async def guarded() -> Result:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main()

    return asyncio.run(guarded())


async def _run(config: RunConfig, journal: Journal) -> dict[str, Any]:
    async with site(config) as opened:
        return await execute(config, opened, journal)


def _reporter(stack: contextlib.ExitStack, url: str, run_id: str, folder: Path) -> Callable[..., None]:
    from orchestrator.reporting import HttpReporter

    reporter = HttpReporter(url, run_id, os.environ["POTSTILL_RUN_TOKEN"], folder)
    stack.callback(reporter.close, 10.0)
    return reporter
