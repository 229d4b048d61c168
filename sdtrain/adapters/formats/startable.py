"""Whether what a run can start from is in an adapter file, layer by layer, told from its header alone; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from sdtrain.adapters.formats.conventions import (
    OTHER_SPELLINGS,
    PARTS,
    SUFFIXES,
    embeddings,
    known_keys,
    known_metadata,
)
from sdtrain.adapters.formats.metadata import (
    ALPHA_KEY,
    DIFFUSERS_KEY,
    OTHER_ROTATIONS,
    json_table,
    number_of,
    other_rotations,
)
from sdtrain.errors import UserError
from sdtrain.families.metadata import D_KEY
from sdtrain.files.header import FRACTIONS, Entry, Header, explain

Kind = Literal["lora", "dora", "loha", "lokr", "oft"]
READABLE = (*FRACTIONS, "F8_E4M3", "F8_E5M2")
LORA = frozenset({"down", "up"})
NEEDED: Mapping[Kind, frozenset[str]] = {
    "lora": LORA,
    "dora": LORA | {"magnitude"},
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "lokr": frozenset({"lokr_w1", "lokr_w2"}),
    "oft": frozenset({"oft_R.weight"}),
}
"""The parts of a layer; a factor of LoKr may also be two, see `_whole`."""
ROLES = {names: {part: role for role, part in parts.items()} for names, parts in SUFFIXES.items()}
"""What parts are here that are called differently in the two namings."""
OF_PEFT = {SUFFIXES["diffusers"]["magnitude"]: "magnitude"}
"""What is read in both namings."""
WORDS = {"down": "its down matrix", "up": "its up matrix", "magnitude": "its lengths"}
OTHERS = {
    "oft_blocks": "turns outputs, and what is trained here turns inputs",
    "w_norm": "changes a normalisation, which no run here trains",
    "b_norm": "changes a normalisation, which no run here trains",
    "diff_b": "changes a bias, which no run here trains",
}
"""What some parts do that no run can start from."""


def start_problems(header: Header, kind: Kind) -> list[str]:
    """Return what keeps a run with adapters of a kind from starting from a file, a sentence each."""
    found = [f"holds the text embedding {name}, which no run trains" for name in embeddings(header.entries)]
    try:
        metadata = known_metadata(header)
    except UserError as error:
        return [*found, explain(error)]
    for layer, parts in _layers(header).items():
        found += [f"{layer} {what}" for what in _parts_problems(parts, kind)][:1]
    return [*found, *_metadata_problems(metadata, kind)]


def _layers(header: Header) -> dict[str, dict[str, Entry]]:
    """Return layer -> part -> entry, each part under today's name."""
    found: dict[str, dict[str, Entry]] = {}
    for key, known in known_keys(header.entries).items():
        layer, part = split_key(known)
        part = OTHER_SPELLINGS.get(part, part)
        roles = ROLES["sd-scripts" if layer.startswith("lora_") else "diffusers"] | OF_PEFT
        found.setdefault(layer, {})[roles.get(part, part)] = header.entries[key]
    return found


def split_key(key: str) -> tuple[str, str]:
    """Return the layer and the part of a key as it is known here."""
    if key.startswith("lora_"):
        layer, _, part = key.partition(".")
        return layer, part
    cuts = [key.index(part) for part in (*PARTS, ".lora.") if part in key]
    cut = min(cuts, default=len(key))
    return key[:cut], key[cut + 1 :]


def _parts_problems(parts: Mapping[str, Entry], kind: Kind) -> list[str]:
    """Return what is wrong with a layer, the weightiest first."""
    whole = _whole(parts)
    needed = NEEDED[kind]
    strange = sorted(whole - needed - ({"lora_mid.weight"} if kind == "lora" else set()))
    found = [
        OTHERS.get(part, f"has {WORDS.get(part, part)}, which is no part of {kind} that a run can start from")
        for part in strange
    ]
    found += [f"lacks {WORDS.get(part, part)}" for part in sorted(needed - whole)]
    found += [
        f"has {WORDS.get(part, part)} in {entry.dtype}, where fractions belong"
        for part, entry in parts.items()
        if part != "alpha" and entry.dtype not in READABLE
    ]
    return found or _shape_problems(parts)


def _whole(parts: Mapping[str, Entry]) -> set[str]:
    """Return the parts without alpha, and with two that make a factor of LoKr as the factor."""
    found = set(parts) - {"alpha"}
    for factor in ("lokr_w1", "lokr_w2"):
        if {f"{factor}_a", f"{factor}_b"} <= found:
            found = found - {f"{factor}_a", f"{factor}_b"} | {factor}
    return found


def _shape_problems(parts: Mapping[str, Entry]) -> list[str]:
    shapes = {part: entry.shape for part, entry in parts.items()}
    found = []
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        found.append(f"has an `alpha` of shape {list(shapes['alpha'])}, where one number belongs")
    down, up, length = (shapes.get(part) for part in ("down", "up", "magnitude"))
    mid = shapes.get("lora_mid.weight")
    if down and up and mid and (len(up) < 2 or len(mid) < 3 or mid[:2] != (up[1], down[0])):
        found.append(f"has a `lora_mid.weight` of shape {list(mid)}, which does not fit its matrices")
    if down and up and not mid and (len(up) < 2 or down[0] != up[1]):
        found.append(f"has matrices of shapes {list(down)} and {list(up)}, which do not fit")
    if length and up and math.prod(length) not in (up[0], down[1] if down and len(down) > 1 else 0):
        found.append("has lengths that are neither one for each output nor one for each input")
    elif length and up and len(length) > 1 and length[0] == 1 < math.prod(length) and not _is_peft(length, up):
        found.append("has lengths for each input, and those that are trained here are for each output")
    return found


def _is_peft(length: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Return whether lengths (1, out, 1, 1) of a convolution are peft's, which stand for outputs, too."""
    return len(length) == 4 and length[1] == up[0]


def _metadata_problems(metadata: Mapping[str, str], kind: Kind) -> list[str]:
    found = []
    for key in (ALPHA_KEY, DIFFUSERS_KEY, D_KEY):
        try:
            table = json_table(metadata, key)
            if key == D_KEY:
                [number_of(value, key) for value in table.values()]
        except ValueError as error:
            found.append(str(error))
            continue
        series = any(name.endswith("use_cayley_neumann") and value for name, value in table.items())
        if kind == "oft" and key == DIFFUSERS_KEY and series:
            found.append("turns inputs by a series, and what is trained here turns them exactly")
        if kind == "oft" and key == DIFFUSERS_KEY:
            found += [
                f"is OFT with peft's `{setting}`, {OTHER_ROTATIONS[setting]}, which is not computed here"
                for setting in other_rotations(metadata)
            ]
    return found
