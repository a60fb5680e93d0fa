"""What the processes of a run wrote, by role: plain text at byte offsets, made harmless on its way out.

    <run>/logs/orchestrator.log   the run's own process, attempt after attempt
    <run>/logs/learner-R.log      rank R of the learner
    <run>/logs/rollout-N.log      rollout worker N
    <run>/teacher.log             a teacher server that the run started; of several NAME.log, in the config's order

Logs only grow, so an offset stays what it is. They lie in the run's folder and outlive the cluster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from orchestrator.service import confined
from orchestrator.service.neutral import MARGIN, neutral, unfinished
from orchestrator.service.ranges import Part, refused
from orchestrator.service.runs import ResolvedRun
from potstill.errors import ServiceError
from potstill.process_log import DRIVER, FOLDER

ROLES = ("orchestrator", "learner", "rollout", "teacher")
MAX_TAIL_BYTES = 4 << 20
OWN = f"{DRIVER}.log"
_PIECE = 1 << 16
_NUMBERED = re.compile(r"(learner|rollout)-([0-9]{1,6})\.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """One log of a run: its role, its number among those of the role, and where it lies in the folder of all runs."""

    role: str
    rank: int
    parts: tuple[str, ...]


def logs_of(runs: Path, run: ResolvedRun) -> list[Log]:
    """Those that there are."""
    inside = confined.names(runs, run.id, FOLDER)
    found = [Log(role="orchestrator", rank=0, parts=(run.id, FOLDER, OWN))] if OWN in inside else []
    numbered = ((name, _NUMBERED.fullmatch(name)) for name in inside)
    found += [Log(role=m[1], rank=int(m[2]), parts=(run.id, FOLDER, name)) for name, m in numbered if m]
    beside = confined.names(runs, run.id)
    teachers = enumerate(f"{name}.log" for name in run.config["teacher"].get("members") or ["teacher"])
    found += [Log(role="teacher", rank=rank, parts=(run.id, name)) for rank, name in teachers if name in beside]
    return sorted(found, key=lambda log: (ROLES.index(log.role), log.rank))


def open_log(runs: Path, run: ResolvedRun, role: str, rank: int) -> BufferedReader:
    """Raises ServiceError (404) naming the logs that there are."""
    found = logs_of(runs, run)
    for log in found:
        if (log.role, log.rank) == (role, rank):
            try:
                return confined.open_file(runs, *log.parts)
            except FileNotFoundError:
                break
    there = ", ".join(f"{log.role} {log.rank}" for log in found) or "none yet"
    raise ServiceError(f"the run has no log of role {role}, rank {rank}; there are: {there}", 404, "log_not_found")


def size_of(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def since(file: BufferedReader, offset: int) -> Part:
    """What there is from `offset` on, up to the last character that is whole. Raises ServiceError (416)."""
    size = size_of(file)
    if offset > size:
        raise refused(f"offset: the log has {size} bytes", size)
    start = max(offset, size - 3)
    file.seek(start)
    stop = size - unfinished(file.read(size - start))
    return Part(start=offset, stop=max(offset, stop), size=size, partial=False)


def last_lines(file: BufferedReader, count: int) -> Part:
    """The last `count` lines, of at most MAX_TAIL_BYTES."""
    whole = since(file, 0)
    position, wanted = whole.stop, count + 1  # line ends: one more than lines, when the last line has its own
    while position > max(0, whole.stop - MAX_TAIL_BYTES):
        first = max(0, position - _PIECE)
        file.seek(first)
        piece = file.read(position - first)
        if position == whole.stop and not piece.endswith(b"\n"):
            wanted -= 1
        ends = [found.start() for found in re.finditer(b"\n", piece)]
        if len(ends) >= wanted:
            return Part(start=first + ends[-wanted] + 1, stop=whole.stop, size=whole.size, partial=False)
        position, wanted = first, wanted - len(ends)
    return Part(start=_at_character(file, position), stop=whole.stop, size=whole.size, partial=False)


def _at_character(file: BufferedReader, position: int) -> int:
    """The first place from `position` on where a character begins, or what is none."""
    file.seek(position)
    return position + next((n for n, byte in enumerate(file.read(3)) if byte & 0xC0 != 0x80), 0)


def neutral_pieces(file: BufferedReader, wanted: Part) -> Iterator[bytes]:
    """The part's bytes, harmless, in pieces; the same wherever a part begins. Closes the file."""
    with file:
        position = wanted.start
        while position < wanted.stop:
            stop = min(position + _PIECE, wanted.stop)
            first = max(0, position - MARGIN)
            file.seek(first)
            text = neutral(file.read(stop + MARGIN - first))
            piece = text[position - first : stop - first]
            if not piece:
                return
            yield piece
            position = stop


def headers_of(wanted: Part, *, complete: bool) -> Mapping[str, str]:
    """Beside the text. `complete`: the run is at its end, and nothing will be added unless it is tried again."""
    return {
        **wanted.headers,
        "X-Next-Offset": str(wanted.stop),
        "X-Log-Size": str(wanted.size),
        "X-Log-Complete": "true" if complete and wanted.stop == wanted.size else "false",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
    }


def text_at_end(runs: Path, run_id: str, lines: int) -> str | None:
    """The last lines of the run's own process; None when it has no log."""
    try:
        file = confined.open_file(runs, run_id, FOLDER, OWN)
    except FileNotFoundError:
        return None
    return b"".join(neutral_pieces(file, last_lines(file, lines))).decode()
