"""Tells what an adapter file says about itself, from its header alone and without torch, so that it answers at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtrain.adapters.formats.conventions import embeddings, known_keys, known_metadata
from sdtrain.adapters.formats.metadata import ALPHA_KEY, DIFFUSERS_KEY, json_table, other_rotations
from sdtrain.errors import UserError
from sdtrain.families.known import FAMILIES
from sdtrain.families.metadata import BUCKETS_KEY, CONFIG_KEY, D_KEY, FOLDERS_KEY, TAGS_KEY, steps_of
from sdtrain.families.words import DENOISER, LORA_UNET_PREFIX, TRAINABLE_NETWORKS
from sdtrain.files.header import Header, read_header, read_scalars
from sdtrain.files.numbers import is_number

RANK_AXIS = {
    "lora_down.weight": 0,
    "lora_A.weight": 0,
    "lora.down.weight": 0,
    "lora_linear_layer.down.weight": 0,
    "hada_w1_b": 0,
    "lokr_w2_b": 0,
    "lokr_w1_b": 0,
}
"""The tensors whose shape tells the rank, and the axis that has its length."""
KINDS = {
    "dora_scale": "dora",
    "lora_magnitude": "dora",
    "hada_": "loha",
    "lokr_": "lokr",
    "oft_": "oft",
    ".diff": "diff",
}


@dataclass(frozen=True)
class FileDescription:
    """Everything that a file says about itself; entries are empty where it does not say."""

    kind: str
    names: str
    """`sd-scripts`, `diffusers`, or empty for a file that holds no adapters."""
    not_computed: tuple[str, ...]
    """The settings of peft under which it means something that is not computed here."""
    num_norms: int
    """Number of normalisations that it changes, too."""
    embeddings: tuple[str, ...]
    """The text embeddings that lie in it, too."""
    num_modules: Mapping[str, int]
    """Network -> number of layers with adapters."""
    ranks: Mapping[int, int]
    """Rank -> number of layers."""
    alphas: Mapping[float, int]
    """Alpha -> number of layers; 0 where the file does not say how many."""
    dtypes: tuple[str, ...]
    num_bytes: int
    title: str
    date: str
    base_model: str
    prediction: str
    steps: int
    num_images: int
    d: Mapping[str, float]
    top_tags: tuple[tuple[str, int], ...]
    buckets: Mapping[tuple[int, int], int]
    """Width and height in pixels -> the number of pictures of an epoch."""
    folders: tuple[tuple[str, int, float], ...]
    """The folders of pictures: name, number of pictures, how often each is seen in an epoch."""
    config_toml: str
    metadata: Mapping[str, str]


def describe_file(path: Path, *, num_tags: int = 20) -> FileDescription:
    """Return what is in a safetensors file of adapters. Raises UserError when it is missing or damaged."""
    stored = read_header(path)
    keys = known_keys(stored.entries)
    header = replace(stored, entries={keys[key]: entry for key, entry in stored.entries.items() if key in keys})
    metadata = header.metadata
    layers = _layers(header)
    first = next((name for name, _ in layers), "")
    return FileDescription(
        kind=_kind(header) if layers else "",
        names=("sd-scripts" if first.startswith("lora_") else "diffusers") if layers else "",
        not_computed=_not_computed(stored),
        num_norms=len({key.rpartition(".")[0] for key in header.entries if key.endswith((".w_norm", ".b_norm"))}),
        embeddings=tuple(embeddings(stored.entries)),
        num_modules=Counter(component for _, component in layers),
        ranks=_ranks(header),
        alphas=_alphas(header),
        dtypes=tuple(sorted({entry.dtype for key, entry in header.entries.items() if not key.endswith(".alpha")})),
        num_bytes=path.stat().st_size,
        title=metadata.get("modelspec.title", metadata.get("ss_output_name", "")),
        date=metadata.get("modelspec.date", ""),
        base_model=metadata.get("ss_sd_model_name", metadata.get("ss_base_model_version", "")),
        prediction=metadata.get("modelspec.prediction_type", ""),
        steps=steps_of(metadata),
        num_images=_whole(metadata.get("ss_num_train_images", "")),
        d={str(name): value for name, value in _table(metadata, D_KEY).items() if is_number(value)},
        top_tags=_top_tags(metadata, num_tags),
        buckets=_buckets(metadata),
        folders=_folders(metadata),
        config_toml=metadata.get(CONFIG_KEY, ""),
        metadata=metadata,
    )


def _not_computed(header: Header) -> tuple[str, ...]:
    """Those of OFT in the header or in peft's file beside; none where these cannot be read, which others tell."""
    if not any(".oft_" in key for key in header.entries):
        return ()
    with suppress(UserError, ValueError):
        return tuple(other_rotations(known_metadata(header)))
    return ()


def _layers(header: Header) -> list[tuple[str, str]]:
    """Return (layer, network) for each layer with an adapter, in the file's order."""
    found = {}
    prefixes = _prefixes()
    for key in header.entries:
        for prefix, component in prefixes.items():
            if key.startswith(prefix) and not key.endswith((".w_norm", ".b_norm")):
                layer = key.split(".")[0] if prefix.startswith("lora_") else _diffusers_layer(key)
                found[layer] = component
                break
    return list(found.items())


def _prefixes() -> dict[str, str]:
    """Return how names begin -> network, in both namings and for all families."""
    encoders = [encoder for family in FAMILIES.values() for encoder in family.text_encoders]
    return {
        LORA_UNET_PREFIX: DENOISER,
        **{encoder.lora_prefix: encoder.component for encoder in encoders},
        **{f"{component}.": component for component in TRAINABLE_NETWORKS},
    }


def _diffusers_layer(key: str) -> str:
    for part in (".lora", ".hada_", ".lokr_", ".oft_", ".diff"):
        if part in key:
            return key[: key.index(part)]
    return key


def _kind(header: Header) -> str:
    for part, kind in KINDS.items():
        if any(part in key for key in header.entries):
            return kind
    return "lora"


def _ranks(header: Header) -> dict[int, int]:
    ranks: dict[str, int] = {}
    for key, entry in header.entries.items():
        for part, axis in RANK_AXIS.items():
            if key.endswith("." + part) and axis < len(entry.shape):
                ranks[key.removesuffix("." + part)] = entry.shape[axis]
    return dict(Counter(ranks.values()).most_common())


def _alphas(header: Header) -> dict[float, int]:
    """Return alpha -> number of layers.

    The alpha tensors tell it; files without any tell it in their metadata, and mean the rank if they do not.
    """
    values = read_scalars(header, ".alpha")
    if values:
        return dict(Counter(values.values()).most_common())
    tables = [modules for modules in _table(header.metadata, ALPHA_KEY).values() if isinstance(modules, dict)]
    kept = [alpha for modules in tables for alpha in modules.values()]
    settings = _table(header.metadata, DIFFUSERS_KEY)
    kept += [value for key, value in settings.items() if key.endswith((".lora_alpha", ".alpha"))]
    kept = [alpha for alpha in kept if is_number(alpha)]
    if not kept:
        return {float(rank): layers for rank, layers in _ranks(header).items()}
    modules = sum(_ranks(header).values())
    return {float(kept[0]): modules} if len(set(kept)) == 1 else {float(alpha): 0 for alpha in sorted(set(kept))}


def _table(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the JSON object under a key; empty where it is no JSON, for such a file is still readable."""
    try:
        return json_table(metadata, key)
    except ValueError:
        return {}


def _top_tags(metadata: Mapping[str, str], num_tags: int) -> tuple[tuple[str, int], ...]:
    counts: Counter[str] = Counter()
    for folder in _table(metadata, TAGS_KEY).values():
        if isinstance(folder, dict):
            counts.update({str(tag).strip(): int(num) for tag, num in folder.items() if is_number(num)})
    return tuple(counts.most_common(num_tags))


def _buckets(metadata: Mapping[str, str]) -> dict[tuple[int, int], int]:
    """Return what sd-scripts and we say of buckets, as far as it is of that form."""
    found, told = {}, _table(metadata, BUCKETS_KEY).get("buckets")
    for bucket in told.values() if isinstance(told, dict) else ():
        size, count = (bucket.get("resolution"), bucket.get("count")) if isinstance(bucket, dict) else (None, None)
        if isinstance(size, list) and len(size) == 2 and all(map(is_number, (*size, count))):
            found[int(size[0]), int(size[1])] = int(count or 0)
    return found


def _folders(metadata: Mapping[str, str]) -> tuple[tuple[str, int, float], ...]:
    """Return what sd-scripts and we say of the folders of pictures, as far as it is of that form."""
    found = []
    for name, told in _table(metadata, FOLDERS_KEY).items():
        count, repeats = (told.get("img_count"), told.get("n_repeats")) if isinstance(told, dict) else (None, None)
        if is_number(count) and is_number(repeats):
            found.append((str(name), int(count), float(repeats)))
    return tuple(found)


def _whole(text: str) -> int:
    return int(text) if re.fullmatch(r"\d{1,15}", text, re.ASCII) else 0
