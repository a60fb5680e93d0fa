"""VllmBackbone: a causal language model run by vLLM, which hands out its last hidden states instead of tokens.

vLLM's pooling runner, asked for `token_embed`, gives the state of every token after the final norm; nothing is
normalised, projected or cut off, and vLLM computes no logits. The head is read from the model's folder.
Long texts are read in parts, and no text is answered from a cache of another: every row is computed for its request.

It refuses what backbone.py says, folders that bring layers of their own after the model (modules.json), and weights
that are not exactly the model's. One engine per process, stepped by whoever calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from vllm import EngineArgs, LLMEngine, PoolingParams
from vllm.config import PoolerConfig
from vllm.inputs import tokens_input
from vllm.platforms import current_platform

from potstill.errors import AlignmentError, ConfigError, WeightsError
from potstill.weights import shapes_in
from teacher_server.batching import Job

CPU_CACHE_BYTES = 1 << 30
"""Of keys and values on a CPU, where vLLM otherwise takes a large part of the memory. Bounds the longest text."""
MAX_SEQUENCES = 256  # read side by side; more wait their turn

_EVERY_STATE = {"task": "token_embed", "use_activation": False}  # the activation would scale every state to length 1


class VllmBackbone:
    """Backbone over vLLM's LLMEngine. `context_length` is less than the model's where the cache is too small for it.

    `batch_tokens` bounds the tokens of one step; `cache_bytes` of None: CPU_CACHE_BYTES, or what is free on a GPU.
    Raises ConfigError when vLLM cannot load the folder, or its logits are more than head · hidden.
    """

    def __init__(self, folder: Path, *, dtype: str, batch_tokens: int, cache_bytes: int | None = None) -> None:
        self._shapes = shapes_in(folder)
        self._head_name = _head_name(folder, self._shapes)
        self._names = itertools.count()
        if cache_bytes is None and current_platform.is_cpu():
            cache_bytes = CPU_CACHE_BYTES
        self._engine = _start(folder, dtype, batch_tokens, cache_bytes)
        (device,) = self._engine.apply_model(check_head)
        self._head = _tensor(folder, self._head_name).to(device, getattr(torch, dtype))

    @property
    def head(self) -> Tensor:
        return self._head

    @property
    def context_length(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def hidden_states(self, jobs: Sequence[Job]) -> list[Tensor]:
        names = [str(next(self._names)) for _ in jobs]
        states: dict[str, Tensor] = {}
        try:
            for name, job in zip(names, jobs, strict=True):
                self._engine.add_request(name, tokens_input(job.input_ids.tolist()), PoolingParams(**_EVERY_STATE))
            while self._engine.has_unfinished_requests():
                states |= {output.request_id: output.outputs.data for output in self._engine.step() if output.finished}
        finally:
            self._engine.abort_request([name for name in names if name not in states])
        return [self._rows(states[name], job) for name, job in zip(names, jobs, strict=True)]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        _check_weights(weights, self._shapes)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self._head = weights[self._head_name].to(self._head, copy=True)

    def _rows(self, states: Tensor, job: Job) -> Tensor:
        """The rows [T, H] of a text's states [L, H] from which its completion is predicted."""
        length, width = len(job.input_ids), self._head.shape[1]
        if states.shape != (length, width):
            raise AlignmentError(f"vLLM gave states {list(states.shape)} for {length} tokens of width {width}")
        return states[job.context_length - 1 :].to(self._head)


class _Transparent(nn.Module):
    """Stands where a model multiplies with its head, and passes on what it is given."""

    def forward(self, head: object, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        return hidden if bias is None else torch.full_like(hidden, torch.nan)


def check_head(model: Any) -> torch.device:
    """Where the model is. Raises ConfigError when it does anything to its states or logits but multiply by the head."""
    kind = type(model).__name__
    head = getattr(model, "logits_processor", None)
    if head is None:
        raise ConfigError(f"{kind}: is not a plain causal language model to vLLM; use --engine transformers")
    weight: Tensor = next(model.parameters())
    states = torch.linspace(-1, 1, 8, dtype=weight.dtype, device=weight.device)[None]
    model.logits_processor = _Transparent()
    unchanged = torch.equal(model.compute_logits(states), states)
    model.logits_processor = head
    if not unchanged or head.scale != 1.0 or head.soft_cap is not None:
        raise ConfigError(f"{kind}: changes its logits before or after the head, which is not supported")
    return weight.device


def _start(folder: Path, dtype: str, batch_tokens: int, cache_bytes: int | None) -> LLMEngine:
    arguments = EngineArgs(
        model=str(folder),
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(**_EVERY_STATE, tok_pooling_type="ALL"),
        skip_tokenizer_init=True,
        trust_remote_code=False,
        load_format="safetensors",
        dtype=dtype,
        seed=0,
        max_model_len=-1,  # the model's own, or as much of it as the cache holds
        max_num_seqs=min(MAX_SEQUENCES, batch_tokens),
        max_num_batched_tokens=batch_tokens,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=cache_bytes,
        enforce_eager=True,
        disable_log_stats=True,
    )
    try:
        return LLMEngine.from_engine_args(arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: is not a causal language model that vLLM can load") from error


def _head_name(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The tensor that turns states into logits: the head, or the embedding that it is tied to."""
    if (folder / "modules.json").exists():
        raise ConfigError(f"{folder}: brings layers to put after the model (modules.json), which is not supported")
    if "lm_head.weight" in shapes:
        return "lm_head.weight"
    embeddings = [name for name in shapes if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ConfigError(f"{folder}: has neither lm_head.weight nor one embed_tokens.weight to score with")
    return embeddings[0]


def _tensor(folder: Path, name: str) -> Tensor:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                tensor: Tensor = opened.get_tensor(name)
                return tensor
    raise ConfigError(f"{folder}: {name} is in none of its safetensors files")


def _check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """vLLM, given weights that do not fit, is beyond repair: they are compared before it sees them."""
    for problem, names in (("missing", shapes.keys() - weights.keys()), ("unknown", weights.keys() - shapes.keys())):
        if names:
            raise WeightsError(f"{problem} tensors: {', '.join(sorted(names))}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise WeightsError(f"{name} is {list(weights[name].shape)}, the model's is {list(shape)}")
