"""Prodigy + Schedule-Free in one optimizer: no learning rate, no schedule, no number of steps to choose. See
README.md."""

from optim.averaging import averaged
from optim.metrics import GroupMetrics, fetching
from optim.optimizer import ProdigyPlusScheduleFree
from optim.ranks.gathering import Piece, in_turn, piece_of, put_together
from optim.ranks.sharding import is_sharded
from optim.saving import flatten_state, unflatten_state

__all__ = [
    "GroupMetrics",
    "Piece",
    "ProdigyPlusScheduleFree",
    "averaged",
    "fetching",
    "flatten_state",
    "in_turn",
    "is_sharded",
    "piece_of",
    "put_together",
    "unflatten_state",
]
