"""Whether a run can start from the file in `method.init_from`, told from headers alone: no torch, no model loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdtrain.adapters.formats.conventions import known_keys
from sdtrain.adapters.formats.describe import FileDescription, describe_file
from sdtrain.adapters.formats.startable import start_problems
from sdtrain.config.schema import Config, LoraConfig
from sdtrain.errors import Problem, UserError
from sdtrain.families.original_names import original_unet_names
from sdtrain.families.words import DENOISER, LORA_UNET_PREFIX
from sdtrain.files.header import Entry, Header, explain, read_header
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.checkpoints.locate import DiffusersFolder
from sdtrain.training.weights_files import NATIVE

Shape = tuple[int, ...]
WHERE = "method.init_from"
WIDTHS = {"lora_down.weight": 1, "lora_A.weight": 1, "lora.down.weight": 1, "lora_up.weight": 0, "lora_B.weight": 0} | {
    "lora.up.weight": 0
}
"""The parts of a LoRA whose own side is one of its layer's, and which side of the layer's weight that is."""


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
    rest = f" (and {len(told) - 1} more like this)" if len(told) > 1 else ""
    return [Problem(WHERE, f"{path.name}: {told[0]}{rest}; choose a whole file of {kind}")]


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
    """Return the problem of a file that was made for another model: its U-Net layers by name and size."""
    method = config.method
    if not isinstance(method, LoraConfig) or not method.init_from:
        return []
    path = Path(method.init_from).expanduser()
    layers = unet_layers(opened)
    is_whole = isinstance(opened.checkpoint, DiffusersFolder)
    try:
        header = read_header(path)
    except UserError:
        return []  # which was told already
    misfits = [
        what
        for key, entry in _known(header).items()
        for part, side in WIDTHS.items()
        if key.endswith("." + part)
        for what in _misfit(key.removesuffix("." + part), side, entry.shape, layers, is_whole=is_whole)
    ]
    if not misfits:
        return []
    rest = f" (and {len(misfits) - 1} more like this)" if len(misfits) > 1 else ""
    what = f"{path.name} was made for another model: {misfits[0]}{rest}; choose a file made for {config.model.path}"
    return [Problem(WHERE, what, (WHERE, "model.path"))]


def _known(header: Header) -> dict[str, Entry]:
    keys = known_keys(header.entries)
    return {keys[key]: entry for key, entry in header.entries.items() if key in keys}


def _misfit(name: str, side: int, shape: Shape, layers: Mapping[str, Shape], *, is_whole: bool) -> list[str]:
    """Return what is wrong with a factor of a layer. is_whole: whether `layers` knows every name there is."""
    if not name.startswith((LORA_UNET_PREFIX, f"{DENOISER}.")):
        return []
    if name not in layers and not is_whole:
        return []
    if name not in layers:
        return [f"its {name} is no layer of this one"]
    size = shape[side] if len(shape) > side else 0
    wanted = layers[name][side]
    if size == wanted:
        return []
    return [f"its {name} has {size} {'inputs' if side else 'outputs'}, this one's {wanted}"]


def unet_layers(opened: OpenedModel) -> dict[str, Shape]:
    """Return the name in LoRA files -> shape of the weight, for the layers of a model's U-Net.

    For a folder these are the names in every naming; a single file tells those in its own, original layout.
    """
    shapes: dict[str, Shape] = {}
    for header in opened.headers[DENOISER]:
        shapes |= _weights(header, opened)
    if isinstance(opened.checkpoint, DiffusersFolder):
        original = original_unet_names(shapes) if opened.family.lora_in_original_layout else {}
        return {
            name: shape
            for layer, shape in shapes.items()
            for name in (
                LORA_UNET_PREFIX + _flat(original.get(layer, layer)),
                LORA_UNET_PREFIX + _flat(layer),
                f"{DENOISER}.{layer}",
            )
        }
    return {LORA_UNET_PREFIX + _flat(layer): shape for layer, shape in shapes.items()}


def _weights(header: Header, opened: OpenedModel) -> dict[str, Shape]:
    prefix = "" if isinstance(opened.checkpoint, DiffusersFolder) else opened.family.unet_prefix
    return {
        key.removeprefix(prefix).removesuffix(".weight"): entry.shape
        for key, entry in header.entries.items()
        if key.startswith(prefix) and key.endswith(".weight") and len(entry.shape) > 1
    }


def _flat(dotted: str) -> str:
    return dotted.replace(".", "_")
