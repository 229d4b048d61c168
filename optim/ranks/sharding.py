"""Parameters that are split over ranks (FSDP2: DTensors sharded along their first axis): where a shard stands in the
whole, and the few sums that need all shards.

Every rank joins every collective, also one whose shards are all empty: what is summed depends only on the whole shapes.
"""

import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from optim.settings import Settings
from optim.steps.stacks import Split, Stack

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(t: Tensor) -> "TypeIs[DTensor]":
    """Whether a tensor is a DTensor. Their module takes half a second to import: who has one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local_part(t: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, in the same memory: all of it, or its shard. Scalars get an axis."""
    if is_sharded(t):
        return t.to_local().detach()
    return t.detach() if t.dim() else t.detach().view(1)


def split_of(t: Tensor) -> Split | None:
    """How a tensor is split over ranks; None if it is whole here.

    Rows are dealt out as by `torch.chunk`: the last ranks may have none.
    """
    if not is_sharded(t):
        return None
    from torch.distributed.tensor import Shard

    for axis, placement in enumerate(t.placements):
        if isinstance(placement, Shard) and t.device_mesh.size(axis) > 1:
            num_rows = -(-t.shape[0] // t.device_mesh.size(axis))
            first_row = min(num_rows * t.device_mesh.get_local_rank(axis), t.shape[0])
            return Split(t.device_mesh.get_group(axis), first_row)
    return None


def problems(p: Tensor, settings: Settings) -> list[str]:
    """Why a DTensor cannot be optimized, as sentences; an empty list for whole tensors and for rows split over one mesh
    axis."""
    if not is_sharded(p):
        return []
    from torch.distributed.tensor import Replicate, Shard

    shards = [placement for placement in p.placements if not isinstance(placement, Replicate)]
    found = []
    if len(shards) > 1 or any(type(placement) is not Shard or placement.dim != 0 for placement in shards):
        found.append(
            f"placements {tuple(p.placements)}: must be Shard(0) over one mesh axis and Replicate() over the others"
        )
    if settings.fused_back_pass:
        found.append(
            "fused_back_pass with sharded parameters: their gradients arrive reduced, after backward; set it to False"
        )
    return found


def reduce_together(tensors: list[Tensor], ranks: list["dist.ProcessGroup"]) -> None:
    """Sums tensors over their ranks, in place, in one collective for each process group."""
    for group in dict.fromkeys(ranks):
        mine = [tensor for tensor, its in zip(tensors, ranks, strict=True) if its is group]
        flat = torch.cat([tensor.reshape(-1) for tensor in mine])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(mine, torch.split(flat, [tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(total.view_as(tensor))


def reduce_squares(active: list[Stack]) -> None:
    """Sums the columns and totals of g^2 of all sharded stacks over the ranks, in one collective."""
    tensors, ranks = [], []
    for stack in active:
        split = stack.kind.split
        if split is None:
            continue
        parts = [stack.totals]
        if stack.kind.axes is not None and stack.kind.axes[0] == 0 and stack.col_now is not None:
            parts.append(stack.col_now)
        tensors += parts
        ranks += [split.ranks] * len(parts)
    reduce_together(tensors, ranks)


def reduce_sums(sums: Tensor, used: list[Stack]) -> None:
    """Sums Prodigy's sums of all sharded parameters over the ranks, in one collective.

    sums: (parameters, NUM_SUMS), changed in place.
    """
    sharded = [(stack, split) for stack in used if (split := stack.kind.split) is not None]
    parts = [sums[stack.indices_here] for stack, _ in sharded]
    reduce_together(parts, [split.ranks for _, split in sharded])
    for (stack, _), part in zip(sharded, parts, strict=True):
        sums.index_copy_(0, stack.indices_here, part)


def reduce_counts(counts: Tensor, splits: list[Split | None]) -> Tensor:
    """The counts of each tensor over all its shards, (tensors,)."""
    places = [place for place, split in enumerate(splits) if split is not None]
    parts = [counts[place].clone() for place in places]
    reduce_together(parts, [split.ranks for split in splits if split is not None])
    for place, part in zip(places, parts, strict=True):
        counts[place] = part
    return counts
