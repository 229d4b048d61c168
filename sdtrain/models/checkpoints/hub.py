"""Finds models that are named by a hub id in the local cache, and fetches those that are not in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError, user_error
from sdtrain.families.words import Component

PARTS = get_args(Component)
SMALL_FILES = (
    "model_index.json",
    "*/config.json",
    "*/*.index*.json",
    "scheduler/*.json",
    "tokenizer/*",
    "tokenizer_2/*",
    "config.json",
)


def is_hub_id(path: str) -> bool:
    """Return whether a path that is neither a file nor a folder reads like `owner/name`."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith((".safetensors", ".ckpt"))
        and not Path(path).expanduser().exists()
    )


def cached_file(repository: str, name: str) -> Path | None:
    """Return a file of a hub repository from the local cache, None where it is not there; the network is not used."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def cached_model(repository: str, variant: str, *, weights: bool = True) -> Path | None:
    """Return the folder of a hub repository in the local cache, None when anything that is needed is not there.

    The network is not used. weights: whether the weights are needed besides configs and tokenizers.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = files_to_fetch(variant) if weights else list(SMALL_FILES)
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_offline() -> bool:
    """Return whether the user forbids the network (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def files_to_fetch(variant: str) -> list[str]:
    """Return shell patterns for the files of a diffusers repository that are needed."""
    middle = f".{variant}" if variant else ""
    weights = [f"{part}/{stem}{middle}{end}" for part in PARTS for stem, end in _weight_names()]
    return [*SMALL_FILES, *weights]


def _weight_names() -> list[tuple[str, str]]:
    stems = ("diffusion_pytorch_model", "model")
    return [(stem, end) for stem in stems for end in (".safetensors", "-*-of-*.safetensors")]


def fetch_if_missing(config: ModelConfig) -> None:
    """Fetch a model that is named by a hub id and not in the local cache; nothing else uses the network."""
    for path in _missing(config):
        fetch_model(path, config.variant)


def is_missing(config: ModelConfig) -> bool:
    """Return whether a model or its VAE is named by a hub id and not in the local cache."""
    return bool(_missing(config))


def _missing(config: ModelConfig) -> list[str]:
    paths = [path for path in (config.path, config.vae) if path and is_hub_id(path)]
    return [path for path in paths if cached_model(path, config.variant) is None]


def fetch_model(repository: str, variant: str) -> Path:
    """Fetch what is needed of a hub repository and return its folder. Raises UserError when that is not possible."""
    if is_offline():
        raise not_cached(repository, variant, "the network is off (HF_HUB_OFFLINE)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=files_to_fetch(variant)))
    except OSError as error:  # what huggingface_hub raises is all derived from it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise not_cached(repository, variant, f"fetching it failed ({reason[0]})") from None


def not_cached(repository: str, variant: str, reason: str, *, weights: bool = True) -> UserError:
    """Return the error that tells the user how to get a hub model that is not in the cache.

    reason: why it is not fetched now. weights: whether the weights are needed besides configs and tokenizers.
    """
    middle = f".{variant}" if variant else ""
    command = f"hf download {repository} --include '*.json' 'tokenizer*/*'"
    if weights:
        command += "".join(f" '{part}/*{middle}.safetensors'" for part in ("unet", "vae", "text_encoder*"))
    return user_error(
        repository,
        "model.path",
        f"neither a file nor a folder nor whole in the local hub cache, and {reason}: where there is a network run "
        f"`{command}`, or copy the model's folder here and name that instead",
    )
