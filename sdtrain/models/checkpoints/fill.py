"""Gives networks in memory the values of tensors in files, without a second copy of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.original_names import Place
from sdtrain.files.header import FRACTIONS, Entry, Header, read_header
from sdtrain.files.tensors import DTYPES, read_tensor

MAX_NAMED = 5
"""The number of problems that are named in full; a model of another shape would have hundreds."""


@dataclass(frozen=True)
class Stored:
    """Where the value of one parameter lies: in which file, under which name and in what form."""

    header: Header
    place: Place

    @property
    def entry(self) -> Entry:
        """The tensor in the file that holds the parameter; where three are fused into one, the whole of it."""
        return self.header.entries[self.place.key]


Fill = Callable[[nn.Module, Mapping[str, "Stored"], torch.dtype], nn.Module]
"""Gives the parameters of a network on the meta device their tensors, in a type; see `fill` and `fill_with_shapes`."""


def fill(network: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype) -> nn.Module:
    """Give the parameters of a network on the meta device their values from files, in `dtype`; return the network.

    stored: where each parameter lies, by its name. Raises UserError when shapes or types do not fit.
    """
    parameters = dict(network.named_parameters())
    check_fit(parameters, stored)
    tensors = {}
    with ExitStack() as stack:
        files: dict[Path, FileIO] = {}
        for name in sorted(stored, key=lambda name: (str(stored[name].header.path), stored[name].entry.start)):
            where = stored[name]
            if where.header.path not in files:
                files[where.header.path] = stack.enter_context(where.header.path.open("rb", buffering=0))
            tensors[name] = read_parameter(files[where.header.path], where, parameters[name].shape).to(dtype)
    network.load_state_dict(tensors, strict=False, assign=True)
    return network


def read_parameter(file: FileIO, where: Stored, shape: Sequence[int]) -> Tensor:
    """Return the value of one parameter in its shape and as it is stored. file: that of `where`, open."""
    return _read(file, where).view(*shape)


def read_again(where: Stored, dtype: torch.dtype) -> Tensor:
    """Return one matrix (out, in) as `fill` read it, in `dtype`. Raises UserError when its file is not as it was."""
    path, key = where.header.path, where.place.key
    if read_header(path).entries.get(key) != where.entry:
        raise user_error(str(path), key, "is not where it was when the run began; put the model's file back")
    with path.open("rb", buffering=0) as file:
        return _read(file, where).flatten(1).to(dtype)


def _read(file: FileIO, where: Stored) -> Tensor:
    raw = read_tensor(file, where.entry, where.place.third)
    return raw.T.contiguous() if where.place.form == "transposed" else raw


def fill_with_shapes(network: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype) -> nn.Module:
    """Give the parameters of a network on the meta device tensors of their shapes, in `dtype`; return the network.

    No file is read: it is for a plan of a run, on fake tensors. Raises UserError as `fill` does.
    """
    parameters = dict(network.named_parameters())
    check_fit(parameters, stored)
    tensors = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in parameters.items()}
    network.load_state_dict(tensors, strict=False, assign=True)
    return network


def check_fit(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Stored]) -> None:
    """Raise UserError unless every parameter has a tensor of its shape and of a type that can be trained."""
    problems = []
    for name, parameter in parameters.items():
        where = stored[name]
        key = where.place.key
        if where.entry.dtype not in FRACTIONS:
            problems.append(
                Problem(key, f"is stored as {where.entry.dtype}, which cannot be trained; get fp16 or more")
            )
        elif _shape(where) != _without_ones(tuple(parameter.shape)):
            problems.append(
                Problem(key, f"has shape {list(where.entry.shape)}, but {list(parameter.shape)} is needed for {name}")
            )
    raise_first(next(iter(stored.values())).header.path, problems)


def _shape(where: Stored) -> tuple[int, ...]:
    """Return the shape of the parameter itself without trailing ones, as some files hold 1 x 1 convolutions flat."""
    shape = where.entry.shape
    if where.place.third is not None:
        shape = (shape[0] // 3, *shape[1:])
    if where.place.form == "transposed":
        shape = shape[::-1]
    return _without_ones(shape)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def raise_first(path: Path, problems: list[Problem]) -> None:
    """Raise a UserError with the first few of many problems of one kind; do nothing when there are none."""
    if not problems:
        return
    more = len(problems) - MAX_NAMED
    if more > 0:
        problems = [*problems[:MAX_NAMED], Problem("...", f"and {more} more")]
    raise UserError(str(path), problems)


def stored_dtype(stored: Iterable[Stored]) -> torch.dtype:
    """Return the type in which most of a network's bytes are stored."""
    sizes = Counter[str]()
    for where in stored:
        sizes[where.entry.dtype] += where.entry.end - where.entry.start
    return DTYPES[sizes.most_common(1)[0][0]]
