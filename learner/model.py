"""The student: loaded from a folder, run over packed rows up to its last hidden state, and its optimizer.

Imports torch, transformers and, for adapters, peft; neither Ray nor vLLM. Loads safetensors only, and no code from the
model's folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.attention import IMPLEMENTATION, Layout
from learner.packing import Packed
from learner.ranks import Alone, Ranks
from potstill.config import LoraConfig, OptimConfig, StudentConfig
from potstill.errors import ConfigError
from potstill.model_folder import check_model_folder


class CausalModel(nn.Module):
    """A causal language model as the learner sees it: packed tokens in, hidden states out, and an output head.

    The head is never called: its product with the hidden states belongs to logprobs.head_loss.
    """

    def __init__(self, network: nn.Module, transformer: PreTrainedModel) -> None:
        super().__init__()
        self.network = network  # what is trained and saved: the transformer, or peft's wrapper around it
        self._transformer = (transformer,)  # in a tuple: the same weights must not be registered twice
        self.ranks: Ranks = Alone()  # over whom its weights lie; see Ranks.shard
        _refuse_unsupported(transformer)

    @property
    def transformer(self) -> PreTrainedModel:
        return self._transformer[0]

    @property
    def head(self) -> Tensor:
        """[V, D]. Over several ranks it is whole from a pass until `Ranks.settle` or a backward; else a shard."""
        weight: Tensor = self.transformer.get_output_embeddings().weight
        return weight

    def forward(self, packed: Packed) -> Tensor:
        """Hidden states [M, D] of the rows that predict a loss token."""
        device = self.head.device
        hidden: Tensor = self.transformer.get_decoder()(
            input_ids=packed.input_ids.to(device).unsqueeze(0),
            position_ids=packed.position_ids.to(device).unsqueeze(0),
            use_cache=False,
            layout=Layout.of(packed.lengths, device),
        ).last_hidden_state
        return hidden.squeeze(0)[packed.predicts.to(device)]

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter by the transformer's own names, tied ones once; adapters merged into copies.

        Over several ranks these are shards: see Ranks.whole.
        """
        if self.network is self.transformer:
            return dict(self.transformer.named_parameters())
        return _merged(self.transformer)


def load_student(config: StudentConfig, *, seed: int, device: torch.device) -> CausalModel:
    """The student, trainable: all weights, or a fresh adapter whose initial update is zero.

    Raises ConfigError when the folder holds no model that transformers can load without running its code.
    """
    transformer = load_transformer(config.model, dtype=getattr(torch, config.dtype), device=device)
    if config.lora is None:
        return CausalModel(transformer, transformer)
    return CausalModel(_with_adapter(transformer, config.lora, seed), transformer)


def load_transformer(folder: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"model {folder!r}: no config.json there; name a folder in Hugging Face format")
    check_model_folder(Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"model {folder!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if info["missing_keys"]:
        raise ConfigError(f"model {folder!r} lacks weights, which would be random: {sorted(info['missing_keys'])[:3]}")
    return model.to(device)


def recompute_layers(student: CausalModel) -> CausalModel:
    """The student itself, whose layers forget what they computed and compute it again in the backward pass.

    Kept are the states between layers: a third more work, and a fraction of the memory (Chen et al., arXiv 1604.06174).
    The weights must then be the same in both passes.
    """
    kinds = set(student.transformer._no_split_modules or ())
    for layer in student.transformer.modules():
        if type(layer).__name__ in kinds:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return student


def make_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW of those that are trained, with weight decay on matrices only."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, *, step: int, steps: int) -> float:
    """Of optimizer step `step`, counted from 1, in a run of `steps`: linear warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - 1 - config.warmup_steps) / (steps - config.warmup_steps)  # the last step still moves
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


def _with_adapter(transformer: PreTrainedModel, config: LoraConfig, seed: int) -> nn.Module:
    import peft

    torch.manual_seed(seed)  # the adapter's first matrix is random
    adapter = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules), task_type="CAUSAL_LM"
    )
    network: nn.Module = peft.get_peft_model(transformer, adapter)
    return network


def _merged(transformer: PreTrainedModel) -> dict[str, Tensor]:
    """Base weights with each adapter's update added, under the names the model has without peft."""
    weights = {}
    updates = {
        f"{name}.weight": module.get_delta_weight("default")
        for name, module in transformer.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        update = updates.get(plain)
        weights[plain] = parameter if update is None else parameter + update.to(parameter.dtype)
    return weights


def _refuse_unsupported(transformer: PreTrainedModel) -> None:
    head = transformer.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError("the student needs an output head without a bias")
    config = transformer.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ConfigError("this student caps its logits (final_logit_softcapping), which the chunked head does not")
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ConfigError(
            f"this student has layers of {', '.join(sorted(others))}; packed sequences would see each other"
        )
