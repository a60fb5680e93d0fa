"""Where prompts come from and how an answer is judged.

An environment gives training prompt number i (any i, in any order: a run resumes by its cursor), a fixed set of
held-out prompts, and a verdict on a completion. Items are held out by their own text, so that no seed and no range of
indices can let one of them into training.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from potstill.config import DataConfig, JsonlData, ReasoningGymData
from potstill.errors import ConfigError
from potstill.types import Message, Prompt

HELD_OUT_SHARE = 16  # one question in so many is held out
_ATTEMPTS = 64  # at a training question; all of them are held out once in 16**64 times, unless there are few questions
_STREAM = 1 << 31  # apart, so that looking for another training item never meets the next index's candidates


class Environment(Protocol):
    def train(self, index: int) -> Prompt:
        """Training prompt `index`, the same for ever."""

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts. Raises ConfigError when there are fewer."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """In [0, 1]; NaN where nothing can judge it."""


def open_environment(config: DataConfig) -> Environment:
    """Raises ConfigError when the data set, its options or its file are wrong."""
    return ReasoningGym(config) if isinstance(config, ReasoningGymData) else Jsonl(config)


class ReasoningGym:
    """Procedural tasks of the reasoning-gym package, judged by its own verifier.

    The written-out steps of `Prompt.solution` come from potstill/worked.py, for the data sets it knows.
    """

    def __init__(self, config: ReasoningGymData) -> None:
        try:
            import reasoning_gym
        except ImportError:
            raise ConfigError("data.kind = reasoning_gym needs the package: install potstill[envs]") from None
        from potstill import worked

        try:
            self._items = reasoning_gym.create_dataset(
                config.dataset, seed=config.seed, size=HELD_OUT_SHARE * _STREAM, **config.options
            )
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"data.dataset {config.dataset!r} with {config.options}: {error}") from None
        self._name = config.dataset
        self._solve: Callable[[Mapping[str, Any]], str | None] | None = worked.SOLVERS.get(config.dataset)

    def train(self, index: int) -> Prompt:
        for candidate in range(index, index + _ATTEMPTS * _STREAM, _STREAM):
            if not _is_held_out(self._items[candidate]["question"]):
                return self._prompt("train", index, candidate)
        raise ConfigError(f"data.dataset {self._name!r} has hardly a question that is not held out: it is too small")

    def held_out(self, count: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        seen: set[str] = set()
        for candidate in range(_STREAM, _STREAM + 64 * HELD_OUT_SHARE * (count + 1)):
            if len(prompts) == count:
                return prompts
            question = self._items[candidate]["question"]
            if _is_held_out(question) and question not in seen:
                seen.add(question)
                prompts.append(self._prompt("held-out", len(prompts), candidate))
        raise ConfigError(f"data.dataset {self._name!r} has fewer than {count} held-out questions: lower eval.items")

    def score(self, prompt: Prompt, completion: str) -> float:
        return float(self._items.score_answer(final_answer(completion), self._items[prompt.info["item"]]))

    def _prompt(self, split: str, index: int, item: int) -> Prompt:
        entry = self._items[item]
        return Prompt(
            id=f"{split}-{index}",
            index=index,
            messages=(Message(role="user", content=entry["question"]),),
            domain=self._name,
            answer=entry["answer"],
            solution=self._solve(entry) if self._solve is not None else None,
            info={"item": item},
        )


class Jsonl:
    """Prompts of a JSON Lines file, read once, in the file's order and from the top again when it ends."""

    def __init__(self, config: JsonlData) -> None:
        self._config = config
        rows = [self._row(number, line) for number, line in enumerate(_lines(config.path), 1) if line.strip()]
        if len(rows) <= config.holdout:
            raise ConfigError(f"{config.path}: {len(rows)} prompts, of which data.holdout = {config.holdout} are kept")
        split = len(rows) - config.holdout
        self._train, self._held_out = rows[:split], rows[split:]

    def train(self, index: int) -> Prompt:
        return self._prompt(f"train-{index}", index, self._train[index % len(self._train)])

    def held_out(self, count: int) -> list[Prompt]:
        if count > len(self._held_out):
            raise ConfigError(f"eval.items = {count}, but data.holdout keeps {len(self._held_out)}")
        return [self._prompt(f"held-out-{i}", i, row) for i, row in enumerate(self._held_out[:count])]

    def score(self, prompt: Prompt, completion: str) -> float:
        if self._config.verifier == "none" or prompt.answer is None:
            return math.nan
        if self._config.verifier == "exact":
            return float(completion.strip() == prompt.answer.strip())
        numbers = re.findall(r"-?\d+(?:\.\d+)?", completion.replace(",", ""))
        return float(bool(numbers) and float(numbers[-1]) == _number(prompt.answer))

    def _row(self, number: int, line: str) -> dict[str, Any]:
        try:
            return read_row(line, verifier=self._config.verifier)
        except ConfigError as error:
            raise ConfigError(f"{self._config.path}:{number}: {error}") from None

    @staticmethod
    def _prompt(id: str, index: int, row: Mapping[str, Any]) -> Prompt:
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return Prompt(
            id=id,
            index=index,
            messages=tuple(Message(role=m["role"], content=m["content"]) for m in messages),
            domain=str(row.get("domain", "default")),
            answer=None if row.get("answer") is None else str(row["answer"]),
            solution=row.get("solution"),
            private=tuple(row.get("private") or ()),
        )


def read_row(line: str, *, verifier: str = "none") -> dict[str, Any]:
    """One line of a file of prompts. Raises ConfigError that says what is wrong with it, and not where it stands."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        raise ConfigError("not JSON that can be read") from None
    if not isinstance(row, dict):
        raise ConfigError("a line is an object with `prompt`")
    if "\\ud" in line.lower() and not _is_text(row):
        raise ConfigError("holds half a character (a lone surrogate), which no tokenizer can read")
    prompt = row.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise ConfigError("`prompt` must be a text or a list of messages")
    if isinstance(prompt, list) and not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        raise ConfigError("every message of `prompt` needs a `role` and a `content`")
    answer = row.get("answer")
    if verifier == "last_number" and answer is not None and _number(str(answer)) is None:
        raise ConfigError("data.verifier = last_number, but `answer` is no number")
    if not isinstance(row.get("solution"), str | None):
        raise ConfigError("`solution` must be a text")
    if not _is_texts(row.get("private")):
        raise ConfigError("`private` must be a list of texts, none of them empty")
    return row


def final_answer(completion: str) -> str | None:
    """What stands between the last <answer> and </answer>; None when the completion never commits itself."""
    found = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    return found[-1].strip() if found else None


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_texts(value: Any) -> bool:
    """Whether it is a list of texts, none of them empty, or missing."""
    return value is None or (isinstance(value, list) and all(isinstance(text, str) and text for text in value))


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")  # a JSON text may hold other line breaks, unescaped
    except OSError as error:
        raise ConfigError(f"data.path {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"data.path {path}: is not UTF-8") from None
