"""The teachers of a run outside its learner: started where the run brings their weights, then met before anything else.

Meeting is asking: who are you, what can you do? A teacher that cannot do what the method reads is refused here, before
a token is paid for. One that the run did not start itself is probed as well: what it can do is only its claim. Whoever
only writes is not asked: its first answer would cost.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.config_teachers import RemoteWriter, ServerTeacher
from potstill.errors import PlanError, TeacherRefused
from potstill.planner import check_teacher
from potstill.probing.probe import ProbeReport, open_alone, preflight
from potstill.processes import Child, start
from potstill.teachers.opening import Access, ScoringTeacher, called, open_scorer, secret
from potstill.tokenization import load_tokenizer
from potstill.wire import Capabilities

START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faculty:
    """Where the run's teachers are met, by name; what the one who scores offers; what probes found of those that were
    there already; the processes that the run started."""

    accesses: Mapping[str, Access]
    met: Capabilities | None
    probed: Mapping[str, ProbeReport]
    processes: tuple[Child, ...]

    @property
    def alive(self) -> bool:
        """Whether all that the run started are still there."""
        return all(child.process.returncode is None for child in self.processes)


@contextlib.asynccontextmanager
async def teachers(config: RunConfig, folder: Path, environment: Mapping[str, str]) -> AsyncIterator[Faculty]:
    """Those that this run calls. Servers that it starts log into `folder`, and end with it.

    Raises ConfigError or PlanError for a teacher that cannot serve this run, TeacherError for one that is away or whose
    scores nobody should learn from.
    """
    scored = config.objective.tier > Tier.TEXT
    wanted = [one for one in called(config.teacher) if scored or isinstance(one[1], RemoteWriter)]
    async with contextlib.AsyncExitStack() as stack:
        accesses: dict[str, Access] = {}
        processes: list[Child] = []
        for name, table, place in wanted:
            accesses[name], started = await _access(name, table, place, folder, environment)
            for child in started:
                stack.push_async_callback(child.stop)
                processes.append(child)
        scorers = [name for name, table, _ in wanted if not isinstance(table, RemoteWriter)]
        met = await _meet(config, accesses) if scorers else None
        probed = {
            name: await _probe(config, table, accesses[name])
            for name, table, _ in wanted
            if not isinstance(table, RemoteWriter) and table.url is not None
        }
        yield Faculty(accesses=accesses, met=met, probed=probed, processes=tuple(processes))


async def _access(
    name: str, table: ScoringTeacher | RemoteWriter, place: str, folder: Path, environment: Mapping[str, str]
) -> tuple[Access, list[Child]]:
    if isinstance(table, ServerTeacher) and table.model is not None:
        child, own = await _serve(table, folder / f"{name}.log", environment)
        return Access(url=child.ready["url"], key=own), [child]
    assert table.url is not None, "only a server that the run starts has no url"
    key = None if table.secret_ref is None else secret(table.secret_ref, f"{place}.secret_ref")
    return Access(url=table.url, key=key), []


async def _serve(table: ServerTeacher, log: Path, environment: Mapping[str, str]) -> tuple[Child, str]:
    assert table.model is not None, "checked by the caller"
    key = secrets.token_urlsafe(32)
    arguments = [table.model, "--port", "0", "--key-env", "POTSTILL_TEACHER_KEY", "--exit-with-parent"]
    arguments += ["--threads", str(table.threads), *(["--accept-weights"] if table.follows == "student" else [])]
    env = {**environment, "POTSTILL_TEACHER_KEY": key, "OMP_NUM_THREADS": str(table.threads)}
    child = await start("teacher server", "teacher_server", arguments, log=log, env=env, timeout_s=START_S)
    return child, key


async def _meet(config: RunConfig, accesses: Mapping[str, Access]) -> Capabilities:
    scorer = open_scorer(config.teacher, accesses, student=load_tokenizer(config.student.model))
    try:
        able = await scorer.capabilities()
    finally:
        await scorer.aclose()
    check_teacher(config, able)
    return able


async def _probe(config: RunConfig, table: ScoringTeacher, access: Access) -> ProbeReport:
    """By itself, as far as the method reads it."""
    scorer, tokenizer = open_alone(table, access, student=load_tokenizer(config.student.model))
    needed = config.objective.tier
    try:
        report = await preflight(scorer, tokenizer, needed=needed)
    finally:
        await scorer.aclose()
    if report.problems:
        raise TeacherRefused(f"teacher at {access.url}: {'; '.join(report.problems)}")
    if report.tier is not None and report.tier < needed:
        found = "; ".join(report.notes)
        raise PlanError(f"method {config.method!r} needs a teacher of tier {needed.name}; {access.url}: {found}")
    return report
