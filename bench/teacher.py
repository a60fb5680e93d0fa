"""How fast a teacher scores: `python -m bench.teacher` prints one JSON object.

A server process, its client in this process, real HTTP on loopback. Beside it, on the same weights and threads, in
processes of their own and in turns, because machines are noisy: transformers' bare forward pass, logits and nothing
else, and vLLM's prompt_logprobs over JSON. Medians of tokens per second; only completion tokens are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from pydantic import SecretStr

from potstill.calling.guard import Guard
from potstill.calling.outbound import CallPolicy, Endpoint
from potstill.codec import SAFETENSORS, encode_request
from potstill.teachers.server import TeacherClient
from potstill.wire import Ask, ScoreItem, ScoreRequest

VOCABULARY, HIDDEN, LAYERS = 32_768, 384, 7  # with tied embeddings: 23.6 million parameters
CONTEXT, COMPLETION, TOP = 64, 256, 64
SHARED_CONTEXTS, ROLLOUTS = (512, 2048), 8
BATCH_TOKENS, SMALL_BATCH_TOKENS = 16_384, 1024  # of the bare forward pass: the server's, and the fastest on a CPU
KEY, DEADLINE_S, START_S = "bench", 600.0, 180.0
ASKS = {"sampled": Ask(), "top64": Ask(top_k=TOP), "given64": Ask(num_ids=TOP), "hidden": Ask(hidden=HIDDEN)}


def save_teacher(folder: Path) -> None:
    """Write a random Qwen3 in float32, and a tokenizer whose tokens are made up."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    core = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))  # noqa: S106
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, eos_token="t1").save_pretrained(folder)  # noqa: S106
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=1024, head_dim=64,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=1, bos_token_id=None, pad_token_id=None, dtype="float32",
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def items(number: int, *, context: int = CONTEXT, shared: bool = False, seed: int = 0) -> list[ScoreItem]:
    """Random texts. Each has its own context, or all have the same."""
    random = np.random.default_rng(seed)
    contexts = random.integers(2, VOCABULARY, (1 if shared else number, context), dtype=np.int32)
    return [
        ScoreItem(
            id=str(index),
            context_ids=contexts[0 if shared else index],
            completion_ids=random.integers(2, VOCABULARY, COMPLETION, dtype=np.int32),
        )
        for index in range(number)
    ]


def with_given_ids(asked: Sequence[ScoreItem]) -> list[ScoreItem]:
    """The same texts, with ids of the caller's choice: spread over the vocabulary, distinct at each position."""
    stride = VOCABULARY // TOP
    offsets = np.random.default_rng(1).integers(0, stride, (COMPLETION, 1))
    ids = (offsets + stride * np.arange(TOP)).astype(np.int32)
    return [
        ScoreItem(id=one.id, context_ids=one.context_ids, completion_ids=one.completion_ids, token_ids=ids)
        for one in asked
    ]


# ------------------------------------------------------------------------------------------------- the contenders


@contextmanager
def server(folder: Path, threads: int) -> Iterator[tuple[str, int]]:
    """`python -m teacher_server`: its url and its pid."""
    command = [sys.executable, "-m", "teacher_server", str(folder), "--key-env", "TEACHER_KEY",
               "--threads", str(threads)]  # fmt: skip
    environment = {**_environment(threads), "TEACHER_KEY": KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process.pid
        finally:
            process.terminate()


def teacher_client(url: str) -> AbstractAsyncContextManager[TeacherClient]:
    """The client that a rollout worker has."""
    headers = {"authorization": SecretStr(f"Bearer {KEY}")}
    policy = CallPolicy(deadline_s=DEADLINE_S, concurrency=1, failures_to_open=1, cool_down_s=1.0)
    return aclosing(TeacherClient(Endpoint(url=url, headers=headers, guard=Guard(["127.0.0.0/8"]), policy=policy)))


@contextmanager
def bare(folder: Path, threads: int) -> Iterator[Callable[[int, int], float]]:
    """A process that, asked for a number of texts and a batch size, reads them and says how many seconds it took."""
    command = [sys.executable, "-m", "bench.teacher", "--bare", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=_environment(threads)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def seconds(number: int, batch_tokens: int) -> float:
            requests.write(f"{number} {batch_tokens}\n")
            requests.flush()
            return float(answers.readline())

        try:
            yield seconds
        finally:
            process.terminate()


def serve_bare(folder: Path) -> None:
    """The other end of `bare`: padded batches as the server's, their logits, no scores."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for line in sys.stdin:
        number, batch_tokens = map(int, line.split())
        texts = [np.concatenate([one.context_ids, one.completion_ids[:-1]]) for one in items(number)]
        batches = torch.split(torch.from_numpy(np.stack(texts)).long(), max(1, batch_tokens // len(texts[0])))
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=batch, use_cache=False).logits  # noqa: B018
        print(time.perf_counter() - began, flush=True)


@contextmanager
def vllm_server(folder: Path, threads: int) -> Iterator[str]:
    """vLLM's OpenAI server, ready: its url."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host",
               "127.0.0.1", "--port", str(port), "--max-logprobs", str(TOP), "--dtype", "float32", "--max-model-len",
               "1024", "--enforce-eager", "--served-model-name", "teacher"]  # fmt: skip
    environment = {**_environment(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            deadline = time.monotonic() + START_S
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("vLLM did not start; see --without-vllm")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


async def ask_vllm(url: str, asked: Sequence[ScoreItem]) -> int:
    """Scores of all texts by prompt_logprobs, parsed. Returns the size of the answer in bytes."""
    body = {
        "model": "teacher", "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": TOP,
        "prompt": [np.concatenate([one.context_ids, one.completion_ids]).tolist() for one in asked],
    }  # fmt: skip
    async with httpx2.AsyncClient(timeout=DEADLINE_S, trust_env=False) as http:
        answer = await http.post(f"{url}/v1/completions", json=body)
    answer.raise_for_status()
    assert len(answer.json()["choices"]) == len(asked)
    return len(answer.content)


# ----------------------------------------------------------------------------------------------------- measuring


async def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of everything, in turns; what is sent per token; and the memory both ends took."""
    asked = items(options.sequences)
    given = with_given_ids(asked)
    tokens = options.sequences * COMPLETION
    speeds: dict[str, list[float]] = {}
    with server(folder, options.threads) as (url, pid), bare(folder, options.threads) as forward:
        async with teacher_client(url) as client:
            await client.score(items(2, seed=1), Ask(), None)
            forward(2, BATCH_TOKENS)
            for _ in range(options.rounds):
                for name, ask in ASKS.items():
                    work = partial(client.score, given if ask.num_ids else asked, ask, None)
                    speeds.setdefault(name, []).append(tokens / await _timed(work))
                for name, batch_tokens in (("bare", BATCH_TOKENS), ("bare_small", SMALL_BATCH_TOKENS)):
                    speeds.setdefault(name, []).append(tokens / forward(options.sequences, batch_tokens))
            shared = {str(width): await shared_context(client, width, options.rounds) for width in SHARED_CONTEXTS}
        sizes = {name: bytes_per_token(url, given[:4] if ask.num_ids else asked[:4], ask) for name, ask in ASKS.items()}
        memory = {"server": _peak_rss_bytes(pid), "client": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return {
        "tokens_per_s": {name: round(statistics.median(measured)) for name, measured in speeds.items()},
        "bytes_per_token": sizes,
        "peak_rss_bytes": memory,
        "shared_context": shared,
    }


async def shared_context(client: TeacherClient, width: int, rounds: int) -> dict[str, float]:
    """Seconds for rollouts of one context: together, each alone, and together with contexts that differ."""
    same, different = items(ROLLOUTS, context=width, shared=True), items(ROLLOUTS, context=width)

    async def one_by_one() -> None:
        for one in same:
            await client.score([one], Ask(), None)

    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "shared_s": lambda: client.score(same, Ask(), None),
        "alone_s": one_by_one,
        "batch_s": lambda: client.score(different, Ask(), None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(await _timed(way))
    found = {name: statistics.median(measured) for name, measured in seconds.items()}
    return {name: round(value, 3) for name, value in found.items()} | {
        "faster_than_alone": round(found["alone_s"] / found["shared_s"], 2),
        "faster_than_batch": round(found["batch_s"] / found["shared_s"], 2),
        "fewer_tokens_read": round(ROLLOUTS * (width + COMPLETION) / (width + ROLLOUTS * COMPLETION), 2),
    }


async def measure_vllm(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's JSON route and ours in turns, on the same few texts."""
    asked = items(options.vllm_sequences)
    tokens = len(asked) * COMPLETION
    speeds: dict[str, list[float]] = {"vllm_json_top64": [], "top64": []}
    with server(folder, options.threads) as (url, _), vllm_server(folder, options.threads) as vllm_url:
        async with teacher_client(url) as client:
            num_bytes = await ask_vllm(vllm_url, items(1, seed=1))
            await client.score(items(2, seed=1), Ask(), None)
            for _ in range(options.rounds):
                speeds["vllm_json_top64"].append(tokens / await _timed(lambda: ask_vllm(vllm_url, asked)))
                speeds["top64"].append(tokens / await _timed(lambda: client.score(asked, ASKS["top64"], None)))
    medians = {name: statistics.median(measured) for name, measured in speeds.items()}
    return {
        "sequences": len(asked),
        "tokens_per_s": {name: round(value) for name, value in medians.items()},
        "top64_of_vllm_json": round(medians["top64"] / medians["vllm_json_top64"], 1),
        "vllm_json_bytes_per_token": round(num_bytes / (CONTEXT + COMPLETION)),
    }


def bytes_per_token(url: str, asked: Sequence[ScoreItem], ask: Ask) -> int:
    """Of the answer, its header included."""
    body = encode_request(ScoreRequest(model="teacher", items=tuple(asked), ask=ask), SAFETENSORS)
    headers = {"authorization": f"Bearer {KEY}", "content-type": SAFETENSORS, "accept": SAFETENSORS}
    answer = httpx2.post(f"{url}/v1/score", content=body, headers=headers, timeout=DEADLINE_S, trust_env=False)
    answer.raise_for_status()
    return round(len(answer.content) / (len(asked) * COMPLETION))


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def _peak_rss_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.teacher", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="16 texts and one round, to see that it works")
    parser.add_argument("--without-vllm", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        serve_bare(options.bare)
        return
    options.sequences, options.vllm_sequences, options.rounds = (16, 2, 1) if options.quick else (256, 16, 3)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "teacher"
        save_teacher(folder)
        report = {
            "workload": {"sequences": options.sequences, "completion_tokens": COMPLETION, "context_tokens": CONTEXT,
                         "vocabulary": VOCABULARY, "threads": options.threads, "rounds": options.rounds},
            **asyncio.run(compare(folder, options)),
        }  # fmt: skip
        speeds = report["tokens_per_s"]
        report["of_bare"] = {name: round(speeds[name] / speeds["bare"], 2) for name in ASKS}
        report["of_bare_small"] = {name: round(speeds[name] / speeds["bare_small"], 2) for name in ASKS}
        if not options.without_vllm:
            report["vllm"] = asyncio.run(measure_vllm(folder, options))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
