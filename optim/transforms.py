"""Optional changes of the gradient or the update; each a pure function of float32 [tensors, elements]."""

from torch import Tensor

SMALLEST_SHARE = 1e-3
FOCUS_PULL = 0.1
SMALLEST_NORM = 1e-30


def cautious(move: Tensor, direction: Tensor) -> Tensor:
    """The move where it agrees in sign with the direction, 0 elsewhere, scaled up by the share that agrees.

    Cautious optimizers, arXiv 2411.16085, algorithm 1. The mean is over each tensor.
    """
    agrees = (move * direction > 0).to(move.dtype)
    return move * agrees / agrees.mean(dim=1, keepdim=True).clamp_min(SMALLEST_SHARE)


def grams(move: Tensor, direction: Tensor) -> Tensor:
    """The size of the move with the sign of the direction. Grams, arXiv 2412.17107, eq. 5."""
    return move.abs() * direction.sign()


def orthogonal(update: Tensor, weights: Tensor) -> Tensor:
    """The part of the update that is orthogonal to the weights, at the update's own length.

    OrthoGrad, arXiv 2501.04697, section 5. All-zero weights leave the update as it is, and so do scalars, to which
    nothing is orthogonal but rounding errors. One projection a tensor.
    """
    if update.shape[1] == 1:
        return update
    along = (weights * update).sum(1, keepdim=True) / (weights * weights).sum(1, keepdim=True).add(SMALLEST_NORM)
    rest = update - along * weights
    length, rest_length = (t.square().sum(1, keepdim=True).sqrt() for t in (update, rest))
    return rest * (length / rest_length.add(SMALLEST_NORM))


def focus(g: Tensor, weights: Tensor, average_weights: Tensor) -> Tensor:
    """sign(g) + 0.1 sign(w - mean w): towards lower loss, and back to where the weights have been on average.

    FOCUS, arXiv 2501.12243, algorithm 1 (its sign of the pull: the update is subtracted, so w above its mean goes
    down).
    """
    return g.sign().add_((weights - average_weights).sign_(), alpha=FOCUS_PULL)
