"""The rotation of an OFT adapter without a question to the device (arXiv 2306.07280)."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn


def never_ask(network: nn.Module) -> None:
    """Let the rotations of a network solve their equations without the check that makes the host wait each time."""
    for module in network.modules():
        if type(module) is OFTRotationModule:
            module.__class__ = Rotation


class Rotation(OFTRotationModule):  # type: ignore[misc]  # of peft's types nothing is known here
    """R = (I - Q)(I + Q)^-1 of a skew Q. All eigenvalues of Q are imaginary, so I + Q always has an inverse."""

    def _cayley_batch(self, Q: Tensor, block_size: int, *series: Any) -> Tensor:
        """Return R, (blocks, size, size), of the numbers above the diagonals of Q, (blocks, size (size - 1) / 2).

        series: whether and how far peft computes the beginning of a series instead; ours never do.
        """
        if any(series[:1]):
            theirs: Tensor = super()._cayley_batch(Q, block_size, *series)
            return theirs
        skew = self._pytorch_skew_symmetric(Q, block_size)
        one = torch.eye(block_size, device=skew.device, dtype=skew.dtype).expand_as(skew)
        solved: Tensor = torch.linalg.solve_ex(one + skew, one - skew, left=False, check_errors=False)[0]
        return solved.to(Q.dtype)
