"""The engine for everything larger: vLLM, built and stepped by one thread of this process.

    event loop                          stepping thread
    generate ──► inbox ──► between two steps: add a request, swap the weights, abort, stop
       ▲                   step ──► finished outputs
       └────────── futures ◄──────────────┘

Requests join at any time. Weights are swapped between two steps, packed beside them where that can be. Requests in
flight go on: their keys and values are computed anew by the new weights, and every token keeps the version that wrote
it. Or they end first, while new ones are held back, or they are aborted. Weights that stop on their way from the
learner's device leave half of a version: then no step is made, whatever is asked, until a version has come whole. A
dead engine is not revived: all that waits for it gets WorkerLost. No sampling parameter is left to the model's
generation_config.json.
Several engines of one process take turns; close them together, because vLLM's own shutdown is the process's.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason as VllmFinishReason

from potstill.config import SamplingConfig
from potstill.config_vllm import VllmConfig
from potstill.config_weights import InFlight
from potstill.errors import ConfigError, NonFinite, WeightsError, WorkerLost
from potstill.transports.device import Stream
from potstill.types import FinishReason, WeightsVersion
from potstill.weights import Bytes, check_newer
from rollout_worker import vllm_loading, vllm_process
from rollout_worker.arriving import Here, Weights
from rollout_worker.engine import Completion, GenerationRequest, check_requests, num_new
from rollout_worker.incoming import Incoming
from rollout_worker.lending import lent
from rollout_worker.sampling import vllm_arguments
from rollout_worker.vllm_packing import Packed, can_pack, pack

CPU_CACHE_GB = 0.5  # of keys and values, where vLLM otherwise takes a large part of the machine's memory
BATCHED_TOKENS = 8192  # of one step; raised where one whole text needs more, because none is prefilled in parts
TEARS = 3  # versions in a row that stopped midway, after which another process is tried

_FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORTED}

# vLLM's kernels share scratch memory within a process: two engines stepping at once corrupt each other's.
_ONE_AT_A_TIME = threading.Lock()


class VllmEngine:
    """RolloutEngine over vLLM's LLMEngine."""

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
        settings: VllmConfig,
    ) -> None:
        self._incoming = Incoming(model, dtype)
        self._dtype = dtype
        self._stop_token_id = stop_token_id
        self._version = version
        self._max_model_len = max_model_len
        self._num_draws = num_draws
        self._settings = settings
        self._names = itertools.count()
        self._waiting: dict[str, Future[CompletionOutput]] = {}
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing enters the inbox once `_stopped` says why
        self._stopped: str | None = None
        self._swapping = asyncio.Lock()
        self._draining: partial[None] | None = None  # the swap that waits for those in flight to end
        self._held: dict[str, partial[None]] = {}  # requests that wait for that swap, by name
        self._torn = 0  # versions in a row of which only a part is loaded
        self._beside = ThreadPoolExecutor(1, "weights", initializer=torch.set_num_threads, initargs=(1,))
        started: Future[LLMEngine] = Future()
        self._thread = threading.Thread(target=self._run, args=(started, model, threads), name="vllm", daemon=True)
        self._thread.start()
        self._engine = started.result()
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._packs = _packs(self._engine, settings)

    @property
    def version(self) -> int:
        return self._version

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        check_requests(
            requests, sampling, support_k=support_k, vocab_size=self._vocab_size, max_model_len=self._max_model_len
        )
        outputs = await asyncio.gather(
            *(self._write(request, sampling, want_logprobs, support_k) for request in requests)
        )
        has_logprobs = want_logprobs and sampling.temperature > 0
        return [_completion(output, has_logprobs, self._num_draws, support_k) for output in outputs]

    async def load_weights(
        self, version: WeightsVersion, payload: Bytes | Stream, in_flight: InFlight = "keep"
    ) -> float:
        async with self._swapping:
            check_newer(self._version, version.version)
            self._refuse_stopped()
            lending = ExitStack()
            weights = await asyncio.wrap_future(self._beside.submit(self._handed, lending, version, payload))
            swapped: Future[float] = Future()
            swapped.set_running_or_notify_cancel()  # only the stepping thread ends it
            swapped.add_done_callback(lambda _: lending.close())  # it swaps, though whoever asked may have gone
            swap = partial(self._swap, version.version, weights, in_flight, swapped)
            await self._between_steps(partial(self._drain, swap) if in_flight == "finish" else swap)
            return await asyncio.wrap_future(swapped)

    async def close(self) -> None:
        if self._stopped is None:
            await self._between_steps(lambda: self._stop("the engine is closed"))
        await asyncio.to_thread(self._beside.shutdown)
        await asyncio.to_thread(self._thread.join)

    def _handed(self, lending: ExitStack, version: WeightsVersion, payload: Bytes | Stream) -> Weights | Packed:
        """Checked, and packed or where vLLM's processes can read them."""
        weights = self._incoming.weights(version, payload)
        if self._settings.tensor_parallel > 1:
            return lending.enter_context(lent(weights))
        if self._packs and isinstance(weights, Here) and not self._torn:  # of a half version no layer is fit to copy
            packed: Packed = self._engine.collective_rpc(lambda worker: pack(worker.get_model(), weights))[0]
            return packed
        return weights

    async def _write(
        self, request: GenerationRequest, sampling: SamplingConfig, want_logprobs: bool, support_k: int
    ) -> CompletionOutput:
        arguments = vllm_arguments(
            sampling,
            max_new_tokens=num_new(request, sampling),
            seed=request.seed,
            stop_token_id=self._stop_token_id,
            want_logprobs=want_logprobs,
            support_k=support_k,
            num_draws=self._num_draws,
        )
        params = SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY)
        name = str(next(self._names))
        finished: Future[CompletionOutput] = Future()
        finished.set_running_or_notify_cancel()  # from here on only the stepping thread ends it
        try:
            await self._between_steps(lambda: self._add(name, request, params, finished))
            return await asyncio.wrap_future(finished)
        except asyncio.CancelledError:
            await self._between_steps(lambda: self._abort(name))
            raise

    async def _between_steps(self, work: Callable[[], None]) -> None:
        """Run `work` on the stepping thread, which alone touches the engine, and wait until it has run."""
        done: Future[None] = Future()
        with self._gate:
            self._refuse_stopped()
            self._inbox.put((work, done))
        await asyncio.wrap_future(done)

    def _refuse_stopped(self) -> None:
        if self._stopped is not None:
            raise WorkerLost(self._stopped)

    # Everything below runs on the stepping thread.

    def _run(self, started: Future[LLMEngine], model: Path, threads: int) -> None:
        try:
            torch.set_num_threads(threads)  # counted per calling thread
            with _ONE_AT_A_TIME:
                engine = _start(model, self._dtype, self._max_model_len, self._num_draws, self._settings)
        except BaseException as error:
            started.set_exception(error)  # raised where the engine is being built
            return
        engine.set_weight_version(str(self._version))
        started.set_result(engine)
        try:
            while self._stopped is None:
                if self._draining is not None and not engine.has_unfinished_requests():
                    with _ONE_AT_A_TIME:
                        self._end_of_drain()
                if self._torn or not engine.has_unfinished_requests() or not self._inbox.empty():
                    self._serve(*self._inbox.get())
                    continue
                with _ONE_AT_A_TIME:
                    outputs = engine.step()
                for output in outputs:
                    self._finish(output)
        except BaseException as error:
            self._stop(f"the vLLM engine died: {type(error).__name__}")
            raise
        finally:
            engine.engine_core.shutdown()

    def _serve(self, work: Callable[[], None], done: Future[None]) -> None:
        """Do one thing from the inbox, unless whoever asked has gone. What fails here leaves a broken engine."""
        if not done.set_running_or_notify_cancel():
            return
        try:
            with _ONE_AT_A_TIME:
                work()
        except BaseException as error:
            done.set_exception(WorkerLost(f"the vLLM engine died: {type(error).__name__}"))
            raise
        done.set_result(None)

    def _add(
        self, name: str, request: GenerationRequest, params: SamplingParams, finished: Future[CompletionOutput]
    ) -> None:
        if self._draining is not None:
            self._held[name] = partial(self._add, name, request, params, finished)
            return
        try:
            self._engine.add_request(name, tokens_input(request.prompt_ids.tolist()), params)
        except VLLMValidationError as error:
            finished.set_exception(ConfigError(f"request {request.id}: vLLM refuses it: {error}"))
        else:
            self._waiting[name] = finished

    def _abort(self, name: str) -> None:
        self._held.pop(name, None)
        if self._waiting.pop(name, None) is not None:
            self._engine.abort_request([name])

    def _finish(self, output: RequestOutput) -> None:
        if output.finished:
            self._waiting.pop(output.request_id).set_result(output.outputs[0])

    def _drain(self, swap: partial[None]) -> None:
        """Swap when nothing is in flight, and begin nothing until then."""
        if self._torn:  # what waits has not begun
            swap()
        else:
            self._draining = swap

    def _end_of_drain(self) -> None:
        swap, self._draining = self._draining, None
        assert swap is not None
        swap()
        held, self._held = self._held, {}
        for add in held.values():
            add()

    def _swap(self, version: int, weights: Weights | Packed, in_flight: InFlight, swapped: Future[float]) -> None:
        began = time.perf_counter()
        try:
            weights.begin()
        except WeightsError as error:
            swapped.set_exception(error)  # nothing is touched
            return
        try:
            if in_flight == "abort":
                self._abort_begun()
            self._load(weights)
        except WeightsError as error:
            self._torn += 1
            if self._torn < TEARS:
                swapped.set_exception(error)
            else:
                self._give_up(f"{TEARS} versions in a row came by half, the last {version}: {error}", swapped)
            return
        except BaseException as error:
            self._give_up(f"weights version {version} was loaded by half: {type(error).__name__}", swapped)
            raise
        self._engine.set_weight_version(str(version))
        self._version, self._torn = version, 0
        swapped.set_result(time.perf_counter() - began)

    def _load(self, weights: Weights | Packed) -> None:
        if isinstance(weights, Packed):
            weights.take()
        else:
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"weights": weights}})
            self._engine.collective_rpc("finish_weight_update")
            weights.end()
        # Cached keys and values are the old weights': what is in flight is read again from its first token.
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM kept keys and values of the old weights")

    def _give_up(self, reason: str, swapped: Future[float]) -> None:
        swapped.set_exception(WorkerLost(reason))
        self._stop(reason)

    def _abort_begun(self) -> None:
        """End every completion that has a token, with what it has."""
        processor = self._engine.output_processor
        for name in list(self._waiting):
            (state,) = (processor.request_states[own] for own in processor.external_req_ids[name])
            if state.detokenizer.num_output_tokens() == 0:
                continue
            output = state.make_request_output([], None, VllmFinishReason.ABORT, None)
            self._engine.abort_request([name])
            self._finish(output)

    def _stop(self, reason: str) -> None:
        """Take no more work, and tell everybody who waits."""
        with self._gate:
            self._stopped = self._stopped or reason
        for finished in self._waiting.values():
            finished.set_exception(WorkerLost(reason))
        self._waiting.clear()
        for held in [*self._held.values(), *([self._draining] if self._draining else [])]:
            held.args[-1].set_exception(WorkerLost(reason))
        self._held, self._draining = {}, None
        while not self._inbox.empty():
            _, done = self._inbox.get()
            if done.set_running_or_notify_cancel():
                done.set_exception(WorkerLost(reason))


def _start(model: Path, dtype: str, max_model_len: int, num_draws: int, settings: VllmConfig) -> LLMEngine:
    cache_gb = CPU_CACHE_GB if settings.cache_gb is None and current_platform.is_cpu() else settings.cache_gb
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="safetensors",
            dtype=dtype,
            seed=0,  # every request that samples brings its own
            max_model_len=max_model_len,
            max_num_seqs=settings.sequences,
            max_num_batched_tokens=max(BATCHED_TOKENS, max_model_len),
            enable_chunked_prefill=False,  # a seeded request that is prefilled in parts kills vLLM on a CPU
            enable_prefix_caching=True,
            kv_cache_memory_bytes=None if cache_gb is None else int(cache_gb * 2**30),
            tensor_parallel_size=settings.tensor_parallel,
            distributed_executor_backend=None if settings.tensor_parallel == 1 else "mp",
            worker_extension_cls=vllm_process.NAME,
            enforce_eager=not settings.compiled,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,
            disable_log_stats=True,
            weight_transfer_config=vllm_loading.config(),
        )
    )
    engine.collective_rpc("report_draws", args=(num_draws,))
    return engine


def _packs(engine: LLMEngine, settings: VllmConfig) -> bool:
    """Whether versions are packed beside the writing: see vllm_packing.py."""
    if not current_platform.is_cpu() or settings.compiled or settings.tensor_parallel > 1:
        return False
    (known,) = engine.collective_rpc(lambda worker: can_pack(worker.get_model()))
    return bool(known)


def _completion(output: CompletionOutput, has_logprobs: bool, num_draws: int, support_k: int) -> Completion:
    length = len(output.token_ids)
    versions = np.full(length, -1, np.int32)
    for span in output.weight_versions:
        versions[span.start : span.end] = int(span.version)
    logprobs = np.full(length, np.nan, np.float32)
    support_ids = support_logprobs = draw_ids = draw_logprobs = None
    if output.logprobs is not None:  # per position: the sampled token, then the draws, then the support
        first = 1 + num_draws  # of the support
        entries = np.asarray(output.logprobs.logprobs, np.float32).reshape(length, first + support_k)
        ids = np.asarray(output.logprobs.token_ids, np.int32).reshape(length, first + support_k)
        if not np.isfinite(entries[:, 0]).all():
            raise NonFinite("the student's logits are NaN or infinite: its weights are not usable")
        if has_logprobs:
            logprobs = entries[:, 0].copy()
        if has_logprobs and num_draws:
            draw_ids, draw_logprobs = ids[:, 1:first].copy(), entries[:, 1:first].copy()
        if support_k:
            support_ids, support_logprobs = ids[:, first:].copy(), entries[:, first:].copy()
    return Completion(
        token_ids=np.asarray(output.token_ids, np.int32),
        logprobs=logprobs,
        support_ids=support_ids,
        support_logprobs=support_logprobs,
        weight_versions=versions,
        finish_reason=_FINISH_REASONS[output.finish_reason],
        draw_ids=draw_ids,
        draw_logprobs=draw_logprobs,
    )
