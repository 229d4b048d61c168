"""What is done to a guided prediction so that pictures are not overexposed."""

from __future__ import annotations

from torch import Tensor


def rescaled_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Return the guided prediction (n, c, h, w) with its spread moved towards that of the conditional one.

    Guidance widens the spread of a prediction, and with pure noise at the start of sampling nothing corrects that: the
    picture becomes too bright or too flat. The guided prediction is scaled, picture by picture, to the standard
    deviation of the conditional one, and mixed with itself: share 0 leaves it alone, 1 takes the scaled one.

    Source: arXiv 2305.08891, section 3.4, eqs. 15 and 16, where the share is called phi (0.7 there).
    """
    axes = tuple(range(1, guided.dim()))
    factor = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return share * (guided * factor) + (1 - share) * guided
