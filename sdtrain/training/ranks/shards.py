"""Networks that are split over the processes of a run: each holds a share of the weights, of their gradients and of the
optimizer's state, and has whole layers for a moment only (FSDP2, `fully_shard`; arXiv 2304.11277).

Whatever a network computes, all processes must compute together, as often and in the same order. What is written is
whole: `whole_tensors` puts it together on the first process, and `share_of` is what each needs of what was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optim import is_sharded, piece_of
from sdtrain.training.ranks.place import Place
from sdtrain.training.ranks.streams import Stream

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYERS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""The layers that are whole one after the other; what lies between them is whole while the network computes."""


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Split a network over the processes of a mesh; its parameters become DTensors of the same names.

    Gradients are added up over the processes, not averaged: losses are weighted by pictures already. Nothing stays
    whole after a forward: who looks with the averaged weights must leave none of them behind.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    parts = [module for module in network.modules() if type(module).__name__ in LAYERS]
    # transformers finds what to return by the class of a whole model, which would become another one
    tops = network.children() if isinstance(network, PreTrainedModel) else [network]
    for part in (*parts, *tops):
        sharded: Any = fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def mesh_of(place: Place, replicas: int, device: torch.device) -> DeviceMesh:
    """Return the processes as a mesh: of all, or of so many groups that hold the weights between them."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device.type, (place.size,))
    return init_device_mesh(device.type, (replicas, place.size // replicas), mesh_dim_names=("replicate", "shard"))


def is_split(network: nn.Module) -> bool:
    """Return whether a network is split over processes."""
    return any(map(is_sharded, network.parameters()))


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return the whole of tensors on the CPU, which all processes must do together; empty without `keep`."""
    stream = Stream({name: piece_of(tensor) for name, tensor in tensors.items()})
    if keep:
        return {name: stream.take(name).to("cpu", copy=True) for name in tensors}
    stream.run_dry()
    return {}


def share_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return what this process needs of the numbers of a parameter, in memory of its own where that is not all."""
    piece = piece_of(parameter)
    if piece.split is None:
        return whole
    return whole.narrow(0, piece.split.first_row, piece.part.shape[0]).clone()


def put(parameter: nn.Parameter, share: Tensor) -> None:
    """Give a parameter the numbers of which `share_of` returned this process's share."""
    piece_of(parameter).part.copy_(share)
