"""What a submitted run may name, and the one way from a submitted config to the one that is run.

    a setting that stands for   is, over HTTP
    a model, a tokenizer        a name below the operator's folders, of a published checkpoint, or run/RUN/step-N
    data                        the id of an uploaded file, or a name below the operator's folders
    a URL, a secret             nobody's: {"kind": "registered", "name": …} borrows a teacher that has them
    a file that the run writes  nobody's: the service keeps the run's folder, and one store of answers for each owner
    a port                      0 (any free one), or none

Which settings those are, their types say (potstill/references.py). Refuses everything else by the setting's key, a line
a mistake. What is named is resolved and must lie where names lead; a model's folder is judged (model_folder.py) before
anybody loads from it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.service.artifacts import model_of_checkpoint
from orchestrator.service.jobs import teachers_allowed
from orchestrator.service.principals import Principal
from orchestrator.service.registry import Registry
from orchestrator.service.scorers import Scorers
from orchestrator.service.shelves import Found, Shelf, is_model, is_name, is_prompts, is_tokenizer
from orchestrator.service.store import Store
from orchestrator.service.store.pages import Page
from orchestrator.service.store.uses import REGISTERED, is_file_id
from orchestrator.service.uploads import Uploads
from potstill.calling.guard import Guard
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError, ServiceError
from potstill.model_folder import why_unsafe
from potstill.nearest import hint
from potstill.planner import plan
from potstill.references import Place, Reference, Stands, put, references
from potstill.teachers.opening import ALLOWED, guard_of

CHECKPOINT = re.compile(r"run/([a-z0-9][a-z0-9_-]{0,62})/(step-\d{1,12})")
"""How a checkpoint of one's own run is named as a model."""
_FILE_OPTION = re.compile(r"(.*_)?(file|path|folder|dir|directory|url|uri)s?", re.IGNORECASE)
_SHOWN = 10  # of the names that there are, in a message


class Catalog:
    """`models` and `data` are folders of the operator's; `uploads`, `published` and `runs` are the service's own.

    `secrets` is the folder whose files registered teachers may name as secrets; `guard` says where teachers may be
    called, by default those addresses that runs may call.
    """

    def __init__(
        self,
        *,
        models: Sequence[Path],
        data: Sequence[Path],
        uploads: Path,
        published: Path,
        runs: Path,
        secrets: Path | None,
        store: Store,
        guard: Guard | None = None,
    ) -> None:
        self._runs = Path(os.path.realpath(runs))
        self._store = store
        self._given = Shelf(models, is_model)
        self._models = Shelf([*models, published], is_model)
        self._datasets = Shelf(data, is_prompts)
        self._shelves = {Stands.MODEL: self._models, Stands.TOKENIZER: Shelf([*models, published], is_tokenizer)}
        self.uploads = Uploads(Path(os.path.realpath(uploads)), store.files)
        called = guard_of({ALLOWED: teachers_allowed()}) if guard is None else guard
        self.registry = Registry(store.teachers, self._shelves, secrets=secrets, guard=called)
        self.scorers = Scorers(self.registry)

    def models(self) -> list[str]:
        """Names of models, published ones too."""
        return self._models.names()

    def datasets(self) -> list[str]:
        """Names of files of prompts."""
        return self._datasets.names()

    def check_new_model(self, name: str) -> None:
        """Raises ServiceError unless a checkpoint may be published under this name: 400, 409 where it is a model's."""
        if not is_name(name) or "/" in name or name == "run":
            message = "a model's name is letters, digits, '.', '_' and '-', and begins with a letter or digit"
            raise ServiceError(message, 400, "invalid_name")
        if self._given.find(name) is not None:
            raise ServiceError(f"a model named {name} is here already: choose another name", 409, "name_taken")

    # -------------------------------------------------------------------------------------------------- resolving

    def resolve(self, body: Mapping[str, Any], viewer: Principal) -> RunConfig:
        """The config that is run. Raises ConfigError, a line a mistake, each beginning with the setting's key."""
        if "runs" in body:
            raise ConfigError("runs: the service keeps its runs in a folder of its own; leave this setting out")
        try:
            raw = copy.deepcopy(dict(body))
            borrowed = self._borrow(raw)
            config = parse({**raw, "runs": str(self._runs)})
        except RecursionError:
            raise ConfigError("the config is nested too deeply") from None
        raw, problems = config.model_dump(mode="json"), []
        for reference in references(config):
            is_lent = any(reference.place[: len(place)] == place for place in borrowed)
            try:
                put(raw, reference.place, self._resolved(reference, viewer, is_lent=is_lent))
            except ConfigError as error:
                problems.append(f"{reference.key}: {error}")
        if problems:
            raise ConfigError("\n".join(problems))
        return RunConfig.model_validate(raw)

    def check(self, config: RunConfig) -> Mapping[str, Any]:
        """The plan of a resolved config, as plan.json has it. Raises ConfigError, for a folder that is not safe too."""
        problems = []
        for reference in references(config):
            if reference.stands in self._shelves:
                path, needs_weights = Path(reference.value), reference.stands is Stands.MODEL
                problem = why_unsafe(path, within=self._root_of(path), weights=needs_weights)
                problems += [] if problem is None else [f"{reference.key}: {problem}"]
        if problems:
            raise ConfigError("\n".join(problems))
        return plan(config).as_dict()

    def _borrow(self, raw: dict[str, Any]) -> set[Place]:
        """Put the tables of registered teachers where they are named; returns where that was."""
        borrowed, problems = set(), []
        for place, table in list(_tables(raw.get("teacher"), ("teacher",))):
            if table.get("kind") == REGISTERED:
                try:
                    put(raw, place, self.registry.lent(table, place))
                except ConfigError as error:
                    problems.append(str(error))
                borrowed.add(place)
        if problems:
            raise ConfigError("\n".join(problems))
        return borrowed

    def _resolved(self, reference: Reference, viewer: Principal, *, is_lent: bool) -> Any:
        """What stands in the config that is run. Raises ConfigError that says why, without the key."""
        value = reference.value
        match reference.stands:
            case Stands.MODEL | Stands.TOKENIZER:
                return str(self._folder(reference.stands, value, viewer))
            case Stands.DATA:
                return str(self._data(value, viewer))
            case Stands.URL | Stands.KEY if not is_lent:
                known = ", ".join(self.registry.names()[:_SHOWN]) or "none"
                how = '{"kind": "registered", "name": …}'
                raise ConfigError(f"no URL and no secret is named over HTTP: borrow a teacher by {how}; known: {known}")
            case Stands.STATE if reference.is_given and reference.place != ("runs",):
                raise ConfigError("the service keeps this file itself; leave the setting out")
            case Stands.STATE if reference.place != ("runs",):
                return str(self._answers(viewer))
            case Stands.PORT if value != 0:
                raise ConfigError("over HTTP only 0, any free port, or none")
            case Stands.OPTIONS:
                return self._options(value)
            case Stands.OUTSIDE:
                raise ConfigError(
                    "over HTTP nobody outside is told of a run; tensorboard writes to the run's own folder"
                )
        return value

    def _folder(self, stands: Stands, name: str, viewer: Principal) -> Path:
        own = CHECKPOINT.fullmatch(name)
        if own is not None:
            try:
                self._store.runs.get(own[1], viewer)
                return Path(os.path.realpath(model_of_checkpoint(self._runs, own[1], own[2])))
            except ServiceError as error:
                if error.status not in {404, 409}:
                    raise
                raise ConfigError(str(error)) from None
        found = self._shelves[stands].find(name)
        if found is None:
            raise ConfigError(f"no {stands.value} {name[:80]!r} is here{hint(name[:80], self.models(), most=_SHOWN)}")
        return found.path

    def _data(self, name: str, viewer: Principal) -> Path:
        if is_file_id(name):
            try:
                return self.uploads.read_by_runs(self._store.files.get(name, viewer))
            except ServiceError as error:
                if error.status != 404:
                    raise
        found: Found | None = self._datasets.find(name)
        if found is None:
            uploaded = [file.id for file in self._store.files.page(viewer, Page(limit=100))[0]]
            known = hint(name[:80], [*self.datasets(), *uploaded], most=_SHOWN)
            raise ConfigError(f"no file {name[:80]!r} is here{known}")
        return found.path

    def _options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        named = [option for option in options if _FILE_OPTION.fullmatch(option)]
        if named:
            raise ConfigError(f"{named[0][:80]}: no file is named over HTTP; leave this option out")
        return options

    def _answers(self, viewer: Principal) -> Path:
        """Where answers that this owner's runs have paid for are kept. An owner's name is no file's name."""
        owner = hashlib.sha256(viewer.owner.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self._runs / ".answers" / f"{owner}.sqlite"

    def _root_of(self, path: Path) -> Path:
        """Where links in a model's folder may lead."""
        roots = [*self._models.roots, self._runs]
        return next((root for root in roots if path.is_relative_to(root)), path)


def _tables(value: Any, place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every table at `place` and inside it, the outer ones first."""
    if isinstance(value, Mapping):
        yield place, value
        for key, inner in value.items():
            yield from _tables(inner, (*place, key))
