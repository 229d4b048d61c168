"""What an optimizer keeps from step to step: its parameters, their state in stacks, the numbers of the groups, and what
is lent."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim.formulas import rounding
from optim.formulas.prodigy import Numbers
from optim.formulas.schedule_free import average
from optim.formulas.second_moment import factored_axes
from optim.ranks import sharding
from optim.settings import Settings
from optim.steps import stacks
from optim.steps.stacks import Kind, Stack


@dataclass(eq=False)
class State:
    """Everything that `state_dict()` saves. Parameters are known by their place among all parameters of all groups."""

    settings: Settings
    seed: int
    steps: int = 0
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # float64 [len(Numbers._fields), groups]
    parameters: list[Tensor] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    place: dict[int, tuple[Stack, int]] = field(default_factory=dict)
    freed: set[int] = field(default_factory=set)  # groups whose d is fixed: they need no p0 and s
    lent: dict[int, Tensor] | None = None  # y, while the model holds x
    views: defaultdict[Tensor, Any] = field(default_factory=lambda: defaultdict(dict))
    """The state by parameter, as torch's `optimizer.state` shows it."""

    def add_group(self, params: list[Tensor], d0: float) -> None:
        """A column of numbers for a new group, and its parameters among all."""
        column, num_groups = Numbers.start(d0, params[0].device), self.numbers.shape[1]
        if num_groups and not self.settings.split_groups:
            column = self.numbers[:, :1]
        self.numbers = torch.cat((self.numbers, column), dim=1) if num_groups else column
        self.group_of += [num_groups] * len(params)
        self.parameters += params

    def build_missing(self, wanted: list[int]) -> list[Stack]:
        """State for those of the wanted parameters that have none yet; returns the new stacks.

        The only place that asks the device: which of them start at zero.
        """
        missing = [index for index in wanted if index not in self.place]
        if not missing:
            return []
        parts = [sharding.local_part(self.parameters[index]) for index in missing]
        counts = torch.stack([part.count_nonzero() for part in parts])
        counts = sharding.reduce_counts(counts, [sharding.split_of(self.parameters[index]) for index in missing])
        kinds: dict[Kind, list[int]] = {}
        for index, count in zip(missing, counts.tolist(), strict=True):
            kinds.setdefault(self.kind(index, starts_at_zero=count == 0), []).append(index)
        built = [self.build(kind, indices) for kind, indices in kinds.items()]
        for stack in built:
            self._add(stack)
        return built

    def build(self, kind: Kind, indices: list[int]) -> Stack:
        """A stack at its start, not yet among the others."""
        weights = [sharding.local_part(self.parameters[index]) for index in indices]
        return stacks.build_stack(kind, indices, self._keys(indices), weights, self.settings)

    def _keys(self, indices: list[int]) -> list[int]:
        return [rounding.signed(rounding.parameter_key(self.seed, index)) for index in indices]

    def kind(self, index: int, *, starts_at_zero: bool) -> Kind:
        """What decides with which other parameters this one can share a stack."""
        p = self.parameters[index]
        local, split = sharding.local_part(p), sharding.split_of(p)
        return Kind(
            group=self.group_of[index],
            shape=local.shape,
            whole=local.shape if split is None else p.shape,
            split=split,
            offset=0 if split is None else split.first_row * p.shape[1:].numel(),
            dtype=p.dtype,
            axes=factored_axes(p.shape) if self.settings.factored else None,
            starts_at_zero=starts_at_zero,
        )

    def _add(self, stack: Stack) -> None:
        if stack.kind.group in self.freed:
            stack.free_prodigy_state()
        self.stacks.append(stack)
        self.place.update({index: (stack, place) for place, index in enumerate(stack.indices)})
        self._show(stack)

    def _show(self, stack: Stack) -> None:
        for place, index in enumerate(stack.indices):
            self.views[self.parameters[index]] = stack.state_of(place)

    def free_frozen(self) -> bool:
        """Once a group's d is fixed, p0 and s go; returns whether any went.

        The device is asked rarely, and only while there is something to free.
        """
        fix_at = self.settings.prodigy_steps
        num_groups = self.numbers.shape[1]
        if fix_at == 0 or len(self.freed) == num_groups:
            return False
        if self.steps % 16 if fix_at == "auto" else self.steps < fix_at:
            return False
        now = Numbers.of(self.numbers)
        due = {
            group
            for group, frozen in enumerate(now.frozen.tolist())
            if frozen or (fix_at != "auto" and now.k[group].item() >= fix_at)
        } - self.freed
        self.freed |= due
        for stack in self.stacks:
            if stack.kind.group in due:
                stack.free_prodigy_state()
                self._show(stack)
        return bool(due)

    def replace(
        self, built: list[Stack], *, numbers: Tensor, steps: int, seed: int, lent: dict[int, Tensor] | None
    ) -> None:
        """Takes over a state that has been checked."""
        self.views.clear()
        self.stacks.clear()
        self.place.clear()
        self.freed.clear()
        self.numbers, self.steps, self.seed, self.lent = numbers, steps, seed, lent
        for stack in built:
            stack.keys = torch.tensor(self._keys(stack.indices), dtype=torch.int32, device=stack.keys.device)
            self._add(stack)

    def lend(self) -> None:
        """The model holds x from here on; a copy of y is kept."""
        self.lent = {}
        if not self.settings.use_schedulefree:
            return
        for index, (stack, place) in self.place.items():
            y = sharding.local_part(self.parameters[index])
            self.lent[index] = y.clone()
            y.copy_(average(y, stack.z[place], self.settings.betas[0]))

    def take_back(self) -> None:
        """The model holds y again, with the bits it had."""
        for index, y in (self.lent or {}).items():
            sharding.local_part(self.parameters[index]).copy_(y)
        self.lent = None
