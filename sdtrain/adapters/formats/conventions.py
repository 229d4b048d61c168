"""The names that other writers give the layers of an adapter file, turned into the two that are known here; no torch.

- peft's `save_pretrained`: `base_model.model.`, with the settings in `adapter_config.json` beside the file
- diffusers' `save_lora_adapter`: the U-Net's own names, without a prefix
- SimpleTuner's LyCORIS: `lycoris_` and the flat names of diffusers
- sd-scripts' OFT: `oft_unet_` in the place of `lora_unet_`
- ComfyUI's LoRA-saving nodes, and trainers for it: `diffusion_model.` and `text_encoders.clip_l.transformer.`

OneTrainer's and ai-toolkit's `lora_unet_` names in the layout of diffusers are known to `lora_file`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from sdtrain.adapters.formats.metadata import DIFFUSERS_KEY, json_table
from sdtrain.errors import user_error
from sdtrain.families.words import DENOISER, LORA_UNET_PREFIX
from sdtrain.files.header import Header

PEFT_PREFIX = "base_model.model."
PEFT_SETTINGS = "adapter_config.json"
BUNDLE = "bundle_emb."
"""What the keys of a text embedding begin with that lies in the same file."""
UNET_PARTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
FLAT_PREFIXES = {
    "lycoris_": LORA_UNET_PREFIX,
    "oft_unet_": LORA_UNET_PREFIX,
    "diffusion_model.": LORA_UNET_PREFIX,
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
}
"""How keys begin -> how sd-scripts begins them; dots in the layer's name become underscores."""
PARTS = (".lora_", ".hada_", ".lokr_", ".oft_", ".dora_scale", ".alpha", ".diff", ".w_norm", ".b_norm", ".rescale")
"""How the name of a part begins, behind that of its layer."""
TO_SD_SCRIPTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
TO_DIFFUSERS = {new: old for old, new in TO_SD_SCRIPTS.items()}


Names = Literal["sd-scripts", "diffusers"]

SUFFIXES: Mapping[Names, Mapping[str, str]] = {
    "sd-scripts": {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"},
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
}
"""What is called differently; every other part has its name in both."""

OTHER_SPELLINGS = {
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
"""Names that earlier diffusers wrote, and what they are called now."""


def known_key(key: str) -> str:
    """Return a key in the names of sd-scripts or of diffusers; one of no known convention comes back as it is."""
    key = _modern(key.removeprefix(PEFT_PREFIX))
    for prefix, ours in FLAT_PREFIXES.items():
        if key.startswith(prefix):
            layer, part = _split(key.removeprefix(prefix))
            return f"{ours}{layer.replace('.', '_')}.{TO_SD_SCRIPTS.get(part, part)}"
    if key.startswith(UNET_PARTS):
        layer, part = _split(key)
        return f"{DENOISER}.{layer}.{TO_DIFFUSERS.get(part, part)}" if part else key
    if key.startswith("text_model.encoder."):
        layer, part = _split(key)
        return f"text_encoder.{layer}.{TO_DIFFUSERS.get(part, part)}" if part else key
    return key


def _modern(key: str) -> str:
    """Return a key in today's names: the first diffusers wrote `attn1.processor.to_out_lora.down` for one of them.

    It is now `attn1.to_out.0.lora.down`.
    """
    layer = {"to_out": "to_out.0"}
    key = key.replace(".processor.", ".")
    return re.sub(
        r"\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.", lambda m: f".{layer.get(m[1], m[1])}.lora.{m[2]}.", key
    )


def _split(key: str) -> tuple[str, str]:
    """Return the layer and the part of a key; the part is empty for one of no adapter."""
    cuts = [key.index(part) for part in PARTS if part in key]
    if not cuts:
        return key, ""
    cut = min(cuts)
    return key[:cut], key[cut + 1 :]


def known_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return key -> key in known names, without those of text embeddings, which belong to no layer."""
    return {key: known_key(key) for key in keys if not key.startswith(BUNDLE)}


def embeddings(keys: Iterable[str]) -> list[str]:
    """Return the names of the text embeddings that lie in a file, in its order."""
    return list(dict.fromkeys(key.removeprefix(BUNDLE).split(".")[0] for key in keys if key.startswith(BUNDLE)))


def known_metadata(header: Header) -> dict[str, str]:
    """Return the metadata of a file with the settings of peft where they are looked for: by network, in the header.

    peft keeps them in a file of their own, diffusers' `save_lora_adapter` without the network's name. Raises UserError
    for a file of peft without its settings, for what it computes depends on the alpha there.
    """
    found = dict(header.metadata)
    if any(key.startswith(PEFT_PREFIX) for key in header.entries):
        return found | {DIFFUSERS_KEY: _prefixed(_peft_settings(header), _network(header))}
    try:
        settings = json_table(found, DIFFUSERS_KEY)
    except ValueError:
        return found  # which is told where an alpha is looked for
    if settings and any(key.startswith(UNET_PARTS) for key in header.entries):
        found[DIFFUSERS_KEY] = _prefixed(settings, DENOISER)
    return found


def _network(header: Header) -> str:
    text = any(key.startswith(f"{PEFT_PREFIX}text_model.") for key in header.entries)
    return "text_encoder" if text else DENOISER


def _prefixed(settings: Mapping[str, object], network: str) -> str:
    named = {key if key.startswith(f"{network}.") else f"{network}.{key}": value for key, value in settings.items()}
    return json.dumps(named, sort_keys=True)


def _peft_settings(header: Header) -> dict[str, object]:
    path = Path(header.path).with_name(PEFT_SETTINGS)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        what = f"has names of peft, whose alpha stands in {PEFT_SETTINGS}: put that file beside it, as peft wrote it"
        raise user_error(str(header.path), header.path.name, what)
    return found
