"""A model from nothing is an ordinary folder, the same for the same arguments, with a tokenizer that loses nothing."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from learner import scratch
from potstill.config import ScratchConfig
from potstill.planner import num_parameters
from potstill.tokenization import load_tokenizer, render
from potstill.types import Message

TEXTS = [f"user\nWhat is {n} + {n + 17}?\nassistant\n<answer>{2 * n + 17}</answer>" for n in range(200)]


def make_config(**changes: Any) -> ScratchConfig:
    sizes = {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 128}
    return ScratchConfig(**{**sizes, **changes})


def create(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    scratch.create(folder, make_config(**changes), texts=TEXTS, seed=seed)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_other_weights(tmp_path: Path):
    first, again, other = create(tmp_path / "a"), create(tmp_path / "b"), create(tmp_path / "c", seed=1)
    assert digest(first) == digest(again)
    differing = {name for name, value in digest(other).items() if value != digest(first)[name]}
    assert differing == {"model.safetensors"}


def test_it_loads_in_transformers_with_the_sizes_that_were_asked_for(tmp_path: Path):
    folder = create(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.head_dim) == (32, 2, 32)
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert num_parameters(folder) == sum(parameter.numel() for parameter in model.parameters())


def test_a_conversation_ends_where_the_assistant_begins_to_write(tmp_path: Path):
    tokenizer = load_tokenizer(create(tmp_path / "a"))
    ids = render(tokenizer, [Message(role="user", content="1 + 2 = ?")])
    assert tokenizer.decode(ids) == "<|im_start|>user\n1 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return scratch.train_tokenizer(TEXTS, vocab_size=320, whole_tokens=("<answer>", "</answer>"))


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_was(tokenizer: Any, text: str):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(number=st.integers(0, 10**12))
def test_every_digit_is_a_token_of_its_own(tokenizer: Any, number: int):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(str(number), add_special_tokens=False))
    assert tokens == list(str(number))


def test_whole_tokens_are_one_token_and_survive_decoding(tokenizer: Any):
    ids = tokenizer.encode("<answer>42</answer>", add_special_tokens=False)
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>42</answer>"


def test_the_end_token_is_no_text(tokenizer: Any):
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_vocabulary_is_no_larger_than_asked_with_whole_tokens_on_top():
    small = scratch.train_tokenizer(TEXTS, vocab_size=262, whole_tokens=("<answer>", "</answer>"))
    assert len(small) == 262 + 2
