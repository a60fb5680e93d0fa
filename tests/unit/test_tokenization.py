"""A tokenizer is told apart by what its ids mean, and by nothing else."""

from __future__ import annotations

import pytest

from potstill.errors import ConfigError
from potstill.tokenization import fingerprint, load_tokenizer, render
from potstill.types import Message
from tests.tiny_models import tiny_tokenizer


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tiny_tokenizer())


def test_the_chat_template_is_not_part_of_the_fingerprint():
    other = tiny_tokenizer()
    other.chat_template = "{{ messages }}"
    assert fingerprint(other) == fingerprint(tiny_tokenizer())


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["distil"]),
        lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|end|>"}),
    ],
)
def test_another_vocabulary_is_another_fingerprint(change):
    other = tiny_tokenizer()
    change(other)
    assert fingerprint(other) != fingerprint(tiny_tokenizer())


def test_a_prompt_is_rendered_up_to_where_the_assistant_begins():
    tokenizer = tiny_tokenizer()
    ids = render(tokenizer, [Message(role="user", content="1 + 1 = é?")])
    assert tokenizer.decode(ids) == "<|im_start|>user\n1 + 1 = é?<|im_end|>\n<|im_start|>assistant\n"


def test_a_missing_folder_and_an_empty_one_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="no such model folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_config_that_is_not_json_is_named(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: is not readable JSON"):
        load_tokenizer(tmp_path)
