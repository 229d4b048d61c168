"""The parameter groups as a step needs them: their settings on the device, and which of them moved."""

from typing import Any

import torch
from torch import Tensor

from optim.formulas.numbers import GroupValues, exact_dtype
from optim.settings import GROUP_SETTINGS, check_group

ON_DEVICE = (*GROUP_SETTINGS, "initial_lr")
"""What a step needs of each group, in the order of the rows."""


def group_ranges(groups: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Where each group's parameters stand among all parameters: (first, last + 1)."""
    ranges, start = [], 0
    for group in groups:
        ranges.append((start, start + len(group["params"])))
        start = ranges[-1][1]
    return ranges


def has_weight(group: dict[str, Any]) -> bool:
    """Whether the steps of a group are multiplied by a weight or `d_coef`."""
    return group["initial_lr"] not in (0, 1) or group["d_coef"] != 1


class GroupsOnDevice:
    """The settings of the groups on the device, written only when somebody (a schedule) changed one."""

    def __init__(self) -> None:
        self._written: list[tuple[float, ...]] = []
        self._values = torch.empty(0)  # float64 (settings, groups)
        self._moved: dict[tuple[bool, ...], Tensor] = {}

    def values(self, groups: list[dict[str, Any]], device: torch.device) -> GroupValues:
        """The settings of the groups, as they are now.

        Raises:
            ValueError: somebody wrote a value that is out of range.
        """
        wanted = [tuple(group[key] for key in ON_DEVICE) for group in groups]
        if len(wanted) != len(self._written):
            self._values = torch.zeros(len(ON_DEVICE), len(wanted), dtype=exact_dtype(device), device=device)
            self._written = [()] * len(wanted)
        for index, (new, old) in enumerate(zip(wanted, self._written, strict=True)):
            if new == old:
                continue
            if problems := check_group(groups[index]["name"], *new[: len(GROUP_SETTINGS)]):
                raise ValueError("; ".join(problems))
            for row, value in enumerate(new):
                self._values[row, index].fill_(value)  # a fill, unlike a copy, does not wait for the device
            self._written[index] = new
        rows = dict(zip(ON_DEVICE, self._values.unbind(0), strict=True))
        return GroupValues(**rows, any_weighed=any(map(has_weight, groups)))

    def marks(self, which: set[int], num_groups: int, device: torch.device) -> Tensor:
        """Whether each group is one of `which`, bool (groups,); remembered, for a copy to the device waits for it."""
        key = tuple(index in which for index in range(num_groups))
        if key not in self._moved:
            self._moved[key] = torch.tensor(key, device=device)
        return self._moved[key]
