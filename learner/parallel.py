"""Several processes that make one step: shards of the student on each (FSDP2), met over NCCL on GPUs, gloo on CPUs.

    forward    a layer's weights are put together for as long as it runs; embedding, last norm and head until the pass
               ends, since the head's product is taken outside the model (logprobs.head_loss)
    backward   gradients are summed, not averaged, and each rank keeps those of its shard
    step       AdamW on shards; its moments are shards

The only file that knows torch.distributed. It shards the student; models beside it that are loaded from folders are
whole on every rank. It decides nothing: who takes which rows is learner/packing.py's, what is summed the trainer's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from learner.logprobs import Tally, accumulator
from learner.model import CausalModel
from learner.packing import Packed


def meeting(host: str) -> TCPStore:
    """Where ranks find each other, kept by rank 0 for as long as they are together: `host`:`store.port`.

    host  an address of this machine that the others reach. Nothing listens on any other.
    """
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


class Joined:
    """This process among the others. One group a process: `join` it, and `leave` it."""

    home = torch.device("cpu")  # from where `shard` takes each rank's share to its device

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank: int = mesh.get_rank()
        self.size: int = mesh.size()
        self._mesh = mesh

    @classmethod
    def join(cls, *, rank: int, size: int, host: str, port: int, timeout_s: float) -> Joined:
        """Returns once all `size` have called; raises torch's DistError when they have not within the time.

        host, port  of rank 0's `meeting`
        timeout_s   of joining, and of every later meeting: a rank that is waited for longer is taken for dead
        """
        device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
        limit = timedelta(seconds=timeout_s)
        store = TCPStore(host, port, is_master=False, timeout=limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        return cls(init_device_mesh(device, (size,)))

    def leave(self) -> None:
        """Called on a failure, too: the others, who may be waiting for this one, then fail at once."""
        dist.destroy_process_group()

    def shard(self, model: CausalModel) -> CausalModel:
        """Layer by layer, onto the ranks' devices: a model on the CPU need never fit into the memory of one."""
        dtype = model.head.dtype
        layers = set(model.transformer._no_split_modules or ())
        for module in [*(m for m in model.modules() if type(m).__name__ in layers), model]:
            fully_shard(
                module,
                mesh=self._mesh,
                reshard_after_forward=module is not model,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=accumulator(dtype)),
            )
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        model.ranks = self
        return model

    def total(self, tally: Tally) -> Tally:
        """Added up in the order of the ranks."""
        losses, sums = ({name: value.item() for name, value in part.items()} for part in (tally.losses, tally.sums))
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (losses, sums, tally.counts))
        whole = Tally()
        for one_losses, one_sums, counts in gathered:
            whole.merge(Tally(losses=_tensors(one_losses), sums=_tensors(one_sums), counts=counts))
        return whole

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        own = torch.nn.utils.get_total_norm([_local(tensor) for tensor in tensors])
        squared = own.to(self._mesh.device_type).double() ** 2
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def settle(self, model: CausalModel) -> None:
        _sharded(model).reshard()

    @torch.no_grad()
    def read(self, model: CausalModel, weights: Mapping[str, Tensor], packed: Packed) -> tuple[Tensor, Tensor]:
        """The shards of `weights` take the place of the model's own for one pass, then those come back."""
        with self._holding(model, weights):
            hidden: Tensor = model(packed)
            head = model.head.clone()  # the next pass puts the model's own there
        _sharded(model).unshard()  # as the pass before this one left it
        return hidden, head

    @contextmanager
    def _holding(self, model: CausalModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
        self.settle(model)
        parameters = dict(model.named_parameters())
        shards = {name: _local(parameters[name]) for name in weights}
        own = {name: shard.clone() for name, shard in shards.items()}
        for name, shard in shards.items():
            shard.copy_(_local(weights[name]))
        try:
            yield
        finally:
            self.settle(model)
            for name, shard in shards.items():
                shard.copy_(own[name])

    @torch.no_grad()
    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One at a time, into the memory of rank 0's CPU."""
        found = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                found[name] = full.detach().cpu()
        return found

    def lay(self, whole: Tensor, *, like: Tensor) -> Tensor:
        """Each takes its share of its own copy: nothing is sent."""
        here = whole.to(like.device)
        if not isinstance(like, DTensor) or whole.shape != like.shape:  # an optimizer's count of steps
            return here
        return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def _sharded(model: CausalModel) -> FSDPModule:
    return cast("FSDPModule", model)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(numbers: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
