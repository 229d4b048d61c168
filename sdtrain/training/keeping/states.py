"""Training states on disk, whole or not there at all. They hold y and z; exported weights hold x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim import Piece, ProdigyPlusScheduleFree, piece_of, unflatten_state
from sdtrain.config.schema import CheckpointConfig
from sdtrain.data.order import Plan
from sdtrain.errors import UserError, user_error
from sdtrain.files.hashes import Digest, digest_of
from sdtrain.files.header import Entry, Header, read_header
from sdtrain.files.tensors import Planned, each_tensor, in_order, write_safetensors
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
from sdtrain.training.ranks.shards import put, share_of
from sdtrain.training.ranks.streams import Stream


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


class UnusableNumbersError(Exception):
    """Numbers of a state are not finite, so that nothing could go on from it; the text says which."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of a state: of every tensor what is on this process, in the memory of the training or in a copy.

    pieces: by file and name, in the order in which they are written. metadata: the text beside those of the optimizer.
    """

    pieces: Mapping[str, Mapping[str, Piece]]
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """How much they are, put together."""
        return sum(piece.num_bytes for pieces in self.pieces.values() for piece in pieces.values())

    def require_finite(self) -> None:
        """Raise UnusableNumbersError where one that is here is not finite: nothing could go on from such a state."""
        if broken := _not_finite({name: piece.part for one in self.pieces.values() for name, piece in one.items()}):
            raise UnusableNumbersError(broken)

    def copied(self) -> Numbers:
        """Return copies on the CPU of the whole tensors. Where they are split, the other processes must `send` them."""
        copies: dict[str, dict[str, Piece]] = {}
        with self.handed_out() as files:
            for file, plans in files.items():
                tensors = {name: plan.values().to("cpu", copy=True) for name, plan in plans.items()}
                copies[file] = {name: Piece(tensor, tensor.shape) for name, tensor in tensors.items()}
        return Numbers(copies, self.metadata)

    @contextmanager
    def handed_out(self) -> Iterator[dict[str, dict[str, Planned]]]:
        """Give the tensors by file and name as those of files that will be written, one after the other.

        Where they are split over processes, the others must `send` them meanwhile. Those which the block did not ask
        for are put together at its end, whether it failed or not, so that nobody waits for them.
        """
        with Stream(self._in_a_row()) as stream:
            yield {
                file: {
                    name: Planned(piece.part.dtype, tuple(piece.shape), partial(stream.take, f"{file}/{name}"))
                    for name, piece in pieces.items()
                }
                for file, pieces in self.pieces.items()
            }

    def send(self) -> None:
        """Give what is here to the first process, which has them handed out."""
        Stream(self._in_a_row()).run_dry()

    def _in_a_row(self) -> dict[str, Piece]:
        return {f"{file}/{name}": piece for file, pieces in self.pieces.items() for name, piece in pieces.items()}


def numbers_of(trainable: Trainable, optimizer: ProdigyPlusScheduleFree) -> Numbers:
    """Return the numbers of a state as they are now, in the memory of the training."""
    named = {name: piece_of(parameter) for name, parameter in trainable.named_parameters().items()}
    state, metadata = optimizer.pieces()
    files = {PARAMETERS: named, OPTIMIZER: state}
    return Numbers({file: _as_written(pieces) for file, pieces in files.items()}, metadata)


def _as_written(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    return {name: pieces[name] for name in in_order({name: piece.part.dtype for name, piece in pieces.items()})}


def save_state(
    folder: Path,
    step: int,
    numbers: Numbers,
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
    Raises UserError when it cannot be written, for example because the disk is full.
    """
    target = folder / f"step-{step:06d}"
    with numbers.handed_out() as tensors, atomic_folder(target, numbers.num_bytes + len(background.pictures)) as partly:
        metadata = {OPTIMIZER: numbers.metadata}
        files = {name: _write_tensors(partly / name, plans, metadata.get(name, {})) for name, plans in tensors.items()}
        texts = {CONFIG: background.config_toml, PICTURES: background.pictures}
        files |= {name: _write_text(partly / name, text) for name, text in texts.items()}
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
        write_text(partly / INDEX, index_text(index))
    if not keep_all:
        remove_superfluous(folder, step, settings)
    return target


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return which numbers are not finite, "" where all are. The tensors lie on one device: it waits once.

    A number that is not finite makes the sum so, which is quicker to find; a sum may also have overflowed.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    sums = torch.stack([tensor.sum().float() for tensor in floats.values()]).isfinite().tolist()
    suspect = [name for name, is_finite in zip(floats, sums, strict=True) if not is_finite]
    broken = [name for name in suspect if not bool(floats[name].isfinite().all())]
    return f"{len(broken)} of {len(floats)} tensors are not finite, for example {broken[0]}" if broken else ""


def _write_tensors(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> dict[str, Any]:
    digest = Digest()
    write_safetensors(path, tensors, metadata, digest=digest)
    return {"bytes": digest.num_bytes, "digest": digest.text()}


def _write_text(path: Path, text: str) -> dict[str, Any]:
    write_text(path, text)
    content = text.encode("utf-8")
    return {"bytes": len(content), "digest": digest_of(content)}


def load_state(
    state: SavedState, trainable: Trainable, optimizer: ProdigyPlusScheduleFree, *, own_d_coef: bool = True
) -> int:
    """Put a saved state back, bit for bit; return its step.

    own_d_coef: whether the optimizer keeps the d_coef it has, which may have been changed since; else it takes the
    smaller one. Weights that are trained in another precision now are rounded to it. Raises UserError, before anything
    is changed, if the state is damaged or of another run.
    """
    wanted = trainable.named_parameters()
    files = {name: _header(state.folder / name) for name in (PARAMETERS, OPTIMIZER)}
    _require_same_names(state.folder, files[PARAMETERS].entries, wanted)
    parameters = _read(files[PARAMETERS], lambda name, whole: share_of(wanted[name], whole))
    tensors = _read(files[OPTIMIZER], optimizer.part_of)
    try:
        if broken := _not_finite(parameters) or _not_finite(tensors):
            raise ValueError(broken)
        content = unflatten_state(tensors, files[OPTIMIZER].metadata)
        _round_to(content["state"], list(wanted.values()))
        chosen = [group["d_coef"] for group in optimizer.param_groups]
        optimizer.load_state_dict(content)
    except ValueError as error:
        raise user_error(str(state.folder), "training state", f"cannot be used: {error}; {_OTHERWISE}") from None
    for group, d_coef in zip(optimizer.param_groups, chosen, strict=True):
        group["d_coef"] = d_coef if own_d_coef else min(d_coef, group["d_coef"])
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


def _header(path: Path) -> Header:
    with _damage_told(path):
        return read_header(path)


def _read(header: Header, share: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a file, of each only what this process needs. Raises UserError where that cannot be done."""
    with _damage_told(header.path):
        return {name: share(name, tensor) for name, tensor in each_tensor(header)}


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        found = "; ".join(f"{problem.where} {problem.what}" for problem in error.problems)
        raise user_error(str(path), "training state", f"cannot be read ({found}); {_OTHERWISE}") from None


def _require_same_names(folder: Path, found: Mapping[str, Entry], wanted: Mapping[str, nn.Parameter]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    wrong = [name for name in wanted if name in found and found[name].shape != tuple(wanted[name].shape)]
    if missing or extra or wrong:
        example = (missing or extra or wrong)[0]
        raise user_error(
            str(folder),
            "parameters",
            f"are those of another model or method: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape, for example {example}",
        )
