"""A version packed beside the writing, for vLLM on a CPU: the layers that hold weights, once more.

    beside the writing     twins of the layers ◄── vLLM's own loading ◄── weights;  oneDNN packs them
    between two steps      each layer becomes its twin

vLLM's reload packs within the pause, and on a CPU packing is most of what a version costs. This takes the memory of a
second version until the first is let go. It refuses compiled models, which keep the tensors that they were compiled
with, and layers that vLLM packs in ways not seen here: their weights are loaded in place (vllm_loading.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from potstill.errors import NonFinite

KNOWN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)  # they keep nothing of a layer but on the layer


class Packed:
    """A whole version that nobody writes with yet."""

    def __init__(self, twins: Mapping[nn.Module, nn.Module]) -> None:
        self._twins = twins

    def begin(self) -> None:
        """It is here."""

    def take(self) -> None:
        """Have the model write with it. Nothing is copied."""
        for layer, twin in self._twins.items():
            vars(layer).update(vars(twin) | {"_modules": vars(layer)["_modules"]})


def can_pack(model: nn.Module) -> bool:
    """Whether all that vLLM makes of this model's weights is known to lie on the layers themselves."""
    methods = [getattr(layer, "quant_method", None) for layer in _holding(model.modules())]
    return all(method is None or type(method) in KNOWN for method in methods)


@torch.no_grad()
def pack(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Packed:
    """Load `weights`, every one of the model's, into twins of its layers. The model writes on meanwhile.

    Raises NonFinite for weights that are NaN, and where vLLM leaves any part of a parameter as it is.
    """
    twins: dict[nn.Module, Any] = {layer: copy.copy(layer) for layer in model.modules()}  # sharing what is no tensor
    shared: dict[Tensor, Tensor] = {}  # as a head that is tied to the embedding
    for layer, twin in twins.items():
        vars(twin)["_modules"] = {name: None if one is None else twins[one] for name, one in layer._modules.items()}
        vars(twin)["_parameters"] = {name: _empty(layer, twin, name, shared) for name in layer._parameters}
        vars(twin)["_buffers"] = {name: None if one is None else one.clone() for name, one in layer._buffers.items()}
    twins[model].load_weights(weights)
    if gaps := [name for name, parameter in twins[model].named_parameters() if parameter.sum().isnan()]:
        raise NonFinite(f"vLLM loaded no finite weights into {', '.join(gaps)}")
    holding = {layer: twins[layer] for layer in _holding(model.modules())}
    for twin in holding.values():
        if getattr(twin, "quant_method", None) is not None:
            twin.quant_method.process_weights_after_loading(twin)
    return Packed(holding)


def _holding(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those with parameters of their own."""
    return [layer for layer in layers if any(one is not None for one in layer._parameters.values())]


def _empty(layer: nn.Module, twin: nn.Module, name: str, shared: dict[Tensor, Tensor]) -> Tensor | None:
    """NaN for a parameter, shaped as it comes and not as it was packed, with vLLM's notes on how to load it."""
    live = layer._parameters[name]
    if live is None:
        return None
    if live not in shared:
        described = get_layerwise_info(layer).restore_metadata[0].get(name)
        room = materialize_meta_tensor(to_meta_tensor(live) if described is None else described)
        restore_layer_refs(room, twin).data.fill_(torch.nan)
        room.weight_loader = _get_original_loader(room)  # after a reload in place: not the one that waits for the next
        shared[live] = room
    return shared[live]
