"""Stand-ins for what is behind an actor's handle: to write, score, load, step is to wait as long as Cost says."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.types import Bundle, FinishReason, Prompt, Receipt, StepBatch, StepReport, WeightsVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """How long the stand-ins take, in seconds and tokens a second; all of it `faster` times faster."""

    slots: int = 16  # rollouts that a worker writes at once
    tokens_per_s: float = 50.0  # of each of them
    mean_tokens: float = 10_000.0
    sigma: float = 0.5  # lengths are log-normal
    max_tokens: int = 24_000
    scored_tokens_per_s: float = 20_000.0  # of a rollout, after it is written
    load_s: float = 2.0  # during which a worker's writing stands still
    publish_s: float = 2.0
    step_share: float = 0.8  # of the time that the workers write for a step, which the learner takes for it
    faster: float = 1.0

    def tokens(self, source: random.Random) -> int:
        mu = math.log(self.mean_tokens) - self.sigma**2 / 2
        return min(self.max_tokens, 1 + int(source.lognormvariate(mu, self.sigma)))

    def ideal(self, workers: int) -> float:
        """Tokens a second that so many write when none of them ever waits."""
        return workers * self.slots * self.tokens_per_s * self.faster

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.faster)


class SimulatedWorker:
    """A rollout worker's calls; its texts are numbers."""

    def __init__(self, number: int, cost: Cost, store: Callable[[], Any] | None = None) -> None:
        """`store`: puts something into the object store that stands for the rollouts of a call."""
        self._cost = cost
        self._store = store
        self._random = random.Random(number)
        self._slots = asyncio.Semaphore(cost.slots)
        self._version = 0
        self._stood_still = 0.0

    async def rollout(self, chunk: range, prompts: Sequence[Prompt], oldest: int) -> list[list[Receipt]]:
        texts = await asyncio.gather(*[self._text() for _ in chunk])
        bundle = Bundle(
            ref=None if self._store is None else self._store(),
            path=f"/runs/a-run/rollouts/{chunk.start:09d}-{chunk.stop - 1:09d}.safetensors",
        )
        return [
            [self._receipt(prompt, bundle, position, *text)]
            for position, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]

    async def load_weights(self, version: WeightsVersion) -> int:
        self._stood_still += self._cost.load_s
        await self._cost.wait(self._cost.load_s)
        self._version = version.version
        return self._version

    async def describe(self, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        return []

    async def beat(self) -> None:
        pass

    async def _text(self) -> tuple[int, int]:
        """Write and score one: (tokens, version of the first of them)."""
        tokens = self._cost.tokens(self._random)
        async with self._slots:
            version, left = self._version, tokens / self._cost.tokens_per_s
            while left:
                before = self._stood_still
                await self._cost.wait(left)
                left = self._stood_still - before
        await self._cost.wait(tokens / self._cost.scored_tokens_per_s)
        return tokens, version

    def _receipt(self, prompt: Prompt, bundle: Bundle, position: int, tokens: int, version: int) -> Receipt:
        return Receipt(
            rollout_id=f"{prompt.id}/0",
            prompt_id=prompt.id,
            index=prompt.index,
            domain=prompt.domain,
            oldest_version=version,
            num_prompt_tokens=64,
            num_completion_tokens=tokens,
            num_loss_tokens=tokens,
            num_unscored_tokens=0,
            finish_reason=FinishReason.LENGTH if tokens == self._cost.max_tokens else FinishReason.STOP,
            reward=math.nan,
            generate_s=tokens / self._cost.tokens_per_s,
            score_s=tokens / self._cost.scored_tokens_per_s,
            repetition=0.5,
            bundle=bundle,
            position=position,
        )


class SimulatedLearner:
    """A learner's calls; its weights are a number."""

    def __init__(self, cost: Cost, workers: int) -> None:
        self._cost = cost
        self._tokens_per_s = cost.ideal(workers) / cost.step_share / cost.faster
        self._version = 0

    async def check(self, batch: StepBatch, num_rollouts: int) -> dict[str, float]:
        return {}

    async def step(self, batch: StepBatch) -> StepReport:
        await self._cost.wait(batch.num_loss_tokens / self._tokens_per_s)
        self._version = batch.step
        return StepReport(step=batch.step, metrics={"loss": 0.0, "reverse_kl": 0.0}, seconds={})

    async def publish(self) -> WeightsVersion:
        await self._cost.wait(self._cost.publish_s)
        return published(self._version)

    async def annotate(self, receipts: Sequence[Receipt]) -> list[None]:
        return []

    async def beat(self) -> None:
        pass


def published(version: int) -> WeightsVersion:
    return WeightsVersion(version=version, digest="", checksums=(), tensors=(), payload=None)
