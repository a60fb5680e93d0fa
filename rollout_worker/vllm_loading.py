"""How vLLM loads a version: an engine of ours for its weight-transfer API, registered under a name of its own.

    start_weight_update   layers make room          update_weights   tensors as they come        finish_weight_update

vLLM's own engines for NCCL and CUDA IPC fetch and load in one, compare nothing with what was sent, wait for ever where
a trainer dies, and take a broken update for whole when the next begins. Here transports fetch, and this file loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

NAME = "potstill"


@dataclass
class Nobody(WeightTransferInitInfo):  # type: ignore[misc]
    """There is nobody to meet: tensors are handed in."""


@dataclass
class Handed(WeightTransferUpdateInfo):  # type: ignore[misc]
    weights: Iterable[tuple[str, Tensor]]


class Loading(WeightTransferEngine[Nobody, Handed]):  # type: ignore[misc]
    """In the process of vLLM's worker, which is this one."""

    init_info_cls = Nobody
    update_info_cls = Handed

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._begun = False

    def init_transfer_engine(self, init_info: Nobody) -> None:
        """Nothing is kept between versions."""

    def start_weight_update(self) -> None:
        if self._begun:  # the one before ended midway; layers still hold what came, and would count it towards this one
            finalize_layerwise_reload(self.model, self.model_config)
        self._begun = True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in the base, which waits for an accelerator even where there is none; here `finish` does."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Handed) -> None:
        with disable_mtp_completeness_check():
            self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_head(self.model)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self._begun = False

    def shutdown(self) -> None:
        """Nothing is held."""


def config() -> WeightTransferConfig:
    """Has vLLM load with `Loading`."""
    return WeightTransferConfig(backend=NAME)


def _repack_head(model: Any) -> None:
    """Reloading leaves the packed copy of a head that is tied to the embedding as it was: pack it again."""
    head = model.lm_head
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine(NAME, Loading)
