"""A tokenizer is told apart by what its ids mean, and by nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from potstill.errors import ConfigError
from potstill.tokenization import fingerprint, load_tokenizer, render
from potstill.types import Message
from tests.tiny_models import tiny_tokenizer


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tiny_tokenizer())


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize(
    "named", ["TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", None]
)
def test_a_tokenizer_is_the_one_that_autotokenizer_takes(model_type, named, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": named}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(ours) is type(theirs)
    assert fingerprint(ours) == fingerprint(theirs)
    text = "1 + 1 = é?  don't\n\n12345 <|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.init_kwargs.keys() == theirs.init_kwargs.keys()


def test_a_qwen3_tokenizer_is_loaded_and_used_without_torch(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    code = """if True:
        import sys
        from potstill.tokenization import load_tokenizer, render
        from potstill.types import Message
        assert render(load_tokenizer(sys.argv[1]), [Message(role="user", content="1 + 1")])
        print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
