"""`sdtrain compare A B` on two weight files: which layers each has, their ranks, how far apart they are by block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtrain.adapters.formats.describe import FileDescription, describe_file
from sdtrain.adapters.formats.lora_file import LoraFile, read_lora
from sdtrain.adapters.kinds import AdapterWeights, DoraWeights, OftWeights, bias_delta, delta
from sdtrain.adapters.shares import block_of
from sdtrain.commands.files.streamed import entry_value, stored_value
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.files.locations import location
from sdtrain.models.checkpoints.fill import Stored
from sdtrain.models.checkpoints.locate import Checkpoint, SingleFile, fallback_folder, locate, open_checkpoint
from sdtrain.models.checkpoints.networks import Outline, trainable_outlines

MOST_NAMED = 3
"""How many of the layers that only one file has are named."""


@dataclass
class Distance:
    """How far apart two files are in one block: sums of squares over its layers, Frobenius."""

    layers: int = 0
    differing: int = 0
    squared_first: float = 0.0
    squared_difference: float = 0.0

    @property
    def share(self) -> float:
        """|A - B| / |A|; |A - B| itself where A is nothing."""
        return math.sqrt(self.squared_difference / (self.squared_first or 1.0))

    def add(self, first: Tensor, second: Tensor) -> None:
        """Count a layer."""
        self.layers += 1
        difference = float((first.double() - second.double()).square().sum())
        self.differing += difference > 0
        self.squared_difference += difference
        self.squared_first += float(first.double().square().sum())


@dataclass
class Difference:
    """What tells two files apart. only: what one of them has alone. notes: what they say of themselves differently."""

    blocks: dict[str, Distance] = field(default_factory=dict)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def block(self, name: str) -> Distance:
        """Return the distance of a block, which is begun where it is not there yet."""
        return self.blocks.setdefault(name, Distance())


def compare_files(first: Path, second: Path, base: str = "", components: str = "") -> dict[str, str]:
    """Return what tells two weight files apart by what it is. Raises UserError.

    base: a model that two LoRAs fit: for the names of its layers, and its weights where DoRA or OFT need them.
    """
    told = [describe_file(path) for path in (first, second)]
    kinds = [bool(one.kind) for one in told]
    if kinds[0] != kinds[1]:
        lora, model = (first, second) if kinds[0] else (second, first)
        what = f"holds adapters, {model.name} a whole model; compare two of a kind, or merge the LoRA before"
        raise user_error("compare", lora.name, what)
    if kinds[0]:
        if not base:
            what = "is missing: name a model that both LoRAs fit, for what their layers are"
            raise user_error("compare", "--base", what)
        found = lora_difference(first, second, base, components)
    else:
        found = model_difference(first, second, components)
    found.notes = _notes(*told)
    return _rows(first, second, found)


def lora_difference(first: Path, second: Path, base: str, components: str = "") -> Difference:
    """Return how far apart the changes of two LoRA files are, whatever their kinds, names and ranks."""
    outlines = trainable_outlines(open_checkpoint(locate(base, ""), ""), fallback_folder(components))
    networks = {name: outline.network for name, outline in outlines.items()}
    one, other = _both(first, second, networks)
    layers = [{(name, module) for name in file.adapters for module in file.adapters[name]} for file in (one, other)]
    found = Difference(
        only_first=sorted(".".join(layer) for layer in layers[0] - layers[1]),
        only_second=sorted(".".join(layer) for layer in layers[1] - layers[0]),
    )
    for component, module in sorted(layers[0] | layers[1]):
        pair = [file.adapters.get(component, {}).get(module) for file in (one, other)]
        changes = _changes(pair, outlines[component], module)
        found.block(_name_of(component, module)).add(*changes)
    return found


def _both(first: Path, second: Path, networks: Mapping[str, nn.Module]) -> tuple[LoraFile, LoraFile]:
    read, problems = [], list[Problem]()
    for path in (first, second):
        try:
            read.append(read_lora(path, networks))
        except UserError as error:
            problems += [Problem(f"{path.name}: {problem.where}", problem.what) for problem in error.problems]
    if problems:
        raise UserError("compare", problems)
    return read[0], read[1]


def _changes(pair: list[AdapterWeights | None], outline: Outline, module: str) -> tuple[Tensor, Tensor]:
    """Return the change of a layer in both files, of its weight and its bias in one row; zero where one has none."""
    name = f"{module}.weight"
    weight: Tensor = outline.network.get_parameter(name)
    if any(isinstance(weights, DoraWeights | OftWeights) for weights in pair):
        weight = stored_value(outline.stored[name], weight)
    first, second = (_row(one, weight) for one in pair)
    return first, second


def _row(weights: AdapterWeights | None, base: Tensor) -> Tensor:
    bias = None if weights is None else bias_delta(weights)
    change = torch.zeros(base.numel()) if weights is None else delta(weights, base).flatten()
    return torch.cat([change, torch.zeros(base.shape[0]) if bias is None else bias])


def _name_of(component: str, module: str) -> str:
    block = block_of(component, module)
    return block if block == component else f"{component} {block}"


def model_difference(first: Path, second: Path, components: str = "") -> Difference:
    """Return how far apart the weights of two single files of one family are, layer by layer from disk."""
    opened = [open_checkpoint(location(str(path)), "") for path in (first, second)]
    if opened[0].family.name != opened[1].family.name:
        titles = [one.family.title for one in opened]
        raise user_error("compare", second.name, f"is of {titles[1]}, {first.name} of {titles[0]}; compare two of one")
    fallback = fallback_folder(components)
    outlines = [trainable_outlines(one, fallback) for one in opened]
    found = Difference()
    places = [{(name, key) for name in one for key in one[name].stored} for one in outlines]
    found.only_first = sorted(".".join(place) for place in places[0] - places[1])
    found.only_second = sorted(".".join(place) for place in places[1] - places[0])
    for component, name in sorted(places[0] & places[1]):
        one, other = (_value(outline[component], name) for outline in outlines)
        if one.shape == other.shape:
            found.block(_name_of(component, name)).add(one, other)
        else:
            found.only_first.append(f"{component}.{name} of shape {tuple(one.shape)}")
            found.only_second.append(f"{component}.{name} of shape {tuple(other.shape)}")
    _compare_rest(found, opened, outlines)
    return found


def _compare_rest(found: Difference, opened: Sequence[Checkpoint], outlines: Sequence[Mapping[str, Outline]]) -> None:
    """Compare the tensors that belong to no network that can be trained: the VAE's, and what else a file has."""
    headers = [one.header for one in opened if isinstance(one, SingleFile)]
    known = [{stored.place.key for part in one.values() for stored in part.stored.values()} for one in outlines]
    rest = [header.entries.keys() - keys for header, keys in zip(headers, known, strict=True)]
    found.only_first += sorted(rest[0] - rest[1])
    found.only_second += sorted(rest[1] - rest[0])
    for key in sorted(rest[0] & rest[1]):
        one, other = (entry_value(header, header.entries[key]) for header in headers)
        name = "vae" if key.startswith(opened[0].family.vae_prefix) else "other tensors"
        if one.shape == other.shape:
            found.block(name).add(one, other)
        else:
            found.only_first.append(f"{key} of shape {tuple(one.shape)}")
            found.only_second.append(f"{key} of shape {tuple(other.shape)}")


def _value(outline: Outline, name: str) -> Tensor:
    stored: Stored = outline.stored[name]
    return stored_value(stored, outline.network.get_parameter(name))


def _notes(first: FileDescription, second: FileDescription) -> dict[str, str]:
    """Return what the files say of themselves and say differently."""
    sides = [
        {
            "kind": f"{one.kind} in {one.names} names" if one.kind else "model",
            "ranks": _counted(one.ranks),
            "alphas": _counted(one.alphas),
            "stored as": ", ".join(one.dtypes),
            "title": one.title,
            "base": one.base_model,
            "steps": str(one.steps or ""),
            "hash": one.metadata.get("modelspec.hash_sha256", ""),
        }
        for one in (first, second)
    ]
    return {
        key: f"{sides[0][key] or 'not said'} | {sides[1][key] or 'not said'}"
        for key in sides[0]
        if sides[0][key] != sides[1][key]
    }


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    most = Counter({f"{value:g}": layers for value, layers in values.items()}).most_common(MOST_NAMED)
    told = ", ".join(f"{value} ({layers} layers)" for value, layers in most)
    return told + (", ..." if len(values) > MOST_NAMED else "")


def _rows(first: Path, second: Path, found: Difference) -> dict[str, str]:
    rows = {"files": f"{first.name} | {second.name}", **found.notes}
    rows |= dict(_only(first, found.only_first)) | dict(_only(second, found.only_second, " (second)"))
    for block, one in sorted(found.blocks.items()):
        told = "the same" if not one.differing else f"{one.share:.3%} apart, {one.differing} of {one.layers} differ"
        rows[block] = told
    total = Distance(
        sum(one.layers for one in found.blocks.values()),
        sum(one.differing for one in found.blocks.values()),
        sum(one.squared_first for one in found.blocks.values()),
        sum(one.squared_difference for one in found.blocks.values()),
    )
    same = not total.differing and not found.only_first and not found.only_second
    rows["all"] = "the same weights" if same else f"|A - B| / |A| = {total.share:.3%}"
    return rows


def _only(path: Path, layers: list[str], ending: str = "") -> Iterator[tuple[str, str]]:
    if layers:
        more = f", and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
        yield f"only in {path.name}{ending}", ", ".join(layers[:MOST_NAMED]) + more
