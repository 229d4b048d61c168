"""`sdtrain cache`: encodes pictures and captions ahead of a run, and tells and removes what is not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from sdtrain.commands.libraries import quiet_pillow
from sdtrain.config.read import read_draft
from sdtrain.config.schema import Config
from sdtrain.data.entries.inventory import Inventory, remove_entries, take_inventory
from sdtrain.data.entries.needed import encode_needed, find_needed
from sdtrain.data.examples import Example
from sdtrain.data.identity.digests import picture_digests
from sdtrain.data.identity.held_out import held_out_examples, training_examples
from sdtrain.errors import UserError, user_error
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.keeping.disk import require_cache_room, size
from sdtrain.training.keeping.standing import cache_folder, contradictions, remembered_digests
from sdtrain.training.prepare import encoders_of, held_out_config, load, seen_whole
from sdtrain.training.run import open_run
from sdtrain.training.start import inspect_run, stored_config
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.text import say

SHOWN_RUNS = 5


@dataclass(frozen=True)
class _Wanted:
    """What one config wants of its cache."""

    config: Config
    opened: OpenedModel
    examples: list[Example]
    digests: list[bytes]

    @property
    def cache(self) -> Path:
        """The folder, which entries in use and entries that are found must name alike, whatever links lead there."""
        return cache_folder(self.config).resolve()


@dataclass(frozen=True)
class Held:
    """What lies in a cache, how much of it the configs use, and what was removed."""

    folder: str
    files: int
    num_bytes: int
    used_files: int
    used_bytes: int
    lacking_files: int
    """How many that they use are not there yet."""
    left_over_files: int
    """What killed processes left."""
    left_over_bytes: int
    removed_files: int = 0
    removed_bytes: int = 0


def fill_cache(paths: Sequence[Path], overrides: Sequence[str], console: Console, *, verify: bool) -> list[Held]:
    """Encode what the caches of the configs lack; say and return what lies there then.

    verify: whether every byte of pictures and entries is read. Raises UserError with all that is wrong with a config.
    """
    found = []
    for wanted in _read(paths, overrides, console, verify=verify):
        require_cache_room(wanted.cache, wanted.config, wanted.examples)
        needed = _needed(wanted, console, encode=True, verify=verify)
        found.append(_held(wanted.cache, take_inventory(wanted.cache), needed))
        _tell(found[-1], 1, console)
    return found


def size_up(paths: Sequence[Path], overrides: Sequence[str], console: Console) -> list[Held]:
    """Say and return what lies in the caches of the configs, used and not. Nothing is encoded. Raises UserError."""
    folders = _by_folder(_read(paths, overrides, console), console)
    found = [_held(folder, take_inventory(folder), needed) for folder, needed in folders.items()]
    for held in found:
        _tell(held, len(paths), console)
    return found


def prune_caches(
    paths: Sequence[Path], overrides: Sequence[str], console: Console, *, yes: bool, ask: Callable[[str], bool] | None
) -> list[Held]:
    """Remove the entries that none of the configs uses, and what killed processes left; return what was there before.

    yes: without asking. ask: answers a question; None: nobody can be asked. Raises UserError, also where that is so.
    """
    wanted = _read(paths, overrides, console)
    found = []
    for folder, needed in _by_folder(wanted, console).items():
        inventory = take_inventory(folder)
        found.append(_held(folder, inventory, needed))
        _tell(found[-1], len(paths), console)
        say(console, *_other_runs(folder, [one.config for one in wanted]))
        unused = {path: num for path, num in inventory.entries.items() if path not in needed}
        unused.update(inventory.left_over)
        if not unused:
            say(console, "nothing to remove")
            continue
        what = f"{_files(len(unused))}, {size(sum(unused.values()))}"
        if not yes and ask is None:
            raise user_error("cache", str(folder), f"{what} would be removed; add --yes to do so")
        if not yes and ask is not None and not ask(f"Remove {what}?"):
            say(console, "nothing was removed")
            continue
        remove_entries(unused)
        found[-1] = replace(found[-1], removed_files=len(unused), removed_bytes=sum(unused.values()))
        say(console, f"removed {what}")
    return found


def _read(paths: Sequence[Path], overrides: Sequence[str], console: Console, *, verify: bool = False) -> list[_Wanted]:
    """Return what the configs want. Raises UserError with all that is wrong with one, before any model is loaded."""
    quiet_pillow()
    found = []
    for path in paths:
        with ProgressLines(console) as progress:
            draft = read_draft(path, overrides)
            opened, examples = inspect_run(draft, decode=False, fetch=True, on_progress=progress.show)
            config = draft.require_sound()
            remembered = remembered_digests(config)
            examples = [*training_examples(examples), *held_out_examples(examples)]
            files = [example.path for example in examples]
            digests = picture_digests(files, remembered, progress.show, verify=verify)
            remembered.keep()
        say(console, *(f"note: {line}" for line in contradictions(remembered)))
        found.append(_Wanted(config, opened, examples, digests))
    return found


def _by_folder(wanted: Sequence[_Wanted], console: Console) -> dict[Path, set[Path]]:
    found: dict[Path, set[Path]] = {}
    for one in wanted:
        found.setdefault(one.cache, set()).update(_needed(one, console, encode=False))
    return found


def _needed(wanted: _Wanted, console: Console, *, encode: bool, verify: bool = False) -> set[Path]:
    """Return the entries of a config, encoded if that is asked for; the model is loaded, whose weights name them."""
    config, cache = wanted.config, wanted.cache
    run = open_run(config)
    model = load(run, wanted.opened)
    encoders = encoders_of(model, config)
    num = len(training_examples(wanted.examples))
    trained, apart = wanted.examples[:num], seen_whole(wanted.examples[num:])
    parts = [
        find_needed(config.data, trained, wanted.digests[:num], encoders, cache),
        find_needed(held_out_config(config).data, apart, wanted.digests[num:], encoders, cache),
    ]
    if encode:
        model.move_encoders(run.device, text=True)
        with ProgressLines(console) as progress:
            for needed in parts:
                encode_needed(needed, encoders, cache, progress.show, verify=verify)
    return {path for needed in parts for path in needed.paths()}


def _held(folder: Path, inventory: Inventory, needed: set[Path]) -> Held:
    entries = inventory.entries
    used = {path: num for path, num in entries.items() if path in needed}
    return Held(
        folder=str(folder),
        files=len(entries),
        num_bytes=sum(entries.values()),
        used_files=len(used),
        used_bytes=sum(used.values()),
        lacking_files=len(needed) - len(used),
        left_over_files=len(inventory.left_over),
        left_over_bytes=sum(inventory.left_over.values()),
    )


def _tell(held: Held, num_configs: int, console: Console) -> None:
    unused_files, unused_bytes = held.files - held.used_files, held.num_bytes - held.used_bytes
    by = "the config" if num_configs == 1 else f"the {num_configs} configs"
    say(
        console,
        f"{held.folder}: {_files(held.files)}, {size(held.num_bytes)}",
        f"  used by {by}: {_files(held.used_files)}, {size(held.used_bytes)}"
        + (f"; {held.lacking_files} that it needs are not there yet" if held.lacking_files else ""),
        f"  not used by {by}: {_files(unused_files)}, {size(unused_bytes)}",
        f"  left by killed processes: {_files(held.left_over_files)}, {size(held.left_over_bytes)}",
    )


def _other_runs(folder: Path, given: Sequence[Config]) -> list[str]:
    """Return a warning that names the runs beside the given ones which share the cache; they may still go on."""
    names = {(Path(config.output).expanduser().resolve(), config.name) for config in given}
    found = []
    for output in sorted({output for output, _ in names}):
        for path in sorted(output.glob("*/config.toml")):
            if (output, path.parent.name) not in names and _shares(path.parent, folder):
                found.append(str(path))
    if not found:
        return []
    shown = ", ".join(found[:SHOWN_RUNS]) + (", ..." if len(found) > SHOWN_RUNS else "")
    return [f"  other runs with this cache: {shown}; what only they use is removed unless their configs are given too"]


def _shares(run: Path, folder: Path) -> bool:
    try:
        return cache_folder(stored_config(run)).resolve() == folder
    except UserError:
        return False  # no run of this version; what it used cannot be told


def _files(num: int) -> str:
    return f"{num:,} {'file' if num == 1 else 'files'}"
