"""TransformersTeacher: a causal language model that scores tokens exactly. The one file here that loads a model.

A batch is right-padded: in a causal model no position sees what stands to its right, so padding needs no mask and
changes nothing. Only the hidden states of completion positions go through the head, a chunk of rows at a time.

It refuses weights that are not safetensors, folders that bring code, checkpoints with missing tensors, and
architectures whose logits are more than head(hidden), for which its scores would be silently wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from potstill.errors import ConfigError
from potstill.tokenization import fingerprint, load_tokenizer
from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from teacher_server.batching import Job
from teacher_server.scoring import RowScores, score_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TransformersTeacher:
    """A model folder, loaded. `score` is not thread-safe: one thread calls it.

    Raises ConfigError when the folder is missing, damaged, or not a causal language model it can score with.
    """

    def __init__(
        self, folder: Path, *, name: str, dtype: str, revision: str | None = None, chunk_rows: int = 1024
    ) -> None:
        self.tokenizer = load_tokenizer(folder)
        self._model = _load_model(folder, DTYPES[dtype])
        self._chunk_rows = chunk_rows
        _check_head(self._model)
        self.identity = TeacherIdentity(
            name=name,
            revision=revision or weights_digest(folder),
            tokenizer_fingerprint=fingerprint(self.tokenizer),
        )
        config = self._model.config.get_text_config()
        self.vocabulary = min(len(self.tokenizer), config.vocab_size)
        self.context_length = int(config.max_position_embeddings)

    def score(self, jobs: Sequence[Job]) -> list[TeacherScores]:
        """Score a batch. A job whose numbers are not finite comes back FAILED, with NaN for every number."""
        with torch.inference_mode():
            hidden = _hidden_states(self._model, jobs)
            scores: dict[int, TeacherScores] = {}
            for members in _alike(jobs):
                rows = self._score_alike([jobs[index] for index in members], [hidden[index] for index in members])
                scores |= zip(members, rows, strict=True)
        return [scores[index] for index in range(len(jobs))]

    def _score_alike(self, jobs: Sequence[Job], hidden: Sequence[Tensor]) -> list[TeacherScores]:
        """Score jobs that ask for the same things in one pass over the head."""
        ids = [job.token_ids for job in jobs if job.token_ids is not None]
        rows = score_rows(
            torch.cat(list(hidden)),
            self._model.get_output_embeddings(),
            targets=torch.from_numpy(np.concatenate([job.completion_ids for job in jobs])).long(),
            token_ids=torch.from_numpy(np.concatenate(ids)).long() if ids else None,
            top_k=jobs[0].top_k,
            entropy=jobs[0].entropy,
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
    return digest.hexdigest()[:16]


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder}: has no *.safetensors weights")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: is not a causal language model that transformers can load") from error
    if report["missing_keys"]:
        raise ConfigError(f"{folder}: weights lack {len(report['missing_keys'])} tensors; they would be random")
    return model.eval()


def _check_head(model: Any) -> None:
    """Raise ConfigError unless logits are finite and head(hidden): some architectures cap or scale them afterwards."""
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model(input_ids=ids, use_cache=False).logits
    if not bool(theirs.isfinite().all()):
        raise ConfigError(f"{type(model).__name__}: these weights give logits that are not finite")
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
        raise ConfigError(f"{type(model).__name__} changes its logits after the head, which is not supported")


def _hidden_states(model: Any, jobs: Sequence[Job]) -> list[Tensor]:
    """The last hidden states [T, H] from which each job's completion tokens are predicted."""
    batch = torch.zeros((len(jobs), max(len(job.input_ids) for job in jobs)), dtype=torch.long)
    for row, job in zip(batch, jobs, strict=True):
        row[: len(job.input_ids)] = torch.from_numpy(job.input_ids)
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    return [
        row[len(job.input_ids) - len(job.completion_ids) : len(job.input_ids)]
        for row, job in zip(hidden, jobs, strict=True)
    ]


def _alike(jobs: Sequence[Job]) -> list[list[int]]:
    """Indices of jobs, grouped by what they ask for."""

    def asked(index: int) -> tuple[int, bool, int]:
        return jobs[index].top_k, jobs[index].entropy, jobs[index].num_ids

    return [list(members) for _, members in groupby(sorted(range(len(jobs)), key=asked), key=asked)]


def _to_scores(rows: RowScores, where: slice, job: Job, identity: TeacherIdentity) -> TeacherScores:
    numbers = (rows.sampled, rows.topk_logprobs, rows.ids_logprobs, rows.entropy)
    if not all(bool(column[where].isfinite().all()) for column in numbers if column is not None):
        return job.unscored(identity, ScoreStatus.FAILED)
    arrays: dict[str, Any] = {}
    for name in (field.name for field in fields(RowScores)):
        column = getattr(rows, name)
        arrays[name] = None if column is None else column[where].numpy()
    if rows.topk_ids is not None:
        arrays["topk_ids"] = arrays["topk_ids"].astype(np.int32)
    return TeacherScores(status=ScoreStatus.OK, identity=identity, **arrays)
