"""A token is private where it writes a byte of a private text, however tokens cut the text; and a run learns which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.byte_alignment import byte_vocabulary
from potstill.config import JsonlData, RunConfig
from potstill.config_file import parse
from potstill.environments import open_environment
from rollout_worker.opening import open_worker
from rollout_worker.privacy import privacy
from tests.collectors import collector_of
from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tests.two_tokenizers import byte_level, pieces

ROCKET, FLAG = "👩‍🚀", "🇯🇵"


def marked(written: list[bytes], *private: str) -> list[int]:
    """The tokens that are private."""
    found = privacy(written, private)
    assert len(found) == len(written)
    assert set(found.tolist()) <= {0.0, 1.0}
    return [t for t, value in enumerate(found) if value]


def slowly(written: list[bytes], private: list[str]) -> list[int]:
    """Token by token and byte by byte: whether a window that holds one of the token's bytes is a private text."""
    completion = b"".join(written)
    found, start = [], 0
    for t, token in enumerate(written):
        windows = {
            completion[first : first + len(text)] == text
            for text in map(str.encode, private)
            for byte in range(start, start + len(token))
            for first in range(max(0, byte - len(text) + 1), byte + 1)
        }
        found += [t] if True in windows else []
        start += len(token)
    return found


@pytest.mark.parametrize(
    ("written", "private", "found"),
    [
        ([b"I am", b" Jo", b"hn", b" D", b"oe."], ["John"], [1, 2]),
        ([b"I am", b" John", b"."], ["John"], [1]),  # half a token is the token
        ([b"Jo", b"hn and ", b"John"], ["John"], [0, 1, 2]),  # wherever it stands
        ([b"a", b"b", b"a", b"b", b"a", b"c"], ["aba"], [0, 1, 2, 3, 4]),  # once inside another
        ([b"a", b"b", b"c", b"d", b"e"], ["bc", "cd"], [1, 2, 3]),  # two that share a token
        ([b"Jo", b"", b"hn", b""], ["John"], [0, 2]),  # special tokens write nothing
        ([b"a+", b"a"], ["a+"], [0]),  # no pattern
        ([b"a\n", b"b"], ["a\nb"], [0, 1]),
        ([b"john", b" ", b"Joh"], ["John"], []),
        ([b"John"], [], []),
        ([b"", b""], ["John"], []),
    ],
)
def test_a_token_is_private_where_it_writes_a_part_of_a_private_text(
    written: list[bytes], private: list[str], found: list[int]
) -> None:
    assert marked(written, *private) == found == slowly(written, private)


def test_a_character_that_is_split_over_tokens_makes_all_of_them_private() -> None:
    face = "😀".encode()
    written = [b"a", face[:1], face[1:3], face[3:] + b"!", b"b"]
    assert marked(written, "😀") == [1, 2, 3]
    assert marked(written, "😁") == []  # all bytes but the last
    assert marked(written[:3], "😀") == []  # cut before its end


@settings(deadline=None)
@given(
    written=st.lists(st.text("ab日", max_size=3).map(str.encode), min_size=1, max_size=8),
    private=st.lists(st.text("ab日", min_size=1, max_size=3), max_size=3),
)
def test_marks_are_those_of_every_window_looked_at(written: list[bytes], private: list[str]) -> None:
    assert marked(written, *private) == slowly(written, private)


@pytest.mark.parametrize("tokenizer", [byte_level(300), pieces(), tiny_tokenizer()], ids=["bytes", "pieces", "single"])
@pytest.mark.parametrize("secret", ["日本語", ROCKET, FLAG, "Jane Doe"])
def test_the_private_tokens_of_a_tokenizer_write_the_private_text(tokenizer: Any, secret: str) -> None:
    text = f"it is {secret} and, again, {secret}."
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    written = byte_vocabulary(tokenizer).written(ids)
    found = marked(written, secret)
    assert b"".join(written) == text.encode()
    assert b"".join(written[t] for t in found).count(secret.encode()) == 2
    assert all(secret.encode() not in b"".join(written[t:]) for t in range(max(found) + 1, len(ids)))
    assert len(found) < len(ids) - 3


# What a rollout worker makes of it.


def make_config(method: str, *changes: str, model: str = "models/student") -> RunConfig:
    return parse(
        {
            "name": "one",
            "method": method,
            "student": {"model": model},
            "teacher": {"kind": "local", "models": [{"model": model}]},
            "data": {"kind": "jsonl", "path": "unused"},
            "rollout": {
                "source": "reference",
                "prompts_per_step": 2,
                "max_prompt_tokens": 64,
                "sampling": {"max_new_tokens": 24},
            },
            "optim": {"lr": 1e-4},
            "loop": {"steps": 3},
        },
        changes,
    )


async def collected(folder: Path, method: str) -> list[Any]:
    """Privacy of two solutions, of which the first line says what is private."""
    rows = [
        {"prompt": "who?", "solution": "Ada 😀", "private": ["Ada", "😀"]},
        {"prompt": "who?", "solution": "Ada 😀"},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = open_environment(JsonlData(path=str(folder / "data.jsonl")))
    collector = collector_of(make_config(method), environment, tiny_tokenizer(), student=None)
    done = await collector.collect([environment.train(index) for index in (0, 1)])
    return [scored.rollout.privacy for scored in done.scored]


async def test_a_completion_says_which_of_its_tokens_are_private(tmp_path: Path) -> None:
    first, second = await collected(tmp_path, "swing")
    assert first.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 0]  # a token a byte, and the end token
    assert second.tolist() == [0] * 9  # the line says of nothing that it is private


async def test_a_worker_that_is_opened_for_swing_says_what_is_private(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "tiny", seed=0))
    line = {"prompt": "who?", "private": [chr(byte) for byte in range(128)]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    changes = (f"data.path={tmp_path / 'data.jsonl'}", "rollout.source=student", "rollout.engine=transformers")
    config = make_config("swing", *changes, model=model)
    worker = await open_worker(config, {}, None, 0)
    done = await worker.collector.collect([open_environment(config.data).train(0)])
    await worker.close()
    rollout = done.scored[0].rollout
    written = byte_vocabulary(worker.tokenizer).written(rollout.completion_ids.tolist())
    assert rollout.privacy is not None
    assert rollout.privacy.tolist() == [float(bool(token) and token[0] < 128) for token in written]
    assert 0 < rollout.privacy.sum() < len(written)  # of this seed: bytes of ASCII and others


async def test_nothing_is_looked_for_where_no_term_reads_it(tmp_path: Path) -> None:
    assert await collected(tmp_path, "gkd") == [None, None]
