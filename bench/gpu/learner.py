"""How fast the learner steps, and in how much memory: `python -m bench.gpu.learner [--sizes 0.6B 1.7B]` prints JSON.

A randomly initialised Qwen3 of each size, on random text: 16 answers of 1,024 tokens to prompts of 512, opd_sampled,
one process. Per way of computing (float32, bfloat16, bfloat16 with layers computed again): tokens a second, memory at
its peak, and MFU: the FLOP that the products of weights and attention need, once forward and twice backward, as a share
of what the GPU's products of that kind reach by its data sheet. Without a GPU it runs a tiny one, for its own sake.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.attention import IMPLEMENTATION
from learner.model import CausalModel, recompute_layers
from learner.trainer import Trainer
from potstill.types import ScoredRollout
from tests.rollouts import make_rollout, make_scored
from tests.trainers import make_config, take_step

# hidden, intermediate, layers, heads, heads of keys, width of a head, whether the head is the embedding
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 16, True),
    "0.6B": (1024, 3072, 28, 16, 8, 128, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, True),
    "4B": (2560, 9728, 36, 32, 8, 128, True),
    "8B": (4096, 12288, 36, 32, 8, 128, False),
}
VOCABULARY = {"tiny": 512}
QWENS = 151_936
WAYS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "bfloat16, recompute": ("bfloat16", True)}
PEAK = {"H200": {"float32": 67e12, "bfloat16": 989e12}, "H100": {"float32": 67e12, "bfloat16": 989e12}}
ANSWERS, PROMPT, ANSWER = 16, 512, 1024
WARM_UP, STEPS = 2, 5


def network(size: str, dtype: str, device: torch.device) -> Qwen3ForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, width, tied = SHAPES[size]
    config = Qwen3Config(
        vocab_size=VOCABULARY.get(size, QWENS), hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width,
        max_position_embeddings=4096, tie_word_embeddings=tied, attn_implementation=IMPLEMENTATION, dtype=dtype,
    )  # fmt: skip
    with device:
        return Qwen3ForCausalLM(config).to(getattr(torch, dtype))


def batch(vocabulary: int) -> list[ScoredRollout]:
    random = np.random.default_rng(0)
    texts = [random.integers(0, vocabulary, PROMPT + ANSWER).tolist() for _ in range(ANSWERS)]
    return [
        make_scored(make_rollout(id=f"p{number}/0", prompt=text[:PROMPT], completion=text[PROMPT:]))
        for number, text in enumerate(texts)
    ]


def flop(size: str, model: CausalModel) -> float:
    """Of a step: two a weight and token that passes it, two a head's width and pair of tokens; three passes."""
    _, _, layers, heads, _, width, _ = SHAPES[size]
    read = sum(p.numel() for p in model.transformer.get_decoder().layers.parameters())
    tokens, pairs = ANSWERS * (PROMPT + ANSWER), ANSWERS * (PROMPT + ANSWER) ** 2 / 2
    once = 2 * (read * tokens + model.head.numel() * ANSWERS * ANSWER) + 4 * layers * heads * width * pairs
    return float(3 * once)


def measure(size: str, way: str, device: torch.device) -> dict[str, Any]:
    dtype, recompute = WAYS[way]
    transformer = network(size, dtype, device)
    model = CausalModel(transformer, transformer)
    trainer = Trainer(
        make_config(method="opd_sampled", optim={"lr": 1e-6}, student={"dtype": dtype}, steps=WARM_UP + STEPS),
        recompute_layers(model) if recompute else model,
    )
    text, seconds = batch(len(model.head)), []
    for step in range(1, WARM_UP + STEPS + 1):
        seconds.append(float(take_step(trainer, text, step).seconds["train"]))
    second = statistics.median(seconds[WARM_UP:])
    peaks = next((peak for name, peak in PEAK.items() if device.type == "cuda" and name in chip(device)), {})
    return {
        "tokens_per_s": round(ANSWERS * (PROMPT + ANSWER) / second),
        "step_s": round(second, 4),
        "mfu": round(flop(size, model) / second / peaks[dtype], 3) if peaks else None,
        "peak_GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if device.type == "cuda" else None,
    }


def chip(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = ["tiny"] if device.type == "cpu" else ["0.6B", "1.7B", "4B"]
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=own)
    report: dict[str, Any] = {"gpu": chip(device), "torch": torch.__version__, "started": time.strftime("%Y-%m-%d")}
    for size in parser.parse_args().sizes:
        report[size] = {}
        for way in WAYS:
            try:
                report[size][way] = measure(size, way, device)
            except torch.OutOfMemoryError as error:
                report[size][way] = {"out_of_memory": str(error).split(".")[0]}
            gc.collect()  # a model refers to itself
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
