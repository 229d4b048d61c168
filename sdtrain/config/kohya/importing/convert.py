"""Makes a config of ours of files of sd-scripts or kohya_ss: translates, makes sure that it is sound, writes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdtrain.config.draft import Written, draft_of
from sdtrain.config.kohya.importing.data import (
    CountPictures,
    images_of_epoch,
    images_of_step,
    translate_data,
    translate_folders,
)
from sdtrain.config.kohya.importing.findings import Became, Finding, Lost, NotNeeded, read_as
from sdtrain.config.kohya.importing.method import translate_author, translate_method, translate_model
from sdtrain.config.kohya.importing.networks import translate_networks
from sdtrain.config.kohya.importing.optimizer import translate_optimizer
from sdtrain.config.kohya.importing.options import ForeignConfig
from sdtrain.config.kohya.importing.outcomes import Outcome, outcomes
from sdtrain.config.kohya.importing.previews import translate_previews
from sdtrain.config.kohya.importing.training import translate_machine, translate_objective, translate_steps
from sdtrain.config.kohya.importing.values import flag, is_off, text
from sdtrain.config.kohya.importing.written import config_text
from sdtrain.config.kohya.known import EMBEDDINGS, OTHER_MODELS
from sdtrain.config.paths import begins_with, location_of
from sdtrain.errors import Problem, UserError

_OTHER_NETWORKS = re.compile(r"flux|sd3|lumina|hunyuan|anima|chroma|lllite|control_net", re.IGNORECASE)
_FOLDER = re.compile(r"data\.folder\[\d+\]\.path")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_ORDER = ("name", "output", "steps", "seed")


@dataclass(frozen=True)
class Imported:
    """The text of the new config, and what became of each option."""

    text: str
    outcomes: tuple[Outcome, ...]


def convert(config: ForeignConfig, count: CountPictures) -> Imported:
    """Return the config of ours that foreign options mean. count: counts the pictures in a folder.

    What it says has been read by our own reader; a setting that it refuses is left out, and told with the reason.
    Raises UserError for a config that trains what sdtrain does not.
    """
    _refuse_others(config)
    findings = [*_translated(config, count)]
    became = [finding for finding in findings if isinstance(finding, Became)]
    chosen, rest = _one_each(became)
    sound, refused = _sound(chosen, {one.setting: one for one in became if not one.options}, config)
    told = [*(finding for finding in findings if not isinstance(finding, Became)), *rest, *refused, *sound]
    found = outcomes(config.everything, told)
    return Imported(config_text(config.sources, sound, found), tuple(found))


def _translated(config: ForeignConfig, count: CountPictures) -> Iterator[Finding]:
    images, per_step = images_of_epoch(config, count), images_of_step(config)
    steps_per_epoch = None if images is None else -(-images // per_step)
    yield from _names(config)
    yield from translate_machine(config)
    yield from translate_steps(config, steps_per_epoch, per_step)
    yield from translate_model(config)
    yield from translate_method(config)
    yield from translate_author(config)
    yield from translate_networks(config)
    yield from translate_data(config)
    yield from translate_folders(config)
    yield from translate_optimizer(config)
    yield from translate_objective(config)
    yield from translate_previews(config)


def _names(config: ForeignConfig) -> Iterator[Finding]:
    """Yield the name, and what stands in for a model and folders that the files do not name."""
    option = config.arguments.find("output_name")
    given = read_as(option, text, "")
    stem = config.sources[0].rpartition(".")[0] if config.sources else ""
    name = next(filter(None, (_NAME.sub("-", word).strip("-._") for word in (given, stem))), "imported")
    yield Became("name", name, (option,) if option and given else ())
    yield Became("model.path", "models/model.safetensors", note="not in the file: name the model to train on")
    yield Became("data.folder[0].path", "pictures", note="not in the file: name the folder of pictures")


def _one_each(all_of_them: Sequence[Became]) -> tuple[list[Became], list[Finding]]:
    """Return the first finding of each setting, and the options of the others, which are not needed then.

    A stand-in, which has no option behind it, gives way to what comes later.
    """
    chosen: dict[str, Became] = {}
    rest: list[Finding] = []
    for became in all_of_them:
        before = chosen.get(became.setting)
        if before is None or not before.options:
            chosen[became.setting] = became
        else:
            rest += [NotNeeded(option, f"{became.setting} follows from others") for option in became.options]
    return list(chosen.values()), rest


def _sound(
    chosen: Sequence[Became], stand_ins: Mapping[str, Became], config: ForeignConfig
) -> tuple[list[Became], list[Finding]]:
    """Return the settings that our reader accepts together, and the options of those that it refuses.

    stand_ins: what takes the place of a setting that is refused and must be there.
    """
    kept, refused = list(chosen), list[Finding]()
    while True:
        table = _table(kept)
        problems = draft_of(Written("import", table, table)).problems
        if not problems:
            return sorted(kept, key=_place), refused
        problem = problems[0]
        wrong = _responsible(kept, problem)
        kept.remove(wrong)
        stand_in = stand_ins.get(_FOLDER.sub("data.folder[0].path", wrong.setting))  # every folder must have a path
        if wrong.options and stand_in:
            kept.append(replace(stand_in, setting=wrong.setting))
        refused += [Lost(option, f"{problem.where} {problem.what}") for option in wrong.options]


def _responsible(kept: Sequence[Became], problem: Problem) -> Became:
    """Return the setting that a problem comes from: the one it names, else another that it looks at."""
    for where in (problem.where, *problem.settings):
        for became in kept:
            place, own = location_of(where), location_of(became.setting)
            if begins_with(place, own) or begins_with(own, place):
                return became
    raise ValueError(f"a stand-in is not sound: {problem.where} {problem.what}")


def _place(became: Became) -> int:
    """Return where a setting stands among those without a section."""
    return _ORDER.index(became.setting) if became.setting in _ORDER else len(_ORDER)


def _table(settings: Sequence[Became]) -> dict[str, Any]:
    """Return the plain table of settings."""
    table: dict[str, Any] = {}
    for became in settings:
        inner: Any = table
        location = location_of(became.setting)
        for part, following in itertools.pairwise(location):
            if isinstance(part, int):
                while len(inner) <= part:
                    inner.append({})
                inner = inner[part]
            else:
                inner = inner.setdefault(part, [] if isinstance(following, int) else {})
        inner[location[-1]] = became.value
    return table


def _refuse_others(config: ForeignConfig) -> None:
    """Raise UserError for what sdtrain does not train, since no config of ours could mean it."""
    options = config.arguments
    problems = [
        Problem(option.place, "is on, but sdtrain trains SDXL and Stable Diffusion 1.x and 2.x only")
        for option in options.having(*OTHER_MODELS)
        if not is_off(option.value) and read_as(option, flag, True)
    ]
    problems += [
        Problem(option.place, "is for an embedding (textual inversion); sdtrain trains networks, as LoRA or in full")
        for option in options.having(*EMBEDDINGS)
        if not is_off(option.value)
    ]
    problems += [
        Problem(option.place, f"{option.value} is for another sort of model; sdtrain trains SDXL and SD 1.x and 2.x")
        for option in options.having("network_module", "LoRA_type", "model_train_type")
        if isinstance(option.value, str) and _OTHER_NETWORKS.search(option.value)
    ]
    if problems:
        raise UserError(" and ".join(config.sources), problems)
