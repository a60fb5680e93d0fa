"""Any causal language model that transformers knows, grown token by token by its own forward pass.

For what packed_decoder.py refuses: other architectures, bfloat16, sliding windows. It builds no masks and no caches
of its own; transformers does. Samples nothing.

Shapes: B rows, Q prompt positions, S columns so far, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig


class ModelCache:
    """transformers' own cache, and which of its columns are not padding."""

    def __init__(self, past: DynamicCache, real_BS: Tensor) -> None:
        self.past = past
        self.real_BS = real_BS

    def keep(self, rows: Tensor) -> None:
        self.past.batch_select_indices(rows)
        self.real_BS = self.real_BS[rows]


class ModelDecoder:
    """Any causal language model that transformers knows, by its own forward pass."""

    def __init__(self, model: Path, config: PretrainedConfig, dtype: str) -> None:
        self._config = config
        self._model = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the model's dtype; what has it already is not copied, and stays where it came from while it is in use."""
        own = self._model.state_dict()
        return {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}

    def swap(self, prepared: dict[str, Tensor]) -> None:
        own = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        for name, tensor in prepared.items():
            own[name].data = tensor

    def row_bytes(self, num_positions: int) -> int:
        text = self._config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        return int(2 * self._model.dtype.itemsize * text.num_hidden_layers * heads * head_dim * num_positions)

    def prefill(self, ids_BQ: Tensor, real_BQ: Tensor, num_new: int) -> tuple[ModelCache, Tensor]:
        cache = ModelCache(DynamicCache(config=self._config), real_BQ)
        return cache, self._forward(cache, ids_BQ, (real_BQ.cumsum(-1) - 1).clamp(min=0))

    def step(self, cache: ModelCache, ids_B: Tensor) -> Tensor:
        positions_B1 = cache.real_BS.sum(-1, keepdim=True)
        cache.real_BS = torch.cat((cache.real_BS, torch.ones_like(cache.real_BS[:, :1])), dim=-1)
        return self._forward(cache, ids_B[:, None], positions_B1)

    def _forward(self, cache: ModelCache, ids_BQ: Tensor, positions_BQ: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids_BQ,
            attention_mask=cache.real_BS,
            position_ids=positions_BQ,
            past_key_values=cache.past,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits
