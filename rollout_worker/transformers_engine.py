"""The engine for small students on a CPU: starts in seconds, bit-equal from run to run with one thread.

Everything happens on one worker thread, in the order of the calls, so that the caller's event loop stays free and a
completion never sees two versions. Rows that end leave the batch. A completion depends on its own prompt, seed and
weights; beside whom it is written changes it by rounding only. It keeps no rows waiting for later calls to join:
for that there is the vLLM engine.

    prompts → unique, left-padded → prefill → [ choose → record → drop finished rows → step ]… → completions
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from potstill.config import SamplingConfig
from potstill.errors import WorkerLost
from potstill.types import FinishReason, WeightsVersion
from potstill.weights import check_fits, check_newer, shapes_in, unpack
from rollout_worker.engine import Completion, GenerationRequest, check_requests, num_new
from rollout_worker.model_decoder import ModelDecoder
from rollout_worker.packed_decoder import PackedDecoder, can_decode
from rollout_worker.sampling import Dice, choose, support, uniforms
from rollout_worker.tensors import as_tensor

CACHE_BYTES = 1 << 30  # keys and values of one batch; more requests than fit are written batch after batch
COMPACT_BELOW = 0.875  # share of unfinished rows under which the finished ones are worth copying away from

Returned = TypeVar("Returned")


class Cache(Protocol):
    def keep(self, rows: Tensor) -> None: ...


class Decoder(Protocol):
    """A model, and how its batch of rows grows by one token."""

    def load(self, tensors: dict[str, Tensor]) -> None: ...
    def row_bytes(self, num_positions: int) -> int: ...
    def prefill(self, ids_BQ: Tensor, real_BQ: Tensor, num_new: int) -> tuple[Any, Tensor]: ...
    def step(self, cache: Any, ids_B: Tensor) -> Tensor: ...


class TransformersEngine:
    """RolloutEngine over PackedDecoder where it fits the model, and over transformers' own forward elsewhere."""

    def __init__(
        self,
        *,
        model: Path,
        dtype: str,
        stop_token_id: int,
        version: int,
        threads: int,
        max_model_len: int,
        num_draws: int,
    ) -> None:
        self._config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        self._shapes = shapes_in(model)
        self._dtype = dtype
        self._stop_token_id = stop_token_id
        self._version = version
        self._max_model_len = max_model_len
        self._num_draws = num_draws
        # torch counts threads per calling thread: only the worker thread's own setting steers its products.
        self._thread = ThreadPoolExecutor(1, "student", initializer=torch.set_num_threads, initargs=(threads,))
        self._closed = False
        self._decoder: Decoder = self._thread.submit(self._open, model).result()

    @property
    def version(self) -> int:
        return self._version

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        check_requests(
            requests,
            sampling,
            support_k=support_k,
            vocab_size=self._config.vocab_size,
            max_model_len=self._max_model_len,
        )
        return await self._in_thread(lambda: self._write_all(requests, sampling, want_logprobs, support_k))

    async def load_weights(self, version: WeightsVersion, payload: NDArray[np.uint8]) -> None:
        await self._in_thread(lambda: self._load(version, payload))

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], Returned]) -> Returned:
        """Run `work` after all that was asked for before; what still waits when the engine is closed is not begun."""

        @torch.inference_mode()
        def run() -> Returned:
            if self._closed:
                raise WorkerLost("the engine is closed")
            return work()

        if self._closed:
            raise WorkerLost("the engine is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _open(self, model: Path) -> Decoder:
        if not can_decode(self._config, self._dtype):
            return ModelDecoder(model, self._config, self._dtype)
        decoder = PackedDecoder(self._config, max_model_len=self._max_model_len)
        tensors: dict[str, Tensor] = {}
        for file in sorted(model.glob("*.safetensors")):
            tensors |= load_file(file)
        decoder.load({name: tensors[name].to(torch.float32) for name in self._shapes})
        return decoder

    def _load(self, version: WeightsVersion, payload: NDArray[np.uint8]) -> None:
        check_newer(self._version, version.version)
        check_fits(version, self._shapes, self._dtype)
        self._decoder.load({name: as_tensor(array) for name, array in unpack(version, payload).items()})
        self._version = version.version

    def _write_all(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        size = max(1, CACHE_BYTES // self._decoder.row_bytes(longest + sampling.max_new_tokens))
        completions: list[Completion] = []
        for start in range(0, len(requests), size):
            completions += self._write(requests[start : start + size], sampling, want_logprobs, support_k)
        return completions

    def _write(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        seeds = [request.seed for request in requests]
        limits = torch.tensor([num_new(request, sampling) for request in requests])
        longest = int(limits.max())
        uniforms_BT, dice = uniforms(seeds, longest), Dice(seeds)
        num_draws = self._num_draws if want_logprobs and sampling.temperature > 0 else 0
        tape = _Tape(limits, support_k, num_draws)
        cache, logits = self._read_prompts(requests, longest)
        rows = torch.arange(len(requests))  # the request of each row of the batch
        unfinished = torch.ones(len(requests), dtype=torch.bool)
        for position in range(longest):
            numbers = uniforms_BT[rows, position, None]
            if num_draws:
                numbers = torch.cat((numbers, dice.throw(rows.tolist(), num_draws)), dim=1)
            chosen, logprobs = choose(logits, numbers, sampling)
            tape.record(position, rows, chosen, logprobs, logits)
            ids = chosen[:, 0]
            ended = unfinished & ((ids == self._stop_token_id) | (limits[rows] == position + 1))
            tape.lengths[rows[ended]] = position + 1
            unfinished &= ~ended
            num_unfinished = int(unfinished.sum())
            if num_unfinished == 0:
                break
            if num_unfinished < COMPACT_BELOW * len(rows):
                kept = unfinished.nonzero()[:, 0]
                cache.keep(kept)
                rows, ids, unfinished = rows[kept], ids[kept], unfinished[kept]
            logits = self._decoder.step(cache, ids)
        return list(tape.completions(self._stop_token_id, self._version, want_logprobs))

    def _read_prompts(self, requests: Sequence[GenerationRequest], num_new: int) -> tuple[Cache, Tensor]:
        """Prefill every distinct prompt once, then give each request a row of its own."""
        index_of: dict[bytes, int] = {}
        prompts: list[NDArray[np.int64]] = []
        prompt_of_row = []
        for request in requests:
            prompt = np.asarray(request.prompt_ids, dtype=np.int64)
            index = index_of.setdefault(prompt.tobytes(), len(prompts))
            if index == len(prompts):
                prompts.append(prompt)
            prompt_of_row.append(index)
        width = max(len(prompt) for prompt in prompts)
        ids_BQ = torch.zeros(len(prompts), width, dtype=torch.int64)
        real_BQ = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids_BQ[row, width - len(prompt) :] = torch.from_numpy(prompt)
            real_BQ[row, width - len(prompt) :] = True
        cache, logits = self._decoder.prefill(ids_BQ, real_BQ, num_new)
        if len(prompts) < len(requests):
            chosen = torch.tensor(prompt_of_row)
            cache.keep(chosen)
            logits = logits[chosen]
        return cache, logits


class _Tape:
    """What each request has written so far. Rows that ended may be written on: their length says what counts."""

    def __init__(self, limits: Tensor, support_k: int, num_draws: int) -> None:
        size = (len(limits), int(limits.max()))
        self.lengths = limits.clone()
        self._num_draws = num_draws
        self._chosen_ids = torch.empty(*size, 1 + num_draws, dtype=torch.int32)  # the written token, then the draws
        self._logprobs = torch.empty(*size, 1 + num_draws)
        self._support_k = support_k
        self._support_ids = torch.empty(*size, support_k, dtype=torch.int32)
        self._support_logprobs = torch.empty(*size, support_k)

    def record(self, position: int, rows: Tensor, chosen: Tensor, logprobs: Tensor, logits: Tensor) -> None:
        self._chosen_ids[rows, position] = chosen.int()
        self._logprobs[rows, position] = logprobs
        if self._support_k:
            support_ids, support_logprobs = support(logits, self._support_k)
            self._support_ids[rows, position] = support_ids.int()
            self._support_logprobs[rows, position] = support_logprobs

    def completions(self, stop_token_id: int, version: int, want_logprobs: bool) -> Iterator[Completion]:
        for row, length in enumerate(self.lengths.tolist()):
            chosen = self._chosen_ids[row, :length].numpy()
            logprobs = self._logprobs[row, :length].numpy()
            ids = chosen[:, 0].copy()
            yield Completion(
                token_ids=ids,
                logprobs=logprobs[:, 0].copy() if want_logprobs else np.full(length, np.nan, np.float32),
                support_ids=self._support_ids[row, :length].numpy().copy() if self._support_k else None,
                support_logprobs=self._support_logprobs[row, :length].numpy().copy() if self._support_k else None,
                weight_versions=np.full(length, version, np.int32),
                finish_reason=FinishReason.STOP if ids[-1] == stop_token_id else FinishReason.LENGTH,
                draw_ids=chosen[:, 1:].copy() if self._num_draws else None,
                draw_logprobs=logprobs[:, 1:].copy() if self._num_draws else None,
            )
