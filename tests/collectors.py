"""A collector of small parts, as rollout_worker/opening.py would put it together of large ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from potstill.byte_alignment import byte_vocabulary
from potstill.config import RunConfig
from potstill.environments import Environment
from rollout_worker.collect import Collector
from rollout_worker.judges import Judges, Verifier
from rollout_worker.scoring import Scoring, support_k
from rollout_worker.sources import Engine, Source, Standing
from rollout_worker.views import Views
from tests.builders_teacher import IDENTITY


def collector_of(
    config: RunConfig,
    environment: Environment,
    tokenizer: Any,
    *,
    student: Any,
    writer: Any = None,
    snapshot: Any = None,
    teacher: Any = None,
    **parts: Any,
) -> Collector:
    """`student`, `writer` and `snapshot` are engines, `teacher` a scorer; `parts` are the collector's own, in place of
    the usual."""
    views = Views(tokenizer, config.teacher)
    own = Engine(
        engine=student,
        view=views.teachers if config.rollout.view == "privileged" else views.own,
        sampling=config.rollout.sampling,
        samples=config.rollout.samples_per_prompt,
        seed=config.seed,
        is_student=True,
        support_k=support_k(config.objective),
    )
    sources: dict[str, Source] = {"student": own, "reference": Standing(tokenizer)}
    if writer is not None:
        sources["teacher"] = replace(own, engine=writer, view=views.teachers, samples=1, is_student=False, support_k=0)
    if snapshot is not None:
        sources["snapshot"] = replace(own, engine=snapshot, view=views.own)
    verifier = Verifier(environment, tokenizer)
    usual = {
        "sources": sources,
        "judges": Judges(training=verifier, held_out=verifier),
        "advisor": None,
        "vocabulary": byte_vocabulary(tokenizer) if config.objective.reads_privacy else None,
        "scoring": None if teacher is None else Scoring(teacher, IDENTITY, config.objective, hidden_size=0),
    }
    return Collector(config, views=views, **(usual | parts))
