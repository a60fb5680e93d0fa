"""From a config to one rollout worker's parts: engines, sources, judges, a teacher. The only place that knows them all.

Raises ConfigError for a model that is missing, TokenizerMismatch for a teacher that reads other tokens and was not
named as one that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.byte_alignment import byte_vocabulary
from potstill.calling.meter import spent_file
from potstill.config import RunConfig
from potstill.config_teachers import (
    LocalTeacher,
    OpenAITeacher,
    RemoteWriter,
    SelfTeacher,
    ServerTeacher,
    TeacherConfig,
)
from potstill.config_weights import InFlight
from potstill.environments import open_environment
from potstill.errors import TokenizerMismatch
from potstill.teachers.black_box import BlackBox
from potstill.teachers.opening import ADVISOR, TEACHER, Access, open_black_box, open_endpoint, open_scorer
from potstill.teachers.server import TeacherClient
from potstill.tokenization import fingerprint, load_tokenizer
from potstill.types import WeightsVersion
from potstill.wire import Capabilities
from rollout_worker.black_boxes import Advised, Answers, AskedOrder, LikenessOrder
from rollout_worker.collect import Advisor, Collector
from rollout_worker.engine import RolloutEngine, build_engine
from rollout_worker.following import Follower
from rollout_worker.judges import Judge, Judges, Ranked, Verifier
from rollout_worker.revision import Revised
from rollout_worker.scoring import Scoring, support_k
from rollout_worker.sources import Engine, HandOff, Source, Standing
from rollout_worker.views import Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What one run needs of one worker. `student` is the engine that new weights are for."""

    collector: Collector
    student: RolloutEngine
    in_flight: InFlight  # what becomes of what is being written when new weights come
    tokenizer: PreTrainedTokenizerBase
    follower: Follower | None
    black_boxes: Mapping[str, BlackBox]
    resources: AsyncExitStack

    async def load_weights(self, version: WeightsVersion, payload: NDArray[np.uint8]) -> int:
        """The student's new weights, and those of a teacher that follows it. Returns the version that is loaded.

        To ask again for a version that the teacher did not get is to ask for the teacher alone.
        """
        is_behind = self.follower is not None and self.follower.is_behind
        if not (is_behind and version.version == self.student.version):
            await self.student.load_weights(version, payload, in_flight=self.in_flight)
        if self.follower is not None:
            await self.follower.follow(version, payload)
        return self.student.version

    def spent(self) -> dict[str, Any]:
        """What the black boxes were asked and what they cost."""
        return {name: box.totals for name, box in self.black_boxes.items()}

    async def close(self) -> None:
        await self.resources.aclose()


async def open_worker(
    config: RunConfig, accesses: Mapping[str, Access], met: Capabilities | None, number: int
) -> Opened:
    """Load what the run needs. `accesses`: where its teachers are met, by name; `met`: what the one who scores offers;
    `number`: of this worker among the run's."""
    async with AsyncExitStack() as stack:
        opener = _Opener(config, accesses, stack, number)
        scoring = opener.scoring(met)
        return Opened(
            collector=opener.collector(scoring),
            student=opener.student(),
            in_flight=config.weights.in_flight,
            follower=opener.follower(scoring),
            tokenizer=opener.tokenizer,
            black_boxes=opener.black_boxes,
            resources=stack.pop_all(),
        )
    raise AssertionError("an exit stack lets every exception out")


class _Opener:
    """Opens each part once, and leaves what must be closed on the stack."""

    def __init__(self, config: RunConfig, accesses: Mapping[str, Access], stack: AsyncExitStack, number: int) -> None:
        self._config, self._accesses, self._stack, self._number = config, accesses, stack, number
        self.black_boxes: dict[str, BlackBox] = {}
        self.tokenizer = load_tokenizer(config.student.model)
        self._views = Views(self.tokenizer, config.teacher)
        self._verifier = Verifier(open_environment(config.data), self.tokenizer)
        self._engines: dict[tuple[str, bool], RolloutEngine] = {}
        self._asked = self._black_box()

    def student(self) -> RolloutEngine:
        return self._engine(self._config.student.model, moves=True)

    def collector(self, scoring: Scoring | None) -> Collector:
        rollout = self._config.rollout
        names = {rollout.source, rollout.beside, "student", "reference"} - {"none"}
        return Collector(
            self._config,
            views=self._views,
            sources={name: self._source(name, scoring) for name in sorted(names)},
            judges=Judges(training=self._judge(), held_out=self._verifier),
            advisor=self._advisor(),
            scoring=scoring,
            vocabulary=byte_vocabulary(self.tokenizer) if self._config.objective.reads_privacy else None,
        )

    def _source(self, name: str, scoring: Scoring | None) -> Source:
        rollout, seed = self._config.rollout, self._config.seed
        if name == "reference":
            return Standing(self.tokenizer)
        if name == "teacher" and self._asked is not None:
            return Answers(self._asked, self.tokenizer)
        own = Engine(
            engine=self.student(),
            view=self._views.teachers if rollout.view == "privileged" else self._views.own,
            sampling=rollout.sampling,
            samples=rollout.samples_per_prompt,
            seed=seed,
            is_student=True,
            support_k=support_k(self._config.objective),
        )
        if name == "student":
            return own
        end = self.tokenizer.eos_token_id
        if name == "revision":
            assert scoring is not None, "checked by the plan"
            return Revised(student=own, teacher=scoring, views=self._views, width=rollout.revision_k, end=end)
        if name == "snapshot":
            folder = rollout.snapshot or self._config.student.model
            return replace(own, engine=self._engine(folder, moves=False), view=self._views.own)
        teachers = self._engine(_teachers_folder(self._config.teacher, self._config.student.model), moves=False)
        writer = replace(own, engine=teachers, view=self._views.teachers, samples=1, is_student=False, support_k=0)
        if name == "teacher":
            return writer
        begins = replace(own, is_student=False, support_k=0)
        return HandOff(student=begins, teacher=writer, after=rollout.handoff_after, end=end)

    def _engine(self, model: str, *, moves: bool) -> RolloutEngine:
        """The engine of a model folder; one that gets new weights is nobody else's."""
        key, rollout = (model, moves), self._config.rollout
        if key not in self._engines:
            if model != self._config.student.model:
                self._require_same_tokens(model, fingerprint(load_tokenizer(model)))
            self._engines[key] = build_engine(
                rollout.engine,
                model=Path(model),
                dtype=self._config.student.dtype,
                stop_token_id=self.tokenizer.eos_token_id,
                version=0,
                threads=self._config.rollout.threads,
                max_model_len=rollout.max_prompt_tokens + rollout.sampling.max_new_tokens,
                num_draws=self._config.objective.num_draws,
                vllm=rollout.vllm,
            )
            self._stack.push_async_callback(self._engines[key].close)
        return self._engines[key]

    def _judge(self) -> Judge:
        teacher = self._config.teacher
        if not isinstance(teacher, OpenAITeacher) or teacher.ranks == "no" or self._asked is None:
            return self._verifier
        ranker = AskedOrder(self._asked, teacher.ranking) if teacher.ranks == "asked" else LikenessOrder(self._asked)
        return Ranked(ranker, self._verifier, self.tokenizer)

    def _black_box(self) -> BlackBox | None:
        """The API that is the teacher, where one is."""
        teacher = self._config.teacher
        return self._opened(teacher, TEACHER, place="teacher") if isinstance(teacher, OpenAITeacher) else None

    def _advisor(self) -> Advisor | None:
        teacher = self._config.teacher
        if not isinstance(teacher, SelfTeacher) or teacher.advisor is None:
            return None
        return Advised(self._opened(teacher.advisor, ADVISOR, place="teacher.advisor"))

    def _opened(self, config: RemoteWriter, name: str, *, place: str) -> BlackBox:
        spent = spent_file(Path(self._config.runs) / self._config.name, name, self._number)
        workers = self._config.rollout.workers
        box = open_black_box(config, self._accesses[name], place=place, spent=spent, workers=workers)
        self.black_boxes[name] = box
        self._stack.push_async_callback(box.aclose)
        return box

    def scoring(self, met: Capabilities | None) -> Scoring | None:
        teacher = self._config.teacher
        if isinstance(teacher, LocalTeacher):
            for one in teacher.models:
                self._require_same_tokens(one.model, fingerprint(load_tokenizer(one.model)))
        if met is None:
            return None
        self._require_same_tokens(met.model, met.tokenizer_fingerprint)
        scorer = open_scorer(teacher, self._accesses, student=self.tokenizer)
        self._stack.push_async_callback(scorer.aclose)
        return Scoring(scorer, met.identity, self._config.objective, hidden_size=met.hidden_size)

    def follower(self, scoring: Scoring | None) -> Follower | None:
        teacher = self._config.teacher
        if scoring is None or not isinstance(teacher, ServerTeacher) or teacher.follows == "nobody":
            return None
        pusher = None
        if self._number == 0:
            access = self._accesses[TEACHER]
            pusher = TeacherClient(open_endpoint(access.url, access.key, teacher))
            self._stack.push_async_callback(pusher.aclose)
        return Follower(scoring, pusher, ema_decay=teacher.ema_decay)

    def _require_same_tokens(self, model: str, found: str) -> None:
        if found != fingerprint(self.tokenizer):
            raise TokenizerMismatch(
                f"model {model!r} reads other tokens than student {self._config.student.model!r}: their tokenizers "
                "differ, so its scores would be of other text; a method that compares spans of text takes it when "
                "teacher.tokenizer names the folder of its tokenizer"
            )


def _teachers_folder(teacher: TeacherConfig, student: str) -> str:
    """The model that writes the teacher's text; the student's own weights where it teaches itself."""
    if isinstance(teacher, LocalTeacher):
        return teacher.models[0].model
    named = teacher.model if isinstance(teacher, ServerTeacher) else None
    return named or student
