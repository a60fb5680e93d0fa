"""Time and memory of the loss, forward and backward, against the products it cannot avoid and a naive one.

    python -m bench.loss [--threads 2] [--tokens 4096] [--vocabularies 4096 32768 151936] [--repetitions 5] [--profile]

floor    the matrix products alone, into buffers that exist: logits, both gradients, and the teacher's logits where it
         is inside the learner
ours     learner.logprobs.head_loss of learner.objective.row_loss, measures included
naive    logits of all tokens at once, log_softmax, the formula, autograd; where the vocabulary is large, of fewer
         tokens, and scaled

They take turns in one process; times are medians, ratios are medians of each turn's ratio. Memory is how far a process
of its own, which does nothing else, rises above its inputs; the gradients of hidden and head are in it. Set
OMP_WAIT_POLICY=PASSIVE where other processes want the cores: ours has many short parallel regions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.aggregation import subsets
from learner.chunk import ReadAhead
from learner.facts import ORIGINS, Facts, Moment
from learner.logprobs import head_loss
from learner.objective import row_loss
from potstill.algebra.objective import Objective

HIDDEN, K, CHUNK_TOKENS = 512, 16, 512
NAIVE_LOGITS = 2**27  # at once: 512 MiB of each tensor, of which a naive loss holds many

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An objective, and whether its teacher's logits are computed here or its scores are given."""

    support: dict[str, Any]
    loss: dict[str, Any]
    inside: bool = False
    correction: str = "ignored"

    @property
    def objective(self) -> Objective:
        choices = {"support": self.support, "loss": self.loss, "correction": self.correction}
        return Objective.model_validate({"over": "student", **choices})


SAMPLED, FULL = {"kind": "sampled"}, {"kind": "full"}
STUDENT_TOPK, TEACHER_TOPK = ({"kind": f"{whose}_topk", "k": K} for whose in ("student", "teacher"))
FORWARD, REVERSE, JSD = {"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"kind": "jsd", "beta": 0.5}
CASES = {
    "sampled policy_gradient": Case(support=SAMPLED, loss={"kind": "policy_gradient"}, correction="truncated"),
    "student_topk reverse_kl": Case(support=STUDENT_TOPK, loss=REVERSE),
    "student_topk reverse_kl, inside": Case(support=STUDENT_TOPK, loss=REVERSE, inside=True),
    "teacher_topk forward_kl": Case(support=TEACHER_TOPK, loss=FORWARD),
    "teacher_topk forward_kl, inside": Case(support=TEACHER_TOPK, loss=FORWARD, inside=True),
    "full reverse_kl": Case(support=FULL, loss=REVERSE, inside=True),
    "full forward_kl": Case(support=FULL, loss=FORWARD, inside=True),
    "full jsd": Case(support=FULL, loss=JSD, inside=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768, 151936])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--profile", action="store_true", help="print where the time of ours goes instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.profile:
        for vocabulary in options.vocabularies:
            profile([CASES[name] for name in options.cases], options.tokens, vocabulary)
        return
    measured = {
        str(vocabulary): {
            name: figures(name, options.tokens, vocabulary, options.repetitions) for name in options.cases
        }
        for vocabulary in options.vocabularies
    }
    settings = {
        "tokens": options.tokens,
        "hidden": HIDDEN,
        "chunk_tokens": CHUNK_TOKENS,
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
    }
    print(json.dumps(settings | {"vocabularies": measured}, indent=2))


def figures(name: str, tokens: int, vocabulary: int, repetitions: int) -> dict[str, float]:
    """Seconds, MiB and ratios of one case at one vocabulary."""
    few = min(tokens, NAIVE_LOGITS // vocabulary // CHUNK_TOKENS * CHUNK_TOKENS or CHUNK_TOKENS)
    step, fewer = Step(CASES[name], tokens, vocabulary), Step(CASES[name], few, vocabulary)
    turns = []
    for _ in range(repetitions + 1):
        floor, ours, naive = seconds(step.floor), seconds(step.ours), seconds(fewer.naive) * tokens / few
        turns.append({"floor": floor, "ours": ours, "naive": naive, "ratio": ours / floor, "saved": naive / ours})
    median = {key: statistics.median(turn[key] for turn in turns[1:]) for key in turns[0]}  # the first warms up
    ours_mib = peak_mib("ours", name, tokens, vocabulary)
    given = gradients_mib(few, vocabulary)  # of the head above all: no more of it for more tokens
    naive_mib = gradients_mib(tokens, vocabulary) + (peak_mib("naive", name, few, vocabulary) - given) * tokens / few
    return {
        "floor_s": round(median["floor"], 4),
        "ours_s": round(median["ours"], 4),
        "naive_s": round(median["naive"], 4),
        "ours_over_floor": round(median["ratio"], 3),
        "naive_over_ours": round(median["saved"], 2),
        "ours_mib": round(ours_mib),
        "gradients_mib": round(gradients_mib(tokens, vocabulary)),
        "naive_mib": round(naive_mib),
        "naive_over_ours_memory": round(naive_mib / ours_mib, 1),
        "naive_tokens": few,
    }


def gradients_mib(tokens: int, vocabulary: int) -> float:
    return (tokens + vocabulary) * HIDDEN * 4 / 2**20


class Step:
    """Random states, heads and scores of one micro-batch, and the three ways through it."""

    def __init__(self, case: Case, tokens: int, vocabulary: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.case = case
        self.hidden = torch.randn(tokens, HIDDEN, generator=random).requires_grad_()
        self.head = (torch.randn(vocabulary, HIDDEN, generator=random) * HIDDEN**-0.5).requires_grad_()
        self.teacher: tuple[Tensor, Tensor] | None = None  # states and head
        if case.inside:
            states = self.hidden.detach() + 0.5 * torch.randn(tokens, HIDDEN, generator=random)
            self.teacher = states, self.head.detach().clone()
        self.ids = torch.randint(vocabulary, (tokens, K), generator=random)
        self.kept = torch.rand(tokens, K, generator=random).log_softmax(-1) - 0.5
        self.rest = torch.log1p(-self.kept.exp().sum(-1))

    def facts(self) -> Facts:
        tokens = len(self.hidden)
        written = {
            "token_ids": self.ids[:, 0],
            "lengths": (tokens,),
            "positions": torch.arange(tokens),
            "origin": torch.full((tokens,), ORIGINS["student"]),
        }
        if self.case.inside:
            ahead = ReadAhead(self._teacher, num_rows=tokens, window=CHUNK_TOKENS)
            return Facts(**written, teacher_logits=ahead)  # type: ignore[arg-type]
        said = {"behaviour": self.kept[:, 1], "teacher": self.kept[:, 0]}
        for ids, kept, rest in (
            ("support_ids", "teacher_support", "teacher_rest"),
            ("topk_ids", "teacher_topk", "topk_rest"),
        ):
            said |= {ids: self.ids, kept: self.kept, rest: self.rest}
        return Facts(**written, **said)  # type: ignore[arg-type]

    @torch.no_grad()
    def _teacher(self, rows: Tensor) -> Tensor:
        assert self.teacher is not None
        states, head = self.teacher
        return states[rows] @ head.T

    def ours(self) -> tuple[Tensor, ...]:
        lengths = (len(self.hidden),)
        loss_of_rows = row_loss(
            self.case.objective,
            self.facts(),
            denominators=subsets(lengths, ["student"]),
            moment=Moment(step=1, steps=1, schedule={}),
        )
        loss, _ = head_loss(self.hidden, self.head, loss_of_rows, chunk_tokens=CHUNK_TOKENS)
        return torch.autograd.grad(loss, (self.hidden, self.head))

    @torch.no_grad()
    def floor(self) -> None:
        logits = torch.zeros(CHUNK_TOKENS, len(self.head))
        grad_hidden, grad_head = torch.zeros_like(self.hidden), torch.zeros_like(self.head)
        for start in range(0, len(self.hidden), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            torch.mm(self.hidden[rows], self.head.T, out=logits)
            if self.teacher is not None:
                states, head = self.teacher
                torch.mm(states[rows], head.T, out=logits)
            torch.mm(logits, self.head, out=grad_hidden[rows])
            grad_head.addmm_(logits.T, self.hidden[rows])

    def naive(self) -> tuple[Tensor, ...]:
        logq = (self.hidden @ self.head.T).log_softmax(-1)
        logp = self._teacher(torch.arange(len(self.hidden))).log_softmax(-1) if self.case.inside else None
        loss = self._naive(logq, logp).mean()
        return torch.autograd.grad(loss, (self.hidden, self.head))

    def _naive(self, logq: Tensor, logp: Tensor | None) -> Tensor:
        case = self.case
        if case.support is SAMPLED:
            written = logq.gather(-1, self.ids[:, :1]).squeeze(-1)
            ratio = (written - self.kept[:, 1]).detach().exp().clamp(max=2.0)
            return -ratio * (self.kept[:, 0] - written).detach() * written
        if case.support is not FULL:
            ids, kept, rest = self.ids, self.kept, self.rest
            if logp is not None:
                ids = (logq if case.support is STUDENT_TOPK else logp).topk(K).indices
                kept = logp.gather(-1, ids)
                rest = torch.log1p(-kept.exp().sum(-1))
            own = logq.gather(-1, ids)
            logq = torch.cat([own, torch.log1p(-own.exp().sum(-1, keepdim=True))], -1)
            logp = torch.cat([kept, rest[:, None]], -1)
        assert logp is not None
        if case.loss is FORWARD:
            return (logp.exp() * (logp - logq)).sum(-1)
        if case.loss is REVERSE:
            return (logq.exp() * (logq - logp)).sum(-1)
        p, q = logp.exp(), logq.exp()
        logm = (0.5 * p + 0.5 * q).log()
        return 0.5 * (p * (logp - logm)).sum(-1) + 0.5 * (q * (logq - logm)).sum(-1)


def seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak_mib(which: str, name: str, tokens: int, vocabulary: int) -> float:
    """How far a process of its own rises above what it held before the run."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_rise, (which, name, tokens, vocabulary, torch.get_num_threads()))


def _rise(which: str, name: str, tokens: int, vocabulary: int, threads: int) -> float:
    torch.set_num_threads(threads)
    getattr(Step(CASES[name], 8, 64), which)()  # threads and libraries are there before the count begins
    step = Step(CASES[name], tokens, vocabulary)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = _resident_mib("VmRSS")
    getattr(step, which)()
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def profile(cases: list[Case], tokens: int, vocabulary: int) -> None:
    for case in cases:
        step = Step(case, tokens, vocabulary)
        step.ours()
        with torch.profiler.profile() as recorded:
            step.ours()
        print(case, vocabulary)
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    main()
