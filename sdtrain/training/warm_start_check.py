"""Whether a run can start from the file in `method.init_from`, told from headers alone: no torch, no model loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.adapters.formats.conventions import known_keys
from sdtrain.adapters.formats.describe import FileDescription, describe_file
from sdtrain.adapters.formats.startable import split_key, start_problems
from sdtrain.adapters.targets import is_target, last_match
from sdtrain.config.schema import Config, LoraConfig
from sdtrain.errors import Problem, UserError
from sdtrain.families.original_names import original_unet_names, own_unet_names
from sdtrain.families.words import DENOISER, LORA_UNET_PREFIX
from sdtrain.files.header import Header, explain, read_header
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.checkpoints.locate import DiffusersFolder
from sdtrain.training.weights_files import NATIVE

Shape = tuple[int, ...]
WHERE = "method.init_from"
EACH = "weights for each output"
OUTPUTS = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "hada_w1_a", "hada_w2_a")
INPUTS = ("lora_down.weight", "lora_A.weight", "lora.down.weight")
EACH_OUTPUT = ("hada_w1_b", "hada_w2_b")
"""The parts of an adapter of which a side is a side of its layer: its outputs, its inputs, and what it has of weights
for each output, which of a convolution are more than its inputs."""
TUCKER = ("hada_t1", "hada_t2", "lokr_t1", "lokr_t2")
"""The parts beside which the sides of the others mean something else."""


@dataclass(frozen=True)
class Layers:
    """The layers of a U-Net: the shapes of their weights by their own names, and those by all their names in files."""

    shapes: Mapping[str, Shape]
    own_names: Mapping[str, str]


def warm_start_problems(config: Config) -> list[Problem]:
    """Return what keeps a run from starting from its file, as far as file and settings tell."""
    method = config.method
    if not isinstance(method, LoraConfig) or not method.init_from:
        return []
    path = Path(method.init_from).expanduser()
    try:
        found = describe_file(path)
    except UserError as error:
        return [Problem(WHERE, explain(error))]
    if not found.kind:
        return [Problem(WHERE, f"{path.name} holds no adapters known here; name a LoRA file")]
    problems = [*_kind(path, found, method), *_networks(path, found, method), *_rank(path, found, method)]
    return problems or _parts(path, method)


def _kind(path: Path, found: FileDescription, method: LoraConfig) -> list[Problem]:
    wanted = "lora" if method.adapter == "rslora" else method.adapter
    if found.kind == wanted:
        return []
    native = path.with_name(f"{path.stem}{NATIVE}{path.suffix}")
    advice = f"name {native.name} beside it" if native.is_file() else f'set method.adapter = "{found.kind}"'
    if found.kind == "diff":
        advice = "name a file of another form"
    what = f"{path.name} holds {found.kind} adapters, but method.adapter = {method.adapter}: {advice}"
    return [Problem(WHERE, what, (WHERE, "method.adapter"))]


def _parts(path: Path, method: LoraConfig) -> list[Problem]:
    """Return the problem of parts of the file that a run cannot start from."""
    kind = "lora" if method.adapter == "rslora" else method.adapter
    told = start_problems(read_header(path), kind)
    if not told:
        return []
    return [Problem(WHERE, f"{path.name}: {told[0]}{_more(told)}; choose a whole file of {kind}")]


def _networks(path: Path, found: FileDescription, method: LoraConfig) -> list[Problem]:
    there, trained = set(found.num_modules), set(method.train)
    problems = []
    if lacking := sorted(trained - there):
        problems.append(f"{path.name} has no adapters for {', '.join(lacking)}: take them out of method.train")
    if more := sorted(there - trained):
        problems.append(f"{path.name} has adapters for {', '.join(more)}, too: add them to method.train")
    return [Problem(WHERE, what, (WHERE, "method.train")) for what in problems]


def _rank(path: Path, found: FileDescription, method: LoraConfig) -> list[Problem]:
    """Return the problem of one rank in the settings and another in the file; with patterns only loading can tell."""
    if method.ranks or method.layer_weights or found.kind not in ("lora", "dora", "loha") or not found.ranks:
        return []
    if set(found.ranks) == {method.rank}:
        return []
    ranks = ", ".join(map(str, sorted(found.ranks)))
    one = len(found.ranks) == 1
    advice = f"set method.rank = {ranks}" if one else "set method.ranks, or give it one rank with `sdtrain resize`"
    what = f"{path.name} has rank {ranks}, but method.rank = {method.rank}: {advice}"
    return [Problem(WHERE, what, (WHERE, "method.rank", "method.ranks"))]


def warm_start_misfits(config: Config, opened: OpenedModel) -> list[Problem]:
    """Return the problems of a file that was made for another model or other targets: its U-Net layers by name and
    size. Those of text encoders, which are of one size in a family, are left to the loading."""
    method = config.method
    if not isinstance(method, LoraConfig) or not method.init_from or DENOISER not in method.train:
        return []
    path = Path(method.init_from).expanduser()
    layers = unet_layers(opened)
    try:
        header = read_header(path)
    except UserError:
        return []  # which was told already
    if not layers.shapes:
        return []  # a layout of which no rule knows the names; only loading can tell
    parts = _parts_by_layer(header)
    misfits = [what for name, there in parts.items() for what in _misfits(name, there, layers)]
    if misfits:
        made_for = f"choose a file made for {config.model.path}"
        what = f"{path.name} was made for another model: {misfits[0]}{_more(misfits)}; {made_for}"
        return [Problem(WHERE, what, (WHERE, "model.path"))]
    wanted = {
        name
        for name, shape in layers.shapes.items()
        if is_target(name, method.targets, is_linear=len(shape) == 2)
        and last_match(method.layer_weights, name, 1.0) > 0
    }
    there = {layers.own_names[name] for name in parts}
    problems = []
    if lacking := sorted(wanted - there):
        what = f"lacks {lacking[0]}{_more(lacking)}, which this run trains: narrow method.targets"
        problems.append(Problem(WHERE, f"{path.name} {what}", (WHERE, "method.targets")))
    if more := sorted(there - wanted):
        what = f"has {more[0]}{_more(more)}, which this run does not train: widen method.targets"
        problems.append(Problem(WHERE, f"{path.name} {what}", (WHERE, "method.targets")))
    return problems


def _more(told: Sequence[str]) -> str:
    return f" (and {len(told) - 1} more like this)" if len(told) > 1 else ""


def _parts_by_layer(header: Header) -> dict[str, dict[str, Shape]]:
    """Return the name in the file -> part -> shape, for its layers of the U-Net."""
    found: dict[str, dict[str, Shape]] = {}
    for key, known in known_keys(header.entries).items():
        if known.startswith((LORA_UNET_PREFIX, f"{DENOISER}.")):
            layer, part = split_key(known)
            found.setdefault(layer, {})[part] = header.entries[key].shape
    return found


def _misfits(name: str, parts: Mapping[str, Shape], layers: Layers) -> Iterator[str]:
    """Yield what is wrong with a layer of the file."""
    if name not in layers.own_names:
        yield f"its {name} is no layer of this one"
        return
    shape = layers.shapes[layers.own_names[name]]
    each = math.prod(shape[1:])
    wanted = {"outputs": shape[0], "inputs": shape[1], EACH: each}
    for word, size in _sizes(parts):
        if size != wanted[word]:
            said = "inputs" if word == EACH and each == shape[1] else word
            yield f"its {name} has {size} {said}, this one's {wanted[word]}"


def _sizes(parts: Mapping[str, Shape]) -> Iterator[tuple[str, int]]:
    """Yield the sizes of the layer that an adapter was made for, as far as the shapes of its parts tell."""
    if any(part in parts for part in TUCKER):
        return
    for part, shape in parts.items():
        if part in OUTPUTS:
            yield "outputs", _side(shape, 0)
        elif part in INPUTS:
            yield "inputs", _side(shape, 1)
        elif part in EACH_OUTPUT:
            yield EACH, math.prod(shape[1:])
        elif part == "oft_R.weight":
            size = (1 + math.isqrt(1 + 8 * _side(shape, 1))) // 2  # a block is n (n - 1) / 2 numbers
            yield EACH, _side(shape, 0) * size
    first, second = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
    if first and second:
        yield "outputs", first[0] * second[0]
        yield EACH, first[1] * second[1]


def _factor(parts: Mapping[str, Shape], name: str) -> tuple[int, int] | None:
    """Return rows and columns of a factor of LoKr, which stands there whole or as a product."""
    if name in parts:
        return _side(parts[name], 0), math.prod(parts[name][1:])
    if {f"{name}_a", f"{name}_b"} <= set(parts):
        return _side(parts[f"{name}_a"], 0), math.prod(parts[f"{name}_b"][1:])
    return None


def _side(shape: Shape, side: int) -> int:
    return shape[side] if len(shape) > side else 0


def unet_layers(opened: OpenedModel) -> Layers:
    """Return the layers of a model's U-Net, from the headers of its files."""
    found: dict[str, Shape] = {}
    for header in opened.headers[DENOISER]:
        found |= _weights(header, opened)
    if isinstance(opened.checkpoint, DiffusersFolder):
        shapes, original = found, original_unet_names(found)
    else:
        own = own_unet_names(found)
        shapes = {own[layer]: shape for layer, shape in found.items() if layer in own}
        original = {name: layer for layer, name in own.items()}
    names = {name: layer for layer in shapes for name in (LORA_UNET_PREFIX + _flat(layer), f"{DENOISER}.{layer}")}
    if opened.family.lora_in_original_layout:
        names |= {LORA_UNET_PREFIX + _flat(original[layer]): layer for layer in shapes if layer in original}
    return Layers(shapes, names)


def _weights(header: Header, opened: OpenedModel) -> dict[str, Shape]:
    prefix = "" if isinstance(opened.checkpoint, DiffusersFolder) else opened.family.unet_prefix
    return {
        key.removeprefix(prefix).removesuffix(".weight"): entry.shape
        for key, entry in header.entries.items()
        if key.startswith(prefix) and key.endswith(".weight") and len(entry.shape) > 1
    }


def _flat(dotted: str) -> str:
    return dotted.replace(".", "_")
