"""ScoringTeacher: a backbone, its tokenizer and its name make a teacher that scores tokens exactly.

The backbone computes hidden states of a batch; jobs that ask for the same things then share one pass over the head.
A score without finite numbers is never sent: its job comes back FAILED, with NaN everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.heads import BLOCK_ROWS, head_digest
from potstill.tokenization import fingerprint, load_tokenizer
from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from teacher_server.backbone import Backbone
from teacher_server.batching import Job
from teacher_server.scoring import RowScores, score_rows

_DIGEST_DIGITS = 16
_TAILS = {"topk_tail", "ids_tail"}  # -inf where nothing is left, which is a number like others


class ScoringTeacher:
    """What admission and the queue know as the teacher. `score` is not thread-safe: one thread calls it.

    `folder` holds the tokenizer, and the weights whose digest is the revision when none is given.
    Raises ConfigError when it holds no tokenizer with a chat template.
    """

    def __init__(
        self, backbone: Backbone, folder: Path, *, name: str, revision: str | None = None, chunk_rows: int = 1024
    ) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.identity = TeacherIdentity(
            name=name,
            revision=revision or weights_digest(folder),
            tokenizer_fingerprint=fingerprint(self.tokenizer),
        )
        self._backbone = backbone
        self._chunk_rows = chunk_rows
        rows, self.hidden_size = backbone.head.shape
        self.vocabulary = min(len(self.tokenizer), rows)
        self.context_length = backbone.context_length
        self.head_id = head_id(backbone.head)

    @torch.inference_mode()
    def score(self, jobs: Sequence[Job]) -> list[TeacherScores]:
        """Score a batch. A job whose numbers are not finite comes back FAILED, with NaN for every number."""
        hidden = self._backbone.hidden_states(jobs)
        scores: dict[int, TeacherScores] = {}
        for members in _alike(jobs):
            rows = self._score_alike([jobs[index] for index in members], [hidden[index] for index in members])
            scores |= zip(members, rows, strict=True)
        return [scores[index] for index in range(len(jobs))]

    def load_weights(self, weights: Mapping[str, Tensor], *, revision: str) -> None:
        """Become the teacher with these weights; see Backbone. Between two batches, never during one."""
        self._backbone.load_weights(weights)
        self.head_id = head_id(self._backbone.head)
        self.identity = TeacherIdentity(
            name=self.identity.name,
            revision=revision,
            tokenizer_fingerprint=self.identity.tokenizer_fingerprint,
        )

    def _score_alike(self, jobs: Sequence[Job], hidden: Sequence[Tensor]) -> list[TeacherScores]:
        """Score jobs that ask for the same things in one pass over the head."""
        head, ask = self._backbone.head, jobs[0].ask

        def joined(rows: Sequence[NDArray[Any]]) -> Tensor:
            return torch.from_numpy(np.concatenate(rows)).to(head.device)

        ids = [job.token_ids for job in jobs if job.token_ids is not None]
        rows = score_rows(
            torch.cat(list(hidden)),
            head,
            targets=joined([job.completion_ids for job in jobs]).long(),
            token_ids=joined(ids).long() if ids else None,
            ask=ask,
            uniforms=joined([_uniforms(job) for job in jobs]) if ask.draws else None,
            vocabulary=self.vocabulary,
            chunk_rows=self._chunk_rows,
        )
        ends = np.cumsum([len(job.completion_ids) for job in jobs])
        return [
            _to_scores(rows, slice(end - len(job.completion_ids), end), job, self.identity)
            for job, end in zip(jobs, ends, strict=True)
        ]


def weights_digest(folder: Path) -> str:
    """First 16 hex digits of the sha256 over the folder's weight files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:_DIGEST_DIGITS]


def head_id(head: Tensor) -> str:
    """The digest of a head [V, H] in whatever precision."""
    return head_digest(block.float().cpu().numpy() for block in torch.split(head, BLOCK_ROWS))


def _alike(jobs: Sequence[Job]) -> list[list[int]]:
    """Indices of jobs, grouped by what they ask for."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(astuple(job.ask), []).append(index)
    return list(groups.values())


def _uniforms(job: Job) -> NDArray[np.float64]:
    """[T, draws] of [0, 1), by the job's own seed alone: its company in a batch changes none of its draws."""
    return np.random.default_rng(job.seed).random((len(job.completion_ids), job.ask.draws))


def _to_scores(rows: RowScores, where: slice, job: Job, identity: TeacherIdentity) -> TeacherScores:
    """One job's rows, or FAILED where a number is not finite."""
    asked = {field.name: getattr(rows, field.name) for field in fields(RowScores)}
    columns = {name: column[where] for name, column in asked.items() if column is not None}
    if not all(bool(column.isfinite().all()) for name, column in columns.items() if name not in _TAILS):
        return job.unscored(identity, ScoreStatus.FAILED)
    arrays = {name: _as_numpy(column) for name, column in columns.items()}
    return TeacherScores(status=ScoreStatus.OK, identity=identity, **arrays)


def _as_numpy(column: Tensor) -> NDArray[Any]:
    """Ids as int32, bfloat16 as its bits, which numpy cannot name; float32 as it is."""
    if column.dtype == torch.int64:
        column = column.int()
    return (column.view(torch.uint16) if column.dtype == torch.bfloat16 else column).cpu().numpy()
