"""Models named by a hub id: the local cache first, the network only for a model that is not in it."""

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
    """Whether a path that is neither file nor folder reads like `owner/name`."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith((".safetensors", ".ckpt"))
        and not Path(path).expanduser().exists()
    )


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a hub repository in the local cache; no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def cached_model(repository: str, variant: str, *, weights: bool = True) -> Path | None:
    """The folder of a hub repository in the local cache, None when what is needed is not there; no network.

    weights: whether more than configs and tokenizers is needed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = files_to_fetch(variant) if weights else list(SMALL_FILES)
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_offline() -> bool:
    """Whether the user forbids the network (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def files_to_fetch(variant: str) -> list[str]:
    """The files of a diffusers repository that are needed, as patterns."""
    middle = f".{variant}" if variant else ""
    weights = [f"{part}/{stem}{middle}{end}" for part in PARTS for stem, end in _weight_names()]
    return [*SMALL_FILES, *weights]


def _weight_names() -> list[tuple[str, str]]:
    stems = ("diffusion_pytorch_model", "model")
    return [(stem, end) for stem in stems for end in (".safetensors", "-*-of-*.safetensors")]


def fetch_if_missing(config: ModelConfig) -> None:
    """Fetch a model that is named by a hub id and not in the local cache; the only use of the network there is."""
    for path in _missing(config):
        fetch_model(path, config.variant)


def is_missing(config: ModelConfig) -> bool:
    """Whether something of a model is named by a hub id and not in the local cache."""
    return bool(_missing(config))


def _missing(config: ModelConfig) -> list[str]:
    paths = [path for path in (config.path, config.vae) if path and is_hub_id(path)]
    return [path for path in paths if cached_model(path, config.variant) is None]


def fetch_model(repository: str, variant: str) -> Path:
    """Fetch what is needed of a hub repository; returns its folder. Raises UserError when that is not possible."""
    if is_offline():
        raise not_cached(repository, variant, "the network is off (HF_HUB_OFFLINE)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=files_to_fetch(variant)))
    except OSError as error:  # what huggingface_hub raises is all derived from it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise not_cached(repository, variant, f"fetching it failed ({reason[0]})") from None


def not_cached(repository: str, variant: str, reason: str, *, weights: bool = True) -> UserError:
    """What to do about a hub model that is not here."""
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
