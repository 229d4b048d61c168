"""`sdtrain card`: a folder of a run as the Hugging Face Hub, Civitai and model managers expect it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain.adapters.formats.describe import FileDescription, describe_file
from sdtrain.commands.files.streamed import entry_value
from sdtrain.commands.publish.card import Card, card_text
from sdtrain.commands.publish.gallery import Shown, gallery_of, write_gallery
from sdtrain.config.read import resolve
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import user_error
from sdtrain.families.family import Family
from sdtrain.families.known import FAMILIES
from sdtrain.families.metadata import CONFIG_KEY
from sdtrain.families.readers import readers_of
from sdtrain.files.header import Entry, Header, read_header
from sdtrain.files.locations import BUILTIN
from sdtrain.files.tensors import DTYPES, Planned, write_safetensors
from sdtrain.files.writer import atomic_file, atomic_folder, write_json, write_text
from sdtrain.models.checkpoints.hub import is_hub_id
from sdtrain.training.describing.author import author_entries, author_problems, trigger_words
from sdtrain.training.start import stored_config
from sdtrain.training.weights_files import NATIVE

FOLDER = "publish"
"""The folder of a run that is made for others."""
PATHS = ("path", "vae", "components", "cache", "output", "init_from", "mask_path", "thumbnail")
"""The settings that are paths of this machine, of which others are told the last name."""
PREVIEW_PX = 512
"""The longest side of the picture beside the weights, which model managers show."""


@dataclass(frozen=True)
class Published:
    """A folder that was made, and what its author should know of it."""

    folder: Path
    notes: tuple[str, ...]


def publish(run: Path, out: Path | None, repository: str, overrides: Sequence[str], *, force: bool) -> Published:
    """Write the folder of a run: card, weights, pictures; return it. Nothing of the run changes.

    repository: where it will stand on the Hub, as `owner/name`; empty where that is not known yet. overrides: what is
    said in `[export.about]`, each as `key=value`. Raises UserError.
    """
    config = _config(run, overrides)
    weights = weights_of(run, config)
    header, found = read_header(weights), describe_file(weights)
    pictures = gallery_of(run, found.steps)
    target = out or run / FOLDER
    name = f"{config.name}.safetensors"
    public = config_to_toml(resolve(_public(config.model_dump(mode="python")), str(run)))
    metadata = {**header.metadata, **author_entries(config, run), CONFIG_KEY: public}
    card = _card(config, replace(found, metadata=metadata), name, pictures, public, repository)
    _require_own(target, config.name, force=force)
    with atomic_folder(target, weights.stat().st_size) as folder:
        _write_weights(folder / name, header, metadata)
        native = weights.with_name(f"{weights.stem}{NATIVE}.safetensors")
        if native.is_file():
            exact = read_header(native)
            words = {**exact.metadata, **author_entries(config, run), CONFIG_KEY: public}
            _write_weights(folder / f"{config.name}{NATIVE}.safetensors", exact, words)
        write_text(folder / "README.md", card_text(card))
        write_json(folder / f"{config.name}.json", _for_web_interfaces(card))
        write_gallery(folder, pictures, config)
        if pictures:
            _write_preview(folder / f"{config.name}.preview.png", pictures[0].picture)
    return Published(target, tuple(_notes(card, target)))


def _config(run: Path, overrides: Sequence[str]) -> Config:
    """Return the settings of a run with what is said of it now. Raises UserError for a change of anything else."""
    stored, config = stored_config(run), stored_config(run, overrides)
    if config.model_copy(update={"export": stored.export}) != stored or config.export.model_copy(
        update={"about": stored.export.about}
    ) != (stored.export):
        raise user_error(str(run), "--set", "changes what was trained; here it is for export.about alone")
    problems = author_problems(config)
    if problems:
        raise user_error(str(run), problems[0].where, problems[0].what)
    return config


def weights_of(run: Path, config: Config) -> Path:
    """Return the weights file of a run: that of its end, or the newest along its way. Raises UserError."""
    whole = run / "weights" / f"{config.name}.safetensors"
    name = re.compile(re.escape(config.name) + r"-step-\d+\.safetensors")
    early = sorted(path for path in run.glob("weights/*.safetensors") if name.fullmatch(path.name))
    for path in (whole, *early[::-1]):
        if path.is_file():
            return path
    raise user_error(str(run), "weights", "are not there yet; `sdtrain export RUN --format sd-scripts` writes them")


def _write_weights(path: Path, header: Header, metadata: Mapping[str, str]) -> None:
    """Write the same tensors, so that all hashes stay, under a header for others."""

    def planned(entry: Entry) -> Planned:
        return Planned(DTYPES[entry.dtype], entry.shape, lambda: entry_value(header, entry))

    write_safetensors(path, {key: planned(entry) for key, entry in header.entries.items()}, metadata)


def _public(value: Any, key: str = "") -> Any:
    """Return settings without the paths of this machine: of each the last name is left."""
    if isinstance(value, dict):
        return {name: _public(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner, key) for inner in value]
    if key not in PATHS or not isinstance(value, str) or value.startswith(BUILTIN) or is_hub_id(value):
        return value
    return Path(value).name


def _card(
    config: Config, found: FileDescription, name: str, pictures: Sequence[Shown], settings: str, repository: str
) -> Card:
    about, method, preview = config.export.about, config.method, config.preview
    triggers = trigger_words(config)
    adapter = bool(found.kind)
    facts = {
        "base model": Path(config.model.path).name,
        "method": f"{found.kind or 'full fine-tune'} on {', '.join(method.train)}",
        "ranks": ", ".join(f"{rank} ({layers} layers)" for rank, layers in found.ranks.items()),
        "alphas": ", ".join(f"{alpha:g} ({layers} layers)" for alpha, layers in found.alphas.items()),
        "steps": str(found.steps or ""),
        "pictures": str(found.num_images or ""),
        "resolution": found.metadata.get("modelspec.resolution", ""),
        "prediction": found.prediction,
        "optimizer": f"Prodigy + Schedule-Free, preset {config.optimizer.preset}",
        **{f"d of {network}": f"{d:.3e}" for network, d in found.d.items()},
        "trained with": "sdtrain",
        "hash": found.metadata.get("modelspec.hash_sha256", ""),
    }
    readers = readers_of(found.kind, found.names) if adapter else ()  # type: ignore[arg-type]
    return Card(
        title=config.name,
        file=name,
        family=_family(found),
        adapter=adapter,
        readers=readers,
        base_id=config.model.path if is_hub_id(config.model.path) else "",
        author=about.author,
        licence=about.license,
        description=about.description,
        usage=about.usage_hint,
        tags=about.tags,
        triggers=triggers,
        pictures=pictures,
        sampling=f"{preview.num_inference_steps} Euler steps, guidance {preview.guidance_scale:g}",
        prompt=(pictures[0].prompt if pictures else "") or ", ".join(triggers) or "a photo",
        facts={key: value for key, value in facts.items() if value},
        settings=settings.rstrip(),
        repository=repository or f"OWNER/{config.name}",
    )


def _family(found: FileDescription) -> Family:
    """Return the family that a file's header names; SDXL where it names none."""
    told = found.metadata.get("modelspec.architecture", "").removesuffix("/lora")
    for family in FAMILIES.values():
        if told and told in (family.words.architecture, family.words.architecture_large_v):
            return family
    return FAMILIES["sdxl"]


def _for_web_interfaces(card: Card) -> dict[str, object]:
    """Return what A1111 and Forge keep beside a LoRA, and show on its card."""
    return {
        "description": card.description,
        "sd version": {"sdxl": "SDXL", "sd1": "SD1", "sd2": "SD2"}[card.family.name],
        "activation text": ", ".join(card.triggers),
        "preferred weight": 0,
        "notes": "\n".join(text for text in (card.usage, card.licence, card.author) if text),
    }


def _write_preview(path: Path, picture: Image.Image) -> None:
    small = picture.copy()
    small.thumbnail((PREVIEW_PX, PREVIEW_PX), Image.Resampling.LANCZOS)
    with atomic_file(path) as file:
        small.save(file, format="PNG")


def _require_own(target: Path, name: str, *, force: bool) -> None:
    """Refuse to replace a folder that is there, and with `force` one that holds anything but what is written here."""
    if not target.exists():
        return
    if not force:
        raise user_error(str(target), target.name, "is there already; add --force to replace it, or choose --out")
    own = {"README.md", "images", f"{name}.json", f"{name}.preview.png"}
    own |= {f"{name}.safetensors", f"{name}{NATIVE}.safetensors"}
    others = sorted(path.name for path in target.iterdir() if path.name not in own) if target.is_dir() else []
    if others:
        raise user_error(str(target), others[0], "was not written by this command; move it away, or choose --out")


def _notes(card: Card, folder: Path) -> list[str]:
    notes = []
    if not card.licence:
        notes.append('no licence is said, so nobody may use it: --set export.about.license="CC-BY-4.0", for example')
    if not card.triggers:
        notes.append("no trigger words are said; set export.about.trigger_words if there are any")
    if not card.pictures:
        notes.append("the run has no previews to show; put pictures into it, and name them in README.md")
    if not card.base_id:
        notes.append(f"the base model has no id on the Hub; say in {folder / 'README.md'} where others get it")
    return notes
