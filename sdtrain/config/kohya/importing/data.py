"""From folders, buckets and captions there to [data] and [[data.folder]] here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

from sdtrain.config.kohya.importing.findings import (
    Became,
    Finding,
    Lost,
    NotNeeded,
    Unreadable,
    direct,
    read_as,
    unread,
)
from sdtrain.config.kohya.importing.options import ForeignConfig, Option, Options
from sdtrain.config.kohya.importing.values import UnreadableError, count, flag, is_off, number, numbers, text, whole
from sdtrain.families.words import LATENT_FACTOR_PX

CountPictures = Callable[[str], int | None]
"""Returns the number of pictures in a folder and below it; None where there is no such folder."""

_REPEATED = re.compile(r"([0-9]+)_.*")
_TOKENS = 75
_LEAST_PX = 64
_EXTENSION = ("caption_extension", "caption_extention")
_DATA_DIRS = ("train_data_dir", "image_folder")
_REG_DIR = "reg_data_dir"
_CROPS = 4  # what stands for crops that are drawn without end
_GUI_MARKS = ("LoRA_type", "max_resolution", "num_cpu_threads_per_process", "model_list")


@dataclass(frozen=True)
class _Folder:
    """A folder of pictures: its path, the option that names it, how often each picture is seen in an epoch, the
    options that count for its captions, and the one that makes its pictures regularisation, if any does."""

    path: str
    option: Option
    repeats: int
    told: tuple[Option, ...]
    note: str = ""
    options: Options = field(default_factory=lambda: Options(()))
    regular: Option | None = None


def is_of_gui(options: Options) -> bool:
    """Return whether kohya_ss saved the file; what is missing has other defaults there than in sd-scripts."""
    return bool(options.having(*_GUI_MARKS))


def translate_data(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of the options about sizes, buckets, batches and captions."""
    options = _scope(config)
    yield from direct(options, "data.resolution_px", _resolution, "resolution", "max_resolution", note=_square(options))
    yield from direct(options, "data.batch_size", count, "batch_size", "train_batch_size")
    if options.find("train_batch_size", "batch_size") is None:
        yield Became("data.batch_size", 1, note="train_batch_size is not in the file; there it is 1 then")
    yield from direct(options, "data.gradient_accumulation", count, "gradient_accumulation_steps")
    yield from _bucket_step(options)
    yield from _aspects(options)
    small = options.find("bucket_no_upscale")
    yield from unread(small, flag)
    if small is not None and read_as(small, flag, False):
        yield Became("data.enlarge", False, (small,))
    yield from direct(options, "data.caption_dropout", _share, "caption_dropout_rate")
    length = options.find("max_token_length")
    if length is not None and not is_off(length.value):
        try:
            yield Became("data.caption_chunks", math.ceil(count(length.value) / _TOKENS), (length,), "chunks of 75")
        except UnreadableError as error:
            yield Unreadable(length, str(error))
    yield from direct(options, "validation.share", _share, "validation_split")
    yield from direct(options, "validation.seed", whole, "validation_seed")
    yield from direct(options, "validation.every", whole, "validate_every_n_steps")


def translate_folders(config: ForeignConfig) -> Iterator[Finding]:
    """Yield the folders of pictures: of the dataset config, or of the training's own folder with its `10_name`s."""
    seen: set[str] = set()
    folders = list(_folders(config))
    index = int(all(folder.regular for folder in folders))  # beside the stand-in where there is nothing but these
    for folder in folders:
        if folder.path in seen:
            yield Lost(folder.option, "named before: a folder is trained at one resolution, data.resolution_px")
        else:
            seen.add(folder.path)
            yield Became(f"data.folder[{index}].path", folder.path, (folder.option,), folder.note)
            yield Became(f"data.folder[{index}].repeats", folder.repeats, folder.told)
            yield from _masks(folder, f"data.folder[{index}]")
            yield from _flipped(folder, f"data.folder[{index}].flip")
            yield from _cropped(folder, f"data.folder[{index}].crops")
            if folder.regular:
                weight = config.arguments.find("prior_loss_weight")
                yield Became(f"data.folder[{index}].regularisation", True, (folder.regular,))
                yield from direct(config.arguments, f"data.folder[{index}].loss_weight", _weight, "prior_loss_weight")
                yield from unread(weight, _weight)
            yield from _wording(f"data.folder[{index}]", folder.options)
            index += 1
    for subset in config.subsets:
        yield from unread(subset.options.find("num_repeats"), count)
    if config.subsets:
        for option in config.arguments.having(*_DATA_DIRS, _REG_DIR):
            if option.is_set:
                yield NotNeeded(option, "the folders of the dataset config count")


def _wording(folder: str, options: Options) -> Iterator[Finding]:
    """Yield what becomes of the options that say where captions stand and how they vary."""
    yield from direct(options, f"{folder}.captions", _extension, *_EXTENSION)
    if options.find(*_EXTENSION) is None and (options.having(*_EXTENSION) or not is_of_gui(options)):
        yield Became(
            f"{folder}.captions", "caption", note="no caption_extension in the file; there it is .caption then"
        )
    yield from direct(options, f"{folder}.caption_prefix", text, "caption_prefix")
    yield from direct(options, f"{folder}.caption_suffix", text, "caption_suffix")
    yield from direct(options, f"{folder}.shuffle_tags", flag, "shuffle_caption")
    separator, kept = options.find("keep_tokens_separator"), options.find("keep_tokens")
    yield from direct(options, f"{folder}.keep_separator", text, "keep_tokens_separator")
    if separator is None or is_off(separator.value):
        yield from direct(options, f"{folder}.keep_tags", whole, "keep_tokens")
    elif kept is not None:
        yield NotNeeded(kept, "keep_tokens_separator counts, there too")
    yield from direct(options, f"{folder}.tag_separator", text, "caption_separator")
    yield from direct(options, f"{folder}.tag_dropout", _share, "caption_tag_dropout_rate")
    yield from direct(options, f"{folder}.wildcards", flag, "enable_wildcard")


def _extension(value: object) -> str:
    """Return the setting for a suffix of caption files; "" for the default. Raises UnreadableError for others."""
    match text(value).strip().lower().removeprefix("."):
        case "txt" | "":
            return ""
        case "caption":
            return "caption"
        case _:
            raise UnreadableError('".txt" or ".caption"; rename the files')


def images_of_epoch(config: ForeignConfig, pictures_in: CountPictures) -> int | None:
    """Return how many pictures an epoch has, repeats counted; None where the folders are not all here."""
    images = 0
    paths: set[str] = set()
    for folder in _folders(config):
        if folder.path not in paths and not folder.regular:
            found = pictures_in(folder.path)
            if not found:
                return None
            images += found * folder.repeats
            paths.add(folder.path)
    if any(folder.regular for folder in _folders(config)):
        images *= 2  # as many of these are seen, there and here
    return images or None


def images_of_step(config: ForeignConfig) -> int:
    """Return how many pictures a step has: those of a batch times the batches that are accumulated."""
    options = _scope(config)
    batch = read_as(options.find("batch_size", "train_batch_size"), count, 1)
    return batch * read_as(options.find("gradient_accumulation_steps"), count, 1)


def _scope(config: ForeignConfig) -> Options:
    """Return the options that count for the data: those of the first dataset above those of the training."""
    first = config.subsets[0].options.all if config.subsets else ()
    return Options((*config.arguments.all, *first))


def _folders(config: ForeignConfig) -> Iterator[_Folder]:
    if config.subsets:
        for subset in config.subsets:
            path = subset.options.find("image_dir")
            if path is not None and isinstance(path.value, str):
                regular = subset.options.find("is_reg")
                yield replace(
                    _subset_folder(path, subset.options),
                    options=Options((*config.arguments.all, *subset.options.all)),
                    regular=regular if read_as(regular, flag, False) else None,
                )
        return
    for names in (_DATA_DIRS, (_REG_DIR,)):
        option = config.arguments.find(*names)
        if option is not None and option.is_set and isinstance(option.value, str):
            yield from _folders_in(option, config.arguments)


def _folders_in(option: Option, arguments: Options) -> Iterator[_Folder]:
    """Yield the folders `10_name` in the folder that an option names, or that one where none is in it."""
    root = text(option.value)
    folder = Path(root).expanduser()
    regular = option if option.name == _REG_DIR else None
    inside = _repeated(folder)
    for name, times in inside:
        inner = f"{root.rstrip('/')}/{name}"
        yield _Folder(inner, option, times, (option,), "repeats by the folder's name", arguments, regular)
    if not inside:
        repeats = arguments.find("dataset_repeats")
        away = "not here: folders in it such as `10_name` are entries of their own, repeats = 10"
        note = "" if folder.is_dir() else away
        told = (repeats,) if repeats else ()
        yield _Folder(root, option, read_as(repeats, count, 1), told, note, arguments, regular)


def _subset_folder(path: Option, options: Options) -> _Folder:
    repeats = options.find("num_repeats", "dataset_repeats")
    note = ""
    if (named := _REPEATED.fullmatch(PureWindowsPath(path.value).name)) and repeats is None:
        note = f"the {named[1]} in its name counts in train_data_dir only"
    return _Folder(text(path.value), path, read_as(repeats, count, 1), (repeats,) if repeats else (), note)


def _repeated(folder: Path) -> list[tuple[str, int]]:
    """Return the names of the folders `10_name` in a folder, and their repeats; nothing where it cannot be read."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return []
    found = [(name, _REPEATED.fullmatch(name)) for name in names]
    return [(name, int(match[1][:9])) for name, match in found if match and int(match[1][:9]) > 0]


def _flipped(folder: _Folder, setting: str) -> Iterator[Finding]:
    option = folder.options.find("flip_aug")
    yield from unread(option, flag)
    if option is not None and read_as(option, flag, False):
        yield Became(setting, True, (option,))


def _cropped(folder: _Folder, setting: str) -> Iterator[Finding]:
    option = folder.options.find("random_crop")
    yield from unread(option, flag)
    if option is not None and read_as(option, flag, False):
        yield Became(setting, _CROPS, (option,), "so many crops are cached, of which each step draws one")


def _masks(folder: _Folder, setting: str) -> Iterator[Finding]:
    """Yield what says there which part of a folder's pictures counts: their alpha channel, or pictures of their own."""
    options = folder.options
    masked, alpha = options.find("masked_loss"), options.find("alpha_mask")
    for option in (masked, alpha):
        yield from unread(option, flag)
    path = options.find("conditioning_data_dir")
    if path is not None and isinstance(path.value, str) and path.value:
        yield Became(f"{setting}.masks", "folder", (masked,) if masked else (), "the red of masks there, grey here")
        yield Became(f"{setting}.mask_path", text(path.value), (path,), "masks must be PNG files")
    elif alpha is not None and read_as(alpha, flag, False):
        yield Became(f"{setting}.masks", "alpha", (alpha, *((masked,) if masked else ())))


def _bucket_step(options: Options) -> Iterator[Finding]:
    step = options.find("bucket_reso_steps")
    if step is not None and not is_off(step.value):
        yield from unread(step, count)
        wanted = read_as(step, count, 0)
        multiple = math.ceil(wanted / LATENT_FACTOR_PX) * LATENT_FACTOR_PX
        if multiple:
            note = "" if multiple == wanted else f"the next multiple of {LATENT_FACTOR_PX}, the VAE's factor"
            yield Became("data.bucket_step_px", multiple, (step,), note)


def _aspects(options: Options) -> Iterator[Finding]:
    """Yield the limit of aspect ratios: the square without buckets, else what their sides may be."""
    enabled = options.find("enable_bucket", "create_buckets")
    lowest, highest = options.find("min_bucket_reso"), options.find("max_bucket_reso")
    sides = tuple(option for option in (lowest, highest) if option is not None)
    on = read_as(enabled, flag, True) if enabled else is_of_gui(options) or not options.find("resolution")
    yield from unread(enabled, flag)
    if not on:
        note = "every picture is cropped to the square" + ("" if _square(options) else ", as there")
        if enabled is None:
            note = f"enable_bucket is not in the file; there it is off then, and {note}"
        yield Became("data.max_aspect", 1.0, (enabled,) if enabled else (), note)
        for side in sides:
            yield NotNeeded(side, "there is one bucket")
        return
    if enabled is not None:
        yield NotNeeded(enabled, "buckets are always on")
    for side in sides:
        yield from unread(side, _side)
    area = float(read_as(options.find("resolution", "max_resolution"), _resolution, 1024)) ** 2
    longest, shortest = read_as(highest, _side, 0.0), read_as(lowest, _side, 0.0)
    limits = [longest**2 / area] if longest >= 1 else []
    limits += [area / shortest**2] if shortest >= 1 else []
    if limits and min(limits) >= 1.5:
        yield Became("data.max_aspect", float(f"{min(limits):.3g}"), sides, "longest over shortest side of a bucket")
    else:
        for side in sides:
            yield NotNeeded(side, "buckets have the area of the resolution; data.max_aspect limits their shape")


def _side(value: object) -> float:
    """Return the side of a bucket in pixels. Raises UnreadableError."""
    return number(value, least=0, most=2**20)


def _square(options: Options) -> str:
    sides = read_as(options.find("resolution", "max_resolution"), numbers, [0.0])
    if len(sides) > 1 and sides[0] != sides[1]:
        return "the side of the square of that area; buckets have all shapes"
    return ""


def _resolution(value: object) -> int:
    sides = numbers(value)
    if len(sides) > 2 or min(sides) < 1 or max(sides) > 2**20:
        raise UnreadableError("one side or two, in pixels")
    side = round(math.sqrt(sides[0] * sides[-1]))
    if side < _LEAST_PX:
        raise UnreadableError(f"{_LEAST_PX} pixels or more")
    return side


def _weight(value: object) -> float:
    return number(value, above=0, most=1000)


def _share(value: object) -> float:
    return number(value, least=0, most=1)
