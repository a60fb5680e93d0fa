"""Probing: from a URL or a run config to what its teachers were found to be, ready to print.

    of_url      one teacher that answers at a URL, of a kind that is named or recognised
    of_run      every teacher that a run would call and does not start itself
    of_table    one teacher by its own [teacher] table

It refuses, with ConfigError, a teacher whose kind needs more than it was told. Keys are read here and shown nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import ValidationError

from potstill.algebra.objective import Tier
from potstill.calling.guard import Guard
from potstill.config import RunConfig
from potstill.config_teachers import Calling, CompletionsTeacher, RemoteWriter, ServerTeacher, VllmTeacher
from potstill.errors import ConfigError, TeacherError
from potstill.journal import finite
from potstill.probing.chat import ChatReport, probe_chat
from potstill.probing.comparison import Comparison, compare
from potstill.probing.page import chat_lines, compared_lines, scorer_lines, served, served_lines
from potstill.probing.probe import ProbeReport, open_alone, probe
from potstill.probing.recognition import kind_of
from potstill.teachers.opening import Access, ScoringTeacher, called, open_endpoint, open_servers, secret
from potstill.teachers.scorer import Scorer
from potstill.teachers.server import TeacherClient
from potstill.teachers.writer import versioned
from potstill.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY_VARIABLE = "POTSTILL_TEACHER_KEY"
Given = TypeVar("Given")
_CALLING = Calling(deadline_s=30.0, concurrency=1)
_UNTRIED = "whether it tempers the scores of given text was not tried: its answers do not show it"
_RECOGNISING = Calling(deadline_s=10.0, concurrency=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a user says of a teacher beside its URL."""

    kind: str | None = None
    model: str | None = None
    tokenizer: Path | None = None
    student: Path | None = None
    context_length: int | None = None
    key_env: str | None = None

    def key(self) -> str | None:
        """From the variable that was named, which must be there, or the usual one, which need not."""
        if self.key_env is not None and self.key_env not in os.environ:
            raise ConfigError(f"--key-env: the environment has no variable {self.key_env}")
        return os.environ.get(self.key_env or KEY_VARIABLE)


class Found(Protocol):
    """One teacher, probed."""

    @property
    def usable(self) -> bool:
        """Whether it can be used at all, or, of a run, for that run."""

    def lines(self) -> Iterator[str]:
        """For people."""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundScorer:
    """A teacher that scores, beside a student where one was named."""

    url: str
    kind: str
    report: ProbeReport
    comparison: Comparison | None = None
    unfit: str | None = None  # why a run's method cannot be served

    @property
    def usable(self) -> bool:
        problem = None if self.comparison is None else self.comparison.problem
        return not self.report.problems and problem is None and self.unfit is None

    @property
    def methods(self) -> list[str]:
        if self.report.tier is None or self.report.problems or (self.comparison and self.comparison.problem):
            return []
        return served(self.report.tier, same_tokens=self.comparison is None or self.comparison.same_tokens)

    def lines(self) -> Iterator[str]:
        yield from () if self.unfit is None else (f"refused     {self.unfit}",)
        yield from scorer_lines(self.url, self.kind, self.report)
        if self.comparison is not None:
            yield from compared_lines(self.comparison.lines, self.comparison.problem)
        yield from served_lines(self.methods) if self.methods else ()

    def as_dict(self) -> dict[str, Any]:
        beside = self.comparison
        student = None if beside is None else {"same_tokens": beside.same_tokens, "lines": list(beside.lines)}
        problems = [*self.report.problems, *filter(None, (beside and beside.problem, self.unfit))]
        found = {"url": self.url, "kind": self.kind, **self.report.as_dict(), "problems": problems}
        return {**found, "student": student, "methods": self.methods}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundWriter:
    """An API that writes."""

    url: str
    model: str
    report: ChatReport = field(default_factory=ChatReport)

    @property
    def usable(self) -> bool:
        return not self.report.problems

    @property
    def methods(self) -> list[str]:
        return served(Tier.TEXT) if self.usable else []

    def lines(self) -> Iterator[str]:
        yield from chat_lines(self.url, self.model, self.report)
        yield from served_lines(self.methods) if self.methods else ()

    def as_dict(self) -> dict[str, Any]:
        tier = Tier.TEXT.name if self.usable else None
        found = {"url": self.url, "kind": "openai", "model": self.model, **self.report.as_dict()}
        return {**found, "tier": tier, "methods": self.methods}


async def of_url(url: str, wanted: Wanted, *, say: Callable[[str], None]) -> list[Found]:
    """The teacher at `url`. One that is away or answers nonsense is found to be so; nothing of it is raised.

    `say` is told what costs money, before it does.
    """
    key = wanted.key()
    kind = wanted.kind
    if kind is None:
        endpoint = open_endpoint(url, key, _RECOGNISING)
        try:
            kind = str(await kind_of(endpoint))
        except TeacherError as error:
            return [FoundScorer(url=url, kind="unknown", report=ProbeReport(problems=(str(error),)))]
        finally:
            await endpoint.aclose()
        if kind == "openai" and wanted.context_length is not None:  # which only one of the two has a use for
            kind = "completions"
    if kind == "openai":
        return [await _writer(url, key, _required(wanted.model, "--model", kind), say)]
    return [await _scorer(url, key, kind, wanted)]


async def of_run(config: RunConfig, *, say: Callable[[str], None]) -> list[Found]:
    """Those that the run would call. Raises ConfigError for a run whose teachers cannot be called, or are its own."""
    found: list[Found] = []
    for _, table, place in called(config.teacher):
        if isinstance(table, ServerTeacher) and table.model is not None:
            continue
        assert table.url is not None, "only a server that the run starts has no url"
        key = None if table.secret_ref is None else secret(table.secret_ref, f"{place}.secret_ref")
        if isinstance(table, RemoteWriter):
            found.append(await _writer(table.url, key, table.model, say))
        else:
            found.append(await _of_run_table(config, table, Access(url=table.url, key=key)))
    if not found:
        raise ConfigError(f"teacher.kind {config.teacher.kind!r} has nobody to probe: the run brings its own teacher")
    return found


async def of_table(
    table: ScoringTeacher | RemoteWriter, access: Access, *, tokenizer: Path | None, guard: Guard | None = None
) -> FoundScorer | FoundWriter:
    """The teacher of a table that no run has: what it can do by itself.

    `tokenizer`: a folder with the teacher's own, where the table names none. Raises ConfigError when it needs one.
    """
    if isinstance(table, RemoteWriter):
        endpoint = open_endpoint(versioned(access.url), access.key, _CALLING, guard)
        return FoundWriter(url=access.url, model=table.model, report=await probe_chat(endpoint, table.model))
    folder = tokenizer if table.tokenizer is None else Path(table.tokenizer)
    own = None if folder is None else load_tokenizer(folder)
    if isinstance(table, ServerTeacher):
        scorer = open_servers(table, access, guard)
    else:
        scorer, own = open_alone(table, access, student=_required(own, "tokenizer", table.kind), guard=guard)
    return FoundScorer(url=access.url, kind=table.kind, report=await _probed(scorer, own, table.kind))


async def _of_run_table(config: RunConfig, table: ScoringTeacher, access: Access) -> FoundScorer:
    student = Path(config.student.model)
    scorer, tokenizer = open_alone(table, access, student=load_tokenizer(student))
    report = await _probed(scorer, tokenizer, table.kind)
    needed, unfit = config.objective.tier, None
    if report.tier is not None and report.tier < needed:
        unfit = f"method {config.method!r} needs a teacher of tier {needed.name}, and this one gives {report.tier.name}"
    comparison = None
    if report.able is not None:
        own = None if table.tokenizer is None else Path(table.tokenizer)
        comparison = compare(report.able, student=student, teacher=own)
    return FoundScorer(url=access.url, kind=table.kind, report=report, comparison=comparison, unfit=unfit)


async def _scorer(url: str, key: str | None, kind: str, wanted: Wanted) -> FoundScorer:
    folder = wanted.tokenizer or wanted.student
    tokenizer = None if folder is None else load_tokenizer(folder)
    scorer: Scorer
    if kind == "server":
        scorer = TeacherClient(open_endpoint(url, key, _CALLING))
    else:
        named = _required(tokenizer, "--tokenizer", kind)
        scorer, _ = open_alone(_table(url, kind, wanted), Access(url=url, key=key), student=named)
    report = await _probed(scorer, tokenizer, kind)
    comparison = None
    if wanted.student is not None and report.able is not None:
        comparison = compare(report.able, student=wanted.student, teacher=wanted.tokenizer)
    return FoundScorer(url=url, kind=kind, report=report, comparison=comparison)


async def _probed(scorer: Scorer, tokenizer: PreTrainedTokenizerBase | None, kind: str) -> ProbeReport:
    """Closes the scorer."""
    try:
        report = await probe(scorer, tokenizer)
    finally:
        await scorer.aclose()
    return report if kind == "server" or report.problems else replace(report, notes=(*report.notes, _UNTRIED))


def _table(url: str, kind: str, wanted: Wanted) -> ScoringTeacher:
    model = _required(wanted.model, "--model", kind)
    if kind == "vllm":
        return VllmTeacher(url=url, model=model)
    length = _required(wanted.context_length, "--context-length", kind)
    try:
        return CompletionsTeacher(url=url, model=model, context_length=length)
    except ValidationError:
        raise ConfigError(f"--context-length {length} must be at least 1") from None


async def _writer(url: str, key: str | None, model: str, say: Callable[[str], None]) -> FoundWriter:
    say(f"{url} is asked for two short answers and one completion, which cost a few tokens")
    endpoint = open_endpoint(versioned(url), key, _CALLING)
    return FoundWriter(url=url, model=model, report=await probe_chat(endpoint, model))


def _required(value: Given | None, option: str, kind: str) -> Given:
    if value is None:
        raise ConfigError(f"{option} is needed for a teacher of kind {kind}")
    return value


def as_json(found: Sequence[Found]) -> Any:
    """One teacher as an object, several as a list; a number that is none is null."""
    said = [finite(one.as_dict()) for one in found]
    return said[0] if len(said) == 1 else said
