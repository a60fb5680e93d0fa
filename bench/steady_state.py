"""Trained tokens per second in steady state, and where a step's time goes, for each engine.

    python -m bench.steady_state [--steps 8] [--engines transformers vllm]

Student of 2,968,064 and teacher of 11,843,264 parameters (Qwen3, vocabulary 4096 and two whole tokens, float32, random
weights), prompts of 64 tokens, 128 new tokens, 32 rollouts a step, student-top-k reverse KL, through Ray, HTTP and
weights published after every step. The first steps are warm-up and left out; figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.launch import site
from orchestrator.run import execute
from potstill.config import RunConfig, ScratchConfig
from potstill.config_file import parse
from potstill.journal import Journal, steps_in

PROMPT_TOKENS, NEW_TOKENS, ROLLOUTS, VOCABULARY = 64, 128, 32, 4096
WARM_UP_STEPS = 3
STUDENT = ScratchConfig(hidden=128, intermediate=704, layers=6, heads=4, kv_heads=2, vocab_size=VOCABULARY)
TEACHER = ScratchConfig(hidden=320, intermediate=1280, layers=6, heads=10, kv_heads=5, vocab_size=VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measured = asyncio.run(measure(Path(scratch), options.engines, options.steps))
    print(json.dumps(measured, indent=2))


async def measure(scratch: Path, engines: list[str], steps: int) -> dict[str, Any]:
    texts = words(random.Random(0), lines=4000)
    write_prompts(scratch / "prompts.jsonl", texts)
    measured = {}
    async with site(config(scratch, engines[0], steps)) as opened:
        for name, architecture in {"student": STUDENT, "teacher": TEACHER}.items():
            await opened.create(scratch / name, architecture, texts=texts, seed=0)
        for engine in engines:
            run = config(scratch, engine, steps + WARM_UP_STEPS)
            journal = Journal(scratch / run.name)
            await execute(run, opened, journal)
            journal.close()
            measured[engine] = figures(journal.folder)
    return measured


def config(scratch: Path, engine: str, steps: int) -> RunConfig:
    return parse(
        {
            "name": f"steady-{engine}",
            "runs": str(scratch),
            "method": "opd",
            "student": {"model": str(scratch / "student")},
            "teacher": {"kind": "server", "model": str(scratch / "teacher")},
            "data": {"kind": "jsonl", "path": str(scratch / "prompts.jsonl")},
            "rollout": {
                "engine": engine,
                "prompts_per_step": ROLLOUTS,
                "max_prompt_tokens": 2 * PROMPT_TOKENS,
                "sampling": {"max_new_tokens": NEW_TOKENS},
            },
            "optim": {"lr": 1e-4},
            "loop": {"steps": steps},
        }
    )


def figures(folder: Path) -> dict[str, Any]:
    """Medians over the steps after the warm-up."""
    steps = steps_in(folder)[WARM_UP_STEPS:]

    def median(name: str) -> float:
        return float(statistics.median(step[name] for step in steps))

    split = {
        "generate": median("worker_seconds_generate"),
        "score": median("worker_seconds_score"),
        "train": median("seconds_train"),
        "weights": median("seconds_weights"),
    }
    total = median("seconds_step")
    return {
        "trained_tokens_per_second": statistics.median(s["tokens_per_second"] for s in steps),
        "tokens_per_step": median("completion_tokens") * ROLLOUTS,
        "seconds_per_step": total,
        "seconds": {**split, "idle": total - sum(split.values())},
        "steps": len(steps),
    }


def words(source: random.Random, *, lines: int) -> list[str]:
    """Made-up words: enough different text for a tokenizer of 4096 tokens."""
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    lexicon = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(6000)]
    return [" ".join(source.choices(lexicon, k=56)) for _ in range(lines)]


def write_prompts(path: Path, texts: list[str]) -> None:
    """Prompts of about PROMPT_TOKENS tokens: a word of this text is about one token and a bit."""
    share = PROMPT_TOKENS - 8  # the chat template's own tokens
    path.write_text("".join(json.dumps({"prompt": " ".join(text.split()[: share * 2 // 3])}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
