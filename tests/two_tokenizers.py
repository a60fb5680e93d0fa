"""Small real tokenizers of two families, trained in a few milliseconds on a text with awkward characters."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from learner.scratch import CHAT_TEMPLATE

TEXT = [
    "12 + 9 = 21, the sum of two numbers is another number; 日本語 and 👩‍🚀 fly\r\n",
    "  other letters, other numbers\n",
] * 20


def byte_level(size: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind: any bytes are tokens."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    core.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def _trained_pieces() -> str:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *fallback]
    )
    core.train_from_iterator((line.encode("ascii", "ignore").decode() for line in TEXT), trainer)
    description = json.loads(core.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in fallback]
    return json.dumps(description)


def pieces() -> PreTrainedTokenizerFast:
    """Llama 2's kind: pieces with "▁" for a space, one of them before every text, and bytes where there is no piece."""
    core = Tokenizer.from_str(_trained_pieces())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", bos_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[answer]"
    return tokenizer
