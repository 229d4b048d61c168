"""Schedule-Free's sequences: y, where gradients are taken; z, the fast iterate; x, their average, which is never
stored.

Sources: Schedule-Free arXiv 2405.15682 (eqs. 2 to 4); cautious updates arXiv 2411.16085; Grams arXiv 2412.17107.
"""

from torch import Tensor

from optim.transforms import cautious, grams


def average(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """x = y + (1 - 1/beta1)(z - y), in float32."""
    return y.float().lerp(z.float(), 1 - 1 / beta1)


def advance(y: Tensor, z: Tensor, u: Tensor, step: Tensor, weight: Tensor, y_share: Tensor) -> None:
    """One step, in place: y moves towards z by the weight c, then both move against the update u, y by its share.

    y, z, u: float32, one shape. step: what u is multiplied by, 0-dim or one a tensor. weight, y_share: 0-dim, of the
    group.
    """
    y.lerp_(z, weight)
    z.addcmul_(u, step, value=-1)
    y.addcmul_(u, step * y_share, value=-1)


def advance_by_signs(
    y: Tensor, z: Tensor, u: Tensor, dlr: Tensor, weight: Tensor, y_share: Tensor, *, use_cautious: bool
) -> None:
    """As `advance`, with y's whole move made cautious, or signed by the update (Grams). y, z, u: [tensors,
    elements]."""
    move = (y - z).mul_(weight).addcmul_(u, dlr * y_share)
    z.addcmul_(u, dlr, value=-1)
    y.sub_(cautious(move, u) if use_cautious else grams(move, u))
