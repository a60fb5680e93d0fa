"""One rank of the learner as a Ray actor: fetches references, calls the trainer, sends weights, writes checkpoints.

Thin on purpose: no maths, no decisions. One method call at a time, but for signs of life and the writing of what was
captured. torch is imported in the actor's own process, so that whoever launches it needs none.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from potstill import bundles
from potstill.config import RunConfig, ScratchConfig
from potstill.fencing import Fence
from potstill.journal import checkpoints
from potstill.manifest import newest_good
from potstill.process_log import log_of, write_to
from potstill.spans import FOLDER, Spans
from potstill.transports.route import Route
from potstill.types import Gathering, Receipt, StartingPoint, StepBatch, StepReport, WeightsVersion
from potstill.wire import Capabilities

if TYPE_CHECKING:
    from learner.parallel import Joined
    from learner.publish import Sender
    from learner.ranks import Ranks
    from learner.trainer import Trainer

MEETING_S = 600.0  # of ranks; that one of them is silent is noticed sooner, by its pulse

aside = ray.method(concurrency_group="aside")  # answered while a step is being made

Method = TypeVar("Method", bound=Callable[..., Any])


def collective(method: Method) -> Method:
    """A verb in which ranks meet. One that fails leaves, so that the others, who wait for it, fail at once."""

    @functools.wraps(method)
    def together(learner: Learner, *arguments: Any) -> Any:
        try:
            return method(learner, *arguments)
        except BaseException:
            joined, learner.joined = learner.joined, None
            if joined is not None:
                joined.leave()
            raise

    return together  # type: ignore[return-value]


class Learner:
    """Holds one run's trainer at a time; `open` starts another run in the same process."""

    def __init__(self) -> None:
        from learner import canaries, checkpoint, scratch

        self._canaries, self._checkpoint, self._scratch = canaries, checkpoint, scratch
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.joined: Joined | None = None  # the ranks, where there are several
        self._trainer: Trainer | None = None
        self._sender: Sender | None = None

    def gather(self, fence: Fence, num_ranks: int) -> Gathering:
        """What rank 0 decides for all: where they meet, and the checkpoint that they go on from."""
        checkpoint, damaged = newest_good(fence.folder / "checkpoints")
        found = Gathering(checkpoint=checkpoint, damaged=tuple(damaged), host="", port=0)
        if num_ranks == 1:
            return found
        from learner.parallel import meeting

        host = ray.util.get_node_ip_address()
        self._meeting = meeting(host)  # is there for as long as this process
        return replace(found, host=host, port=self._meeting.port)

    @collective
    def open(
        self, config: RunConfig, met: Capabilities | None, fence: Fence, rank: int, gathering: Gathering, route: Route
    ) -> StartingPoint:
        """Load the student, where the run stands by the checkpoint, and publish it.

        met    what the teacher offers that scores from outside, where one does
        fence  of the attempt that this is
        route  of the weights to the workers
        Raises ConfigError when the student cannot be loaded.
        """
        import torch

        from learner.model import load_student, recompute_layers
        from learner.publish import open_sender
        from learner.sent_states import SentStates
        from learner.trainer import Trainer

        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.seed)
        self._config, self._fence = config, fence
        self._tokenizer = self._checkpoint.tokenizer_files(Path(config.student.model))
        self._spans = Spans(fence.folder / FOLDER / f"learner-{rank}.jsonl", f"learner-{rank}")
        write_to(log_of(fence.folder, f"learner-{rank}"))
        ranks = self._meet(rank, config.learner.ranks, gathering)
        student = load_student(config.student, seed=config.seed, device=ranks.home)
        student = ranks.shard(recompute_layers(student) if config.learner.recompute else student)
        self._trainer = Trainer(config, student, SentStates.of(config, met, student))
        self._route = route
        if self._sender is not None:
            self._sender.close()
        host = ray.util.get_node_ip_address()
        self._sender = open_sender(route, folder=fence.folder / "weights", host=host) if rank == 0 else None
        checkpoint = gathering.checkpoint
        extra = {} if checkpoint is None else self._checkpoint.restore(self._trainer, checkpoint)
        return StartingPoint(published=self.publish(), extra=extra, damaged=gathering.damaged)

    def create(self, folder: str, architecture: ScratchConfig, texts: list[str], seed: int) -> None:
        """Write a model folder from nothing, replacing what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        self._scratch.create(Path(folder), architecture, texts=texts, seed=seed)

    @collective
    def check(self, batch: StepBatch, num_rollouts: int) -> dict[str, float]:
        """The canaries, on the first rollouts of the first batch."""
        return self._canaries.check(self.trainer, bundles.rollouts(batch.receipts[:num_rollouts]))

    @collective
    def step(self, batch: StepBatch) -> StepReport:
        from learner.aggregation import Denominators
        from learner.targets import fresh

        with self._spans.span("wait:bundles", step=batch.step):
            rollouts = bundles.rollouts(batch.receipts)
        denominators = Denominators(num_loss_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        with self._spans.span("train", step=batch.step):
            return self.trainer.step(fresh(rollouts, batch.oldest_version), step=batch.step, denominators=denominators)

    @collective
    def validate(self, receipts: Sequence[Receipt]) -> float:
        return self.trainer.validate(bundles.rollouts(receipts))

    @collective
    def annotate(self, receipts: Sequence[Receipt]) -> list[list[float] | None]:
        """Per rollout, the self-teacher's log-prob of every token; None without a self-teacher."""
        return [self.trainer.teacher_logprobs(scored) for scored in bundles.rollouts(receipts)]

    @collective
    def publish(self) -> WeightsVersion | None:
        """Send the current weights. All ranks put them together; rank 0 has the version."""
        from learner.publish import gathered

        trainer = self.trainer
        with self._spans.span("weights:publish", version=trainer.version):
            if self._sender is not None:
                return self._sender.publish(trainer.student, version=trainer.version)
            gathered(trainer.student, self._route)
            return None

    @collective
    def save(self, folder: str, card: str, extra: Mapping[str, Any]) -> None:
        """Copy what decides the next number; rank 0 begins to write it, once it has written what came before."""
        self._written()
        with self._spans.span("checkpoint", version=self.trainer.version):
            captured = self._checkpoint.capture(self.trainer)
        if self.trainer.student.ranks.rank == 0:
            self._writing = self._writer.submit(self._write, captured, Path(folder), card, extra)

    @aside  # type: ignore[untyped-decorator]
    def saved(self) -> list[str]:
        """Wait for what is being written. Returns the checkpoints on disk. Raises RunError when the disk refuses."""
        self._written()
        return [str(folder) for folder in checkpoints(self._fence.folder / "checkpoints")]

    @aside  # type: ignore[untyped-decorator]
    def beat(self) -> None:
        """A sign of life."""

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("open a run first")
        return self._trainer

    def _meet(self, rank: int, num_ranks: int, gathering: Gathering) -> Ranks:
        """The other ranks, met once and for all runs of these processes."""
        from learner.ranks import Alone

        if num_ranks == 1:
            return Alone()
        if self.joined is None:
            from learner.parallel import Joined

            self.joined = Joined.join(
                rank=rank, size=num_ranks, host=gathering.host, port=gathering.port, timeout_s=MEETING_S
            )
        return self.joined

    def _write(self, captured: Any, folder: Path, card: str, extra: Mapping[str, Any]) -> None:
        self._checkpoint.write(captured, folder, card=card, tokenizer=self._tokenizer, extra=extra, fence=self._fence)
        self._checkpoint.prune(folder.parent, keep=self._config.checkpoint.keep)

    def _written(self) -> None:
        if self._writing is not None:
            self._writing.result()
