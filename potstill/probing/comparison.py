"""A teacher beside a student: do they read ids as the same text, and do they write a conversation alike? Pure.

    same tokenizer, other rows in the head    fine: padding rows mean nothing, and only ids that tokens have are scored
    another tokenizer                         token by token nothing can be compared: methods that align text

It compares fingerprints and ids, never sizes: two vocabularies of one size may have no token in common.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.algebra.objective import Tier
from potstill.methods import PRESETS
from potstill.tokenization import fingerprint, load_tokenizer, render
from potstill.types import Message
from potstill.wire import Capabilities

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATION = (
    Message(role="user", content="12 + 9 = ?"),
    Message(role="assistant", content="21"),
    Message(role="user", content="And minus 4?\n"),
)
"""What both chat templates write. Two turns: templates differ most in how one follows another."""
ACROSS = tuple(
    name
    for name, method in PRESETS.items()
    if method.objective.crosses_tokenizers and method.objective.tier > Tier.TEXT
)
"""Methods that read the scores of a teacher of another tokenizer."""
_NUM_SHOWN = 6  # ids from the first that differs


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was found, in lines for people; `problem` when no method can have both."""

    same_tokens: bool
    lines: tuple[str, ...]
    problem: str | None = None


def compare(able: Capabilities, *, student: Path, teacher: Path | None) -> Comparison:
    """The teacher that was met, beside the student in a folder. `teacher`: a folder with the teacher's own tokenizer.

    Raises ConfigError for a folder without a tokenizer or a chat template.
    """
    own = load_tokenizer(student)
    theirs = None if teacher is None else load_tokenizer(teacher)
    if theirs is not None and fingerprint(theirs) != able.tokenizer_fingerprint:
        return Comparison(same_tokens=False, lines=(), problem=f"{teacher} does not hold the tokenizer of {able.model}")
    same = fingerprint(own) == able.tokenizer_fingerprint
    lines = [_of_tokens(same, teacher), *(_of_heads(student, teacher) if same else ())]
    if theirs is None:
        lines.append("chat templates were not compared: name the teacher's folder with --tokenizer")
    else:
        lines.append(_of_templates(own, theirs))
    if same and able.vocabulary < len(own):
        problem = f"{able.model} scores ids below {able.vocabulary}, and the student writes {len(own)}"
        return Comparison(same_tokens=True, lines=tuple(lines), problem=problem)
    return Comparison(same_tokens=same, lines=tuple(lines))


def _of_tokens(same: bool, teacher: Path | None) -> str:
    if same:
        return "the same tokenizer as the student's"
    folder = "FOLDER" if teacher is None else str(teacher)
    return f'another tokenizer than the student\'s: methods {", ".join(ACROSS)} with teacher.tokenizer = "{folder}"'


def _of_heads(student: Path, teacher: Path | None) -> list[str]:
    rows = [_num_rows(student), None if teacher is None else _num_rows(teacher)]
    if None in rows or rows[0] == rows[1]:
        return []
    return [f"heads of {rows[0]} and {rows[1]} rows: fine, only ids that the tokenizer has are scored"]


def _num_rows(folder: Path) -> int | None:
    """Of the model's output head, where its config says it. `load_tokenizer` has found config.json readable."""
    file = folder / "config.json"
    if not file.exists():
        return None
    rows = json.loads(file.read_text()).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _of_templates(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Ids are compared where both have the same; else the text that each would have its own ids for."""
    from jinja2 import TemplateError  # comes with transformers, which a tokenizer needs

    try:
        one, other = render(student, CONVERSATION), render(teacher, CONVERSATION)
    except TemplateError:
        return "chat templates were not compared: one of them does not take a conversation of two turns"
    if fingerprint(student) != fingerprint(teacher):
        same = student.decode(one) == teacher.decode(other)
        return f"chat templates write {'the same text' if same else 'different text'}, each in its own tokens"
    if one == other:
        return f"chat templates write the same {len(one)} ids for a conversation of two turns"
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return (
        f"chat templates differ from id {place} on: student {_shown(student, one[place:])}, "
        f"teacher {_shown(teacher, other[place:])}; the teacher reads prompts in the student's"
    )


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    part = ids[:_NUM_SHOWN]
    return f"{part} {tokenizer.decode(part)!r}" if part else "nothing more"
