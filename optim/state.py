"""What an optimizer keeps from step to step: its parameters, their state in stacks, the numbers of the groups, and y
while the model holds the average."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim.formulas import rounding
from optim.formulas.freezing import FROZEN_FOR_ITS_WEIGHT, FROZEN_WHILE_IT_CLIMBED
from optim.formulas.numbers import Numbers
from optim.formulas.schedule_free import average
from optim.formulas.second_moment import factored_axes
from optim.ranks import sharding
from optim.settings import Settings
from optim.steps import stacks
from optim.steps.stacks import Kind, Stack


@dataclass(eq=False)
class State:
    """Everything that `state_dict()` saves. Parameters are known by their index among all parameters of all groups."""

    settings: Settings
    seed: int
    steps: int = 0
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # float64 (len(Numbers._fields), groups)
    parameters: list[Tensor] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    slots: dict[int, tuple[Stack, int]] = field(default_factory=dict)  # where in which stack a parameter's state is
    freed: set[int] = field(default_factory=set)  # groups whose d is fixed: they need no p0 and s
    set_aside: dict[int, Tensor] | None = None  # y, while the model holds x
    views: defaultdict[Tensor, Any] = field(default_factory=lambda: defaultdict(dict))
    """The state by parameter, as torch's `optimizer.state` shows it."""

    def add_group(self, params: list[Tensor], d0: float) -> None:
        """Gives a new group a column of numbers, and its parameters indices."""
        column, num_groups = Numbers.start(d0, params[0].device), self.numbers.shape[1]
        if num_groups and not self.settings.split_groups:
            column = self.numbers[:, :1]
        self.numbers = torch.cat((self.numbers, column), dim=1) if num_groups else column
        self.group_of += [num_groups] * len(params)
        self.parameters += params

    def build_missing(self, wanted: list[int]) -> list[Stack]:
        """Builds state for those of the wanted parameters that have none yet; returns the new stacks.

        It asks the device, once, which of them start at zero.
        """
        missing = [index for index in wanted if index not in self.slots]
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
        """A stack at its start, which is not yet one of the state's."""
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
        self.slots.update({index: (stack, slot) for slot, index in enumerate(stack.indices)})
        self._show(stack)

    def _show(self, stack: Stack) -> None:
        for index, state in zip(stack.indices, stack.states(), strict=True):
            self.views[self.parameters[index]] = state

    def free_frozen(self, any_weighed: bool) -> bool:
        """Drops p0 and s of groups whose d is fixed; returns whether there were any.

        The device is asked rarely, and only while there is something to free. any_weighed: whether d of some group may
        be fixed because it has a weight.
        """
        fix_at = self.settings.prodigy_steps
        num_groups = self.numbers.shape[1]
        if len(self.freed) == num_groups:
            return False
        by_count = fix_at not in (0, "auto") and self.steps >= int(fix_at)
        if not by_count and (self.steps % 16 or not (fix_at == "auto" or any_weighed)):
            return False
        now = Numbers.of(self.numbers)
        due = {
            group
            for group, frozen in enumerate(now.frozen.tolist())
            if frozen or (by_count and now.k[group].item() >= int(fix_at))
        } - self.freed
        self.freed |= due
        for stack in self.stacks:
            if stack.kind.group in due:
                stack.free_prodigy_state()
                self._show(stack)
        return bool(due)

    def thaw(self) -> list[int]:
        """Starts the estimate of d anew in the groups whose d is fixed and would not be under these settings.

        One that was fixed at rest because it has a weight stays fixed.
        """
        now, fix_at = Numbers.of(self.numbers), self.settings.prodigy_steps
        due = []
        for group, (frozen, k) in enumerate(zip(now.frozen.tolist(), now.k.tolist(), strict=True)):
            learns = frozen == FROZEN_WHILE_IT_CLIMBED if fix_at == "auto" else fix_at == 0 or k < fix_at
            if frozen not in (0, FROZEN_FOR_ITS_WEIGHT) and learns:
                due.append(group)
        for group in due:
            for value in (now.frozen, now.numerator, now.peak):
                value[group] = 0.0
            for mark_d, mark_k in ((now.mark_d, now.mark_k), (now.climb_d, now.climb_k)):
                mark_d[group], mark_k[group] = now.d[group], now.k[group]
        self.freed -= set(due)
        for stack in self.stacks:
            if stack.kind.group in due:
                parts = [sharding.local_part(self.parameters[index]).detach() for index in stack.indices]
                stack.begin_estimate(stack.z if self.settings.use_schedulefree else torch.stack(parts), self.settings)
                self._show(stack)
        return due

    def replace(
        self, built: list[Stack], *, numbers: Tensor, steps: int, seed: int, set_aside: dict[int, Tensor] | None
    ) -> None:
        """Puts a state that has been checked in the place of this one."""
        self.views.clear()  # torch's `optimizer.state` is this very object
        self.stacks, self.slots, self.freed = [], {}, set()
        self.numbers, self.steps, self.seed, self.set_aside = numbers, steps, seed, set_aside
        for stack in built:
            stack.keys = torch.tensor(self._keys(stack.indices), dtype=torch.int32, device=stack.keys.device)
            self._add(stack)

    def swap_in_average(self) -> None:
        """Writes x into the parameters, and keeps a copy of y."""
        self.set_aside = {}
        if not self.settings.use_schedulefree:
            return
        z = {id(stack): stack.z.unbind() for stack in self.stacks}
        for index, (stack, slot) in self.slots.items():
            y = sharding.local_part(self.parameters[index])
            self.set_aside[index] = y.to(self.aside_on(y), copy=True)
            y.copy_(average(y, z[id(stack)][slot], self.settings.betas[0]))

    def aside_on(self, parameter: Tensor) -> torch.device:
        """Where y of a parameter is kept while the model holds x."""
        return torch.device("cpu") if self.settings.set_aside_on_cpu else parameter.device

    def restore(self) -> None:
        """Writes y into the parameters again, with the bits it had."""
        for index, y in (self.set_aside or {}).items():
            sharding.local_part(self.parameters[index]).copy_(y)
        self.set_aside = None
