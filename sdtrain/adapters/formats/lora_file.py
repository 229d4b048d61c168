"""Adapter files, in sd-scripts names or in diffusers names.

**sd-scripts names** are what ComfyUI, A1111, Forge and the kohya tools read: down, up and alpha for every layer.
diffusers reads them too, but misnames the alphas of attention layers when a network has several, and then gives all
of them the most frequent one (diffusers 0.42, `get_peft_kwargs`); so a file has one alpha in each network, and where
there were several the difference is multiplied into the up matrices.

**diffusers names** have no place for alpha. Where alpha / rank can be multiplied into the up matrices and taken out
again bit for bit, it is, and every reader computes the same dW. Where it cannot, the matrices stay as they are and
alpha stands in the `lora_adapter_metadata` of the header, which diffusers reads since 0.35.

Who computes the trained change from which kind and names is the table of `sdtrain/families/readers.py`. A DoRA's
`dora_scale` is what LyCORIS means by it, the length of the rows of the sum; in diffusers names, where diffusers and
peft read it exactly, transformers wants `.weight` after its name in text encoders and diffusers none in the U-Net.

`sdtrain.alpha` in the header keeps the alphas that were multiplied in, so that reading gives the same bits back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtrain.adapters.formats.alphas import (
    Scaled,
    one_alpha_each,
    pack_alphas,
    rescaled,
    scale_of_one,
    unpack_alpha,
)
from sdtrain.adapters.formats.conventions import BUNDLE, SUFFIXES, Names, embeddings, known_keys, known_metadata
from sdtrain.adapters.formats.layer_names import diffusers_names, family_of, sd_scripts_names
from sdtrain.adapters.formats.metadata import ALPHA_KEY, DIFFUSERS_KEY, FileFacts, Shape, header_metadata
from sdtrain.adapters.formats.peft_metadata import alpha_in_metadata, peft_metadata, series_terms
from sdtrain.adapters.formats.tensor_names import decode, encode, expressible, shape_problem
from sdtrain.adapters.kinds import (
    Adapters,
    AdapterWeights,
    OftWeights,
    bias_delta,
    kind_of,
)
from sdtrain.adapters.layers import plain_modules
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.words import DENOISER, LORA_UNET_PREFIX, TRAINABLE_NETWORKS
from sdtrain.files.hashes import Hashes
from sdtrain.files.header import Header, read_header
from sdtrain.files.tensors import planned, read_tensors, write_safetensors


@dataclass(frozen=True)
class LoraFile:
    """The content of an adapter file."""

    path: Path
    adapters: dict[str, dict[str, AdapterWeights]]
    """component -> module -> weights; the tensors are on the CPU, as they were stored."""
    metadata: dict[str, str]
    names: Names
    left_out: tuple[Problem, ...] = ()
    """What was asked to be left out, for it cannot be used here: a layer or an embedding each."""


def without(file: LoraFile, reasons: Mapping[tuple[str, str], str], *, partial: bool) -> LoraFile:
    """Return a file without layers, (component, module) -> why it cannot be used here.

    Raises UserError with these reasons where that was not asked for, or where nothing would be left.
    """
    kept = {
        component: {module: weights for module, weights in modules.items() if (component, module) not in reasons}
        for component, modules in file.adapters.items()
    }
    problems = [Problem(f"{component}.{module}", what) for (component, module), what in reasons.items()]
    require_usable(problems, sum(map(len, kept.values())), file.path, partial=partial)
    left = {component: modules for component, modules in kept.items() if modules}
    return replace(file, adapters=left, left_out=(*file.left_out, *problems))


def require_usable(problems: Sequence[Problem], num_left: int, path: Path, *, partial: bool) -> None:
    """Raise UserError for what of a file cannot be used, unless it was asked to use what is left."""
    if not problems or (partial and num_left):
        return
    told = shortened(problems)
    if num_left and not partial:
        told.append(
            Problem("--partial", f"uses the {num_left} layers that fit, in `sdtrain merge`, `resize` and `sample`")
        )
    raise UserError(str(path), told)


def write_lora(
    path: Path,
    adapters: Adapters,
    networks: Mapping[str, nn.Module],
    *,
    names: Names,
    facts: FileFacts,
    dtype: torch.dtype | None = None,
) -> Hashes:
    """Write adapters (component -> module -> weights) to one safetensors file, whole or not at all.

    Returns the hashes by which other tools know it.

    `networks` are the networks the modules belong to, on any device (meta too): their trees make the names. `dtype`
    is the type tensors are stored in, None keeps theirs. Raises UserError for a kind the names have no words for, for
    weights that are not finite, and for a full disk.
    """
    _check_kinds(path, adapters, names)
    plain = {component: dict(modules) for component, modules in adapters.items() if modules}
    scaled = one_alpha_each(plain, dtype) if names == "sd-scripts" else scale_of_one(plain, dtype)
    tensors = adapter_tensors(scaled.adapters, networks, names)
    _check_finite(path, tensors)
    metadata = header_metadata(facts, _shape(scaled, networks), in_diffusers_names=names == "diffusers")
    if scaled.alphas:
        metadata[ALPHA_KEY] = pack_alphas(scaled.alphas, plain)
    if names == "diffusers":
        text = peft_metadata(path, scaled.adapters)
        metadata |= {DIFFUSERS_KEY: text} if text else {}
    return write_safetensors(path, planned(tensors), {**metadata, "format": "pt"}, seal=_seal)


def _seal(hashes: Hashes) -> dict[str, str]:
    """Return the header entries with the hashes by which other tools know the file."""
    return {
        "sshs_model_hash": hashes.data,
        "sshs_legacy_hash": hashes.legacy,
        "modelspec.hash_sha256": f"0x{hashes.data}",
    }


def _check_kinds(path: Path, adapters: Adapters, names: Names) -> None:
    problems = [
        Problem(
            f"{component}.{module}",
            f"is {kind_of(weights)}, for which {names} names have no words: write diffusers names, or merge it",
        )
        for component, modules in adapters.items()
        for module, weights in modules.items()
        if not expressible(weights, names)
    ]
    if not any(adapters.values()):
        problems.append(Problem("adapters", "there are none to write"))
    if problems:
        raise UserError(str(path), shortened(problems))


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    problems = [
        Problem(key, f"is not finite as {str(tensor.dtype).removeprefix('torch.')}: the training has diverged")
        for key, tensor in tensors.items()
        if not bool(tensor.isfinite().all())
    ]
    if problems:
        raise UserError(str(path), shortened(problems))


def adapter_tensors(adapters: Adapters, networks: Mapping[str, nn.Module], names: Names) -> dict[str, Tensor]:
    """Return every tensor of a file by its name in it."""
    table = sd_scripts_names(networks) if names == "sd-scripts" else diffusers_names(networks)
    return {
        f"{table[component][module]}.{_key(part, component, names)}": tensor.detach().cpu().contiguous()
        for component, modules in adapters.items()
        for module, weights in modules.items()
        for part, tensor in encode(weights, names).items()
    }


def _key(part: str, component: str, names: Names) -> str:
    """Return what a part is called: in text encoders transformers, which loads them, wants a magnitude's `.weight`.

    diffusers, which loads the U-Net, wants it without.
    """
    is_magnitude = names == "diffusers" and part == SUFFIXES["diffusers"]["magnitude"]
    return f"{part}.weight" if is_magnitude and component != DENOISER else part


def _shape(scaled: Scaled, networks: Mapping[str, nn.Module]) -> Shape:
    """Return what reading the file will give: alphas that can be undone exactly are told as they were."""
    every = [weights for modules in scaled.adapters.values() for weights in modules.values()]
    alphas = [
        scaled.alphas.get(component, {}).get(module, weights.alpha)
        for component, modules in scaled.adapters.items()
        for module, weights in modules.items()
    ]
    return Shape(
        kinds=frozenset(kind_of(weights) for weights in every),
        ranks=Counter(weights.rank for weights in every),
        alphas=Counter(alphas),
        family=family_of(networks),
    )


def read_lora(path: Path, networks: Mapping[str, nn.Module], *, partial: bool = False) -> LoraFile:
    """Read the adapters in a file, in any naming, for the layers of these networks (on any device, meta too).

    partial: whether what cannot be used is left out, as long as something is left. Raises UserError, naming the key,
    for a file that is damaged or no adapter, for layers that these networks do not have, and for adapters of other
    shapes than their layers.
    """
    stored = read_header(path)
    keys = known_keys(stored.entries)
    tensors = {keys[key]: _widened(tensor) for key, tensor in read_tensors(stored).items() if key in keys}
    entries = {keys[key]: entry for key, entry in stored.entries.items() if key in keys}
    header = replace(stored, entries=entries, metadata=known_metadata(stored))
    names = names_of(path, header)
    layers = _layers(networks, names)
    weight = {component: dict(plain_modules(network)) for component, network in networks.items()}
    found: dict[str, dict[str, AdapterWeights]] = {}
    problems = [
        Problem(f"{BUNDLE}{name}", "is a text embedding, which belongs to no layer; load it as an embedding")
        for name in embeddings(stored.entries)
    ]
    for name, parts in _grouped(tensors, layers).items():
        if name not in layers:
            problems.append(Problem(name, _no_such_layer(name, header, parts)))
            continue
        component, module = layers[name]
        try:
            weights = _decoded(parts, names, header.metadata, component, module)
        except ValueError as error:
            problems.append(Problem(name, str(error)))
            continue
        if not all(bool(tensor.isfinite().all()) for tensor in parts.values()):
            problems.append(Problem(name, "holds numbers that are not finite: its training had diverged, use another"))
            continue
        layer = weight[component][module]
        assert isinstance(layer.weight, Tensor)
        problem = shape_problem(weights, layer.weight)
        if bias_delta(weights) is not None and layer.bias is None:
            problem = "changes a bias, which this layer does not have"
        if problem:
            problems.append(Problem(name, f"{problem}: it was made for another model"))
            continue
        found.setdefault(component, {})[module] = weights
    require_usable(problems, sum(map(len, found.values())), path, partial=partial)
    return LoraFile(path, found, dict(header.metadata), names, tuple(problems))


def _widened(tensor: Tensor) -> Tensor:
    """Return numbers of eight bits as float16, which holds all of them exactly and can be computed with."""
    return tensor.to(torch.float16) if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor


def names_of(path: Path, header: Header) -> Names:
    """Return the naming of an adapter file. Raises UserError for other files."""
    first = next(iter(header.entries), "")
    if any(key.startswith(("lora_unet_", "lora_te")) for key in header.entries):
        return "sd-scripts"
    if any(key.startswith(tuple(f"{component}." for component in TRAINABLE_NETWORKS)) for key in header.entries):
        return "diffusers"
    if first.startswith(("model.diffusion_model.", "conditioner.", "first_stage_model.", "cond_stage_model.")):
        raise user_error(str(path), first, "is of a whole checkpoint; `sdtrain extract` makes a LoRA of two of them")
    raise user_error(str(path), first or "file", "is no adapter known here: names start with `lora_unet_` or `unet.`")


def _layers(networks: Mapping[str, nn.Module], names: Names) -> dict[str, tuple[str, str]]:
    """Return name in the file -> (component, module), with the other names that writers use.

    With transformers 5 diffusers writes text encoders without `text_model.`; some trainers write SDXL in sd-scripts
    style, but in the layout of diffusers.
    """
    if names == "diffusers":
        proper = diffusers_names(networks, norms=True)
        short = {
            component: {module: name.replace(".text_model.", ".") for module, name in modules.items()}
            for component, modules in proper.items()
        }
        tables = [short, proper]
    else:
        proper = sd_scripts_names(networks, norms=True)
        flat = {module: LORA_UNET_PREFIX + module.replace(".", "_") for module in proper.get(DENOISER, {})}
        tables = [{DENOISER: flat}, proper]
    return {
        name: (component, module)
        for table in tables
        for component, modules in table.items()
        for module, name in modules.items()
    }


def _grouped(tensors: Mapping[str, Tensor], layers: Mapping[str, object]) -> dict[str, dict[str, Tensor]]:
    """Return layer name -> part -> tensor.

    Names of diffusers contain dots, so the longest known layer name that a key begins with counts.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        pieces = key.split(".")
        cuts = (".".join(pieces[:cut]) for cut in range(len(pieces) - 1, 0, -1))
        layer = next((name for name in cuts if name in layers), None)
        if layer is None:
            layer = key.split(".lora")[0] if not key.startswith("lora_") else pieces[0]
        found.setdefault(layer, {})[key.removeprefix(layer + ".")] = tensor
    return found


def _decoded(
    parts: Mapping[str, Tensor], names: Names, metadata: Mapping[str, str], component: str, module: str
) -> AdapterWeights:
    weights = decode(parts, names)
    if isinstance(weights, OftWeights) and not weights.on_outputs:
        return replace(weights, terms=series_terms(metadata, component))
    elsewhere = alpha_in_metadata(metadata, component, module, weights.rank)
    if elsewhere is not None and "alpha" not in parts:
        weights = decode(parts, names, elsewhere)
    original = unpack_alpha(metadata, component, module)
    return weights if original is None else rescaled(weights, original)


def _no_such_layer(name: str, header: Header, parts: Mapping[str, Tensor]) -> str:
    """Return the likely reason why a layer of the file is not in the model."""
    if name.startswith("lora_te_"):
        return "is a text encoder of SD 1.x or 2.x; this file is not for the model in use, choose one made for it"
    widths = {header.entries[key].shape[-1] for key in header.entries if "attn2_to_k.lora_down" in key}
    if widths & {768, 1024}:
        return (
            f"is not in this model; the file is for SD 1.x or 2.x (text is {min(widths)} wide), choose one made for it"
        )
    return "is not in this model; choose a file made for it"


def shortened(problems: Sequence[Problem]) -> list[Problem]:
    """Return the first three of many texts and how many more there are, for one mistake shows in hundreds of keys."""
    rest = [Problem("...", f"and {len(problems) - 3} more like these")] if len(problems) > 4 else list(problems[3:])
    return [*problems[:3], *rest]
