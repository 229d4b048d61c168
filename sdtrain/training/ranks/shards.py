"""Networks that are split over the processes of a run: each holds a share of the weights, of their gradients and of the
optimizer's state, and has whole layers for a moment only (FSDP2, `fully_shard`; arXiv 2304.11277).

Whatever a network computes, all processes must compute together, as often and in the same order. What is written is
whole: `whole_one_by_one` puts it together, and `share_of` is what each needs of what was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optim import piece_of
from sdtrain.training.ranks.place import Place
from sdtrain.training.ranks.streams import Stream

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYERS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""The layers that are whole one after the other; what lies between them is whole while the network computes."""


def shard(network: nn.Module, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Split a network over the processes of a mesh; its parameters become DTensors of the same names.

    offload: whether these lie on the CPU, whatever computes. Gradients are added up over the processes, not averaged:
    losses are weighted by pictures already. Nothing stays whole after a forward: who looks with the averaged weights
    must leave none of them behind.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for part in _parts(network):
        sharded: Any = fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _parts(network: nn.Module) -> list[nn.Module]:
    """Return what is split by itself, the layers first: each holds what none before it holds."""
    layers = [module for module in network.modules() if type(module).__name__ in LAYERS]
    # transformers finds what to return by the class of a whole model, which would become another one
    return [*layers, *(network.children() if isinstance(network, PreTrainedModel) else [network])]


@dataclass(frozen=True)
class Travel:
    """What travels between the processes of a split network in a micro-batch: weights that are gathered, in forward and
    again in backward, and gradients, added up in float32. layer_bytes: what a process holds of the largest layer while
    it is whole: its weights and those of the next one, its gradients, and these in float32."""

    gathers: int = 0
    gathered_bytes: int = 0
    reductions: int = 0
    reduced_bytes: int = 0
    layer_bytes: int = 0

    @property
    def calls(self) -> int:
        """How often anything travels."""
        return self.gathers + self.reductions

    @property
    def num_bytes(self) -> int:
        """How much travels."""
        return self.gathered_bytes + self.reduced_bytes


NOTHING_TRAVELS = Travel()


def travel_of(networks: Iterable[nn.Module]) -> Travel:
    """Return what would travel if these networks, of which all weights are trained, were split."""
    layers, seen = [], set[int]()
    for part in (part for network in networks for part in _parts(network)):
        own = [p for p in part.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            layers.append((sum(p.nbytes for p in own), 4 * sum(p.numel() for p in own)))
    gathered, reduced = (sum(sizes) for sizes in zip(*layers, strict=True)) if layers else (0, 0)
    largest = max((3 * weights + gradients for weights, gradients in layers), default=0)
    return Travel(2 * len(layers), 2 * gathered, len(layers), reduced, largest)


def mesh_of(place: Place, replicas: int, device: torch.device) -> DeviceMesh:
    """Return the processes as a mesh: of all, or of so many groups that hold the weights between them."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device.type, (place.size,))
    return init_device_mesh(device.type, (replicas, place.size // replicas), mesh_dim_names=("replicate", "shard"))


def whole_one_by_one(tensors: Mapping[str, Tensor]) -> Stream:
    """Return a stream of the whole of tensors, in their order, which all processes must take or run dry together."""
    return Stream({name: piece_of(tensor) for name, tensor in tensors.items()})


def share_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return what this process needs of the numbers of a parameter, in memory of its own where that is not all."""
    piece = piece_of(parameter)
    if piece.split is None:
        return whole
    return whole.narrow(0, piece.split.first_row, piece.part.shape[0]).clone()


def put(parameter: nn.Parameter, share: Tensor) -> None:
    """Give a parameter the numbers of which `share_of` returned this process's share."""
    piece_of(parameter).part.copy_(share)
