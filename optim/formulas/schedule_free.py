"""Schedule-Free's sequences: y, where gradients are taken; z, the fast iterate; x, their average, which is never
stored.

Sources: Schedule-Free arXiv 2405.15682 (eqs. 2 to 4).
"""

from torch import Tensor


def average(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """x = y + (1 - 1/beta1)(z - y), in float32."""
    return y.float().lerp(z.float(), 1 - 1 / beta1)


def advance(y: Tensor, z: Tensor, u: Tensor, step: Tensor, weight: Tensor, y_share: Tensor) -> None:
    """One step, in place: y moves towards z by the weight c, then both move against the update u, y by its share.

    y, z, u: float32, of one shape. step: what u is multiplied by, 0-dim or one per tensor. weight, y_share: 0-dim, of
        the group.
    """
    y.lerp_(z, weight)
    z.addcmul_(u, step, value=-1)
    y.addcmul_(u, step * y_share, value=-1)
