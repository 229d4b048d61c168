"""Training states on disk, whole or not there at all. They hold y and z; exported weights hold x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, flatten_state, unflatten_state
from sdtrain.config.schema import CheckpointConfig
from sdtrain.data.order import Plan
from sdtrain.errors import UserError, user_error
from sdtrain.files.hashes import Digest, digest_of
from sdtrain.files.header import read_header
from sdtrain.files.tensors import Planned, planned, read_tensors, write_safetensors
from sdtrain.files.writer import atomic_folder, write_text
from sdtrain.training.keeping.manifest import (
    CONFIG,
    INDEX,
    OPTIMIZER,
    PARAMETERS,
    PICTURES,
    VERSION,
    SavedState,
    index_text,
)
from sdtrain.training.keeping.policy import remove_superfluous
from sdtrain.training.parameters import Trainable
from sdtrain.training.ranks.shards import put, whole_tensors


@dataclass(frozen=True)
class Background:
    """What a state says of its run beside numbers: what it was trained with, and on what.

    config_toml: the run's settings. pictures: the text of the register of its pictures. plan: how these are dealt out.
    base: the digest of the model.
    """

    config_toml: str
    pictures: str
    plan: Plan
    base: str


@dataclass(frozen=True)
class Whole:
    """The numbers of a state. parameters: by name. optimizer: what its `state_dict` returns."""

    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]


def whole_of(trainable: Trainable, optimizer: ProdigyPlusScheduleFree, *, is_sharded: bool, keep: bool) -> Whole | None:
    """Return the numbers of a state, where `keep`.

    is_sharded: whether they are split over processes, all of which put them together.
    """
    named = {name: value.detach() for name, value in trainable.named_parameters().items()}
    if not is_sharded:
        return Whole(named, optimizer.state_dict()) if keep else None
    parameters, state = whole_tensors(named, keep=keep), optimizer.whole_state_dict(keep=keep)
    return None if state is None else Whole(parameters, state)


class UnusableNumbersError(Exception):
    """Numbers of a state are not finite, so that nothing could go on from it; the text says which."""


def save_state(
    folder: Path,
    step: int,
    whole: Whole,
    background: Background,
    settings: CheckpointConfig,
    *,
    loss_is_finite: bool = True,
    loss_scale: tuple[float, int] | None = None,
    keep_all: bool = False,
) -> Path:
    """Write the state after `step` steps under `folder`, then remove those that need not stay; return its folder.

    It is written under a temporary name and renamed when it is complete, so that a kill at any moment leaves whole
    states only. A state of that step that is there already is replaced: it may only look whole. loss_is_finite: whether
    the last step had a finite loss; if not, the state removes no other. loss_scale: see `LossScale.state`. keep_all:
    whether none is removed anyway.
    Raises UserError when it cannot be written, for example because the disk is full, and UnusableNumbersError, before
    anything is written, when there is no use in it.
    """
    target = folder / f"step-{step:06d}"
    state, metadata = flatten_state(whole.optimizer)
    _require_finite(whole.parameters, state)
    tensors = {PARAMETERS: (planned(whole.parameters), {}), OPTIMIZER: (planned(state), metadata)}
    num_bytes = sum(tensor.num_bytes for plans, _ in tensors.values() for tensor in plans.values())
    with atomic_folder(target, num_bytes + len(background.pictures)) as partial:
        files = {name: _write_tensors(partial / name, *content) for name, content in tensors.items()}
        texts = {CONFIG: background.config_toml, PICTURES: background.pictures}
        files |= {name: _write_text(partial / name, text) for name, text in texts.items()}
        index = {
            "version": VERSION,
            "step": step,
            "loss_was_finite": loss_is_finite,
            "batch_size": background.plan.batch_size,
            "accumulation": background.plan.accumulation,
            "base": background.base,
            "files": files,
            **({} if loss_scale is None else {"loss_scale": list(loss_scale)}),
        }
        write_text(partial / INDEX, index_text(index))
    if not keep_all:
        remove_superfluous(folder, step, settings)
    return target


def _require_finite(*parts: Mapping[str, Tensor]) -> None:
    """Raise UnusableNumbersError unless all numbers are finite. The tensors of a part lie on one device: it waits once.

    A number that is not finite makes the sum so, which is quicker to find; a sum may also have overflowed.
    """
    broken, num = [], 0
    for tensors in parts:
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        sums = torch.stack([tensor.sum().float() for tensor in floats.values()]).isfinite().tolist()
        suspect = [name for name, is_finite in zip(floats, sums, strict=True) if not is_finite]
        broken += [name for name in suspect if not bool(floats[name].isfinite().all())]
        num += len(floats)
    if broken:
        raise UnusableNumbersError(f"{len(broken)} of {num} tensors are not finite, for example {broken[0]}")


def _write_tensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> dict[str, Any]:
    digest = Digest()
    write_safetensors(path, tensors, metadata, digest=digest)
    return {"bytes": digest.num_bytes, "digest": digest.text()}


def _write_text(path: Path, text: str) -> dict[str, Any]:
    write_text(path, text)
    content = text.encode("utf-8")
    return {"bytes": len(content), "digest": digest_of(content)}


def load_state(state: SavedState, trainable: Trainable, optimizer: ProdigyPlusScheduleFree) -> int:
    """Put a saved state back, bit for bit; return its step.

    The optimizer keeps its own d_coef, which may have been changed since; weights that are trained in another precision
    now are rounded to it. Raises UserError, before anything is changed, if the state is damaged or of another run.
    """
    parameters, _ = _read(state.folder / PARAMETERS)
    wanted = trainable.named_parameters()
    _require_same_names(state.folder, parameters, wanted)
    tensors, metadata = _read(state.folder / OPTIMIZER)
    try:
        _require_finite(parameters, tensors)
        content = unflatten_state(tensors, metadata)
        _round_to(content["state"], list(wanted.values()))
        chosen = [group["d_coef"] for group in optimizer.param_groups]
        optimizer.load_state_dict(content)
    except (ValueError, UnusableNumbersError) as error:
        raise user_error(str(state.folder), "training state", f"cannot be used: {error}; {_OTHERWISE}") from None
    for group, d_coef in zip(optimizer.param_groups, chosen, strict=True):
        group["d_coef"] = d_coef
    for name, parameter in wanted.items():
        put(parameter, parameters[name])
    return state.step


_OTHERWISE = "move its folder away to go on from the one before"


def _round_to(state: Mapping[int, dict[str, Tensor]], parameters: list[nn.Parameter]) -> None:
    """Give the tensors that have their parameter's precision the one it has now; the state itself is changed."""
    for index, tensors in state.items():
        for name in ("z", "y"):
            if name in tensors and index < len(parameters):
                tensors[name] = tensors[name].to(parameters[index].dtype)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        header = read_header(path)
        return read_tensors(header), header.metadata
    except UserError as error:
        found = "; ".join(f"{problem.where} {problem.what}" for problem in error.problems)
        raise user_error(str(path), "training state", f"cannot be read ({found}); {_OTHERWISE}") from None


def _require_same_names(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or extra or wrong:
        example = (missing or extra or wrong)[0]
        raise user_error(
            str(folder),
            "parameters",
            f"are those of another model or method: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape, for example {example}",
        )
