"""What a run does beside its steps, and when: canaries, evaluations, samples, checkpoints.

Each chore owns the rule of when it is due, so that the loop needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.card import model_card
from orchestrator.crew import Crew
from orchestrator.recorder import Recorder, share_right
from potstill.config import RunConfig, ServerTeacher
from potstill.environments import Environment
from potstill.journal import Journal
from potstill.types import Prompt, StepBatch

SAMPLED_STEPS = 5  # steps of a run whose first rollouts are kept as samples
SAMPLES_PER_STEP = 4


class Chores:
    def __init__(
        self, config: RunConfig, *, crew: Crew, journal: Journal, recorder: Recorder, data: Environment
    ) -> None:
        self._config = config
        self._crew = crew
        self._journal = journal
        self._recorder = recorder
        self._held_out = data.held_out(config.eval.items)
        self.accuracy: dict[str, float] = {}

    async def before(self) -> None:
        """The student as it is, and the teacher where a rollout worker holds it."""
        await self._evaluate("before", self._held_out)
        if "teacher" in {self._config.rollout.source, self._config.rollout.beside}:
            await self._evaluate("teacher", self._held_out)

    async def canaries(self, batch: StepBatch) -> None:
        """On the first batch, where a teacher behind HTTP scores what the student wrote."""
        if batch.step > 1 or not self._scored_over_http:
            return
        found = await self._crew.check(batch)
        self._journal.event("canaries.passed", "teacher, sampler and learner agree on what they score", **found)

    async def after_step(self, batch: StepBatch) -> None:
        step = batch.step
        every = max(1, self._config.loop.steps // SAMPLED_STEPS)
        if (step - 1) % every == 0 or step == self._config.loop.steps:
            await self._sample(batch)
        if self._config.eval.every and step % self._config.eval.every == 0 and step < self._config.loop.steps:
            await self._evaluate("between", self._held_out[: self._config.eval.items_between])
        if self._config.checkpoint.every and step % self._config.checkpoint.every == 0:
            await self._save()

    async def after(self) -> None:
        await self._evaluate("after", self._held_out)
        await self._save()

    async def _evaluate(self, stage: str, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            return
        verdicts = await self._crew.evaluate(prompts, "writer" if stage == "teacher" else "student")
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

    async def _sample(self, batch: StepBatch) -> None:
        for record in await self._crew.describe(batch.receipts[:SAMPLES_PER_STEP]):
            self._journal.sample({"step": batch.step, **record})

    async def _save(self) -> None:
        step = self._recorder.steps_done
        folder = self._journal.folder / "checkpoints" / f"step-{step:06d}"
        if folder.exists():
            return
        folder.parent.mkdir(exist_ok=True)
        card = model_card(self._config, step=step, tokens_trained=self._recorder.tokens_trained, accuracy=self.accuracy)
        await self._crew.save(folder, card=card, extra={"tokens_trained": self._recorder.tokens_trained})
        self._journal.event("checkpoint.saved", f"checkpoint of step {step}", step=step, path=str(folder))

    @property
    def _scored_over_http(self) -> bool:
        """Whether the loss is of what a teacher behind HTTP said of the student's text, and 0 where they agree."""
        alone = self._config.rollout.source == "student" and self._config.rollout.beside == "none"
        only_teacher = all(term.vanishes_at_teacher for term in self._config.objective.terms.values())
        return alone and only_teacher and isinstance(self._config.teacher, ServerTeacher)
