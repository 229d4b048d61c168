"""`ProdigyPlusScheduleFree`: arguments, groups, the order of a step, and what it keeps."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from optim import rounding, saving, sharding, stacks
from optim.metrics import GroupMetrics, metrics_of
from optim.parameters import parameter_problems
from optim.passes import Passes
from optim.prodigy import Coefficients, GroupValues, Numbers, begin_step, end_step, neutral_table, speed_sums
from optim.schedule_free import average
from optim.second_moment import factored_axes
from optim.settings import GROUP_SETTINGS, Settings, SplitGroupsMean, check_group
from optim.stacks import Kind, Stack


@dataclass(eq=False)
class StepInProgress:
    """What a step needs from its first parameter to its last."""

    table: Tensor  # float32 [coefficients, groups]
    sound: Tensor  # bool, 0-dim: no gradient so far was anything but finite
    key: int
    done: set[int]


class ProdigyPlusScheduleFree(torch.optim.Optimizer):
    """Prodigy's step size inside Schedule-Free averaging, with an epsilon-free update and little memory.

    Leave `lr` at 1, use no schedule and no gradient clipping, and sample, validate and save inside
    `averaged(optimizer)`. Give each network a group of its own, `{"params": ..., "name": "unet"}`; a group may set its
    own `lr`, `weight_decay`, `d0` and `d_coef`. Parameters are float32 or bfloat16, all on one device, or FSDP2's
    DTensors sharded along their first axis.

    Args:
        params: parameters or groups of them.
        lr: factor of the estimated step size.
        betas: beta1, the place of y between z and x; beta2, decay of the second moment.
        beta3: decay of Prodigy's sums; None: sqrt(beta2).
        weight_decay: decoupled, taken at y.
        weight_decay_by_lr: whether the decay is multiplied by the step size.
        d0: the first d. With `split_groups_mean=None` 1e-5 to 1e-4 may help.
        d_coef: factor of the estimate of d; the one to tune if any.
        d_limiter: let d grow by at most 2^(1/4) a step.
        prodigy_steps: fix d from this step on and free what its estimate needs; 0: never; "auto": when d has stopped
            growing.
        eps: None: the update is (4/pi) atan2(d g, sqrt v); > 0: d g / (sqrt v + d eps).
        split_groups: every group estimates its own d; False: one d for all.
        split_groups_mean: with split groups apply this mean of their d ("harmonic_mean", "geometric_mean", "mean");
            None: each its own.
        beta4: 0: d never falls; > 0: a running average of the estimate; < 0: an average only on the way down; None:
            beta2.
        factored: keep row and column means in place of the second moment (two or more axes, one of 32 or more).
        factored_fp32: keep them in float32 whatever the parameters are in.
        use_schedulefree: False: plain Prodigy with a first moment, for an outside schedule.
        schedulefree_c: > 0: weight of the newest z in the average, refined averaging (6 to 12 for short noisy runs, 50
            to 200 for long ones); 0: the plain average.
        use_stableadamw: with eps > 0, divide the update by the root of its RMS where that is above 1. atan2 needs none.
        use_bias_correction: RAdam's rectified warm-up.
        use_speed: SPEED in place of Prodigy's ratio: scale-free, less memory, experimental.
        stochastic_rounding: round bfloat16 weights and state stochastically.
        fused_back_pass: update each parameter within backward and drop its gradient; `step()` then ends the step.
        use_cautious, use_grams, use_adopt, use_orthograd, use_focus: see `optim/transforms.py`.
        seed: of the stochastic rounding; the same on every rank.
        compile: whether to compile the step, on first use, for this machine; None: where it pays and a compiler works.
            Where none does, plain torch is used, with one warning.

    Raises:
        ValueError: a value out of range, settings that contradict one another, parameters that cannot be optimized.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        beta3: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        d_limiter: bool = True,
        prodigy_steps: int | Literal["auto"] = 0,
        eps: float | None = None,
        split_groups: bool = True,
        split_groups_mean: SplitGroupsMean | None = "harmonic_mean",
        beta4: float | None = 0.0,
        factored: bool = True,
        factored_fp32: bool = True,
        use_schedulefree: bool = True,
        schedulefree_c: float = 0.0,
        use_stableadamw: bool = True,
        use_bias_correction: bool = False,
        use_speed: bool = False,
        stochastic_rounding: bool = True,
        fused_back_pass: bool = False,
        use_cautious: bool = False,
        use_grams: bool = False,
        use_adopt: bool = False,
        use_orthograd: bool = False,
        use_focus: bool = False,
        seed: int = 0,
        compile: bool | None = None,  # noqa: A002 - torch's own word for it
    ) -> None:
        self.settings = Settings(
            betas=tuple(betas) if isinstance(betas, list) else betas,
            beta3=beta3,
            beta4=beta4,
            weight_decay_by_lr=weight_decay_by_lr,
            d_limiter=d_limiter,
            prodigy_steps=prodigy_steps,
            eps=eps,
            split_groups=split_groups,
            split_groups_mean=split_groups_mean,
            factored=factored,
            factored_fp32=factored_fp32,
            use_schedulefree=use_schedulefree,
            schedulefree_c=schedulefree_c,
            use_stableadamw=use_stableadamw,
            use_bias_correction=use_bias_correction,
            use_speed=use_speed,
            stochastic_rounding=stochastic_rounding,
            fused_back_pass=fused_back_pass,
            use_cautious=use_cautious,
            use_grams=use_grams,
            use_adopt=use_adopt,
            use_orthograd=use_orthograd,
            use_focus=use_focus,
            seed=seed,
        )
        self._seed = seed
        self._steps = 0
        self._lent: dict[int, Tensor] | None = None
        self._parameters: list[Tensor] = []
        self._group_of: list[int] = []
        self._stacks: list[Stack] = []
        self._place: dict[int, tuple[Stack, int]] = {}
        self._passes = Passes(self._parameters, self._stacks, self.settings, compile)
        self._hooked: dict[int, Any] = {}
        self._freed: set[int] = set()
        self._current: StepInProgress | None = None
        self._buffer = torch.empty(0)
        self._values: GroupValues | None = None
        self._values_seen: list[tuple[float, ...]] = []
        self._moved_seen: dict[tuple[bool, ...], Tensor] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "d0": d0, "d_coef": d_coef})

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its d starts at its d0, or at the joint d without `split_groups`."""
        if self._lent is not None or self._current is not None:
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
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        problems = check_group(name, *(group[key] for key in GROUP_SETTINGS))
        if any(other["name"] == name for other in self.param_groups):
            problems.append(f"two groups are named {name!r}: names must differ")
        problems += parameter_problems(name, group["params"], self._parameters, self.settings)
        if problems:
            raise ValueError("; ".join(problems))
        super().add_param_group(group)
        self._add_column(self.param_groups[-1])

    def _add_column(self, group: dict[str, Any]) -> None:
        """A column of numbers for a new group, and the group's parameters among all."""
        params: list[Tensor] = group["params"]
        index = len(self.param_groups) - 1
        device = params[0].device
        column = Numbers.start(group["d0"], device)
        if index == 0:
            self._buffer = column
        else:
            joins = self._buffer[:, :1].clone() if not self.settings.split_groups else column
            self._buffer = torch.cat((self._buffer, joins), dim=1)
        self._parameters += params
        self._group_of += [index] * len(params)
        num = len(self._parameters)
        self._sums = torch.zeros(num, stacks.NUM_SUMS, dtype=self._buffer.dtype, device=device)
        self._neutral = neutral_table(device)
        self._group_column = torch.tensor(self._group_of, device=device)
        self._values = None
        self._moved_seen = {}
        if self.settings.fused_back_pass:
            self._hook_parameters()

    @property
    def _now(self) -> Numbers:
        return Numbers.of(self._buffer)

    def _group_values(self) -> GroupValues:
        """The groups' settings on the device; written again only when somebody (a schedule) changed them."""
        seen = [tuple(group[key] for key in GROUP_SETTINGS) for group in self.param_groups]
        if self._values is None or len(seen) != len(self._values_seen):
            empty = torch.zeros(len(GROUP_SETTINGS), len(seen), dtype=self._buffer.dtype, device=self._buffer.device)
            self._values, self._values_seen = GroupValues(*empty.unbind(0)), [()] * len(seen)
        for index, (new, old) in enumerate(zip(seen, self._values_seen, strict=True)):
            if new == old:
                continue
            if problems := check_group(self.param_groups[index]["name"], *new):
                raise ValueError("; ".join(problems))
            for key, value in zip(GROUP_SETTINGS, new, strict=True):
                self._value_row(key)[index].fill_(value)  # a fill, unlike a copy, does not wait for the device
        self._values_seen = seen
        return self._values

    def _value_row(self, key: str) -> Tensor:
        assert self._values is not None
        match key:
            case "lr":
                return self._values.lr
            case "weight_decay":
                return self._values.weight_decay
            case "d0":
                return self._values.d0
            case _:
                return self._values.d_coef

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step from the gradients at y; with `fused_back_pass`, the end of the step that backward has made.

        A gradient that is not finite (or whose square is not, in float32) leaves every weight and all state as they
        are, and is counted in the metrics; within a fused backward the parameter that has it is left out.

        Raises:
            RuntimeError: the averaged weights are lent.
            ValueError: a gradient is sparse, or of another shape or device than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_while_lent("step()")
        present = [index for index, p in enumerate(self._parameters) if p.grad is not None]
        if self.settings.fused_back_pass:
            for index in present:  # parameters without a hook: they needed no gradient when the step began
                self._step_parameter(index)
            current = self._current or self._begin()
        else:
            current = self._begin()
            self._build_missing(present)
            self._advance(present, current)
        self._end(current)
        return loss

    def _begin(self) -> StepInProgress:
        if self.settings.fused_back_pass:
            self._hook_parameters()
            self._build_missing([index for index, p in enumerate(self._parameters) if p.requires_grad])
        for stack in self._stacks:
            stacks.begin_stack(stack)
        self._sums.zero_()
        table = begin_step(self._now, self._group_values(), self.settings)
        self._steps += 1
        key = rounding.signed(rounding.step_key(self._seed, self._steps))
        sound = torch.ones((), dtype=torch.bool, device=self._buffer.device)
        self._current = StepInProgress(table, sound, key, set())
        return self._current

    def _step_parameter(self, index: int) -> None:
        """Within a fused backward: the whole step of one parameter, whose gradient is dropped then."""
        self._refuse_while_lent("backward() with fused_back_pass")
        current = self._current or self._begin()
        if index in current.done:
            self._parameters[index].grad = None  # so that step() can still end the step
            raise RuntimeError(
                f"parameter {index} got a second gradient before step(): with fused_back_pass=True every backward must "
                "be followed by step(); accumulate gradients without it"
            )
        self._build_missing([index])
        self._advance([index], current)
        self._parameters[index].grad = None

    def _advance(self, present: list[int], current: StepInProgress) -> None:
        current.done.update(present)
        sound = self._passes.step(present, current.table, self._neutral, current.key)
        current.sound = current.sound & sound

    def _end(self, current: StepInProgress) -> None:
        """The sums of all parameters become those of the groups, and d moves."""
        used = [stack for stack in self._stacks if not current.done.isdisjoint(stack.indices)]
        for stack in used:
            self._sums.index_copy_(0, stack.places, stack.sums)
        sharding.reduce_sums(self._sums, used)
        if self.settings.use_speed:
            self._finish_speed(used, current)
        else:
            # as upstream, where |s|_1 of each tensor is a bfloat16
            self._sums[:, 1].copy_(self._sums[:, 1].to(torch.bfloat16))
        groups = [self._sums[start:stop, :2].sum(0) for start, stop in self._group_ranges()]
        moved = self._moved(current.done)
        end_step(self._now, torch.stack(groups), moved, self._group_values(), self.settings, current.sound)
        self._passes.end(self._stacks)
        self._current = None
        self._free_frozen()

    def _finish_speed(self, used: list[Stack], current: StepInProgress) -> None:
        """SPEED's sums are ratios of each tensor's own averages."""
        now = self._now
        lam_row = Coefficients._fields.index("lam")
        for stack in used:
            if stack.norms is None:
                continue
            group = stack.kind.group
            moved = torch.tensor([index in current.done for index in stack.indices], device=stack.places.device)
            lam = current.table[lam_row, group].to(stack.sums.dtype)
            learns = moved & current.sound & (lam > 0)
            num = speed_sums(stack.norms, self._sums[stack.places], now.k[group], lam, learns)
            entry = torch.stack((num, num.new_ones(len(stack.indices)), torch.zeros_like(num)), dim=1)
            self._sums.index_copy_(0, stack.places, torch.where(learns[:, None], entry, 0.0))

    def _group_ranges(self) -> list[tuple[int, int]]:
        ranges, start = [], 0
        for group in self.param_groups:
            ranges.append((start, start + len(group["params"])))
            start = ranges[-1][1]
        return ranges

    def _moved(self, done: set[int]) -> Tensor:
        """bool [groups]: which groups had any gradient."""
        groups = {self._group_of[index] for index in done}
        key = tuple(index in groups for index in range(len(self.param_groups)))
        if key not in self._moved_seen:
            self._moved_seen[key] = torch.tensor(key, device=self._buffer.device)
        return self._moved_seen[key]

    # ------------------------------------------------------------------ state

    def _build_missing(self, wanted: list[int]) -> None:
        """State for the parameters that have none yet. The only place that asks the device: which of them start at
        zero."""
        missing = [index for index in wanted if index not in self._place]
        if not missing:
            return
        local = {index: sharding.local_part(self._parameters[index]) for index in missing}
        counts = torch.stack([part.count_nonzero() for part in local.values()])
        counts = sharding.reduce_counts(counts, [sharding.split_of(self._parameters[index]) for index in missing])
        kinds: dict[Kind, list[int]] = {}
        for index, count in zip(missing, counts.tolist(), strict=True):
            kinds.setdefault(self._kind(index, local[index], count == 0), []).append(index)
        for kind, indices in kinds.items():
            self._add_stack(
                stacks.build_stack(kind, indices, self._keys(indices), [local[i] for i in indices], self.settings)
            )

    def _kind(self, index: int, local: Tensor, starts_at_zero: bool) -> Kind:
        p = self._parameters[index]
        factors = self.settings.factored and not self.settings.use_focus
        split = sharding.split_of(p)
        return Kind(
            group=self._group_of[index],
            shape=local.shape,
            whole=local.shape if split is None else p.shape,
            split=split,
            offset=0 if split is None else split.first_row * p.shape[1:].numel(),
            dtype=p.dtype,
            axes=factored_axes(p.shape) if factors else None,
            starts_at_zero=starts_at_zero,
        )

    def _keys(self, indices: list[int]) -> list[int]:
        return [rounding.signed(rounding.parameter_key(self._seed, index)) for index in indices]

    def _add_stack(self, stack: Stack) -> None:
        if stack.kind.group in self._freed:
            stack.free_prodigy_state()
        if self._current is not None:
            stacks.begin_stack(stack)
        self._stacks.append(stack)
        self._passes.changed()
        for place, index in enumerate(stack.indices):
            self._place[index] = (stack, place)
            self.state[self._parameters[index]] = stack.state_of(place)

    def _free_frozen(self) -> None:
        """Once a group's d is frozen, p0 and s go. The device is asked rarely, and only while there is something to
        free."""
        steps = self.settings.prodigy_steps
        if steps == 0 or len(self._freed) == len(self.param_groups):
            return
        if self._steps % 16 if steps == "auto" else self._steps < steps:
            return
        for group, frozen in enumerate(self._now.frozen.tolist()):
            due = frozen or (steps != "auto" and self._now.k[group].item() >= steps)
            if due and group not in self._freed:
                self._freed.add(group)
                for stack in self._stacks:
                    if stack.kind.group == group:
                        stack.free_prodigy_state()
                        self._passes.changed()
                        for place, index in enumerate(stack.indices):
                            self.state[self._parameters[index]] = stack.state_of(place)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to continue bit for bit: tensors are views of the state in their own dtypes, not
        copies.

        Besides torch's "state" and "param_groups" it has "version", "settings", "numbers", "steps", "seed" and "lent".
        While the averaged weights are lent, y is part of it. Under FSDP2 it is this rank's part.
        """
        return saving.pack(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`, bit for bit. If it was taken while x was lent, the model must hold that x.

        Raises:
            ValueError: the state is of another version, other groups, other parameters, or settings that change its
            meaning.
        """
        saving.unpack(self, state_dict)

    def _restore(
        self, built: list[Stack], *, numbers: Tensor, steps: int, seed: int, lent: dict[int, Tensor] | None
    ) -> None:
        """Takes over a state that has been checked."""
        self.state.clear()
        self._stacks.clear()
        self._place, self._freed, self._current = {}, set(), None
        self._passes.changed()
        self._buffer, self._steps, self._seed = numbers, steps, seed
        self._values = None
        for stack in built:
            stack.keys = torch.tensor(self._keys(stack.indices), dtype=torch.int32, device=stack.keys.device)
            self._add_stack(stack)
        self._lent = None
        if lent is not None:
            self._lent = {index: y.to(self._buffer.device, copy=True) for index, y in lent.items()}

    # ------------------------------------------------------------------ lending

    @property
    def lent(self) -> bool:
        """Whether the model holds x, the averaged weights."""
        return self._lent is not None

    @torch.no_grad()
    def eval(self) -> None:
        """The model holds x from here on; a copy of y is kept for `train()`. Nothing if it does already."""
        if self._current is not None:
            raise RuntimeError("eval() between a fused backward and its step(): call step() first")
        if self._lent is not None:
            return
        self._lent = {}
        if not self.settings.use_schedulefree:
            return
        for index, (stack, place) in self._place.items():
            y = sharding.local_part(self._parameters[index])
            self._lent[index] = y.clone()
            y.copy_(average(y, stack.z[place], self.settings.betas[0]))

    @torch.no_grad()
    def train(self) -> None:
        """The model holds y again, with the bits it had. Nothing if it does already."""
        if self._lent is None:
            return
        for index, y in self._lent.items():
            sharding.local_part(self._parameters[index]).copy_(y)
        self._lent = None

    def _refuse_while_lent(self, what: str) -> None:
        if self._lent is not None:
            raise RuntimeError(
                f"{what} while the model holds the averaged weights: leave the `averaged(optimizer)` block, or call "
                "optimizer.train(), first"
            )

    # ------------------------------------------------------------------ what people see

    def metrics(self) -> list[GroupMetrics]:
        """One entry a group. Waits for the device, once."""
        return metrics_of(self.param_groups, self._buffer, self.settings)

    # ------------------------------------------------------------------ fused backward

    def _hook_parameters(self) -> None:
        me = weakref.ref(self)
        for index, p in enumerate(self._parameters):
            if index not in self._hooked and p.requires_grad:
                self._hooked[index] = p.register_post_accumulate_grad_hook(_hook_for(me, index))  # type: ignore[no-untyped-call]

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


def _hook_for(me: "weakref.ref[ProdigyPlusScheduleFree]", index: int) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def hook(_: Tensor) -> None:
        optimizer = me()
        if optimizer is not None:
            optimizer._step_parameter(index)

    return hook
