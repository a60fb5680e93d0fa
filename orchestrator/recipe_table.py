"""The recipes of `potstill quickstart`, as a table: which shipped configs run, in which order, on whose models.

  opd            scratch ─► teacher, warm_student ─► opd ─► sft_control (from the same warm student, as many tokens)
  opsd           scratch ─► hint_student ─► opsd ─► opsd_sft_control (on what the hinted student writes)
  seqkd, …       teacher behind an API of text, warm_student ─► seqkd; soda and ranked go on from its beginning

A new recipe is an entry here, with its configs in deploy/recipes. Pure: runs nothing, reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One run: a shipped config, and what is filled into it that only this machine has."""

    config: str
    scratch: str | None = None
    """Table of models.toml that its student is made from."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Setting → the preparation whose model it names."""
    apis: Mapping[str, str] = field(default_factory=dict)
    """Table of a black box → the preparation that answers there."""
    changes: tuple[str, ...] = ()
    seed: int | None = None
    """Its own; None: the recipe's."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.models.values(), *self.apis.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is run once everything that it needs is prepared."""

    distil: Phase
    control: Phase | None = None
    """Supervised, on as many tokens. None: the student as it was is the only one."""
    teacher: str | None = None
    """The preparation whose accuracy is the teacher's, where no run asks the teacher itself."""

    @property
    def runs(self) -> tuple[Phase, ...]:
        return (self.distil,) if self.control is None else (self.distil, self.control)

    @property
    def prepared(self) -> list[str]:
        """Names of PREPARATIONS, each after those that it needs."""
        found: dict[str, None] = {}

        def visit(names: Sequence[str]) -> None:
            for name in names:
                visit(PREPARATIONS[name].needs)
                found[name] = None

        for phase in self.runs:
            visit(phase.needs)
        return list(found)


_WARM = {"student.model": "warm_student"}
_STARTED = {"student.model": "seqkd_start"}
_HINTED = {"student.model": "hint_student"}
_BOX = {"teacher": "teacher"}

PREPARATIONS = {
    "teacher": Phase(config="teacher", scratch="teacher", seed=0),
    "second_teacher": Phase(config="teacher", scratch="teacher", changes=("loop.steps=350",), seed=1),
    "foreign_teacher": Phase(config="teacher", scratch="foreign_teacher", seed=0),
    "warm_student": Phase(config="warm_student", scratch="student"),
    "hint_student": Phase(config="hint_student", scratch="hint_student"),
    "advised_student": Phase(config="advised_student", scratch="hint_student"),
    "seqkd_start": Phase(config="seqkd", models=_WARM, apis=_BOX, changes=("loop.steps=50",)),
}

_CONTINUED = Phase(config="seqkd", models=_STARTED, apis=_BOX)

RECIPES = {
    "opd": Recipe(
        distil=Phase(config="opd", models={**_WARM, "teacher.model": "teacher"}),
        control=Phase(config="sft_control", models={**_WARM, "teacher.model": "teacher"}),
    ),
    "opsd": Recipe(
        distil=Phase(config="opsd", models=_HINTED), control=Phase(config="opsd_sft_control", models=_HINTED)
    ),
    "seqkd": Recipe(distil=Phase(config="seqkd", models=_WARM, apis=_BOX), teacher="teacher"),
    "soda": Recipe(
        distil=Phase(config="soda", models={**_STARTED, "rollout.snapshot": "warm_student"}, apis=_BOX),
        control=_CONTINUED,
        teacher="teacher",
    ),
    "gad": Recipe(
        distil=Phase(config="gad", models=_WARM, apis=_BOX),
        control=Phase(config="seqkd", models=_WARM, apis=_BOX),
        teacher="teacher",
    ),
    "ranked": Recipe(distil=Phase(config="ranked", models=_STARTED, apis=_BOX), control=_CONTINUED, teacher="teacher"),
    "advised": Recipe(
        distil=Phase(
            config="advised", models={"student.model": "advised_student"}, apis={"teacher.advisor": "teacher"}
        ),
        teacher="teacher",
    ),
    "cross_tokenizer": Recipe(
        distil=Phase(
            config="cross_tokenizer",
            models={**_WARM, "teacher.model": "foreign_teacher", "teacher.tokenizer": "foreign_teacher"},
        ),
        teacher="foreign_teacher",
    ),
    "two_teachers": Recipe(
        distil=Phase(
            config="two_teachers",
            models={
                **_WARM,
                "teacher.members.first.teacher.model": "teacher",
                "teacher.members.second.teacher.model": "second_teacher",
            },
        ),
        teacher="teacher",
    ),
}
