"""TransformersBackbone: hidden states from a model folder loaded by transformers, on a GPU where there is one.

Rows are padded on the right: in a causal model no position sees what stands to its right, so padding needs no mask
and changes nothing. Contexts that several jobs of a batch have in common are read once, when that is less work.

It refuses weights that are not safetensors, checkpoints with missing tensors, and architectures whose logits are more
than hidden · headᵀ, for which scores would be silently wrong. It shares no context of a model whose keys depend on what
follows them (windows, recurrent states, angles that change with the text's length): those are read job by job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from potstill.errors import ConfigError, WeightsError
from teacher_server.batches import by_context, shares
from teacher_server.batching import Job

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # the others change their angles with the text's length
_PASS_TOKENS = 1024  # read at a time; beyond it, activations leave the caches and a token costs a third more
_KEYS_PER_TOKEN = 16  # that a pass over shared contexts may copy: short completions would else copy without bound


class TransformersBackbone:
    """A model folder, loaded; a Backbone. Raises ConfigError for a folder that it cannot score with."""

    def __init__(self, folder: Path, *, dtype: str) -> None:
        self._model = _load_model(folder, DTYPES[dtype])
        _check_head(self._model)
        config = self._model.config.get_text_config()
        self._can_share = can_share(config)
        self.context_length = int(config.max_position_embeddings)

    @property
    def head(self) -> Tensor:
        weight: Tensor = self._model.get_output_embeddings().weight.detach()
        return weight

    @torch.inference_mode()
    def hidden_states(self, jobs: Sequence[Job]) -> list[Tensor]:
        """As Backbone says. A shared context changes a state by float32 rounding only."""
        groups = by_context(jobs)
        shared = [group for group in groups if self._can_share and shares([jobs[index] for index in group])]
        together = [index for group in shared for index in group]
        alone = sorted(set(range(len(jobs))) - set(together))
        states = dict(zip(alone, self._alone([jobs[index] for index in alone]), strict=True))
        states |= zip(together, self._shared([[jobs[index] for index in group] for group in shared]), strict=True)
        return [states[index] for index in range(len(jobs))]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As Backbone says; a tied head is not given. Values are rounded to the precision that the model has."""
        own = dict(self._model.named_parameters())
        if strange := sorted(own.keys() ^ weights.keys()):
            raise WeightsError(f"weights lack these tensors, or have them in excess: {', '.join(strange[:5])}")
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                message = f"has shape {list(weights[name].shape)}, the model's has {list(parameter.shape)}"
                raise WeightsError(f"{name}: {message}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def _alone(self, jobs: Sequence[Job]) -> list[Tensor]:
        states: list[Tensor] = []
        for part in passes([len(job.input_ids) for job in jobs], _PASS_TOKENS):
            hidden = self._read(_padded([job.input_ids for job in jobs[part]]), use_cache=False).last_hidden_state
            states += [
                row[job.context_length - 1 : len(job.input_ids)] for row, job in zip(hidden, jobs[part], strict=True)
            ]
        return states

    def _shared(self, groups: Sequence[Sequence[Job]]) -> list[Tensor]:
        """States of the jobs, group by group; each group has one context.

        A pass reads some contexts, and then all that follows them: keys and values do not outlive it.
        """
        states: list[Tensor] = []
        for part in passes([group[0].context_length for group in groups], _PASS_TOKENS):
            states += self._shared_pass(groups[part])
        return states

    def _shared_pass(self, groups: Sequence[Sequence[Job]]) -> list[Tensor]:
        """Read every context once, then the completions over their contexts' keys and values."""
        lengths = torch.tensor([group[0].context_length for group in groups])
        contexts = self._read(
            _padded([group[0].input_ids[: group[0].context_length] for group in groups]), use_cache=True
        )
        first = contexts.last_hidden_state[torch.arange(len(groups)), lengths - 1]
        jobs = [job for group in groups for job in group]
        rows = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
        states: list[Tensor] = []
        weights = [max(len(job.completion_ids), job.context_length // _KEYS_PER_TOKEN) for job in jobs]
        for part in passes(weights, _PASS_TOKENS):
            after = self._after(contexts.past_key_values, rows[part], lengths[rows[part]], jobs[part])
            states += [
                torch.cat([first[row, None], hidden[: len(job.completion_ids) - 1]])
                for row, job, hidden in zip(rows[part].tolist(), jobs[part], after, strict=True)
            ]
        return states

    def _after(self, cache: Any, rows: Tensor, lengths: Tensor, jobs: Sequence[Job]) -> Tensor:
        """States [n, Q, H] of the jobs' completions but their last token, after contexts `rows` of the cache."""
        completions = _padded([job.completion_ids[:-1] for job in jobs])
        if not completions.shape[1]:
            return self.head.new_empty(len(jobs), 0, self.head.shape[1])
        seen = torch.arange(cache.get_seq_length()) < lengths[:, None]
        hidden: Tensor = self._read(
            completions,
            use_cache=True,
            past_key_values=DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers]),
            position_ids=lengths[:, None] + torch.arange(completions.shape[1]),
            attention_mask=torch.cat([seen, torch.ones_like(completions, dtype=torch.bool)], dim=-1),
        ).last_hidden_state
        return hidden

    def _read(self, ids: Tensor, **how: Any) -> Any:
        device = self.head.device
        there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in how.items()}
        return self._model.base_model(input_ids=ids.to(device), **there)


def can_share(config: PretrainedConfig) -> bool:
    """Whether keys and values of a context are the same whatever follows it, and are kept whole."""
    rope = getattr(config, "rope_parameters", None) or {}
    layers = DynamicCache(config=config).layers
    return rope.get("rope_type") in _FIXED_ROPE and all(type(layer) is DynamicLayer for layer in layers)


def passes(lengths: Sequence[int], tokens: int) -> list[slice]:
    """Neighbours in passes of at most `tokens`, padding included; a longer text is a pass by itself."""
    parts: list[slice] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if not parts or longest * (index + 1 - parts[-1].start) > tokens:
            parts.append(slice(index, index + 1))
            longest = length
        else:
            parts[-1] = slice(parts[-1].start, index + 1)
    return parts


def _padded(rows: Sequence[Any]) -> Tensor:
    """Token ids of different lengths as one [n, longest] tensor, zeros to the right."""
    return pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True)


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder}: has no *.safetensors weights")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: is not a causal language model that transformers can load") from error
    if report["missing_keys"]:
        raise ConfigError(f"{folder}: weights lack {len(report['missing_keys'])} tensors; they would be random")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _check_head(model: Any) -> None:
    """Raise ConfigError unless logits are finite and hidden · headᵀ: some architectures add, cap or scale."""
    head = model.get_output_embeddings().weight
    ids = torch.arange(8, device=head.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        ours = model.base_model(input_ids=ids, use_cache=False).last_hidden_state @ head.T
        theirs = model(input_ids=ids, use_cache=False).logits
    if not bool(theirs.isfinite().all()):
        raise ConfigError(f"{type(model).__name__}: these weights give logits that are not finite")
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
        raise ConfigError(f"{type(model).__name__} changes its logits after the head, which is not supported")
