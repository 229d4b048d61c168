"""`ProdigyPlusScheduleFree`: its arguments and the order of a step. What it keeps is in `state.py`."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from optim import saving
from optim.formulas import rounding
from optim.formulas.numbers import GroupValues, Numbers, no_op_coefficients
from optim.formulas.prodigy import begin_step, end_step
from optim.groups import GroupsOnDevice, group_ranges
from optim.metrics import GroupMetrics, metrics_later
from optim.parameters import parameter_problems
from optim.ranks.gathering import Piece
from optim.settings import GROUP_SETTINGS, Params, Settings, check_group, with_settings_as_keywords
from optim.state import State
from optim.stepper import Stepper
from optim.steps import stacks
from optim.sums import note_squares, sum_up
from optim.waiting import Waiting, hook_for


@dataclass(eq=False)
class StepInProgress:
    """What a step needs from its first parameter to its last."""

    coefficients: Tensor  # float32 (coefficients, groups)
    all_finite: Tensor  # bool, 0-dim: whether all gradients so far were
    key: int  # for the rounding
    done: set[int]  # the parameters that have moved


class ProdigyPlusScheduleFree(torch.optim.Optimizer):
    """Prodigy's step size inside Schedule-Free averaging, with an epsilon-free update and little memory.

    Leave `lr` at 1, use no schedule and no gradient clipping, and sample, validate and save inside
    `averaged(optimizer)`. Give each network a group of its own, `{"params": ..., "name": "unet"}`; a group may set its
    own `lr`, `weight_decay`, `d0` and `d_coef`. Parameters are float32 or bfloat16, all on one device, or FSDP2's
    DTensors sharded along their first axis.

    Args:
        params: parameters or groups of them.
        lr, betas, ...: the settings of `optim.settings.Settings`, by name; only `lr` may stand without.

    Raises:
        TypeError: a keyword that is no setting.
        ValueError: a value out of range, settings that contradict one another, parameters that cannot be optimized.
    """

    @with_settings_as_keywords(Settings)
    def __init__(self, params: Params, settings: Settings) -> None:
        self.settings = settings
        self._kept = State(settings, settings.seed)
        self._groups = GroupsOnDevice()
        self._stepper = Stepper(self._kept, settings)
        self._hooked: dict[int, Any] = {}
        self._waiting = Waiting()
        self._lists: list[list[Tensor]] = []
        self._current: StepInProgress | None = None
        super().__init__(
            params,
            {
                "lr": settings.lr,
                "weight_decay": settings.weight_decay,
                "d0": settings.d0,
                "d_coef": settings.d_coef,
            },
        )
        self.state = self._kept.views

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its d starts at its d0, or at the joint d without `split_groups`.

        Raises:
            RuntimeError: in the middle of a step, or while the model holds the averaged weights.
            ValueError: a setting, a name or a parameter of the group cannot be used.
        """
        if self.holds_average or self._current is not None:
            raise RuntimeError("add_param_group() in the middle of a step or while the averaged weights are lent")
        known = {"params", "name", "initial_lr", *GROUP_SETTINGS}
        name = str(param_group.get("name", f"group_{len(self.param_groups)}"))
        if unknown := sorted(set(param_group) - known):
            raise ValueError(
                f"group {name!r} sets {', '.join(unknown)}: a group may set only name, {', '.join(GROUP_SETTINGS)}; "
                "other settings hold for the whole optimizer"
            )
        group = {**self.defaults, **param_group, "name": name}
        params = group["params"]
        group.setdefault("initial_lr", group["lr"])
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        problems = check_group(name, *(group[key] for key in GROUP_SETTINGS))
        if any(other["name"] == name for other in self.param_groups):
            problems.append(f"two groups are named {name!r}: names must differ")
        problems += parameter_problems(name, group["params"], self._kept.parameters, self.settings)
        if problems:
            raise ValueError("; ".join(problems))
        super().add_param_group(group)
        self._kept.add_group(group["params"], group["d0"])
        self._lists.append(group["params"])
        device = self._kept.numbers.device
        self._no_op = no_op_coefficients(device)
        self._sums = torch.zeros(
            len(self._kept.parameters), stacks.NUM_SUMS, dtype=self._kept.numbers.dtype, device=device
        )
        if self.settings.fused_back_pass:
            self._hook_parameters()

    def _follow_groups(self) -> None:
        """Takes over parameters that a wrapper put into the groups before the first step, as under FSDP2."""
        if all(group["params"] is known for group, known in zip(self.param_groups, self._lists, strict=True)):
            return
        if self._kept.steps:
            raise RuntimeError("the parameters of a group were replaced after the first step: their state is lost")
        groups = list(self.param_groups)
        self.param_groups.clear()
        self._kept = State(self.settings, self._kept.seed)
        self._stepper = Stepper(self._kept, self.settings)
        self._hooked, self._lists, self.state = {}, [], self._kept.views
        for group in groups:
            self.add_param_group(group)

    @property
    def _now(self) -> Numbers:
        return Numbers.of(self._kept.numbers)

    def _values(self) -> GroupValues:
        return self._groups.values(self.param_groups, self._kept.numbers.device)

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step from the gradients at y; with `fused_back_pass`, the end of the step that backward has made.

        A gradient that is not finite (or whose square is not, in float32) leaves every weight and all state as they
        are, and is counted in the metrics; within a fused backward, where weights before it have moved already, it is
        that parameter, those that step together with it and those that come after that are left as they are.

        Raises:
            RuntimeError: the model holds the averaged weights, or a group has other parameters than at the first step.
            ValueError: a gradient is sparse, or of another shape or device than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_while_averaged("step()")
        self._follow_groups()
        present = [index for index, p in enumerate(self._kept.parameters) if p.grad is not None]
        if self.settings.fused_back_pass:
            for index in present:  # parameters without a hook: they needed no gradient when the step began
                if index not in self._waiting.indices:
                    self._note_gradient(index)
            current = self._current or self._begin(self._trainable())
            self._step_waiting(current)
        else:
            current = self._begin(present)
            try:
                self._build_missing(present)
                self._advance(present, current)
            except ValueError:  # nothing has moved yet: the next step is this one again
                self.abandon_step()
                raise
        self._end(current)
        return loss

    def abandon_step(self) -> bool:
        """Give up the step that an error interrupted, if there is one; the next step is this one again.

        Returns False, and changes nothing, where weights have moved already: they are those of no step then, and a
        state that was saved before has to take their place.
        """
        if self._current is not None:
            if self._stepper.has_moved:
                return False
            self._drop_waiting()
            self._current = None
            self._kept.steps -= 1
        return True

    def _begin(self, present: list[int]) -> StepInProgress:
        """present: the parameters that take part; within a fused backward, those that are expected to."""
        if self.settings.fused_back_pass:
            self._hook_parameters()
            self._build_missing(present)
            self._waiting = Waiting(sum(self._kept.parameters[index].nbytes for index in present))
        self._stepper.has_moved = False
        for stack in self._kept.stacks:
            stacks.begin_stack(stack)
        self._sums.zero_()
        coefficients = begin_step(self._now, self._groups_of(present), self._values(), self.settings)
        key = rounding.signed(rounding.step_key(self._kept.seed, self._kept.steps + 1))
        all_finite = torch.ones((), dtype=torch.bool, device=self._sums.device)
        self._current = StepInProgress(coefficients, all_finite, key, set())
        self._kept.steps += 1
        return self._current

    def _trainable(self) -> list[int]:
        return [index for index, p in enumerate(self._kept.parameters) if p.requires_grad]

    def _groups_of(self, indices: Iterable[int]) -> Tensor:
        """Whether each group has any of these parameters, bool (groups,)."""
        which = {self._kept.group_of[index] for index in indices}
        return self._groups.marks(which, len(self.param_groups), self._sums.device)

    def _hook_parameters(self) -> None:
        note = weakref.WeakMethod(self._note_gradient)
        for index, p in enumerate(self._kept.parameters):
            if index not in self._hooked and p.requires_grad:
                self._hooked[index] = p.register_post_accumulate_grad_hook(hook_for(note, index))  # type: ignore[no-untyped-call]

    def _note_gradient(self, index: int) -> None:
        """Takes the gradient of a parameter within a fused backward; steps those that wait, once they are many."""
        self._refuse_while_averaged("backward() with fused_back_pass")
        current = self._current or self._begin(self._trainable())
        if index in current.done or index in self._waiting.indices:
            self._waiting.forget(index)
            self._kept.parameters[index].grad = None  # so that step() can still end the step
            raise RuntimeError(
                f"parameter {index} got a second gradient before step(): with fused_back_pass=True every backward must "
                "be followed by step(); accumulate gradients without it"
            )
        if self._waiting.are_enough_with(index, self._kept.parameters[index]):
            self._step_waiting(current)

    def _step_waiting(self, current: StepInProgress) -> None:
        """Makes the whole step of the parameters that wait within a fused backward, and drops their gradients."""
        present = [index for index in self._waiting.indices if self._kept.parameters[index].grad is not None]
        if present:  # else somebody has dropped them
            self._build_missing(present)
            self._advance(present, current)
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        for index in self._waiting.take():
            self._kept.parameters[index].grad = None

    def _build_missing(self, wanted: list[int]) -> None:
        built = self._kept.build_missing(wanted)
        if built:
            self._stepper.changed()
        if self._current is not None:
            for stack in built:
                stacks.begin_stack(stack)

    def _advance(self, present: list[int], current: StepInProgress) -> None:
        current.done.update(present)
        so_far = current.all_finite
        current.all_finite = self._stepper.step(present, current.coefficients, self._no_op, current.key, so_far)

    def _end(self, current: StepInProgress) -> None:
        """Adds the sums of the parameters up to those of the groups, and moves d."""
        used = [stack for stack in self._kept.stacks if not current.done.isdisjoint(stack.indices)]
        sum_up(self._sums, used, self._now, self.settings, current.coefficients, current.all_finite, current.done)
        sums = torch.stack([self._sums[start:stop, :2].sum(0) for start, stop in group_ranges(self.param_groups)])
        note_squares(used, self._now, current.all_finite)
        moved = self._groups_of(current.done)
        values = self._values()
        end_step(self._now, sums, moved, values, self.settings, current.all_finite)
        self._stepper.end()
        self._current = None
        if self._kept.free_frozen(values.any_weighed):
            self._stepper.changed()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue bit for bit, in views of the state, not copies.

        Besides torch's "state" and "param_groups" it has "version", "settings", "numbers", "steps", "seed" and "lent".
        While the model holds the averaged weights ("lent"), y is part of it. Under FSDP2 it is this rank's part.
        """
        return saving.pack(self._kept, self.param_groups)

    def whole_state_dict(self, *, keep: bool = True) -> dict[str, Any] | None:
        """The `state_dict()` of the whole parameters, in copies on the CPU: any number of ranks can load it, also one.

        Under FSDP2 all ranks must call it. keep: whether this rank is to have it; the others only send and get None.
        """
        return saving.pack_whole(self._kept, self.param_groups, keep=keep)

    def pieces(self) -> tuple[dict[str, Piece], dict[str, str]]:
        """What `flatten_state(whole_state_dict())` returns, not put together yet and not copied: of every tensor what
        is on this rank, in the memory of the state, for those who write it tensor by tensor (`put_together`)."""
        return saving.pieces(self._kept, self.param_groups)

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """What this rank needs of a tensor of a flat state, in memory of its own: `load_state_dict` takes these parts
        as well as whole tensors, so that nobody has to hold a state that is larger than a host's memory.

        name: as in `flatten_state`. Where parameters are not split, and for a name of no parameter, it is `whole`.
        """
        self._follow_groups()
        return saving.part_of(self._kept, name, whole)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()` or a `whole_state_dict()`, bit for bit.

        If it was taken while the model held x, the model must hold that x.

        Raises:
            ValueError: the state is of another version, other groups, other parameters, or settings that change its
                meaning.
        """
        self._follow_groups()
        saving.unpack(self._kept, self.param_groups, state_dict)
        self._drop_waiting()
        self._current = None
        self._stepper.changed()

    def thaw(self) -> list[str]:
        """Estimates d again in groups whose d is fixed and would not be under these settings; returns their names.

        For a run that goes on with another `prodigy_steps`, after `load_state_dict`. Under "auto" these are the groups
        whose d was fixed while it climbed. The estimate starts anew from where the weights are now, d from what it is.
        """
        due = self._kept.thaw()
        if due:
            self._stepper.changed()
        return [self.param_groups[group]["name"] for group in due]

    # ------------------------------------------------------------------ the average

    @property
    def holds_average(self) -> bool:
        """Whether the model holds x, the averaged weights."""
        return self._kept.set_aside is not None

    @torch.no_grad()
    def eval(self) -> None:
        """The model holds x from here on; a copy of y is kept for `train()`. Nothing if it does already."""
        if self._current is not None:
            raise RuntimeError("eval() between a fused backward and its step(): call step() first")
        if not self.holds_average:
            self._kept.swap_in_average()

    @torch.no_grad()
    def train(self) -> None:
        """The model holds y again, with the bits it had. Nothing if it does already."""
        if self.holds_average:
            self._kept.restore()

    def _refuse_while_averaged(self, what: str) -> None:
        if self.holds_average:
            raise RuntimeError(
                f"{what} while the model holds the averaged weights: leave the `averaged(optimizer)` block, or call "
                "optimizer.train(), first"
            )

    # ------------------------------------------------------------------ what people see

    def metrics(self) -> list[GroupMetrics]:
        """What each group is doing, one entry per group. Waits for the device, once."""
        return self.metrics_later()()

    def metrics_later(self) -> Callable[[], list[GroupMetrics]]:
        """As `metrics`, of this moment; but only who calls what is returned waits for the device, if it is not done."""
        zeros = {stack.kind.group for stack in self._kept.stacks if stack.kind.starts_at_zero}
        return metrics_later(self.param_groups, self._kept.numbers, self._values(), self.settings, zeros)

    def not_finite(self) -> list[int]:
        """Which parameters, in their order, had a gradient that is not finite in the last step, or whose square is not.

        Waits for the device. Not for a fused backward, which has no such moment.
        """
        bad = [
            index
            for stack in self._kept.stacks
            for index, is_finite in zip(stack.indices, stack.totals.isfinite().tolist(), strict=True)
            if not is_finite
        ]
        return sorted(bad)

    # ------------------------------------------------------------------ refusals

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        raise RuntimeError(
            "GradScaler cannot be used: it exists for float16 gradients, which this optimizer does not take; "
            "train in bfloat16 (torch.autocast(dtype=torch.bfloat16)), which needs no scaler"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a ProdigyPlusScheduleFree cannot be pickled or copied: save its state_dict() and load it into a new one"
        )
