"""Runs as a service that was used for a while holds them: rows, events, metrics, and the folders that runs leave.

Every number follows from the arguments, so that two calls make the same service. Nothing is trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from orchestrator.reporting import Report
from orchestrator.service.runs import Failure, State
from orchestrator.service.store import Store
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.runs import NewRun
from orchestrator.service.store.schema import EVENTS, RUNS
from potstill.config_file import parse

STEPS = 600
PATHS: Mapping[State, tuple[State, ...]] = {
    State.QUEUED: (),
    State.RUNNING: (State.STARTING, State.RUNNING),
    State.WAITING_TEACHER: (State.STARTING, State.RUNNING, State.WAITING_TEACHER),
    State.PAUSED: (State.STARTING, State.RUNNING, State.PAUSING, State.PAUSED),
    State.SUCCEEDED: (State.STARTING, State.RUNNING, State.SUCCEEDED),
    State.FAILED: (State.STARTING, State.RUNNING, State.FAILED),
    State.CANCELLED: (State.STARTING, State.RUNNING, State.CANCELLED),
}
AWAY = Failure(
    type="TeacherUnavailable",
    category="teacher",
    message="teacher qwen3-32b: no answer within 600 s; the last word of it was HTTP 503",
    log_tail="10:41:07 step 231: waiting for the teacher\n10:51:07 giving up after 600 s",
)


def shown(store: Store, runs: Path, *, owner: str, key_id: str, ago_s: float = 0.0, **of_run: Any) -> None:
    """Store one run as it would be now; its folder too when it has done a step. Arguments of `of_run`: see Shown."""
    run = Shown(**of_run)
    store.runs.create(run.new(owner), Once(key_id=key_id, key=None, route="/v1/runs", body_digest=run.name))
    for state in PATHS[run.state]:
        store.runs.move(run.name, state, f"the run is {state}", run.failure if state is State.FAILED else None)
    if run.step:
        for report in run.reports(time.time() - ago_s):
            store.runs.report(run.name, report)
        run.leave(runs / run.name)
    _date(store, run, time.time() - ago_s)


def _date(store: Store, run: Shown, then: float) -> None:
    """Have it begun and ended when it would have, by its steps of two seconds."""
    worked = 2.0 * run.step
    times: dict[str, float] = {"created_at": then - worked - 40}
    if run.step:
        times |= {"started_at": then - worked, "heartbeat_at": then}
    if run.state.final:
        times["finished_at"] = then
    with store.database.writing() as db:
        db.execute(RUNS.update().where(RUNS.c.id == run.name).values(times))
        mine = (EVENTS.c.run_id == run.name) & (EVENTS.c.stream == "service")
        seqs = db.execute(sa.select(EVENTS.c.seq).where(mine).order_by(EVENTS.c.seq)).scalars().all()
        for number, seq in enumerate(seqs):
            at = then - worked - 40 + 15 * number if number < 3 else then
            db.execute(EVENTS.update().where(mine & (EVENTS.c.seq == seq)).values(time=at))


class Shown:
    """One run that pretends to have been."""

    def __init__(
        self,
        *,
        name: str,
        state: State = State.QUEUED,
        step: int = 0,
        lr: float = 5e-4,
        top: float = 0.72,
        method: str = "opd",
        notes: str = "",
        metadata: Mapping[str, str] | None = None,
        message: str = "teacher, sampler and learner agree on what they score",
        samples: Sequence[Mapping[str, Any]] | None = None,
        failure: Failure = AWAY,
    ) -> None:
        self.name, self.state, self.step, self.lr, self.top, self.method = name, state, step, lr, top, method
        self.notes, self.metadata, self.message, self.failure = notes, dict(metadata or {}), message, failure
        self._noise = random.Random(name)
        self._samples = samples

    def new(self, owner: str) -> NewRun:
        submitted = {
            "name": self.name,
            "method": self.method,
            "student": {"model": "warm-student-1b"},
            "teacher": {"kind": "server", "model": "qwen3-32b"},
            "data": {"kind": "reasoning_gym", "dataset": "basic_arithmetic"},
            "rollout": {"prompts_per_step": 8, "sampling": {"max_new_tokens": 64}},
            "optim": {"lr": self.lr, "warmup_steps": 10},
            "loop": {"steps": STEPS},
        }
        return NewRun(
            id=self.name,
            submitted=submitted,
            config=parse(submitted).model_dump(mode="json"),
            owner=owner,
            metadata=self.metadata,
            notes=self.notes,
        )

    def reports(self, now: float) -> Iterator[Report]:
        begun = now - 2.0 * self.step
        told = [(1.0, "canaries.passed", self.message, "info", {})]
        for step in range(0, self.step + 1, 100):
            accuracy = self._accuracy(step)
            data = {"stage": "between" if step else "before", "step": step, "accuracy": accuracy, "items": 128}
            told.append((2.0 * step, "eval.finished", f"accuracy {accuracy:.1%} on 128 held-out items", "info", data))
        for step in range(100, self.step + 1, 100):
            told.append((2.0 * step + 1, "checkpoint.saved", f"checkpoint of step {step}", "info", {"step": step}))
        if self.step >= 200:
            alarm = {"step": 231, "action": "warn", "value": 10.4, "bound": 10.0}
            told.append((462.0, "alarm.repetition", "one completion in ten repeats itself", "warn", alarm))
        ordered = enumerate(sorted(told, key=lambda one: one[0]), 1)
        events = [
            {"seq": seq, "time": begun + at, "type": kind, "level": level, "message": message, "data": data}
            for seq, (at, kind, message, level, data) in ordered
        ]
        yield Report.model_validate({"events": events})
        steps = [self._measured(step, begun) for step in range(1, self.step + 1)]
        for first in range(0, len(steps), 200):
            yield Report.model_validate({"metrics": steps[first : first + 200]})

    def leave(self, folder: Path) -> None:
        """Samples, spans, logs and two checkpoints."""
        (folder / "logs").mkdir(parents=True)
        (folder / "spans").mkdir()
        samples = self._samples if self._samples is not None else [
            sample(self._noise, step, right=step > 1 or rank == 2, rank=rank)
            for step in (1, *range(121, self.step + 1, 120)) for rank in range(3)
        ]  # fmt: skip
        _lines(folder / "samples.jsonl", samples)
        for process, spans in _spans(min(self.step, 40)).items():
            _lines(folder / "spans" / f"{process}.jsonl", spans)
        log = "".join(f"10:{n // 30:02d}:{2 * (n % 30):02d} step {n}: loss {2 / (n + 3):.4f}\n" for n in range(1, 90))
        (folder / "logs" / "orchestrator.log").write_text(f"── attempt 1\n{log}")
        (folder / "logs" / "learner-0.log").write_text("learner 0: 8 threads, float32\n")
        for step in (100, 200):
            if step <= self.step:
                _checkpoint(folder / "checkpoints" / f"step-{step:06d}", step)

    def _accuracy(self, step: int) -> float:
        return 0.125 + (self.top - 0.125) * (1 - math.exp(-5 * step / STEPS))

    def _measured(self, step: int, begun: float) -> dict[str, Any]:
        far, noise = 1 - math.exp(-5 * step / STEPS), self._noise
        kl = 0.09 + 0.78 * (1 - far) * (0.85 + 0.3 * noise.random()) + 0.02 * noise.random()
        return {
            "seq": step, "time": begun + 2 * step, "step": step, "loss": kl * 0.9, "reverse_kl": kl,
            "accuracy": round(8 * min(1.0, max(0.0, self._accuracy(step) + 0.3 * (noise.random() - 0.5)))) / 8,
            "entropy": 0.9 - 0.6 * far + 0.05 * noise.random(), "teacher_entropy": 0.31 + 0.03 * noise.random(),
            "completion_tokens": 38 + 20 * (1 - far) + 4 * noise.random(),
            "truncated_fraction": max(0.0, 0.3 * (1 - far) - 0.05 * noise.random()),
            "staleness_mean": 0.6 + 0.8 * noise.random(), "staleness_max": float(noise.choice((1, 2, 2, 3))),
            "tokens_per_second": 640 + 90 * noise.random(), "tokens_trained": 410.0 * step,
            "grad_norm": 0.4 + 2.0 * (1 - far) * noise.random(), "seconds_total": 2.0 * step,
            "seconds_generate": 1.1 + 0.3 * noise.random(), "seconds_train": 0.7 + 0.05 * noise.random(),
            "seconds_weights": 0.06, "weights_version": float(step),
        }  # fmt: skip


def sample(noise: random.Random, step: int, *, right: bool, rank: int = 0) -> dict[str, Any]:
    """A line of samples.jsonl: a sum worked out, with the teacher in doubt where it goes wrong."""
    a, b = noise.randint(120, 890), noise.randint(120, 890)
    total = a + b if right else a + b + noise.choice((-10, 10, 100))
    ones, tens = (a % 10) + (b % 10), (a // 10 % 10) + (b // 10 % 10)
    carry = int(ones > 9)
    text = (
        f"We add the ones first : {a % 10} + {b % 10} = {ones} .\n"
        f"Then the tens : {a // 10 % 10} + {b // 10 % 10}{' + 1' * carry} = {tens + carry} .\n"
        f"Then the hundreds .\nThe answer is {total} ."
    )
    words = re.findall(r"\S+\n?", text)
    tokens = []
    for place, word in enumerate(words):
        student = -noise.expovariate(3.0 if right else 1.2)
        teacher = min(-0.001, student + noise.gauss(0.0 if right else -0.3, 0.35 if right else 1.1))
        if word == str(total) and not right:
            teacher = student - 5.2
        text = f" {word}" if place and not words[place - 1].endswith("\n") else word
        tokens.append(token(text, 1000 + place, student, teacher, version=step - 1, trained=place != 1))
    tokens.append(token("<|im_end|>", 2, -0.01, -0.02, version=step))
    return {
        "step": step, "rollout_id": f"train-{step}/{rank}", "prompt_id": f"train-{step}",
        "prompt": f"What is {a} + {b}?", "reward": float(right), "finish_reason": "stop", "tokens": tokens,
    }  # fmt: skip


def token(
    text: str, id: int, student: float, teacher: float | None, *, version: int = 3, trained: bool = True
) -> dict[str, Any]:
    return {
        "text": text, "id": id, "student_logprob": student, "teacher_logprob": teacher, "version": version,
        "trained": trained,
    }  # fmt: skip


def _spans(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Two workers that write and score while a learner trains on what was written before."""
    start, found = 1_764_012_000.0, {name: [] for name in ("loop", "learner-0", "worker-0", "worker-1")}
    noise = random.Random(steps)

    def add(process: str, name: str, begin: float, seconds: float, **numbers: int) -> None:
        span = {"process": process, "name": name, "start": begin, "end": begin + seconds, **numbers}
        found[process].append(span)

    for step in range(1, steps + 1):
        at = start + 2.0 * step
        for worker in (0, 1):
            writing = 1.0 + 0.3 * noise.random()
            add(f"worker-{worker}", "generate", at, writing, chunk=2 * step + worker)
            add(f"worker-{worker}", "score", at + writing, 0.35 + 0.2 * noise.random(), chunk=2 * step + worker)
        add("loop", "wait:batch", at, 1.0 + 0.2 * noise.random())
        add("learner-0", "train", at + 1.1, 0.75, step=step)
        add("learner-0", "weights:publish", at + 1.86, 0.1, version=step)
        if step % 20 == 0:
            add("learner-0", "checkpoint", at + 0.1, 0.8)
    return found


def _checkpoint(folder: Path, step: int) -> None:
    files = {
        "model/model.safetensors": b"\0" * 4096,
        "model/config.json": b"{}",
        "trainer/counters.json": json.dumps({"step": step}).encode(),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listed = {name: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for name, c in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": listed}))


def _lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
