"""Which jobs are scored together, and which contexts are read once for several of them. Pure arithmetic.

The jobs of one context are read in one of two ways. Alone: context and completion, job by job. Shared: the context,
then every completion over its keys and values. The way that is less work is taken; the scores are the same.
Padding is not counted: a backbone reads a batch in passes of texts that are nearly equal in length, or packs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teacher_server.batching import Job

_SHARED_OVERHEAD = 1.25  # a completion's token over a context's keys costs that much more than in a row of its own


def by_context(jobs: Sequence[Job]) -> list[list[int]]:
    """Indices of the jobs of each different context, in the order in which the contexts first appear."""
    groups: dict[bytes, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.input_ids[: job.context_length].tobytes(), []).append(index)
    return list(groups.values())


def shares(group: Sequence[Job]) -> bool:
    """Whether it is less work to read the context of these jobs, which is one, once."""
    alone, shared = _extents(group)
    return shared * _SHARED_OVERHEAD < alone


def tokens_read(jobs: Sequence[Job]) -> int:
    """Tokens that the model reads of a batch."""
    return sum(_tokens([jobs[index] for index in group]) for group in by_context(jobs))


def cut(jobs: Sequence[Job], batch_tokens: int) -> list[list[int]]:
    """Indices of `jobs`, in batches that read at most `batch_tokens` each; a larger job is a batch by itself.

    Jobs of one context stay together if a batch can hold them all. Contexts come in the order of their longest job,
    shortest first, so that neighbours are nearly equal in length.
    """

    def length(index: int) -> int:
        return len(jobs[index].input_ids)

    groups = [sorted(group, key=length) for group in by_context(jobs)]
    batches: list[list[int]] = []
    size = 0
    for group in sorted(groups, key=lambda group: length(group[-1])):
        for piece in _pieces(jobs, group, batch_tokens):
            added = _tokens([jobs[index] for index in piece])
            if batches and len(piece) == len(group) and size + added <= batch_tokens:
                batches[-1].extend(piece)
                size += added
            else:
                batches.append(piece)
                size = added
    return batches


def _pieces(jobs: Sequence[Job], group: list[int], batch_tokens: int) -> list[list[int]]:
    """A group of one context, in as few pieces as batches can hold."""
    pieces: list[list[int]] = []
    for index in group:
        if not pieces or _tokens([jobs[other] for other in [*pieces[-1], index]]) > batch_tokens:
            pieces.append([])
        pieces[-1].append(index)
    return pieces


def _tokens(group: Sequence[Job]) -> int:
    alone, shared = _extents(group)
    return shared if shares(group) else alone


def _extents(group: Sequence[Job]) -> tuple[int, int]:
    """Tokens of jobs that have one context: read alone, and shared."""
    alone = sum(len(job.input_ids) for job in group)
    return alone, alone - (len(group) - 1) * group[0].context_length
