"""From a [teacher] table to whoever scores or writes for it. The only place that knows which kind is which class.

Secrets come in as values, found by whoever may read them; they are kept in headers and shown nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import SecretStr

from potstill.calling.guard import LAPTOP, Guard
from potstill.calling.meter import Budget, Meter, Prices
from potstill.calling.outbound import RETRIED, CallPolicy, Endpoint
from potstill.config_teachers import (
    Calling,
    CompletionsTeacher,
    OpenAITeacher,
    RemoteWriter,
    SelfTeacher,
    ServerTeacher,
    SeveralTeachers,
    TeacherConfig,
    VllmTeacher,
)
from potstill.errors import ConfigError
from potstill.teachers.black_box import BlackBox
from potstill.teachers.cache import AnswerStore, ScoreCache
from potstill.teachers.cached import CachedScorer
from potstill.teachers.echoing import EchoScorer
from potstill.teachers.replicas import Replicas
from potstill.teachers.retokenised import RetokenisedScorer
from potstill.teachers.scorer import Scorer
from potstill.teachers.server import TeacherClient
from potstill.teachers.several import Seat, Several
from potstill.teachers.vllm import VllmScorer
from potstill.teachers.writer import ChatWriter, versioned
from potstill.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ScoringTeacher: TypeAlias = ServerTeacher | VllmTeacher | CompletionsTeacher
TEACHER, ADVISOR = "teacher", "advisor"  # names of accesses; members of "several" go by their own
ALLOWED = "POTSTILL_TEACHERS"
"""Environment variable with the private networks and hosts that teachers may be called at, separated by commas. Unset:
those of a laptop, loopback and private networks. A service sets it for the runs that are submitted to it."""
_NOT_TWICE = RETRIED - {408, 504}  # our own server has given the work up by then: the next deadline is as short
_FAILURES_PER_SLOT = 4
_COOL_DOWN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where a teacher is met, with its key."""

    url: str
    key: str | None = field(repr=False)


def called(teacher: TeacherConfig) -> Iterator[tuple[str, ScoringTeacher | RemoteWriter, str]]:
    """Every endpoint that a table names: its access's name, its own table, and that table's place in the config."""
    if isinstance(teacher, SeveralTeachers):
        for name, member in teacher.members.items():
            yield name, member.teacher, f"teacher.members.{name}.teacher"
    elif isinstance(teacher, SelfTeacher) and teacher.advisor is not None:
        yield ADVISOR, teacher.advisor, "teacher.advisor"
    elif isinstance(teacher, ServerTeacher | VllmTeacher | CompletionsTeacher | OpenAITeacher):
        yield TEACHER, teacher, "teacher"


def secret(reference: str, setting: str) -> str:
    """The value behind env:NAME or file:PATH. Raises ConfigError that names `setting` and it, and never the value."""
    kind, _, name = reference.partition(":")
    if kind == "env":
        if name not in os.environ:
            raise ConfigError(f"{setting}: the environment has no variable {name}")
        return os.environ[name]
    try:
        return Path(name).read_text().strip()
    except OSError as error:
        raise ConfigError(f"{setting}: {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:  # which shows what it was reading
        raise ConfigError(f"{setting}: {name} holds no text") from None


def open_endpoint(url: str, key: str | None, calling: Calling, guard: Guard | None = None) -> Endpoint:
    """An endpoint that is called with a bearer key, where there is one. Raises ConfigError for one that may not be.

    Without a `guard` of the caller's own, it is this process's.
    """
    return Endpoint(
        url=url,
        headers={} if key is None else {"authorization": SecretStr(f"Bearer {key}")},
        guard=guard_of(os.environ) if guard is None else guard,
        policy=CallPolicy(
            deadline_s=calling.deadline_s,
            concurrency=calling.concurrency,
            failures_to_open=_FAILURES_PER_SLOT * calling.concurrency,
            cool_down_s=_COOL_DOWN_S,
            retried=_NOT_TWICE,
        ),
    )


def open_scorer(
    teacher: TeacherConfig,
    accesses: Mapping[str, Access],
    *,
    student: PreTrainedTokenizerBase,
    guard: Guard | None = None,
) -> Scorer:
    """Whoever scores for this table, in the student's tokens. Raises ConfigError for a kind that scores nothing.

    `guard` as of open_endpoint.
    """
    if isinstance(teacher, SeveralTeachers):
        return Several(
            {
                name: Seat(
                    scorer=_scorer(member.teacher, accesses[name], student, guard),
                    weight=member.weight,
                    domains=frozenset(member.domains),
                )
                for name, member in teacher.members.items()
            }
        )
    if isinstance(teacher, ServerTeacher | VllmTeacher | CompletionsTeacher):
        return _scorer(teacher, accesses[TEACHER], student, guard)
    raise ConfigError(f"teacher.kind {teacher.kind!r} is not scored by over HTTP")


def open_black_box(config: RemoteWriter, access: Access, *, place: str, spent: Path, workers: int) -> BlackBox:
    """The API whose settings stand at `place`; what it has cost so far is counted in the file `spent`.

    A budget is shared out evenly among `workers`, each with a file of its own: no two spend the same dollar.
    """
    kept = Path(config.answers)
    for file in (kept, spent):
        file.parent.mkdir(parents=True, exist_ok=True)
    prices = Prices(
        usd_per_million_in=Decimal(str(config.price_in)), usd_per_million_out=Decimal(str(config.price_out))
    )
    own = None if config.budget is None else Decimal(str(config.budget)) / workers
    meter = Meter(prices, Budget(usd=own, tokens=None), spent)
    writer = ChatWriter(open_endpoint(versioned(access.url), access.key, config), model=config.model)
    return BlackBox(writer, AnswerStore(kept), meter, config, place=place)


def _scorer(teacher: ScoringTeacher, access: Access, student: PreTrainedTokenizerBase, guard: Guard | None) -> Scorer:
    """In the student's tokens, whatever the teacher's own are."""
    scorer = _alone(teacher, access, student, guard)
    if teacher.tokenizer is not None:
        scorer = RetokenisedScorer(scorer, student=student, teacher=load_tokenizer(teacher.tokenizer))
    return scorer if teacher.cache_mib is None else CachedScorer(scorer, ScoreCache(teacher.cache_mib * 2**20))


def open_servers(teacher: ServerTeacher, access: Access, guard: Guard | None = None) -> Scorer:
    """A server of potstill's own and its replicas: it knows its tokens, and needs no tokenizer here."""
    urls = (access.url, *teacher.replicas)
    servers = [TeacherClient(open_endpoint(url, access.key, teacher, guard)) for url in urls]
    return servers[0] if len(servers) == 1 else Replicas(servers)


def _alone(teacher: ScoringTeacher, access: Access, student: PreTrainedTokenizerBase, guard: Guard | None) -> Scorer:
    def endpoint(url: str) -> Endpoint:
        return open_endpoint(url, access.key, teacher, guard)

    if isinstance(teacher, ServerTeacher):
        return open_servers(teacher, access, guard)
    reads = Path(teacher.tokenizer or student.name_or_path)
    if isinstance(teacher, VllmTeacher):
        return VllmScorer(endpoint(access.url), model=teacher.model, revision=teacher.revision, tokenizer=reads)
    return EchoScorer(
        endpoint(access.url),
        model=teacher.model,
        revision=teacher.revision,
        tokenizer=reads,
        context_length=teacher.context_length,
    )


def guard_of(environment: Mapping[str, str]) -> Guard:
    """The guard of a run's process, which asks ALLOWED for the addresses that may be called beside public ones."""
    given = environment.get(ALLOWED)
    allow = LAPTOP if given is None else [entry.strip() for entry in given.split(",") if entry.strip()]
    return Guard(allow, setting=ALLOWED)
