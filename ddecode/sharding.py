"""FSDP: each process of a launch keeps its part of every trained tensor, of its gradient, of Adam's moments and of the
EMA, cut along the first dimension (torch's `fully_shard`, accelerate's `fsdp_version: 2`).

An objective is whole while it looks at a batch, but for what its backbones' blocks consist of, which is nearly all of
it: each attention or MLP is gathered for its own pass. Between steps all is sharded; what is frozen never is.

accelerate passes FSDP over on a CPU, without a word. So its options are read here, and `fully_shard` is called alike
with and without GPUs.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddecode.processes import rank, world


def fsdp_options() -> FullyShardedDataParallelPlugin | None:
    """Those of `accelerate launch` or its config file; None where FSDP is off.

    Raises:
        ValueError: they ask for what is not there.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"FSDP of version {version} is not supported: set fsdp_version to 2")
    options = FullyShardedDataParallelPlugin()
    if isinstance(options.cpu_offload, CPUOffloadPolicy) or options.activation_checkpointing:
        raise ValueError("FSDP's offloading and activation checkpointing are not supported: set them to false")
    return options


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """An objective's networks and the EMA of its model, dealt out over the processes."""

    objective: nn.Module
    average: nn.Module
    reshard_after_forward: bool

    @classmethod
    def made(cls, objective: Any, average: nn.Module, options: FullyShardedDataParallelPlugin) -> "Sharded":
        """Shard both in place.

        Args:
            objective: a `ddecode.training.Objective` on its device.
            average: of its model.
            options: see `fsdp_options`.
        """
        # backbones add to what their parts return, and never in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        device = next(average.parameters()).device
        sharded = cls(objective=objective, average=average, reshard_after_forward=bool(options.reshard_after_forward))
        mesh = init_device_mesh(device.type, (world(),))
        frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
        for network in (objective.model, *objective.critics.values()):
            for unit in units(network):
                fully_shard(unit, mesh=mesh, reshard_after_forward=sharded.reshard_after_forward, ignored_params=frozen)
        fully_shard(objective, mesh=mesh, ignored_params=frozen)
        average.load_state_dict(dealt(average.state_dict(), objective.model.state_dict()), assign=True)
        return sharded

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All networks and the average with all their weights, in each process. All must enter and leave together;
        inside, each may run them by itself."""
        sharded = self.average.state_dict()
        self.gather_average()
        rest, *parts = [module for module in self.objective.modules() if isinstance(module, FSDPModule)]
        for unit in (rest, *parts):
            unit.unshard()
        for unit in parts:
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in parts:
                unit.set_reshard_after_forward(self.reshard_after_forward, recurse=False)
            for unit in (rest, *parts):
                unit.reshard()
            self.average.load_state_dict(sharded, assign=True)

    def gather_average(self) -> None:
        """Make it whole again, in each process."""
        self.average.load_state_dict(dict(gathered(self.average.state_dict())), assign=True)


def units(network: nn.Module) -> list[nn.Module]:
    """What a network's backbone, where it has one, gathers at a time: the modules with matrices that its blocks consist
    of. They are called as modules only; blocks and the backbone itself have methods that read weights as well."""
    backbone = getattr(network, "backbone", None)
    lists = [part for part in backbone.modules() if isinstance(part, nn.ModuleList)] if backbone is not None else []
    children = [child for blocks in reversed(lists) for block in blocks for child in block.children()]
    return [child for child in children if any(p.requires_grad and p.dim() > 1 for p in child.parameters())]


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One after the other, whole. All processes must go through them together; each may drop what it does not need."""
    return ((name, whole(tensor)) for name, tensor in tensors.items())


def whole(tensor: Tensor) -> Tensor:
    """It itself where it is not sharded; else all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def dealt(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, the same in all processes, sharded where those of the same name in `like` are."""
    parts = dict(tensors)
    for name, tensor in tensors.items():
        if isinstance(placed := like.get(name), DTensor):
            parts[name] = distribute_tensor(tensor, placed.device_mesh, placed.placements, src_data_rank=None)
    return parts


# --- checkpoints: whole, so that they know nothing of the number of processes ---------------------------------------


def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the memory of the process that writes, none in the others. All must call it."""
    return {name: tensor.cpu() for name, tensor in gathered(tensors) if rank() == 0}


def kept_moments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`kept` of an optimiser's state."""
    state = optimizer.state_dict()
    return state | {"state": {number: kept(moments) for number, moments in state["state"].items()}}


def dealt_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state, sharded as its parameters are; the numbers of steps are scalars, and stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: dealt(tensors, {name: parameters[number] for name in tensors if name != "step"})
        for number, tensors in state["state"].items()
    }
    return state | {"state": moments}
