"""Two tokenizers' readings of one text, aligned on its bytes: what each token writes, and which tokens write the same.

Strings are never compared: "Ġthe" and "▁the" are the same four bytes, and half a character is bytes as well. Refuses
tokenizers whose tokens have no known bytes, and texts that differ. A token that cannot be aligned is masked: it has
no group, and no number that could pass for a score.

Legend: T tokens of the student's completion, U of the teacher's reading of it, K entries of a top-k, V vocabulary.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import AlignmentError, ConfigError
from potstill.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CHUNK_TOKENS = 6
"""Of a chunk, on either side (arXiv 2606.09456). Larger: one log-prob is spread over tokens it says little about."""

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


# What a token writes.


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteVocabulary:
    """What the ids of a tokenizer write."""

    tokens: tuple[bytes | None, ...]  # [V]; None: a special token, or no token at all
    end_id: int
    opens_with_space: bool  # the first token of a text begins with a space that decoding removes

    def raw(self, token_id: int) -> bytes | None:
        """An id beyond the vocabulary is a padded row of the head: it writes nothing."""
        return self.tokens[token_id] if token_id < len(self.tokens) else None

    def written(self, ids: Sequence[int]) -> list[bytes]:
        """What each token of a text writes of it; b"" for a special token."""
        found = [self.raw(token_id) or b"" for token_id in ids]
        if self.opens_with_space and found[:1]:
            found[0] = found[0].removeprefix(b" ")
        return found


def byte_vocabulary(tokenizer: PreTrainedTokenizerBase) -> ByteVocabulary:
    """Of a tokenizer as loaded. Raises ConfigError where its tokens have no known bytes or it has no end token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token: set eos_token")
    removes = any(
        (step["type"] == "Strip" and step["start"] > 0)
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in _steps(_description(tokenizer)["decoder"], "decoders")
    )
    return ByteVocabulary(
        tokens=tuple(token_bytes(tokenizer)), end_id=int(tokenizer.eos_token_id), opens_with_space=removes
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of every id; None for special tokens and for ids that are none. Half a second for 150,000 ids: keep it.

    Two families are known, by what their decoder does: byte-level BPE (GPT-2's map of bytes to characters) and pieces
    with "▁" for a space (SentencePiece), whose <0xE2> are single bytes. Added tokens that are not special, such as
    <think>, are text. Raises ConfigError, naming what was found, for any other.
    """
    description = _description(tokenizer)
    read = _reader(description, name=tokenizer.name_or_path)
    added = {token["id"]: token for token in description["added_tokens"]}
    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    special = {token_id for token_id, token in added.items() if token["special"]} | set(tokenizer.all_special_ids)
    for token, token_id in vocabulary.items():
        if token_id not in special:
            found[token_id] = added[token_id]["content"].encode() if token_id in added else read(token)
    return found


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's own JSON."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one: save it with tokenizer.json")
    description: dict[str, Any] = json.loads(core.to_str())
    return description


def _reader(description: Mapping[str, Any], *, name: str) -> Callable[[str], bytes]:
    """From a token as the vocabulary spells it to its bytes."""
    steps = list(_steps(description["decoder"], "decoders"))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return lambda token: bytes(_BYTE_OF[character] for character in token)
    spaces = any(step["type"] == "Replace" and step["pattern"] == {"String": _SPACE} for step in steps)
    if spaces or "Metaspace" in kinds:
        fallback = "ByteFallback" in kinds
        return lambda token: _piece_bytes(token, fallback=fallback)
    raise ConfigError(
        f"the tokenizer of {name!r} is a {description['model']['type']} that decodes by {kinds or 'nothing'}: "
        'bytes are known of byte-level tokens and of pieces with "▁" only'
    )


def _steps(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a tokenizer's part, which may be one, a sequence of them, or missing."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[inner]:
            yield from _steps(step, inner)
    else:
        yield part


def _piece_bytes(token: str, *, fallback: bool) -> bytes:
    byte = _BYTE.fullmatch(token) if fallback else None
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _byte_of() -> dict[str, int]:
    """GPT-2's map: printable bytes are themselves, the others follow from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()


# Which tokens write the same.


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Groups of tokens that write the same bytes on both sides, numbered from 0 in the order of the text."""

    student: IntArray  # [T] group of each token; -1: masked
    teacher: IntArray  # [U]
    num_groups: int

    @property
    def partners(self) -> IntArray:
        """[T] the teacher's token that writes what this one writes; -1 where either side needs several."""
        alone = np.full(self.num_groups + 1, -1, np.int32)  # the last entry is that of group -1
        alone[self.teacher] = np.arange(len(self.teacher))
        alone[~_at_most(1, self)] = -1
        return alone[self.student]


def align(student: Sequence[bytes], teacher: Sequence[bytes], *, ended: bool) -> Alignment:
    """Smallest groups of tokens with equal bytes: one closes wherever tokens of both sides end together.

    A token of no bytes is masked, but for the last ones where `ended` says that they are the end tokens of both sides.
    Raises AlignmentError when the two texts differ.

    >>> align([b"an", b"other", b""], [b"another", b""], ended=True).student.tolist()
    [0, 0, 1]
    """
    if b"".join(student) != b"".join(teacher):
        raise AlignmentError("the student's and the teacher's tokens do not write the same text")
    closing = np.intersect1d(_visible_ends(student), _visible_ends(teacher))
    own, other = _groups(student, closing), _groups(teacher, closing)
    if ended:
        own[-1] = other[-1] = len(closing)
    return Alignment(student=own, teacher=other, num_groups=len(closing) + ended)


def _visible_ends(tokens: Sequence[bytes]) -> NDArray[np.int64]:
    """Where tokens that write something end, in bytes of the text."""
    widths = np.array([len(token) for token in tokens], dtype=np.int64)
    return widths.cumsum()[widths > 0]


def _groups(tokens: Sequence[bytes], closing: NDArray[np.int64]) -> IntArray:
    """The group of each token, by the first end at or after its own at which a group closes."""
    found = np.full(len(tokens), -1, np.int32)
    visible = [place for place, token in enumerate(tokens) if token]
    found[visible] = np.searchsorted(closing, _visible_ends(tokens))
    return found


def _at_most(most: int, alignment: Alignment) -> BoolArray:
    """[groups + 1] whether a group has no more tokens on either side; False for the last, which is group -1."""
    found: BoolArray = np.ones(alignment.num_groups + 1, dtype=np.bool_)
    for groups in (alignment.student, alignment.teacher):
        found[:-1] &= np.bincount(groups[groups >= 0], minlength=alignment.num_groups) <= most
    found[-1] = False
    return found


# One text, read by the other.


@dataclass(frozen=True, slots=True, kw_only=True)
class Retokenised:
    """A completion of the student as the teacher reads it."""

    teacher_ids: IntArray  # [U], U >= 1
    alignment: Alignment


def retokenise(
    ids: Sequence[int], *, student: ByteVocabulary, teacher: ByteVocabulary, encode: Callable[[str], list[int]]
) -> Retokenised:
    """The teacher's tokens for what the student's `ids` write, and which of them belong together.

    The end token becomes the teacher's. Special tokens of the student are left out. From a character on that is not
    UTF-8, such as one that was cut by the length limit, nothing is asked of the teacher: U+FFFD was never written.
    Where nothing is left to ask, or the teacher's tokens cannot write the text, all tokens are masked; the teacher
    then reads at least an end token, so that every completion has an answer.

    encode  text → the teacher's ids, without special tokens, special tokens spelt out in the text being text
    """
    written = student.written(ids)
    kept = _num_decodable(written)
    written[kept:] = [b""] * (len(written) - kept)
    text = b"".join(written)
    ended = kept == len(written) and ids[-1] == student.end_id
    teacher_ids = encode(text.decode()) if text else []
    if ended or not teacher_ids:
        teacher_ids = [*teacher_ids, teacher.end_id]
    read = [teacher.raw(token_id) or b"" for token_id in teacher_ids]
    if b"".join(read) == b" " + text:  # which this tokenizer puts before any text
        read[0] = read[0].removeprefix(b" ")
    if b"".join(read) == text:
        alignment = align(written, read, ended=ended)
    else:
        nothing = (np.full(len(side), -1, np.int32) for side in (written, read))
        alignment = Alignment(student=next(nothing), teacher=next(nothing), num_groups=0)
    return Retokenised(teacher_ids=np.array(teacher_ids, dtype=np.int32), alignment=alignment)


def _num_decodable(written: Sequence[bytes]) -> int:
    """How many tokens come before the first one that holds a part of something that is not UTF-8."""
    ends = list(accumulate(map(len, written)))
    kept = len(written)
    while True:
        try:
            b"".join(written[:kept]).decode()
        except UnicodeDecodeError as error:
            kept = bisect_right(ends, error.start)
        else:
            return kept


# Scores of the one as scores of the other.


def chunk_scores(alignment: Alignment, teacher_sampled: FloatArray) -> tuple[FloatArray, IntArray]:
    """The teacher's log-probs [U] as (sampled [T], chunks [T]) of TeacherScores: each token has its chunk's sum.

    NaN and chunk -1 for tokens that are masked, or whose chunk has more than MAX_CHUNK_TOKENS on a side. A NaN of the
    teacher's makes its own chunk NaN, which keeps its number: it was asked for and is missing.
    """
    short = _at_most(MAX_CHUNK_TOKENS, alignment)
    sums = np.zeros(alignment.num_groups + 1)
    np.add.at(sums, alignment.teacher, teacher_sampled)
    sums[~short] = np.nan
    chunks = np.where(short[alignment.student], alignment.student, -1)
    return sums[alignment.student].astype(np.float32), chunks.astype(np.int32)


def whole_chunks(chunks: IntArray, mask: BoolArray) -> BoolArray:
    """[T] the tokens of the mask that have a chunk, all of whose tokens are in the mask.

    >>> whole_chunks(np.array([0, 0, 1, -1]), np.array([True, False, True, True])).tolist()
    [False, False, True, False]
    """
    return mask & (chunks >= 0) & ~np.isin(chunks, chunks[~mask])


def translation(*, teacher: ByteVocabulary, student: ByteVocabulary) -> IntArray:
    """[V of the teacher] the student's id that writes the same bytes, or -1; no student's id occurs twice.

    Of ids with the same bytes the last counts: vocabularies begin with single bytes (<0x41>), which are written only
    where no piece has them. The end tokens are each other's.
    """
    last = {written: token_id for token_id, written in enumerate(teacher.tokens) if written}
    found = np.full(max(len(teacher.tokens), teacher.end_id + 1), -1, np.int32)
    for token_id, written in enumerate(student.tokens):
        if written and written in last:
            found[last[written]] = token_id
    found[teacher.end_id] = student.end_id
    return found


def map_topk(
    topk_ids: IntArray, topk_logprobs: FloatArray, topk_tail: FloatArray, translated: IntArray
) -> tuple[IntArray, FloatArray, FloatArray]:
    """The teacher's top-k [U, K], [U, K], [U] in the student's ids (`translation`).

    An entry without such an id becomes id -1 with a log-prob of NaN, and its mass a part of the tail: the distribution
    over the entries that are left and the rest stays the teacher's.
    """
    known = (topk_ids >= 0) & (topk_ids < len(translated))
    ids = np.where(known, translated[np.where(known, topk_ids, 0)], -1).astype(np.int32)
    lost = ids < 0
    parts = np.concatenate([np.where(lost, topk_logprobs, -np.inf), topk_tail[:, None]], axis=1, dtype=np.float64)
    tail = np.logaddexp.reduce(parts, axis=1)
    return ids, np.where(lost, np.nan, topk_logprobs).astype(np.float32), tail.astype(np.float32)
