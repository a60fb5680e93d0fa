"""The seam behind which the student writes: what goes in, what comes out, and what both engines promise.

No engine is imported here until `build_engine` is asked for one. Engines know nothing of prompts as text, teachers,
rewards or runs: token ids and a seed go in, token ids and their log-probs come out.

What both promise:
  * a completion has at least one token, ends at the stop token or at `max_new_tokens`, and keeps the stop token;
  * log-probs belong to the distribution that was really sampled from; missing ones are NaN;
  * every token knows the weights version that wrote it;
  * weights are checked whole before the first of them is touched: refused weights leave the old ones serving. Only
    those that come from the learner's device one by one are checked one by one, and if they stop midway, nothing is
    written until a later version is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from potstill.config import SamplingConfig
from potstill.config_vllm import VllmConfig
from potstill.config_weights import InFlight
from potstill.errors import ConfigError
from potstill.model_folder import check_model_folder
from potstill.transports.device import Stream
from potstill.types import FinishReason, FloatArray, IntArray, WeightsVersion
from potstill.weights import Bytes

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin slow every other process on shared cores
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of a process with threads
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or processes that share a model want a NUMA node each
}
DEFAULTS = VllmConfig()
COOLEST = 0.01  # below it, and above 0, vLLM samples at 0.01 instead and logits / temperature may overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One completion to write.

    Example: GenerationRequest(id="train-7.0", prompt_ids=np.array([5, 9, 31], np.int32), seed=1234)
    The seed decides the completion at temperature > 0, together with the weights; 0 <= seed < 2**63.
    """

    id: str
    prompt_ids: IntArray  # [P], P >= 1
    seed: int
    max_new_tokens: int | None = None  # of this one, at most the sampling's; None: as it says


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """T tokens exactly as sampled, T >= 1.

    Example: token_ids [50, 49, 2], logprobs [-0.1, -0.7, -0.02], weight_versions [4, 4, 5], finish_reason STOP
    """

    token_ids: IntArray  # [T] ends with the stop token when finish_reason is STOP
    logprobs: FloatArray  # [T] under the distribution sampled from; NaN when greedy or not asked for
    support_ids: IntArray | None  # [T, K] the most probable ids, most probable first
    support_logprobs: FloatArray | None  # [T, K] of the student itself: temperature 1, nothing cut off
    weight_versions: IntArray  # [T]
    finish_reason: FinishReason
    draw_ids: IntArray | None = None  # [T, M] further draws from what each token was sampled from; None as logprobs NaN
    draw_logprobs: FloatArray | None = None  # [T, M]


class RolloutEngine(Protocol):
    """A student that writes. Not shared between event loops."""

    @property
    def version(self) -> int:
        """The weights version that the next token will come from."""
        ...

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        """Write one completion per request, in the requests' order. `support_k` 0: no support.

        With log-probs come the draws that the engine was built to keep: they change nothing that is written.

        Raises ConfigError for a request that cannot be written, NonFinite when the student's own numbers are NaN or
        infinite, WorkerLost when the engine is dead.
        """
        ...

    async def load_weights(
        self, version: WeightsVersion, payload: Bytes | Stream, in_flight: InFlight = "keep"
    ) -> float:
        """Swap to a later version, whole or not at all. Returns the seconds for which nothing could be written.

        payload    may stay in use until the version after it is loaded; a Stream is for vLLM alone
        in_flight  what becomes of completions that are being written, see WeightsConfig. "abort" ends those that have
                   a token; the others begin under the new weights.
        Checking and packing go on beside the writing. What is kept is read again from its first token, so that no
        token depends on keys and values of two versions.
        Raises StaleWeights for a version not later than the one loaded, or one that stopped coming; WeightsError for
        damaged or foreign tensors; WorkerLost when the swap itself fails: an engine that cannot load ends and serves
        nobody.
        """
        ...

    async def close(self) -> None:
        """Free the engine. Later calls raise WorkerLost."""
        ...


def build_engine(
    name: str,
    *,
    model: Path,
    dtype: Literal["float32", "bfloat16"],
    stop_token_id: int,
    version: int,
    threads: int,
    max_model_len: int,
    num_draws: int = 0,
    vllm: VllmConfig = DEFAULTS,
) -> RolloutEngine:
    """Load `model` as weights version `version`, held as `dtype`, into the engine of that name.

    `num_draws` independent draws are kept at every position, beside the token that is written.
    `vllm` is of that engine alone.
    `stop_token_id` is the tokenizer's; the model's generation_config.json is never read.
    Sets ENVIRONMENT for this process. The OMP settings bind only where torch has not been imported before.
    Raises ConfigError for an unknown name, a folder that is no model, more positions than the model has, and heads that
    processes cannot share.
    """
    check_model_folder(model)
    described = json.loads((model / "config.json").read_text())
    positions, heads = (described.get(name) for name in ("max_position_embeddings", "num_attention_heads"))
    if positions is not None and max_model_len > positions:
        raise ConfigError(f"{model}: knows {positions} positions; prompts and new tokens may need {max_model_len}")
    if heads is not None and heads % vllm.tensor_parallel:
        raise ConfigError(
            f"{model}: {heads} heads; rollout.vllm.tensor_parallel {vllm.tensor_parallel} must divide them"
        )
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
    if name == "transformers":
        from rollout_worker.transformers_engine import TransformersEngine

        return TransformersEngine(
            model=model, dtype=dtype, stop_token_id=stop_token_id, version=version, threads=threads,
            max_model_len=max_model_len, num_draws=num_draws,
        )  # fmt: skip
    if name == "vllm":
        from rollout_worker.vllm_engine import VllmEngine

        return VllmEngine(
            model=model, dtype=dtype, stop_token_id=stop_token_id, version=version, threads=threads,
            max_model_len=max_model_len, num_draws=num_draws, settings=vllm,
        )  # fmt: skip
    raise ConfigError(f'rollout.engine {name!r} is not known: write "transformers" or "vllm"')


def num_new(request: GenerationRequest, sampling: SamplingConfig) -> int:
    """Tokens of the request's completion, at most."""
    return sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


def check_requests(
    requests: Sequence[GenerationRequest],
    sampling: SamplingConfig,
    *,
    support_k: int,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Raise ConfigError for what either engine would refuse, cut short or silently change."""
    if 0 < sampling.temperature < COOLEST:
        raise ConfigError(f"rollout.sampling.temperature is {sampling.temperature}: write 0 (greedy) or >= {COOLEST}")
    if not 0 <= support_k <= vocab_size:
        raise ConfigError(f"objective.support.k is {support_k}, the student's vocabulary has {vocab_size} entries")
    for request in requests:
        length = len(request.prompt_ids)
        if length == 0:
            raise ConfigError(f"request {request.id}: the prompt is empty")
        if length + num_new(request, sampling) > max_model_len:
            raise ConfigError(
                f"request {request.id}: {length} prompt tokens and rollout.sampling.max_new_tokens "
                f"{num_new(request, sampling)} exceed the {max_model_len} positions of the engine"
            )
        if request.prompt_ids.min() < 0 or request.prompt_ids.max() >= vocab_size:
            raise ConfigError(f"request {request.id}: a prompt id lies outside the vocabulary of {vocab_size}")
        if not 1 <= num_new(request, sampling) <= sampling.max_new_tokens:
            raise ConfigError(
                f"request {request.id}: max_new_tokens is {request.max_new_tokens}, "
                f"of {sampling.max_new_tokens} at most"
            )
        if not 0 <= request.seed < 2**63:
            raise ConfigError(f"request {request.id}: seed {request.seed} is not in [0, 2**63)")
