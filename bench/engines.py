"""How fast the student writes: `python -m bench.engines` prints one JSON object.

Per size of student: generated tokens per second of each engine, of transformers' own `generate`, and of the matrix
products alone, the last two in the same process. Rounds are interleaved, because machines are noisy; medians count.
Only tokens up to a completion's end are counted. Each engine has a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.config import SamplingConfig
from rollout_worker.engine import GenerationRequest, build_engine

ROUNDS = 5
THREADS = 1
STOP = 0  # the prompts do not contain it; a random student draws it now and then


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A student's shape and what it is asked to write."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    batch: int
    prompt_tokens: int
    new_tokens: int


WORKLOADS = {
    "3M": Workload(hidden=256, layers=3, heads=8, kv_heads=4, head_dim=32, intermediate=512, vocab=4096, batch=32,
                   prompt_tokens=64, new_tokens=128),
    "0.3M": Workload(hidden=96, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=300, batch=64,
                     prompt_tokens=56, new_tokens=80),
}  # fmt: skip


def save_student(work: Workload, folder: Path) -> None:
    """Write a random Qwen3 in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=work.vocab, hidden_size=work.hidden, num_hidden_layers=work.layers, head_dim=work.head_dim,
        num_attention_heads=work.heads, num_key_value_heads=work.kv_heads, intermediate_size=work.intermediate,
        max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
        pad_token_id=None, dtype="float32",
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def measure(name: str, work: Workload, folder: Path) -> dict[str, Any]:
    """Everything about one engine, in this process. `startup_s` counts from before any heavy import."""
    began = time.perf_counter()
    engine = build_engine(
        name, model=folder, dtype="float32", stop_token_id=STOP, version=0, threads=THREADS, max_model_len=512
    )  # fmt: skip
    startup_s = time.perf_counter() - began
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    prompts = np.random.default_rng(0).integers(1, work.vocab, size=(work.batch, work.prompt_tokens), dtype=np.int32)
    asked = [GenerationRequest(id=str(i), prompt_ids=prompt, seed=i) for i, prompt in enumerate(prompts)]
    sampling = SamplingConfig(max_new_tokens=work.new_tokens)
    with asyncio.Runner() as runner:

        def write(support_k: int) -> int:
            written = runner.run(engine.generate(asked, sampling, want_logprobs=True, support_k=support_k))
            return sum(len(completion.token_ids) for completion in written)

        contenders: dict[str, Callable[[], int]] = {
            "engine": lambda: write(0),
            "engine_top16": lambda: write(16),
            **reference(work, folder, prompts),
        }
        speeds = interleaved(contenders)
        peak_rss = max(peak_rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        runner.run(engine.close())
    return {"startup_s": round(startup_s, 2), "peak_rss_bytes": peak_rss, "tokens_per_s": speeds}


def reference(work: Workload, folder: Path, prompts: np.ndarray) -> dict[str, Callable[[], int]]:
    """transformers' own generate, and nothing but the matrix products that writing these tokens takes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts.astype(np.int64))
    linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(work.batch * work.prompt_tokens, weight.shape[1]) for weight in linears}

    def generate() -> int:
        texts = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=work.new_tokens, eos_token_id=STOP, pad_token_id=STOP,
        )  # fmt: skip
        ended = (texts[:, work.prompt_tokens :] == STOP).int().cumsum(-1)
        return int((ended == 0).sum() + (ended[:, -1] > 0).sum())

    @torch.inference_mode()
    def products() -> int:
        for weight in linears:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        for _ in range(work.new_tokens):
            for weight in linears:
                torch.nn.functional.linear(inputs[weight.shape[1]][: work.batch], weight)
        return work.batch * work.new_tokens

    return {"generate": generate, "matrix_products": products}


def interleaved(contenders: dict[str, Callable[[], int]]) -> dict[str, int]:
    """Median tokens per second of each contender over ROUNDS rounds, after one round that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + ROUNDS):
        for name, run in contenders.items():
            began = time.perf_counter()
            num_tokens = run()
            speeds[name].append(num_tokens / (time.perf_counter() - began))
    return {name: round(statistics.median(measured[1:])) for name, measured in speeds.items()}


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], WORKLOADS[sys.argv[2]], Path(sys.argv[3]))))
        return
    report: dict[str, Any] = {"rounds": ROUNDS, "threads": THREADS}
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    for size, work in WORKLOADS.items():
        report[size] = {"workload": asdict(work)}
        with tempfile.TemporaryDirectory() as folder:
            save_student(work, Path(folder))
            for name in ("transformers", "vllm"):
                command = [sys.executable, "-m", "bench.engines", name, size, folder]
                finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                report[size][name] = json.loads(finished.stdout.splitlines()[-1])
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
