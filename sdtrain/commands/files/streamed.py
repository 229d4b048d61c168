"""A checkpoint with changes added to its weights, one tensor at a time: never more than one of them is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from itertools import count

import torch
from torch import Tensor, nn

from sdtrain.adapters.kinds import Adapters, AdapterWeights, bias_delta, delta
from sdtrain.adapters.shares import Share
from sdtrain.errors import user_error
from sdtrain.families.words import Component
from sdtrain.files.header import Entry, Header
from sdtrain.files.progress import Progress
from sdtrain.files.tensors import DTYPES, Planned, read_tensor
from sdtrain.models.checkpoints.fill import Stored, read_parameter
from sdtrain.models.checkpoints.networks import Outline
from sdtrain.models.checkpoints.single_file import Change, original_form


@dataclass(frozen=True)
class Adding:
    """The changes of several adapter files, each with its weights, as one.

    terms: in an order that does not depend on that in which the files were named, so that neither does the sum.
    done: is called after each layer.
    """

    terms: Sequence[tuple[Adapters, Share]]
    done: Callable[[], None] = lambda: None

    def shown(self, show: Progress) -> Adding:
        """Return the same, which shows how many of its layers are done."""
        numbers, total = count(1), len(self.layers())
        return replace(self, done=lambda: show("layers", next(numbers), total))

    def touches(self, component: str, module: str) -> bool:
        """Return whether a layer is changed: a weight of 0 leaves it as it is, bit for bit."""
        return any(module in one.get(component, {}) and share.of(component, module) for one, share in self.terms)

    def layers(self) -> set[tuple[str, str]]:
        """Return (component, module) of all layers that are changed."""
        named = {(component, module) for one, _ in self.terms for component in one for module in one[component]}
        return {layer for layer in named if self.touches(*layer)}

    def parameters(self) -> list[tuple[str, str, str]]:
        """Return (component, module, `weight` or `bias`) of all that is changed."""
        return [
            (component, module, leaf)
            for component, module in sorted(self.layers())
            for leaf in ("weight", "bias")
            if self.changes(component, module, leaf)
        ]

    def changes(self, component: str, module: str, leaf: str) -> bool:
        """Return whether a parameter of a layer is changed."""
        if leaf == "weight":
            return self.touches(component, module)
        return leaf == "bias" and any(bias_delta(weights) is not None for weights, _ in self._of(component, module))

    @torch.no_grad()
    def added(self, component: str, module: str, leaf: str, value: Tensor) -> Tensor:
        """Return a layer's weight or bias with all changes of it, rounded to nothing narrower than float32.

        Each is computed from the value as it was.
        """
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        total = torch.zeros_like(wide)
        for weights, times in self._of(component, module):
            change = delta(weights, wide) if leaf == "weight" else bias_delta(weights)
            if change is not None:
                total += times * change
        if leaf == "weight":
            self.done()
        return wide + total

    def _of(self, component: str, module: str) -> list[tuple[AdapterWeights, float]]:
        """Return the changes of a layer and how often each counts."""
        return [
            (one[component][module], times)
            for one, share in self.terms
            if module in one.get(component, {}) and (times := share.of(component, module))
        ]


def changed_file(header: Header, outlines: Mapping[str, Outline], adding: Adding) -> dict[str, Planned]:
    """Return all tensors of a single file as they will be written: those that nothing changes byte for byte."""
    touched: dict[str, list[tuple[tuple[str, str, str], Stored, tuple[int, ...]]]] = {}
    for component, module, leaf in adding.parameters():
        outline = outlines[component]
        name = f"{module}.{leaf}"
        stored, shape = outline.stored[name], tuple(outline.network.get_parameter(name).shape)
        touched.setdefault(stored.place.key, []).append(((component, module, leaf), stored, shape))

    def planned(key: str, entry: Entry) -> Planned:
        def values() -> Tensor:
            with _opened(header) as file:
                tensor = read_tensor(file, entry)
                if key not in touched:
                    return tensor
                wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                for parameter, stored, shape in touched[key]:
                    part = adding.added(*parameter, read_parameter(file, stored, shape))
                    _place(wide, part, stored)
                return wide

        return Planned(DTYPES[entry.dtype], entry.shape, values)

    return {key: planned(key, entry) for key, entry in header.entries.items()}


def _place(whole: Tensor, part: Tensor, stored: Stored) -> None:
    """Put the value of a parameter where it lies in the tensor of the file."""
    third, rows = stored.place.third, whole.shape[0] // 3
    target = whole if third is None else whole[third * rows : (third + 1) * rows]
    target.copy_(original_form(part, stored.place).reshape(target.shape))


def changing(sources: Mapping[str, Mapping[str, Stored]], adding: Adding) -> Change:
    """Return a change that reads each parameter when it is its turn, for networks whose values were not loaded.

    sources: where the parameters of each network lie.
    """

    def change(component: Component, name: str, parameter: Tensor) -> Tensor:
        value = stored_value(sources[component][name], parameter)
        module, _, leaf = name.rpartition(".")
        return adding.added(component, module, leaf, value) if adding.changes(component, module, leaf) else value

    return change


def stored_value(stored: Stored, parameter: Tensor) -> Tensor:
    """Return the value of a parameter, of which only the shape is known, as its file has it."""
    with _opened(stored.header) as file:
        return read_parameter(file, stored, parameter.shape)


def entry_value(header: Header, entry: Entry) -> Tensor:
    """Return a tensor of a file as it is stored."""
    with _opened(header) as file:
        return read_tensor(file, entry)


@dataclass
class Sources:
    """Notes where the parameters of networks lie, in the place of `fill`, which reads them."""

    found: dict[int, Mapping[str, Stored]]

    def note(self, network: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype) -> nn.Module:
        """Note the sources of a network, which stays without values."""
        self.found[id(network)] = stored
        return network

    def of(self, networks: Mapping[Component, nn.Module]) -> dict[str, Mapping[str, Stored]]:
        """Return the sources of networks by their names."""
        return {component: self.found[id(network)] for component, network in networks.items()}


@contextmanager
def _opened(header: Header) -> Iterator[FileIO]:
    try:
        file = header.path.open("rb", buffering=0)
    except OSError as error:
        raise user_error(str(header.path), header.path.name, f"cannot be read: {error.strerror}") from None
    with file:
        yield file
