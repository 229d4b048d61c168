"""`sdtrain merge`: writes a base model with LoRAs merged into it, or one LoRA in place of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.lora_file import LoraFile, read_lora
from sdtrain.adapters.layers import layer_names
from sdtrain.adapters.shares import Share, unmatched
from sdtrain.commands.files.free import require_free
from sdtrain.commands.files.made_of import Part, joined_words, made_of_entries, part_of
from sdtrain.commands.files.streamed import Adding, Sources, changed_file, changing
from sdtrain.config.schema import ModelConfig
from sdtrain.diffusion.words import Prediction
from sdtrain.errors import Problem, UserError
from sdtrain.families.family import Family
from sdtrain.families.metadata import resolution_of
from sdtrain.families.modelspec import Description, kept_words, spec_metadata
from sdtrain.families.words import Resolution
from sdtrain.files.header import read_header
from sdtrain.files.locations import location
from sdtrain.files.progress import Progress, unseen
from sdtrain.files.tensors import write_safetensors
from sdtrain.models.checkpoints.components import load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.checkpoints.locate import SingleFile, fallback_folder, open_checkpoint
from sdtrain.models.checkpoints.markers import CONFIGS_KEY, NO_CAPTION_KEY, no_caption_of, scheduler_of
from sdtrain.models.checkpoints.networks import trainable_outlines
from sdtrain.models.checkpoints.single_file import seal, write_single_file
from sdtrain.models.load import load_model
from sdtrain.models.model import Layout, Model


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    changed: int
    """The number of layers that changed."""
    left_out: tuple[Problem, ...]
    """What of the files could not be used."""
    hash: str = ""
    """`0x` and the SHA-256 of what was written, by which other tools know it; empty for a folder."""
    error: float = 0.0
    """The share of the change that its rank loses, |dW - written| / |dW|; 0 for a whole model."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """A model on the CPU, with networks in float32, and what its file says of it."""

    model: Model
    resolution_px: Resolution
    """The size of the pictures that it was made for."""
    metadata: Mapping[str, str]


def read_base(path: str, components: str = "") -> tuple[Model, Resolution]:
    """Return a model on the CPU, with networks in float32, and the size of pictures it was made for.

    Raises UserError.
    """
    found = read_whole(path, components)
    return found.model, found.resolution_px


def read_whole(path: str, components: str = "") -> Base:
    """Return a model and what its file says of it. Raises UserError."""
    config = ModelConfig(path=path, components=components)
    opened = open_model(config, path)
    model = load_model(opened, config, device=CPU, dtype=torch.float32)
    return Base(model, trained_size(opened), opened.metadata)


def trained_size(opened: OpenedModel) -> Resolution:
    """Return the size of the pictures that a model was made for, by its file or else by its family."""
    return size_of(opened.metadata, opened.family, opened.prediction)


def size_of(metadata: Mapping[str, str], family: Family, prediction: Prediction) -> Resolution:
    """Return the same, for what is known of a model."""
    return resolution_of(metadata) or family.native_resolution(predicts_v=prediction == "v_prediction")


def merge(
    base: str,
    files: Sequence[tuple[Path, Share]],
    out: Path,
    layout: Layout,
    components: str = "",
    *,
    partial: bool = False,
    force: bool = False,
    show: Progress = unseen,
) -> Merged:
    """Write `base` with adapter files merged in, each times its weights; return what was done.

    Values are read, changed in float32 and written one at a time. A single file that becomes a single file keeps every
    tensor that nothing changes byte for byte. partial: whether layers that cannot be used are left out. force: whether
    a file that is there is replaced. show: is told how many layers are done.

    The base's author and licence are kept: the result is a work made of theirs. Raises UserError.
    """
    require_free(out, force=force, folder=layout == "folder")
    if layout == "single-file" and location(base).is_file():
        checkpoint = open_checkpoint(location(base), "")
        assert isinstance(checkpoint, SingleFile), "a file is no folder"
        return _merge_file(checkpoint, files, out, fallback_folder(components), show, partial=partial)
    return _merge_model(base, files, out, layout, components, show, partial=partial)


def _merge_file(
    checkpoint: SingleFile,
    files: Sequence[tuple[Path, Share]],
    out: Path,
    fallback: Path | None,
    show: Progress,
    *,
    partial: bool,
) -> Merged:
    header, family = checkpoint.header, checkpoint.family
    outlines = trainable_outlines(checkpoint, fallback)
    read = read_files(files, {name: outline.network for name, outline in outlines.items()}, partial=partial)
    scheduler = scheduler_of(checkpoint, fallback)
    prediction: Prediction = "v_prediction" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"
    described = _described(out, header.metadata, size_of(header.metadata, family, prediction), part_of(header), read)
    metadata = {
        **{key: header.metadata[key] for key in (CONFIGS_KEY,) if key in header.metadata},
        NO_CAPTION_KEY: no_caption_of(checkpoint),
        **spec_metadata(described, family, scheduler),
        "format": "pt",
    }
    tensors = changed_file(header, outlines, read.adding.shown(show))
    hashes = write_safetensors(out, tensors, metadata, seal=seal, finite_only=True)
    return Merged(len(read.adding.layers()), read.left_out, f"0x{hashes.data}")


def _merge_model(
    base: str,
    files: Sequence[tuple[Path, Share]],
    out: Path,
    layout: Layout,
    components: str,
    show: Progress,
    *,
    partial: bool,
) -> Merged:
    opened = open_model(ModelConfig(path=base, components=components), base)
    sources = Sources({})
    found = load_components(opened, torch.float32, sources.note)
    trainable: dict[str, nn.Module] = {name: found.networks[name] for name in opened.family.trainable}
    read = read_files(files, trainable, partial=partial)
    whole = Part(opened.checkpoint.path.name, "")
    part = part_of(opened.checkpoint.header) if isinstance(opened.checkpoint, SingleFile) else whole
    described = _described(out, opened.metadata, trained_size(opened), part, read)
    change = changing(sources.of(found.networks), read.adding.shown(show))
    told = ""
    if layout == "folder":
        write_folder(found, out, described, change=change)
    else:
        told = write_single_file(found, out, described, change=change)
    return Merged(len(read.adding.layers()), read.left_out, told)


@dataclass(frozen=True)
class ReadFiles:
    """Adapter files that were read, in the order in which they were named."""

    files: tuple[LoraFile, ...]
    parts: tuple[Part, ...]
    adding: Adding

    @property
    def left_out(self) -> tuple[Problem, ...]:
        """What of them could not be used."""
        return tuple(problem for file in self.files for problem in file.left_out)


def read_files(files: Sequence[tuple[Path, Share]], networks: Mapping[str, nn.Module], *, partial: bool) -> ReadFiles:
    """Read adapter files for networks. Raises UserError with what is wrong in all of them and in their weights."""
    layers = {name: layer_names(network) for name, network in networks.items()}
    found: list[tuple[LoraFile, Part]] = []
    problems: list[Problem] = []
    for path, share in files:
        problems += [Problem("--weight", text) for text in unmatched(share, layers)]
        try:
            header = read_header(path)
            found.append((read_lora(path, networks, partial=partial), part_of(header, share)))
        except UserError as error:
            if len(files) == 1 and not problems:
                raise
            problems += [Problem(f"{path.name}: {problem.where}", problem.what) for problem in error.problems]
    if problems:
        raise UserError("merge", problems)
    order = sorted(found, key=lambda one: (one[1].hash, one[1].share.text()))
    adding = Adding([(file.adapters, part.share) for file, part in order])
    return ReadFiles(tuple(file for file, _ in found), tuple(part for _, part in found), adding)


def _described(
    out: Path, metadata: Mapping[str, str], resolution_px: Resolution, base: Part, read: ReadFiles
) -> Description:
    """Return what people should read about a merged model: what its base's author says, and what is in it."""
    words = joined_words([metadata, *(file.metadata for file in read.files)], ("trigger_phrase",))
    more = {**kept_words(metadata), **words, **made_of_entries([base, *read.parts])}
    return Description(title=out.stem, resolution_px=resolution_px, more=more)


def is_adapter_file(path: str) -> bool:
    """Return whether a file holds adapters; what cannot be read is told by who opens it as a model."""
    try:
        return path.endswith(".safetensors") and bool(describe_file(location(path)).kind)
    except UserError:
        return False
