"""State in and out: exact, checked, and as plain tensors and text for safetensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from optim.formulas.freezing import CLIMB_PATIENCE, FROZEN_WHILE_IT_CLIMBED
from optim.formulas.numbers import Numbers
from optim.groups import group_ranges
from optim.ranks import gathering
from optim.ranks.gathering import Piece
from optim.state import State
from optim.steps.stacks import Kind, Stack

VERSION = 1
MUST_MATCH = ("betas", "factored", "factored_fp32", "split_groups", "use_schedulefree", "use_speed")
"""Settings that give a state its meaning: they must be the same when it is loaded."""
ROWS_BEFORE_WEIGHTS = 11
"""Numbers per group in the states of before weights were held back while d climbs."""
ROWS_BEFORE_SQUARES = 16
"""Numbers per group in the states of before the gradients' squares were noted."""
NUMBERS = "numbers"
"""The name of the tensor that belongs to no parameter."""


Groups = list[dict[str, Any]]


def pack(kept: State, groups: Groups) -> dict[str, Any]:
    """The state as tensors by parameter, and everything else a run needs: see `ProdigyPlusScheduleFree.state_dict`."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, (stack, slot) in sorted(kept.slots.items()):
        state[index] = stack.state_of(slot)
        if kept.set_aside is not None and index in kept.set_aside:
            state[index]["y"] = kept.set_aside[index]
    saved_groups = []
    for group, (start, stop) in zip(groups, group_ranges(groups), strict=True):
        saved_groups.append(
            {**{key: value for key, value in group.items() if key != "params"}, "params": list(range(start, stop))}
        )
    chosen = asdict(kept.settings)
    settings = {key: list(value) if isinstance(value := chosen[key], tuple) else value for key in MUST_MATCH}
    return {
        "state": state,
        "param_groups": saved_groups,
        "version": VERSION,
        "settings": settings,
        "numbers": kept.numbers.clone(),
        "steps": kept.steps,
        "seed": kept.seed,
        "lent": kept.set_aside is not None,
    }


def pack_whole(kept: State, groups: Groups, *, keep: bool) -> dict[str, Any] | None:
    """The same of whole parameters, from all ranks: see `ProdigyPlusScheduleFree.whole_state_dict`."""
    found, metadata = pieces(kept, groups)
    whole: dict[str, Tensor] = {}
    for turn in gathering.in_turn(found.items()):
        tensors = gathering.put_together(turn)
        if keep:
            whole |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    return unflatten_state(whole, metadata) if keep else None


def pieces(kept: State, groups: Groups) -> tuple[dict[str, Piece], dict[str, str]]:
    """What is here of the tensors of a state, and its text: see `ProdigyPlusScheduleFree.pieces`."""
    mine = pack(kept, groups)
    tensors, metadata = _flat(mine)
    found = {NUMBERS: Piece(tensors.pop(NUMBERS), mine["numbers"].shape)}
    for name, part in tensors.items():
        index, field = _place_of(name)
        found[name] = gathering.piece_of_state(field, part, kept.slots[index][0].kind)
    return found, metadata


def part_of(kept: State, name: str, whole: Tensor) -> Tensor:
    """What this rank needs of a tensor of a state: see `ProdigyPlusScheduleFree.part_of`."""
    if name == NUMBERS:
        return whole
    index, field = _place_of(name)
    if not 0 <= index < len(kept.parameters):
        return whole
    kind = kept.kind(index, starts_at_zero=False)
    return whole if kind.split is None else gathering.part_here(field, whole, kind).clone()


def _parts_here(kept: State, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """This rank's parts of a state of whole parameters; what is a part already stays as it is."""
    parts = {}
    for index, tensors in state.items():
        parts[index] = dict(tensors)
        kind = kept.kind(index, starts_at_zero="p0" not in tensors)
        if "z" in tensors and tensors["z"].shape == kind.whole:
            parts[index] = {name: gathering.part_here(name, value, kind) for name, value in tensors.items()}
    return parts


def unpack(kept: State, groups: Groups, saved: Mapping[str, Any]) -> None:
    """Takes a saved state over, or refuses it and changes nothing.

    Raises:
        ValueError: the state does not belong to this optimizer; everything that does not fit is named.
    """
    if problems := _problems(kept, groups, saved):
        raise ValueError("this state does not belong to this optimizer: " + "; ".join(problems))
    state = _parts_here(kept, saved["state"])
    built = _build_stacks(kept, state)
    for group, old in zip(groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})
    numbers = _completed(saved["numbers"].to(kept.numbers, copy=True), groups)
    set_aside = None
    if saved["lent"]:
        set_aside = {index: s["y"].to(kept.aside_on(numbers), copy=True) for index, s in state.items() if "y" in s}
    kept.replace(built, numbers=numbers, steps=saved["steps"], seed=saved["seed"], set_aside=set_aside)


def _problems(kept: State, groups: Groups, saved: Mapping[str, Any]) -> list[str]:
    """Everything that does not fit, with what was found and what was expected."""
    mine = pack(kept, groups)
    if missing := sorted(set(mine) - set(saved)):
        return [f"it lacks {', '.join(missing)} (is it another optimizer's?)"]
    if saved["version"] != VERSION:
        return [f"version {saved['version']} of the state, this is version {VERSION}"]
    problems = []
    for key, value in mine["settings"].items():
        if saved["settings"].get(key) != value:
            problems.append(f"{key} was {saved['settings'].get(key)!r}, is {value!r}")
    for key, value in saved["settings"].items():  # older versions had more of them, almost always off
        if key not in mine["settings"] and value:
            problems.append(f"{key} was {value!r}, which this version does not have")
    old, new = saved["param_groups"], mine["param_groups"]
    if len(old) != len(new):
        return [*problems, f"it has {len(old)} groups, the optimizer {len(new)}"]
    for index, (before, now) in enumerate(zip(old, new, strict=True)):
        if before["name"] != now["name"]:
            problems.append(f"group {index} was {before['name']!r}, is {now['name']!r}")
        if len(before["params"]) != len(now["params"]):
            problems.append(f"group {now['name']!r} had {len(before['params'])} parameters, has {len(now['params'])}")
    known = [mine["numbers"].shape, *((rows, len(new)) for rows in (ROWS_BEFORE_WEIGHTS, ROWS_BEFORE_SQUARES))]
    if saved["numbers"].shape not in known:
        problems.append(f"numbers of shape {tuple(saved['numbers'].shape)}, expected {tuple(mine['numbers'].shape)}")
    for index, tensors in saved["state"].items():
        if not 0 <= index < len(kept.parameters):
            problems.append(f"state of a parameter {index}, there are {len(kept.parameters)}")
            continue
        kind = kept.kind(index, starts_at_zero="p0" not in tensors)
        for name in ("z", "y"):
            if (name == "z" or saved["lent"]) and name in tensors:
                shape = tensors[name].shape
                if shape not in (kind.shape, kind.whole):
                    part = "" if kind.split is None else f", of which {tuple(kind.shape)} is here"
                    problems.append(f"parameter {index} had shape {tuple(shape)}, has {tuple(kind.whole)}{part}")
    return problems


def _completed(numbers: Tensor, groups: Groups) -> Tensor:
    """The numbers of an older state, with the rows that came since.

    One of before weights were held back while d climbs counted the weight in W and d_coef in d, and did not say whether
    d was at rest when it was fixed.
    """
    if numbers.shape[0] == len(Numbers._fields):
        return numbers
    whole = torch.cat([Numbers.start(1.0, numbers.device) for _ in groups], dim=1)
    whole[: numbers.shape[0]] = numbers
    now = Numbers.of(whole)
    now.left_zero.fill_(1.0)  # a run that has got so far has moved
    if numbers.shape[0] > ROWS_BEFORE_WEIGHTS:
        return whole
    lr, d0, d_coef = (torch.tensor([float(group[key]) for group in groups]).to(whole) for key in ("lr", "d0", "d_coef"))
    now.weight_sum.div_(torch.where(lr > 0, lr**2, 1.0))
    now.applied_lr.copy_(lr)
    now.d.copy_(torch.maximum(now.d / d_coef, d0))
    for estimate in (now.mark_d, now.climb_d, now.pace):
        estimate.copy_(now.d)
    now.climb_k.copy_(now.k - CLIMB_PATIENCE)
    now.frozen.mul_(FROZEN_WHILE_IT_CLIMBED)
    return whole


def _build_stacks(kept: State, state: Mapping[int, Mapping[str, Tensor]]) -> list[Stack]:
    """Stacks with the saved tensors in them; shapes and dtypes are those a fresh start would give."""
    kinds: dict[tuple[Kind, bool], list[int]] = {}
    for index, tensors in sorted(state.items()):
        estimating = "s" in tensors or "norms" in tensors
        kinds.setdefault((kept.kind(index, starts_at_zero="p0" not in tensors), estimating), []).append(index)
    built = []
    for (kind, estimating), indices in kinds.items():
        stack = kept.build(kind, indices)
        if not estimating:
            stack.free_prodigy_state()
        for name, target in stack.tensors().items():
            for slot, index in enumerate(indices):
                source = state[index].get(name)
                if source is None or source.shape != target[slot].shape or source.dtype != target.dtype:
                    was = "nothing" if source is None else f"{tuple(source.shape)} {source.dtype}"
                    raise ValueError(
                        f"this state does not belong to this optimizer: {name!r} of parameter {index} is {was}, "
                        f"must be {tuple(target[slot].shape)} {target.dtype}"
                    )
                target[slot].copy_(source)
        built.append(stack)
    return built


def flatten_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A `state_dict()` as tensors by name and text by name, which is what a safetensors file holds.

    Tensors are copies on the CPU, each with memory of its own. `unflatten_state` is the exact inverse.
    """
    tensors, metadata = _flat(state_dict)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}, metadata


def _flat(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {NUMBERS: state_dict["numbers"]}
    for index, state in state_dict["state"].items():
        tensors |= {f"state.{index}.{name}": value for name, value in state.items()}
    plain = {key: value for key, value in state_dict.items() if key not in ("state", "numbers")}
    return tensors, {"prodigy_plus_schedule_free": json.dumps(plain)}


def _place_of(name: str) -> tuple[int, str]:
    """The parameter of a tensor of state by its name, and which of its tensors it is."""
    _, index, field = name.split(".")
    return int(index), field


def unflatten_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The `state_dict()` that `flatten_state` was given.

    Raises:
        ValueError: the metadata are not those of such a state.
    """
    text = metadata.get("prodigy_plus_schedule_free")
    if text is None:
        raise ValueError(
            f"no state of this optimizer: metadata has {sorted(metadata)}, not 'prodigy_plus_schedule_free'"
        )
    result: dict[str, Any] = json.loads(text)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name == NUMBERS:
            result["numbers"] = value
            continue
        index, field = _place_of(name)
        state.setdefault(index, {})[field] = value
    return {"state": dict(sorted(state.items())), **result}
