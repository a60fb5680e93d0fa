"""Tiny Qwen3 folders, real in every part: safetensors weights, byte-level tokenizer, chat template.

A test that needs a model builds one here, in its own temporary folder; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIALS = ("<pad>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIALS)  # what the tokenizer knows; ids from here on are padding rows of the head
HEAD_DIM = 32
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte (0..255), then <pad>, <|im_start|> and <|im_end|>, which also ends a completion."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(
    folder: Path,
    *,
    seed: int,
    hidden: int = 64,
    layers: int = 2,
    vocab_size: int = VOCABULARY,
    tie_word_embeddings: bool = False,
    max_positions: int = 512,
) -> Path:
    """Write a random Qwen3 (float32) and its tokenizer to `folder`, and return the folder.

    The same seed gives the same weights. `vocab_size` is the rows of the head; real models often have
    more of them than their tokenizer has tokens.
    Weights are drawn wide (0.1) so that distributions are far from uniform and a misaligned score is seen.
    """
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=max(1, hidden // HEAD_DIM // 2),
        head_dim=HEAD_DIM,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
