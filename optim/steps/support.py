"""What both compiled steps know, and how they deal their work out."""

import torch
from torch import Tensor

from optim.settings import Settings
from optim.steps.stacks import Stack

MOST_K = 64
"""Elements along the axes that are not factored: above that, the plain path is used."""


def supports(settings: Settings) -> bool:
    """Whether the compiled steps know these settings: Schedule-Free's step, without SPEED."""
    return settings.use_schedulefree and not settings.use_speed


def supports_stack(stack: Stack, settings: Settings) -> bool:
    """Factored axes must lead, the others be short, factors be float32, and StableAdamW's RMS be had from what is
    here."""
    leading = stack.kind.axes == (0, 1) and stack.kind.shape[2:].numel() <= MOST_K
    factored = stack.row is None or (leading and stack.row.dtype == torch.float32)
    return factored and not (settings.scales_by_rms and stack.kind.split is not None)


def numbered(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as many times as it counts, and beside it 0, 1, 2, ..."""
    job = torch.repeat_interleave(rows, counts)
    first = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return job, torch.arange(len(job)) - first
