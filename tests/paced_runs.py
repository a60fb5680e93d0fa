"""A run whose work is sleeping: a real loop of tasks that wait for each other, and the spans that it leaves behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from potstill.spans import FOLDER, Spans


@dataclass(kw_only=True)
class PacedRun:
    """How long everything takes, in seconds. `ahead` is how many steps the workers may be ahead of the learner."""

    generate_s: float = 0.01
    score_s: float = 0.005
    train_s: float = 0.01
    weights_s: float = 0.001
    workers: int = 2
    steps: int = 4
    ahead: int = 0
    spans: dict[str, Spans] = field(default_factory=dict)

    def leave_spans(self, folder: Path) -> None:
        names = ["loop", "learner-0", *(f"worker-{number}" for number in range(self.workers))]
        self.spans = {name: Spans(folder / FOLDER / f"{name}.jsonl", name) for name in names}
        asyncio.run(self._run())
        for spans in self.spans.values():
            spans.close()

    async def _run(self) -> None:
        grants = asyncio.Semaphore(self.workers * (1 + self.ahead))
        written: asyncio.Queue[int] = asyncio.Queue()
        writing = [asyncio.create_task(self._write(number, grants, written)) for number in range(self.workers)]
        await self._train(grants, written)
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)

    async def _write(self, worker: int, grants: asyncio.Semaphore, written: asyncio.Queue[int]) -> None:
        """With leave to be ahead, a chunk is scored while the next is written."""
        chunk = worker
        scoring = set()
        spans = self.spans[f"worker-{worker}"]
        while True:
            with self.spans["loop"].span("wait:grant", worker=worker):
                await grants.acquire()
            with spans.span("generate", chunk=chunk):
                await asyncio.sleep(self.generate_s)
            scoring.add(asyncio.create_task(self._hand_in(spans, chunk, written)))
            if self.ahead == 0:
                await asyncio.wait(scoring)
            chunk += self.workers

    async def _hand_in(self, spans: Spans, chunk: int, written: asyncio.Queue[int]) -> None:
        with spans.span("score", chunk=chunk):
            await asyncio.sleep(self.score_s)
        written.put_nowait(chunk)

    async def _train(self, grants: asyncio.Semaphore, written: asyncio.Queue[int]) -> None:
        loop, learner = self.spans["loop"], self.spans["learner-0"]
        for step in range(1, self.steps + 1):
            with loop.span("wait:batch", step=step):
                for _ in range(self.workers):
                    await written.get()
            with learner.span("train", step=step):
                await asyncio.sleep(self.train_s)
            with learner.span("weights:publish", version=step):
                await asyncio.sleep(self.weights_s)
            with loop.span("weights:load", version=step):
                await asyncio.gather(*[self._load(worker, step) for worker in range(self.workers)])
            for _ in range(self.workers):
                grants.release()

    async def _load(self, worker: int, version: int) -> None:
        spans = self.spans[f"worker-{worker}"]
        with spans.span("weights:load", version=version):
            await asyncio.sleep(self.weights_s)
            with spans.span("weights:pause", version=version):
                await asyncio.sleep(self.weights_s / 4)
