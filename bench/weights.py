"""How fast weights travel: `python -m bench.weights [--sizes 10 100 500]` prints one JSON object.

Per size in millions of float32 parameters and per transport, from the learner's tensors to the tensors that an engine
computes with, over two real processes (this one and a Ray actor), beside a plain copy of the same bytes, by one thread,
in the same rounds. Medians count, and the best rounds stand beside them, because machines are noisy; the first version,
which touches new memory, is reported apart. `rebound` is an engine that takes the received bytes as its weights
(transformers' own forward pass); up to ENGINE_SIZE real engines load as well, while they write: transformers' forward
pass, the packed decoder, whose weights oneDNN packs anew, and vLLM, which packs them within the pause. From device to
device, which is gloo between CPUs here, only vLLM loads.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.masters import Masters
from learner.model import CausalModel
from learner.outbox import Outbox
from learner.publish import DevicePublisher, as_numpy
from potstill.config import SamplingConfig
from potstill.transports.delta import difference, patched
from potstill.transports.route import Route, open_transport
from potstill.types import WeightsVersion
from potstill.weights import Array, pack, unpack
from rollout_worker.engine import GenerationRequest, build_engine
from rollout_worker.tensors import as_tensor

ROUNDS = 5
FIRST = 2  # versions that touch new memory
ENGINE_SIZE = 100  # millions of parameters of the largest real engine
ENGINES = {  # by what is reported: the engine, and the model's activation, which decides who computes it
    "transformers engine": ("transformers", "gelu"),
    "packed engine": ("transformers", "silu"),
    "vllm engine": ("vllm", "silu"),
}
TAKERS = {  # who is measured with which transport
    "shared_memory": {"rebound", *ENGINES},
    "object_store": {"rebound"},
    "disk": {"rebound"},
    "device": {"vllm engine"},
}
SHAPES = {
    10: {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 768, "vocab_size": 16_000},
    100: {"hidden_size": 768, "num_hidden_layers": 10, "intermediate_size": 2048, "vocab_size": 48_000},
    500: {"hidden_size": 1280, "num_hidden_layers": 20, "intermediate_size": 3584, "vocab_size": 96_000},
}
RATES = (1e-6, 1e-5, 1e-4)  # learning rates at which deltas are measured


def config_of(size: int, *, activation: str = "silu") -> Qwen3Config:
    """A Qwen3; one with another activation is computed by transformers itself and not by packed_decoder.py."""
    shape = SHAPES[size]
    heads = shape["hidden_size"] // 64
    return Qwen3Config(
        **shape, head_dim=64, num_attention_heads=heads, num_key_value_heads=heads // 2, hidden_act=activation,
        max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
        pad_token_id=None, dtype="float32",
    )  # fmt: skip


def tensors_of(size: int) -> dict[str, Array]:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config_of(size))
    rng = np.random.default_rng(0)
    return {
        name: (0.02 * rng.standard_normal(tuple(weight.shape), dtype=np.float32))
        for name, weight in model.named_parameters()
    }


class Rebound:
    """A worker whose weights are views into what it received."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._weights: dict[str, torch.Tensor] = {}

    def ready(self) -> None:
        """Answers once it is built."""

    def load(self, version: WeightsVersion) -> dict[str, float]:
        began = time.perf_counter()
        received = unpack(version, version.payload.open(self._kept))
        tensors = {name: as_tensor(array) for name, array in received.items()}
        ready = time.perf_counter()
        self._weights = tensors
        return {"load_s": time.perf_counter() - began, "pause_s": time.perf_counter() - ready}


class Writing:
    """A worker with a real engine that writes while weights come."""

    def __init__(self, folder: str, engine: str) -> None:
        self._kept: dict[str, Any] = {}
        self._engine = build_engine(
            engine, model=Path(folder), dtype="float32", stop_token_id=0, version=0, threads=1, max_model_len=1024
        )

    async def ready(self) -> None:
        """Answers once it is built."""

    async def load(self, version: WeightsVersion) -> dict[str, float]:
        prompt = np.arange(1, 33, dtype=np.int32)
        asked = [GenerationRequest(id=str(seed), prompt_ids=prompt, seed=seed) for seed in range(4)]
        sampling = SamplingConfig(max_new_tokens=400)
        writing = asyncio.create_task(self._engine.generate(asked, sampling, want_logprobs=True, support_k=0))
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        payload = await asyncio.to_thread(version.payload.open, self._kept)
        pause_s = await self._engine.load_weights(version, payload, "abort")
        load_s = time.perf_counter() - began
        del payload
        await writing
        return {"load_s": load_s, "pause_s": pause_s}


def memcpy_s(source: Array, target: Array) -> float:
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


Publish = Callable[[int], WeightsVersion]
"""Sends the tensors as the version of that number."""


@contextmanager
def opened(name: str, tensors: Mapping[str, Array], folder: Path) -> Iterator[Publish]:
    """The learner's side of a transport."""
    route = Route(transport=name, wire="exact", adapter_only=False, reason="")  # type: ignore[arg-type]
    if name == "device":
        sender = DevicePublisher(route, Outbox("127.0.0.1"))
        lying = {key: torch.from_numpy(array) for key, array in tensors.items()}
        yield lambda number: sender.send(lying, version=number)
        sender.close()
        return
    transport = open_transport(route, folder)

    def publish(number: int) -> WeightsVersion:
        described, payload = pack(tensors, number, room=transport.room)
        return replace(described, payload=transport.send(payload, number))

    yield publish
    transport.close()


def travel(publish: Publish, worker: Any, number: int) -> dict[str, float]:
    """One version from the learner's tensors to the worker's, in seconds."""
    began = time.perf_counter()
    version = publish(number)
    publish_s = time.perf_counter() - began
    loaded: dict[str, float] = ray.get(worker.load.remote(version))
    return {"publish_s": publish_s, "total_s": publish_s + loaded["load_s"], **loaded}


def measure(tensors: Mapping[str, Array], workers: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Interleaved rounds of every transport to every worker that takes it, and of a plain copy."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    source = np.concatenate([tensor.reshape(-1) for tensor in tensors.values()])
    target = np.ones_like(source)
    report: dict[str, Any] = {"bytes": nbytes}
    numbers = itertools.count(1)  # of versions; an engine takes only later ones
    for name, takers in TAKERS.items():
        with opened(name, tensors, folder) as publish:
            for who in [who for who in workers if who in takers]:
                rounds, copies = [], []
                for _ in range(FIRST + ROUNDS):
                    copies.append(memcpy_s(source, target))
                    rounds.append(travel(publish, workers[who], next(numbers)))
                report[f"{name} to {who}"] = summary(rounds, copies, nbytes)
    return report


def summary(rounds: list[dict[str, float]], copies: list[float], nbytes: int) -> dict[str, float]:
    median = {key: statistics.median(one[key] for one in rounds[FIRST:]) for key in rounds[0]}
    memcpy = statistics.median(copies[FIRST:])
    return {
        **{key: round(value, 5) for key, value in median.items()},
        "memcpy_s": round(memcpy, 5),
        "GB_per_s": round(nbytes / median["total_s"] / 1e9, 2),
        "memcpy_GB_per_s": round(nbytes / memcpy / 1e9, 2),
        "share_of_memcpy": round(memcpy / median["total_s"], 3),
        "best_share_of_memcpy": round(min(copies[FIRST:]) / min(one["total_s"] for one in rounds[FIRST:]), 3),
        "pause_share": round(median["pause_s"] / median["total_s"], 4),
        "first_total_s": round(rounds[0]["total_s"], 5),
    }


def one_size(size: int) -> dict[str, Any]:
    tensors = tensors_of(size)
    workers: dict[str, Any] = {"rebound": ray.remote(Rebound).options(num_cpus=0).remote()}
    with tempfile.TemporaryDirectory() as folder:
        if size <= ENGINE_SIZE:
            for who, (engine, activation) in ENGINES.items():
                Qwen3ForCausalLM(config_of(size, activation=activation)).save_pretrained(f"{folder}/{who}")
                workers[who] = ray.remote(Writing).options(num_cpus=0).remote(f"{folder}/{who}", engine)
        ray.get([worker.ready.remote() for worker in workers.values()])  # building an engine takes every core
        report = measure(tensors, workers, Path(folder))
    for worker in workers.values():
        ray.kill(worker)
    return report


def deltas(size: int) -> dict[str, Any]:
    """What a delta saves of a bfloat16 student, per learning rate, after AdamW's third to fifth step on random text."""
    report: dict[str, Any] = {}
    for rate in RATES:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config_of(size)).bfloat16()
        masters = Masters(CausalModel(model, model))
        optimizer = torch.optim.AdamW(masters.weights.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        payloads, shares, seconds = [], [], []
        for step in range(5):
            ids = torch.randint(0, model.config.vocab_size, (2, 128))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            masters.settle()
            optimizer.zero_grad()
            arrays = {name: as_numpy(weight) for name, weight in model.named_parameters()}
            payloads.append(pack(arrays, step)[1])
            if step < 2:
                continue
            began = time.perf_counter()
            delta = difference(payloads[-2], payloads[-1])
            made = time.perf_counter()
            assert (patched(payloads[-2], delta) == payloads[-1]).all()
            seconds.append((made - began, time.perf_counter() - made))
            shares.append(delta.size / payloads[-1].size)
        encode_s, patch_s = (statistics.median(times) for times in zip(*seconds, strict=True))
        report[f"lr {rate:g}"] = {
            "share_of_bytes": round(statistics.median(shares), 3),
            "changed": round(statistics.median(shares) - 1 / 16, 3),
            "encode_GB_per_s": round(payloads[-1].size / encode_s / 1e9, 2),
            "patch_GB_per_s": round(payloads[-1].size / patch_s / 1e9, 2),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    sizes = parser.parse_args().sizes
    torch.set_num_threads(1)
    largest = 4 * 1_000_000 * max(sizes)
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        "local",  # a cluster of its own, whatever runs on this machine
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=3 * largest + (100 << 20),
        runtime_env={"env_vars": environment},
    )  # fmt: skip
    report: dict[str, Any] = {"rounds": ROUNDS, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for size in sizes:
        report[f"{size}M"] = one_size(size)
    report["delta, bfloat16, 10M"] = deltas(10)
    report["load_after"] = os.getloadavg()[0]
    ray.shutdown()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
