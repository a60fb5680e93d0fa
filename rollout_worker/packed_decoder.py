"""Llama-shaped decoders (Llama, Qwen2, Qwen3) in float32 on a CPU, written out for speed: prefill, then step by step.

A model of a few million parameters spends most of a decoding step outside its matrix products. Here q, k and v are one
product, gate and up another, weights are packed for oneDNN once per version, and keys and values lie in preallocated
buffers. The numbers are transformers' to rounding; a test compares them. It refuses every other architecture
(`can_decode`), trains nothing and samples nothing.

Shapes: B rows, Q new positions, H query heads, G of them per key-value head, K key-value heads, D head size,
S positions in the buffers, E width of the hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from potstill.errors import WeightsError

FAMILIES = ("llama", "qwen2", "qwen3")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their angles with the text's length
PREFILL_MASK_ENTRIES = 1 << 24  # floats of attention mask that exist at a time
PACK_ROWS = 2048  # the product's height that packing is tuned for; measured no slower at 32

Linear = Callable[[Tensor], Tensor]


def can_decode(config: PretrainedConfig, dtype: str) -> bool:
    """Whether this file computes what transformers would for such a model."""
    return (
        config.model_type in FAMILIES
        and dtype == "float32"
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in FIXED_ROPE
        and not getattr(config, "use_sliding_window", False)
    )


@dataclass(slots=True)
class PackedCache:
    """Keys and values of the rows being written. Prompts are padded on the left, so that all rows grow in step."""

    keys: list[Tensor]  # per layer [B, K, D, S]: positions are contiguous, for products with one query
    values: list[Tensor]  # per layer [B, K, D, S]
    bias_B1S: Tensor  # 0 at real positions, the lowest float at padding
    positions_B: Tensor  # of the next token in its own row
    length: int  # columns in use, the same for every row

    def keep(self, rows: Tensor) -> None:
        """Rows become `rows`, in that order; a row may be kept several times or not at all."""
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]
        self.bias_B1S = self.bias_B1S.index_select(0, rows)
        self.positions_B = self.positions_B.index_select(0, rows)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    query_key_value: Linear
    head_norm: Tensor | None  # [H + K, D], for Qwen3
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class _Weights:
    embedding: Tensor
    layers: list[_Layer]
    norm: Tensor
    head: Linear


class PackedDecoder:
    """One set of weights. `swap` replaces all of them; caches made before are then worthless."""

    def __init__(self, config: PretrainedConfig, *, max_model_len: int) -> None:
        self._config = config
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._cosine, self._sine = _rotations(config, max_model_len, self._head_dim)

    def prepare(self, tensors: dict[str, Tensor]) -> _Weights:
        """Pack the tensors of a checkpoint, named as in its files. Raises WeightsError for missing or unknown ones."""
        left = {name: tensor.float() for name, tensor in tensors.items()}
        embedding = _take(left, "model.embed_tokens.weight").clone()
        layers = [self._layer(left, index) for index in range(self._config.num_hidden_layers)]
        norm = _take(left, "model.norm.weight").clone()
        head = _pack(embedding if self._config.tie_word_embeddings else _take(left, "lm_head.weight"))
        if left:
            raise WeightsError(f"tensors that a {self._config.model_type} does not have: {', '.join(sorted(left))}")
        return _Weights(embedding, layers, norm, head)

    def swap(self, prepared: _Weights) -> None:
        self._weights = prepared

    def row_bytes(self, num_positions: int) -> int:
        """Memory of one row's keys and values."""
        return 8 * int(self._config.num_hidden_layers) * self._num_kv_heads * self._head_dim * num_positions

    def prefill(self, ids_BQ: Tensor, real_BQ: Tensor, num_new: int) -> tuple[PackedCache, Tensor]:
        """Read left-padded prompts. Returns a cache with room for `num_new` more tokens and the last logits [B, V]."""
        num_rows, width = ids_BQ.shape
        cache = self._empty_cache(real_BQ, width + num_new)
        positions_BQ = (real_BQ.cumsum(-1) - 1).clamp(min=0)
        later_QQ = torch.ones(width, width, dtype=torch.bool).triu(1)
        lowest = torch.finfo(torch.float32).min
        logits = []
        for rows in torch.split(torch.arange(num_rows), max(1, PREFILL_MASK_ENTRIES // (width * width))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            # The lowest float and not -inf: a padded query sees nothing, and a softmax over nothing is NaN.
            bias = cache.bias_B1S[part, None, :, :width].masked_fill(later_QQ, lowest)
            buffers = [(key[part], value[part]) for key, value in zip(cache.keys, cache.values, strict=True)]
            hidden_NE = self._hidden(ids_BQ[part], positions_BQ[part], bias, buffers, 0)
            logits.append(self._logits(hidden_NE.view(len(rows), width, -1)[:, -1]))
        return cache, torch.cat(logits)

    def step(self, cache: PackedCache, ids_B: Tensor) -> Tensor:
        """Append one token to every row. Returns the logits after it, [B, V]."""
        bias = cache.bias_B1S[:, :, : cache.length + 1].repeat_interleave(self._num_kv_heads, dim=0)
        buffers = list(zip(cache.keys, cache.values, strict=True))
        hidden_BE = self._hidden(ids_B[:, None], cache.positions_B[:, None], bias, buffers, cache.length)
        cache.length += 1
        cache.positions_B += 1
        return self._logits(hidden_BE)

    def _empty_cache(self, real_BQ: Tensor, size: int) -> PackedCache:
        num_rows, width = real_BQ.shape
        layers, heads, dim = range(self._config.num_hidden_layers), self._num_kv_heads, self._head_dim
        bias_B1S = torch.zeros(num_rows, 1, size)
        bias_B1S[:, 0, :width].masked_fill_(~real_BQ, torch.finfo(torch.float32).min)
        return PackedCache(
            keys=[torch.empty(num_rows, heads, dim, size) for _ in layers],
            values=[torch.empty(num_rows, heads, dim, size) for _ in layers],
            bias_B1S=bias_B1S,
            positions_B=real_BQ.sum(-1),
            length=width,
        )

    def _hidden(
        self, ids_BQ: Tensor, positions_BQ: Tensor, bias: Tensor, buffers: list[tuple[Tensor, Tensor]], start: int
    ) -> Tensor:
        """The hidden states of new tokens, [B·Q, E]; their keys and values go to `buffers` from column `start` on."""
        num_rows, width = ids_BQ.shape
        cosine, sine = self._cosine[positions_BQ.flatten()], self._sine[positions_BQ.flatten()]
        heads, dim, eps = self._num_heads + self._num_kv_heads, self._head_dim, self._config.rms_norm_eps
        attend = self._attend_prompt if start == 0 else self._attend_one
        hidden = F.embedding(ids_BQ.flatten(), self._weights.embedding)
        for layer, (keys, values) in zip(self._weights.layers, buffers, strict=True):
            fused = layer.query_key_value(_norm(hidden, layer.attention_norm, eps))
            fused = fused.view(num_rows * width, heads + self._num_kv_heads, dim)
            query_key = fused[:, :heads]
            if layer.head_norm is not None:
                query_key = F.rms_norm(query_key, (dim,), None, eps) * layer.head_norm
            query_key = torch.addcmul(query_key * cosine, query_key.roll(dim // 2, -1), sine)
            attended = attend(query_key, fused[:, heads:], bias, keys, values, start)
            hidden = hidden + layer.output(attended)
            gate, up = layer.gate_up(_norm(hidden, layer.mlp_norm, eps)).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate).mul_(up))
        return hidden

    def _attend_one(
        self, query_key: Tensor, value: Tensor, bias: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        """One new position per row, against everything in the buffers. `bias` [B·K, 1, start + 1]."""
        num_rows, heads, dim, size = keys.shape
        keys[..., start] = query_key[:, self._num_heads :]
        values[..., start] = value
        query = query_key[:, : self._num_heads].reshape(num_rows * heads, -1, dim)  # [B·K, G, D]
        scores = torch.baddbmm(bias, query, keys.view(-1, dim, size)[..., : start + 1], alpha=dim**-0.5)
        # Values stand on the left: measured, the product is faster with its long contiguous side there.
        attended = torch.bmm(values.view(-1, dim, size)[..., : start + 1], scores.softmax(-1).transpose(1, 2))
        return attended.transpose(1, 2).reshape(num_rows, -1)

    def _attend_prompt(
        self, query_key: Tensor, value: Tensor, bias: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> Tensor:
        """The first positions of every row, against each other. `bias` [B, 1, Q, Q]."""
        num_rows, heads, _, _ = keys.shape
        query_key = query_key.view(num_rows, -1, *query_key.shape[1:]).transpose(1, 2)
        value = value.view(num_rows, -1, *value.shape[1:]).transpose(1, 2)
        query, key = torch.split(query_key, [self._num_heads, heads], dim=1)
        end = start + key.shape[2]
        keys[..., start:end] = key.transpose(2, 3)
        values[..., start:end] = value.transpose(2, 3)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        return attended.transpose(1, 2).flatten(0, 1).flatten(1)

    def _logits(self, hidden_BE: Tensor) -> Tensor:
        return self._weights.head(_norm(hidden_BE, self._weights.norm, self._config.rms_norm_eps))

    def _layer(self, tensors: dict[str, Tensor], index: int) -> _Layer:
        """Take one layer's tensors out of `tensors` and pack them."""

        def linear(*names: str) -> Linear:
            weights = [_take(tensors, f"model.layers.{index}.{name}.weight") for name in names]
            biases = [tensors.pop(f"model.layers.{index}.{name}.bias", None) for name in names]
            present = [bias for bias in biases if bias is not None]
            if len(present) not in (0, len(names)):
                raise WeightsError(f"model.layers.{index}: some but not all of {', '.join(names)} have a bias")
            return _pack(torch.cat(weights), torch.cat(present) if present else None)

        def norm(name: str) -> Tensor:
            return _take(tensors, f"model.layers.{index}.{name}.weight").clone()

        head_norm = None
        if self._config.model_type == "qwen3":
            query_norm = norm("self_attn.q_norm").expand(self._num_heads, -1)
            head_norm = torch.cat((query_norm, norm("self_attn.k_norm").expand(self._num_kv_heads, -1)))
        return _Layer(
            attention_norm=norm("input_layernorm"),
            query_key_value=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            head_norm=head_norm,
            output=linear("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise WeightsError(f"tensor {name} is missing")
    return tensors.pop(name)


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def _rotations(config: PretrainedConfig, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin for every position, [S, 1, D]; sin carries the sign with which rotate_half swaps the halves."""
    cosine, sine = Qwen3RotaryEmbedding(config)(torch.empty(0), torch.arange(size)[None])
    sine[..., : dim // 2].neg_()
    return cosine[0, :, None], sine[0, :, None]


def _pack(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """x ↦ x·weightᵀ + bias on a packed copy: at decoding heights about twice as fast as the BLAS of torch."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        kept = weight.clone()
        return lambda x: F.linear(x, kept, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
