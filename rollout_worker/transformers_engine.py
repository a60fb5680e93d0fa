"""The engine for small students on a CPU: starts in seconds, bit-equal from run to run with one thread.

Writing happens on one worker thread, in the order of the calls, so that the caller's event loop stays free. New
weights are checked and packed on another, and taken between two steps or two calls by changing a pointer. Rows that end
leave the batch. A completion depends on its own prompt, seed and weights; beside whom it is written changes it by
rounding only. It keeps no rows waiting for later calls to join: for that there is the vLLM engine.

    prompts → unique, left-padded → prefill → [ choose → record → drop finished rows → step ]… → completions
                                       ▲                                               │
                                       └── prompts and what is written ◄── new weights ┘
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from potstill.config import SamplingConfig
from potstill.config_weights import InFlight
from potstill.errors import WorkerLost
from potstill.transports.device import Stream
from potstill.types import FinishReason, IntArray, WeightsVersion
from potstill.weights import Bytes, check_newer
from rollout_worker.engine import Completion, GenerationRequest, check_requests, num_new
from rollout_worker.incoming import Incoming
from rollout_worker.model_decoder import ModelDecoder
from rollout_worker.packed_decoder import PackedDecoder, can_decode
from rollout_worker.sampling import Dice, choose, support, uniforms

CACHE_BYTES = 1 << 30  # keys and values of one batch; more requests than fit are written batch after batch
COMPACT_BELOW = 0.875  # share of unfinished rows under which the finished ones are worth copying away from

Returned = TypeVar("Returned")


class Cache(Protocol):
    def keep(self, rows: Tensor) -> None: ...


class Decoder(Protocol):
    """A model, and how its batch of rows grows by one token."""

    def prepare(self, tensors: dict[str, Tensor]) -> Any: ...
    def swap(self, prepared: Any) -> None: ...
    def row_bytes(self, num_positions: int) -> int: ...
    def prefill(self, ids_BQ: Tensor, real_BQ: Tensor, num_new: int) -> tuple[Any, Tensor]: ...
    def step(self, cache: Any, ids_B: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Arrival:
    """Weights that are ready to be taken, once."""

    version: int
    weights: Any  # what the decoder prepared
    in_flight: InFlight
    taken: Future[float] = field(default_factory=Future)  # seconds for which nothing was written


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
        self._incoming = Incoming(model, dtype)
        self._stop_token_id = stop_token_id
        self._version = version
        self._max_model_len = max_model_len
        self._num_draws = num_draws
        # torch counts threads per calling thread: only the worker thread's own setting steers its products.
        self._thread = ThreadPoolExecutor(1, "student", initializer=torch.set_num_threads, initargs=(threads,))
        self._beside = ThreadPoolExecutor(1, "weights", initializer=torch.set_num_threads, initargs=(1,))
        self._loading = asyncio.Lock()
        self._arrived: _Arrival | None = None
        self._closed = False
        self._decoder: Decoder = self._thread.submit(self._open, model, dtype).result()

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

    async def load_weights(
        self, version: WeightsVersion, payload: Bytes | Stream, in_flight: InFlight = "keep"
    ) -> float:
        assert isinstance(payload, np.ndarray), "checked by the plan"
        async with self._loading:
            check_newer(self._version, version.version)
            self._refuse_closed()
            weights = await asyncio.wrap_future(self._beside.submit(self._prepare, version, payload))
            self._refuse_closed()
            arrival = _Arrival(version.version, weights, in_flight)
            if in_flight != "finish":
                self._arrived = arrival  # between two steps, if there are any before its turn among the calls
            self._thread.submit(self._take_in_turn, arrival)
            return await asyncio.wrap_future(arrival.taken)

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._beside.shutdown)
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], Returned]) -> Returned:
        """Run `work` after all that was asked for before; what still waits when the engine is closed is not begun."""

        @torch.inference_mode()
        def run() -> Returned:
            self._refuse_closed()
            return work()

        self._refuse_closed()
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise WorkerLost("the engine is closed")

    def _open(self, model: Path, dtype: str) -> Decoder:
        if not can_decode(self._config, dtype):
            return ModelDecoder(model, self._config, dtype)
        decoder = PackedDecoder(self._config, max_model_len=self._max_model_len)
        decoder.swap(decoder.prepare(self._incoming.base()))
        return decoder

    @torch.no_grad()
    def _prepare(self, version: WeightsVersion, payload: Bytes) -> Any:
        return self._decoder.prepare(self._incoming.tensors(version, payload))

    # Everything below runs on the writing thread.

    @torch.inference_mode()
    def _take_in_turn(self, arrival: _Arrival) -> None:
        with self._taking(arrival) as taken:
            if taken:
                self._refuse_closed()
                self._swap(arrival)

    @contextmanager
    def _taking(self, arrival: _Arrival) -> Iterator[bool]:
        """Whether it is still there to be taken. The block's time is that for which nothing is written."""
        self._arrived = None
        future = arrival.taken
        if future.done() or future.running() or not future.set_running_or_notify_cancel():
            yield False
            return
        began = time.perf_counter()
        try:
            yield True
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(time.perf_counter() - began)

    def _swap(self, arrival: _Arrival) -> None:
        self._decoder.swap(arrival.weights)
        self._version = arrival.version

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
        texts = [request.prompt_ids for request in requests]
        cache, logits = self._read(texts, longest)
        rows = torch.arange(len(requests))  # the request of each row of the batch
        unfinished = torch.ones(len(requests), dtype=torch.bool)
        for position in range(longest):
            numbers = uniforms_BT[rows, position, None]
            if num_draws:
                numbers = torch.cat((numbers, dice.throw(rows.tolist(), num_draws)), dim=1)
            chosen, logprobs = choose(logits, numbers, sampling)
            tape.record(position, self._version, rows, chosen, logprobs, logits)
            ids = chosen[:, 0]
            ended = unfinished & ((ids == self._stop_token_id) | (limits[rows] == position + 1))
            tape.lengths[rows[ended]] = position + 1
            unfinished &= ~ended
            num_unfinished = int(unfinished.sum())
            if num_unfinished == 0:
                break
            arrival = self._arrived
            if arrival is not None:
                rows, unfinished = rows[unfinished], unfinished[unfinished]
                renewed = self._renewed(arrival, texts, tape, rows, position + 1)
                if renewed is None:
                    break
                cache, logits = renewed
                continue
            if num_unfinished < COMPACT_BELOW * len(rows):
                kept = unfinished.nonzero()[:, 0]
                cache.keep(kept)
                rows, ids, unfinished = rows[kept], ids[kept], unfinished[kept]
            logits = self._decoder.step(cache, ids)
        return list(tape.completions(self._stop_token_id, want_logprobs))

    def _renewed(
        self, arrival: _Arrival, texts: Sequence[IntArray], tape: _Tape, rows: Tensor, length: int
    ) -> tuple[Cache, Tensor] | None:
        """Take new weights and read the rows' texts with them from the first token, so that no key or value is older.

        None: their completions end here, after `length` tokens each.
        """
        with self._taking(arrival) as taken:
            if taken:
                self._swap(arrival)
                if arrival.in_flight == "abort":
                    tape.abort(rows, length)
                    return None
            so_far = [np.concatenate((texts[row], tape.written(row, length))) for row in rows.tolist()]
            return self._read(so_far, tape.size - length)

    def _read(self, texts: Sequence[IntArray], num_new: int) -> tuple[Cache, Tensor]:
        """Prefill every distinct text once, then give each a row of its own."""
        index_of: dict[bytes, int] = {}
        distinct: list[NDArray[np.int64]] = []
        index_of_row = []
        for given in texts:
            text = np.asarray(given, dtype=np.int64)
            index = index_of.setdefault(text.tobytes(), len(distinct))
            if index == len(distinct):
                distinct.append(text)
            index_of_row.append(index)
        width = max(len(text) for text in distinct)
        ids_BQ = torch.zeros(len(distinct), width, dtype=torch.int64)
        real_BQ = torch.zeros(len(distinct), width, dtype=torch.bool)
        for row, text in enumerate(distinct):
            ids_BQ[row, width - len(text) :] = torch.from_numpy(text)
            real_BQ[row, width - len(text) :] = True
        cache, logits = self._decoder.prefill(ids_BQ, real_BQ, num_new)
        if len(distinct) < len(texts):
            chosen = torch.tensor(index_of_row)
            cache.keep(chosen)
            logits = logits[chosen]
        return cache, logits


class _Tape:
    """What each request has written so far. Rows that ended may be written on: their length says what counts."""

    def __init__(self, limits: Tensor, support_k: int, num_draws: int) -> None:
        self.size = int(limits.max())
        size = (len(limits), self.size)
        self.lengths = limits.clone()
        self._num_draws = num_draws
        self._chosen_ids = torch.empty(*size, 1 + num_draws, dtype=torch.int32)  # the written token, then the draws
        self._logprobs = torch.empty(*size, 1 + num_draws)
        self._support_k = support_k
        self._support_ids = torch.empty(*size, support_k, dtype=torch.int32)
        self._support_logprobs = torch.empty(*size, support_k)
        self._versions = np.empty(self.size, np.int32)  # all rows grow in step
        self._aborted = torch.zeros(len(limits), dtype=torch.bool)

    def record(
        self, position: int, version: int, rows: Tensor, chosen: Tensor, logprobs: Tensor, logits: Tensor
    ) -> None:
        self._versions[position] = version
        self._chosen_ids[rows, position] = chosen.int()
        self._logprobs[rows, position] = logprobs
        if self._support_k:
            support_ids, support_logprobs = support(logits, self._support_k)
            self._support_ids[rows, position] = support_ids.int()
            self._support_logprobs[rows, position] = support_logprobs

    def written(self, row: int, length: int) -> IntArray:
        return self._chosen_ids[row, :length, 0].numpy()

    def abort(self, rows: Tensor, length: int) -> None:
        self.lengths[rows] = length
        self._aborted[rows] = True

    def completions(self, stop_token_id: int, want_logprobs: bool) -> Iterator[Completion]:
        for row, length in enumerate(self.lengths.tolist()):
            chosen = self._chosen_ids[row, :length].numpy()
            logprobs = self._logprobs[row, :length].numpy()
            ids = chosen[:, 0].copy()
            reason = FinishReason.STOP if ids[-1] == stop_token_id else FinishReason.LENGTH
            yield Completion(
                token_ids=ids,
                logprobs=logprobs[:, 0].copy() if want_logprobs else np.full(length, np.nan, np.float32),
                support_ids=self._support_ids[row, :length].numpy().copy() if self._support_k else None,
                support_logprobs=self._support_logprobs[row, :length].numpy().copy() if self._support_k else None,
                weight_versions=self._versions[:length].copy(),
                finish_reason=FinishReason.ABORTED if self._aborted[row] else reason,
                draw_ids=chosen[:, 1:].copy() if self._num_draws else None,
                draw_logprobs=logprobs[:, 1:].copy() if self._num_draws else None,
            )
