"""What a run does beside its steps, and when: canaries, alarms, evaluations, validations, samples, checkpoints.

Each chore owns the rule of when it is due, so that the loop needs none.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.alarms import watch
from orchestrator.card import model_card
from orchestrator.crew import Crew
from orchestrator.offpolicy import Kept, OffPolicy
from orchestrator.recorder import Recorder, share_right
from orchestrator.stopping import unless_asked
from potstill import spool
from potstill.config import RunConfig
from potstill.config_teachers import OpenAITeacher, ServerTeacher
from potstill.environments import Environment
from potstill.errors import AlarmRaised
from potstill.journal import Journal
from potstill.types import Prompt, Receipt, StepBatch

SAMPLED_STEPS = 5  # steps of a run whose first rollouts are kept as samples
SAMPLES_PER_STEP = 4


class Chores:
    def __init__(
        self,
        config: RunConfig,
        *,
        crew: Crew,
        journal: Journal,
        recorder: Recorder,
        data: Environment,
        offpolicy: OffPolicy | None,
        stopping: asyncio.Event,
    ) -> None:
        """`stopping`: set when the run is asked to end, which evaluations and canaries do not hold up."""
        self._config = config
        self._crew = crew
        self._journal = journal
        self._recorder = recorder
        self._data = data
        self._offpolicy = offpolicy
        self._stopping = stopping
        self._held_out = data.held_out(config.eval.items)
        self._alarms = watch(config)
        self._saving: tuple[int, asyncio.Task[list[str]]] | None = None  # the step, and its writing
        self._saved: int | None = None
        self._trained_at: dict[str, tuple[range, ...]] = {}  # by checkpoint
        self._solutions: list[Receipt] = []  # held-out ones, on which a run with a schedule of texts is validated
        self.accuracy: dict[str, float] = {}

    async def before(self, extra: Mapping[str, Any]) -> None:
        """The student as it is, and the teacher where a rollout worker holds it; one that is paid is not examined.

        `extra` is what a checkpoint kept of this: a run that goes on from one has been examined.
        """
        if extra:
            self._load(extra)
            return
        await self._evaluate("before", self._held_out)
        held = not isinstance(self._config.teacher, OpenAITeacher)
        if held and "teacher" in {self._config.rollout.source, self._config.rollout.beside}:
            await self._evaluate("teacher", self._held_out)
        if self._offpolicy is not None:
            await self._validate(self._offpolicy)

    async def canaries(self, batch: StepBatch) -> None:
        """On the first batch, where a teacher behind HTTP scores what the student wrote."""
        if batch.step > 1 or not self._scored_over_http:
            return
        found: dict[str, Any] = await unless_asked(self._stopping, self._crew.check(batch))
        self._journal.event("canaries.passed", "teacher, sampler and learner agree on what they score", **found)

    async def after_step(self, batch: StepBatch, trained: Sequence[range]) -> None:
        """`trained`: the prompts whose steps are done. Raises AlarmRaised when the run must not go on.

        The evaluation is after what a checkpoint keeps: being asked to stop ends it, and leaves one."""
        step = batch.step
        await self._look(step, trained)
        every = max(1, self._config.loop.steps // SAMPLED_STEPS)
        if (step - 1) % every == 0 or step == self._config.loop.steps:
            await self._sample(batch)
        if self._offpolicy is not None:
            await self._schedule(self._offpolicy, batch)
        if self._config.eval.every and step % self._config.eval.every == 0 and step < self._config.loop.steps:
            await self._evaluate("between", self._held_out[: self._config.eval.items_between])
        await self._announce(wait=False)
        if self._config.checkpoint.every and step % self._config.checkpoint.every == 0:
            await self._save(trained)

    async def after(self, trained: Sequence[range]) -> None:
        await self._evaluate("after", self._held_out)
        await self.stop(trained)

    async def stop(self, trained: Sequence[range]) -> None:
        """Leave a checkpoint of the step that is done."""
        with self._recorder.spans.span("checkpoint"):
            await self._save(trained)
            await self._announce(wait=True)

    async def _evaluate(self, stage: str, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            return
        who: Literal["student", "teacher"] = "teacher" if stage == "teacher" else "student"
        with self._recorder.spans.span("evaluate"):
            verdicts = await unless_asked(self._stopping, self._crew.evaluate(prompts, who))
        rewards = [reward for verdict in verdicts for reward in verdict.rewards]
        accuracy = share_right(rewards)
        self.accuracy[stage] = accuracy
        self._journal.event(
            "eval.finished",
            f"accuracy {accuracy:.1%} on {len(rewards)} held-out items",
            stage=stage,
            step=self._recorder.steps_done,
            accuracy=accuracy,
            items=len(rewards),
            tokens_trained=self._recorder.tokens_trained,
            completion_tokens=sum(verdict.num_tokens for verdict in verdicts) / len(rewards),
            truncated=sum(verdict.num_truncated for verdict in verdicts),
        )

    async def _schedule(self, offpolicy: OffPolicy, batch: StepBatch) -> None:
        """What the schedule of texts learns from a step, before the step that it then decides can be granted."""
        if batch.step % offpolicy.config.validate_every == 0:
            await self._validate(offpolicy)
        written = [receipt for receipt in batch.receipts if receipt.oldest_version >= 0]
        prompts = [receipt.index // self._config.rollout.samples_per_prompt for receipt in written]
        texts = await self._crew.completions(written)
        offpolicy.trained(batch.step, [Kept(prompt=p, ids=tuple(ids)) for p, ids in zip(prompts, texts, strict=True)])

    async def _look(self, step: int, trained: Sequence[range]) -> None:
        """Sound the alarms of the step. One that pauses the run leaves a checkpoint first."""
        values = self._recorder.latest
        if step == 1 and (silent := self._alarms.silent(values)):
            self._journal.event("alarms.silent", f"alarms without a voice in this run: {', '.join(silent)}", **silent)
        found = self._alarms.look(step, values)
        for alarm in found:
            self._journal.event(
                f"alarm.{alarm.name}",
                alarm.message,
                level=alarm.level,
                step=alarm.step,
                action=alarm.action,
                value=alarm.value,
                bound=alarm.bound,
            )
        grave = [alarm for alarm in found if alarm.action != "warn"]
        if any(alarm.action == "pause" for alarm in grave):
            await self.stop(trained)
        if grave:
            raise AlarmRaised("; ".join(alarm.message for alarm in grave))

    def _load(self, extra: Mapping[str, Any]) -> None:
        """What `_save` kept."""
        self.accuracy = {stage: math.nan if value is None else value for stage, value in extra["accuracy"].items()}
        self._alarms.load(extra["alarms"])
        if self._offpolicy is not None:
            self._offpolicy.load(extra["offpolicy"])

    async def _validate(self, offpolicy: OffPolicy) -> None:
        if not self._solutions:
            held_out = self._data.held_out(offpolicy.config.validate_items)
            self._solutions = await self._crew.given([dataclasses.replace(p, text="given") for p in held_out])
        loss = await self._crew.validate(self._solutions)
        offpolicy.validated(loss)
        self._journal.event(
            "validation.finished",
            f"loss {loss:.4f} on {len(self._solutions)} held-out solutions; {offpolicy.share:.0%} student's text ahead",
            step=self._recorder.steps_done,
            loss=loss,
            share=offpolicy.share,
        )

    async def _sample(self, batch: StepBatch) -> None:
        for record in await self._crew.describe(batch.receipts[:SAMPLES_PER_STEP]):
            self._journal.sample({"step": batch.step, **record})

    async def _save(self, trained: Sequence[range]) -> None:
        """Begin to write a checkpoint of the step that is done; training goes on meanwhile."""
        step = self._recorder.steps_done
        folder = self._journal.folder / "checkpoints" / f"step-{step:06d}"
        await self._announce(wait=True)
        if self._saved == step:
            return
        card = model_card(self._config, step=step, tokens_trained=self._recorder.tokens_trained, accuracy=self.accuracy)
        extra: dict[str, Any] = {
            "accuracy": self.accuracy,
            "trained": [[some.start, some.stop] for some in trained],
            "alarms": self._alarms.state(),
            "offpolicy": None if self._offpolicy is None else self._offpolicy.state(),
        }
        self._trained_at[folder.name] = tuple(trained)
        await self._crew.save(folder, card=card, extra=extra)
        self._saving = (step, asyncio.create_task(self._crew.saved()))

    async def _announce(self, *, wait: bool) -> None:
        """Say that a checkpoint is durable, once it is, and drop the rollouts that none needs any more."""
        if self._saving is None or not (wait or self._saving[1].done()):
            return
        (step, writing), self._saving = self._saving, None
        kept = await writing
        self._saved = step
        self._journal.sync()
        self._journal.event("checkpoint.saved", f"checkpoint of step {step}", step=step, path=kept[-1])
        self._drop_rollouts(older_than=Path(kept[0]).name)

    def _drop_rollouts(self, *, older_than: str) -> None:
        """Of the spool, what every checkpoint that is kept has behind it; `older_than` names the oldest."""
        trained = self._trained_at.get(older_than, ())
        self._trained_at = {name: some for name, some in self._trained_at.items() if name >= older_than}
        spool.prune(self._journal.folder / "rollouts", trained=lambda index: any(index in some for some in trained))

    @property
    def _scored_over_http(self) -> bool:
        """Whether the loss is of what a teacher behind HTTP said of the student's text, and 0 where they agree."""
        rollout = self._config.rollout
        alone = rollout.source == "student" and rollout.beside == "none" and rollout.adaptive is None
        only_teacher = all(term.vanishes_at_teacher for term in self._config.objective.terms.values())
        return alone and only_teacher and isinstance(self._config.teacher, ServerTeacher)
