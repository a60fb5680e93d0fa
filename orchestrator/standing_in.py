"""A run that goes on when the folder its student began in is gone: a checkpoint of its own stands in for it.

Of a student all of whose weights are trained, a checkpoint has all that the folder had: weights, tokenizer, chat
template. What reads the student as the run found it has no stand-in, for no checkpoint has that: the base of an
adapter, a frozen teacher or reference, a model that writes and never changes.
"""

from __future__ import annotations

from pathlib import Path

from potstill.config import RunConfig
from potstill.config_teachers import SelfTeacher
from potstill.journal import KEPT
from potstill.manifest import newest_good


def with_a_student(config: RunConfig) -> RunConfig:
    """The config as it is; where its student's folder is gone and nothing else will do, with the newest sound
    checkpoint's.

    The run then begins with that checkpoint, which is marked: it is still there for a process that loads it late.
    """
    if Path(config.student.model).exists() or _reads_the_beginning(config):
        return config
    own, _ = newest_good(Path(config.runs) / config.name / "checkpoints")
    if own is None:
        return config
    (own / KEPT).touch()
    student = config.student.model_copy(update={"model": str(own / "model")})
    return config.model_copy(update={"student": student})


def _reads_the_beginning(config: RunConfig) -> bool:
    """Whether something needs the student as the run found it."""
    teacher, rollout = config.teacher, config.rollout
    frozen = isinstance(teacher, SelfTeacher) and teacher.weights in {"frozen", "trust_region"}
    written = isinstance(teacher, SelfTeacher) and {"teacher", "handoff"} & {rollout.source, rollout.beside}
    snapshot = rollout.source == "snapshot" and rollout.snapshot is None
    return bool(frozen or written or snapshot or config.student.lora or config.objective.reads_reference)
