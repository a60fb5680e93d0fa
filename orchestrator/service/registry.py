"""Registered teachers: what an administrator may register, how a run borrows one, how the service calls one itself.

A registered table is a [teacher] table of a kind that is called at a URL. Its URLs pass the guard, its secrets are
references that the operator allows, its folders are names on the service's shelves:

    file:NAME                   the file NAME in the folder of secrets
    env:POTSTILL_SECRET_NAME    that variable, of the process that calls

Refuses a secret that is written out, a file that the service would write, and a teacher that a run could change.
No message repeats what stood where a secret should be named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.service.shelves import Shelf, inside
from orchestrator.service.store.pages import Page
from orchestrator.service.store.teachers import Teacher, Teachers
from potstill.calling.guard import Guard
from potstill.config_file import first_mistakes
from potstill.config_teachers import CompletionsTeacher, OpenAITeacher, RemoteWriter, ServerTeacher, VllmTeacher
from potstill.errors import ConfigError, ServiceError
from potstill.model_folder import why_unsafe
from potstill.nearest import hint
from potstill.references import Place, Reference, Stands, dotted, put, references
from potstill.teachers.opening import Access, ScoringTeacher, secret

Called = ScoringTeacher | OpenAITeacher
KINDS: Mapping[str, type[Called]] = {
    "server": ServerTeacher,
    "vllm": VllmTeacher,
    "completions": CompletionsTeacher,
    "openai": OpenAITeacher,
}
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_READING = frozenset({"privileged_template", "fade_steps"})
_ASKING = frozenset({"instruction", "ranks", "ranking"})
BY_RUNS = {"server": _READING, "vllm": _READING, "completions": _READING, "openai": _ASKING}
"""What a run may say of a teacher that it borrows: what it reads, or what it is asked."""
_FILE = re.compile(r"file:([A-Za-z0-9][A-Za-z0-9._-]{0,127})")
_VARIABLE = re.compile(r"env:POTSTILL_SECRET_[A-Z0-9_]{1,100}")


class Registry:
    """`shelves` are where the names of models and of tokenizers are looked up; `guard` says what may be called.

    A probe may take `probe_s` seconds.
    """

    def __init__(
        self,
        teachers: Teachers,
        shelves: Mapping[Stands, Shelf],
        *,
        secrets: Path | None,
        guard: Guard,
        probe_s: float = 60.0,
    ) -> None:
        self._teachers = teachers
        self._shelves = shelves
        self._secrets = None if secrets is None else secrets.resolve()
        self.guard = guard
        self.probe_s = probe_s

    # ------------------------------------------------------------------------------------------------ registering

    def checked(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table as it is stored: what was said, and no defaults. Raises ConfigError, a line a mistake."""
        teacher = _parsed(table)
        problems = [line for reference in references(teacher, ("teacher",)) for line in self._problems(reference)]
        if isinstance(teacher, ServerTeacher) and teacher.model is not None:
            problems.append("teacher.model: a registered teacher is one that is running: name its url")
        if isinstance(teacher, ServerTeacher) and teacher.follows != "nobody":
            problems.append("teacher.follows: a registered teacher is everybody's, and no run's to change")
        if problems:
            raise ConfigError("\n".join(problems))
        return {"kind": table["kind"], **teacher.model_dump(mode="json", exclude_unset=True)}

    def _problems(self, reference: Reference) -> Iterator[str]:
        key, value = reference.key, reference.value
        if reference.stands is Stands.URL:
            try:
                self.guard.check(value)
            except ConfigError as error:
                yield f"{key}: {error}"
        elif reference.stands is Stands.KEY and self._located(value) is None:
            yield f"{key}: {self._what_secrets_are()}"
        elif reference.stands in self._shelves and self._unsafe(reference) is not None:
            yield f"{key}: {self._unsafe(reference)}"
        elif reference.stands is Stands.STATE and reference.is_given:
            yield f"{key}: the service keeps this file itself; leave the setting out"

    def _unsafe(self, reference: Reference) -> str | None:
        found = self._shelves[reference.stands].find(reference.value)
        if found is None:
            return f"there is no {reference.stands.value} of that name here"
        return why_unsafe(found.path, within=found.root, weights=reference.stands is Stands.MODEL)

    def _what_secrets_are(self) -> str:
        variable = "env:POTSTILL_SECRET_NAME, a variable of whoever calls"
        if self._secrets is None:
            return f"name the key as {variable}; this service has no folder of secrets"
        return f"name the key as file:NAME, a file in the folder of secrets, or as {variable}"

    # ---------------------------------------------------------------------------------------------------- lending

    def lent(self, borrowed: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """The table behind `{"kind": "registered", "name": …}` at `place` of a run, with what the run says of it.

        Secrets are where the run's process finds them. Raises ConfigError, a line a mistake.
        """
        name, key = borrowed.get("name"), dotted(place)
        teacher = self._find(name) if isinstance(name, str) else None
        if teacher is None:
            said = str(name)[:80]
            known = hint(said, self.names(), most=10)
            raise ConfigError(f"{key}.name: no teacher {said!r} is registered{known}")
        kind = teacher.config["kind"]
        more = {setting: value for setting, value in borrowed.items() if setting not in {"kind", "name"}}
        if wrong := sorted(more.keys() - BY_RUNS[kind]):
            why = "is not the run's to say of a registered teacher"
            raise ConfigError("\n".join(f"{key}.{one}: {why}{hint(one, sorted(BY_RUNS[kind]))}" for one in wrong))
        table = {**self._with_secrets(teacher), **more}
        if place[-1] == "advisor":
            if kind != "openai":
                raise ConfigError(f"{key}.name: {name} scores text and writes none: an advisor is of kind openai")
            return {setting: value for setting, value in table.items() if setting in RemoteWriter.model_fields}
        return table

    def names(self) -> list[str]:
        """Of the newest hundred."""
        return [teacher.id for teacher in self._teachers.page(Page(limit=100))[0]]

    # ---------------------------------------------------------------------------------------------------- calling

    def called(self, teacher: Teacher) -> tuple[Called, Access]:
        """Its table, folders as real places, and where it is met. Raises ServiceError (503) without its key."""
        parsed = _parsed(self._with_secrets(teacher))
        raw = parsed.model_dump(mode="json")
        for reference in references(parsed):
            if reference.stands in self._shelves:
                put(raw, reference.place, str(self._folder(reference)))
        table = KINDS[parsed.kind].model_validate(raw)
        try:
            key = None if table.secret_ref is None else secret(table.secret_ref, "secret_ref")
        except ConfigError:  # which names a place on our disk
            raise ServiceError(f"the key of {teacher.id} cannot be read", 503, "secret_unavailable") from None
        assert table.url is not None, "checked when it was registered"
        return table, Access(url=table.url, key=key)

    def tokenizer(self, name: str) -> Path:
        """The folder of a tokenizer that a client names. Raises ConfigError."""
        reference = Reference(place=("tokenizer",), stands=Stands.TOKENIZER, value=name, is_given=True)
        return self._folder(reference)

    def get(self, name: str) -> Teacher:
        """Raises ServiceError (404)."""
        found = self._find(name)
        if found is None:
            raise ServiceError("there is no such teacher", 404, "teacher_not_found")
        return found

    def _folder(self, reference: Reference) -> Path:
        found = self._shelves[reference.stands].find(reference.value)
        problem = self._unsafe(reference)
        if found is None or problem is not None:
            raise ConfigError(f"{reference.key}: {problem}")
        return found.path

    def _find(self, name: str) -> Teacher | None:
        if not NAME.fullmatch(name):
            return None
        try:
            return self._teachers.get(name)
        except ServiceError as error:
            if error.status == 404:
                return None
            raise

    def _with_secrets(self, teacher: Teacher) -> dict[str, Any]:
        table = dict(teacher.config)
        if table.get("secret_ref") is not None:
            located = self._located(table["secret_ref"])
            if located is None:
                raise ServiceError(f"the key of {teacher.id} is not where it was", 503, "secret_unavailable")
            table["secret_ref"] = located
        return table

    def _located(self, reference: str) -> str | None:
        """A reference as the process that calls reads it; None for one that nobody allows. Opens nothing."""
        if _VARIABLE.fullmatch(reference):
            return reference
        named = _FILE.fullmatch(reference)
        if named is None or self._secrets is None or ".." in named[1]:
            return None
        place = inside(self._secrets, named[1])
        # not the resolved place: a secret that is changed may be a link that leads elsewhere tomorrow
        return f"file:{self._secrets / named[1]}" if place is not None and place.is_file() else None


def _parsed(table: Mapping[str, Any]) -> Called:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"teacher.kind: {str(kind)[:80]!r} cannot be registered{hint(str(kind)[:80], KINDS)}")
    try:
        return KINDS[kind].model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError(first_mistakes(_lines(KINDS[kind], error))) from None


def _lines(kind: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = ".".join(["teacher", *(str(part)[:80] for part in problem["loc"])])
        if problem["type"] == "extra_forbidden":
            yield f"{where}: no such setting{hint(str(problem['loc'][-1])[:80], kind.model_fields)}"
        else:
            yield f"{where}: {problem['msg'].removeprefix('Value error, ')}"
