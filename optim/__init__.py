"""Prodigy + Schedule-Free in one optimizer: no learning rate, no schedule, no number of steps to choose. See
README.md."""

from optim.averaging import averaged
from optim.metrics import GroupMetrics, fetching
from optim.optimizer import ProdigyPlusScheduleFree
from optim.ranks.sharding import is_sharded
from optim.saving import flatten_state, unflatten_state

__all__ = [
    "GroupMetrics",
    "ProdigyPlusScheduleFree",
    "averaged",
    "fetching",
    "flatten_state",
    "is_sharded",
    "unflatten_state",
]
