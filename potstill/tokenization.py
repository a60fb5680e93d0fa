"""A model folder's tokenizer: load it, name its vocabulary, render a prompt. Nothing else.

transformers is imported when a tokenizer is loaded, so that importing this file stays instant.
Code that a model folder brings along is never run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.errors import ConfigError
from potstill.model_folder import check_model_folder
from potstill.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# The class that AutoTokenizer takes for Qwen3, by what the folder says. To ask it imports torch, 4 s of every command.
_QWEN3_CLASSES = {
    "TokenizersBackend": "TokenizersBackend",
    "PreTrainedTokenizerFast": "TokenizersBackend",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises ConfigError when the folder, its tokenizer or its chat template is missing, or when it wants to run code.
    """
    folder = Path(path)
    check_model_folder(folder)
    if not any((folder / name).exists() for name in _VOCABULARY_FILES):  # transformers would make up an empty one
        raise ConfigError(f"{folder}: no tokenizer: save one there with save_pretrained")
    try:
        tokenizer = _load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: its tokenizer cannot be loaded") from error
    if not tokenizer.chat_template:
        raise ConfigError(f"{folder}: the tokenizer has no chat template: add chat_template.jinja")
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerBase:
    import transformers

    kind = getattr(transformers, _known_class(folder) or "AutoTokenizer")
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _known_class(folder: Path) -> str | None:
    """What AutoTokenizer would choose, where that is known without it."""
    names = ("config.json", "tokenizer_config.json")
    if not all((folder / name).is_file() for name in names):
        return None
    match [json.loads((folder / name).read_text()) for name in names]:
        case [{"model_type": "qwen3" | "qwen3_moe"}, {"tokenizer_class": str(named)}]:
            return _QWEN3_CLASSES.get(named)
    return None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """64 hex digits that are equal when every token id means the same text.

    Covers the vocabulary, added tokens and special ids. The chat template is left out: prompts may be written
    differently for teacher and student, ids may not. Take it of a tokenizer as loaded, before changing its pad token.
    """
    facts = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation in the tokenizer's own chat template, up to where the assistant begins to write."""
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in rendered]
