"""The first config of a person, made of a model, a folder of pictures and little else: for `init`, and `fit` alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.commands.starting.seen import Pictures, card_memory_gib, opened_model, pictures_in, resolution_of
from sdtrain.config.draft import Written
from sdtrain.config.paths import read_toml
from sdtrain.config.read import overridden
from sdtrain.config.write import toml_value
from sdtrain.errors import Problem, UserError, printable
from sdtrain.families.known import FAMILIES
from sdtrain.models.checkpoints.hub import fetch_if_missing, is_missing
from sdtrain.training.start import draft_run

VIEWS = 100
"""How often each picture is to be seen: enough for a likeness, and few enough not to learn it by heart."""
FEWEST_STEPS, MOST_STEPS = 300, 4000
"""d needs a few hundred steps to be found and used; more can always be added."""
IMAGES_A_STEP = 4
NUM_PREVIEWS, LEAST_EVERY = 6, 20
MANY_PICTURES, RANK, RANK_OF_MANY = 500, 16, 32
USUAL_MEMORY_GIB = 12.0
"""What is taken for granted where no card tells its memory."""
USABLE = 0.9
"""The share of a card's memory that a run may take."""
FIXED_GIB, PICTURE_GIB = 5.6, 5.0
"""What SDXL needs in bfloat16 with a LoRA, and what each picture of 1024 x 1024 px adds: measured 10.5 and 25.3."""
ROOMY_GIB = 16.0
"""A smaller card that takes one picture at once is near its edge: activations are computed again there."""
COMMENT_COLUMN = 32
LONGEST_LINE = 120


@dataclass(frozen=True)
class Wishes:
    """What a person said of the run to be. Empty, 0 and None: nothing, so that it is inferred."""

    model: str = ""
    pictures: str = ""
    trigger: str = ""
    steps: int | None = None
    memory_gib: float | None = None
    name: str = ""
    output: str = ""
    several_cards: bool = False
    """Whether several processes are to train it together."""


@dataclass(frozen=True)
class Seen:
    """What was found of it. resolution_px: that of the model; None where it is not on this machine yet."""

    pictures: Pictures
    resolution_px: int | None
    card_gib: float | None


def look(wishes: Wishes, source: str) -> Seen:
    """Return what there is of what a person wishes. Raises UserError, naming `source`, with all that is missing."""
    problems = []
    if not wishes.model:
        what = "is missing: name a .safetensors file, a diffusers folder, a hub id, or builtin:tiny-sdxl to try it"
        problems.append(Problem("--model", what))
    if not wishes.pictures:
        problems.append(Problem("--pictures", "is missing: name the folder that the pictures are in"))
    problems += _unwritable(wishes)
    pictures = Pictures("", 0)
    if wishes.pictures and not problems:
        try:
            pictures = pictures_in(wishes.pictures)
            problems += _of_pictures(pictures, wishes)
        except (OSError, RuntimeError, ValueError) as error:  # a home of nobody, a zero byte
            problems.append(Problem("--pictures", f"{wishes.pictures} cannot be read: {error}"))
    if problems:
        raise UserError(source, problems)
    opened = opened_model(wishes.model)
    card = card_memory_gib() if wishes.memory_gib is None else None
    return Seen(pictures, resolution_of(opened) if opened else None, card)


def _unwritable(wishes: Wishes) -> Iterator[Problem]:
    """Yield a problem for each wish that no TOML file can hold: names of files need not be text."""
    texts = {"--model": wishes.model, "--pictures": wishes.pictures, "--trigger": wishes.trigger}
    for option, text in {**texts, "--output": wishes.output}.items():
        if text != text.encode("utf-8", "replace").decode("utf-8"):
            yield Problem(option, f"{text} is not text in UTF-8, as a config is; rename it")


def _of_pictures(pictures: Pictures, wishes: Wishes) -> Iterator[Problem]:
    lacking = pictures.num - pictures.num_captioned
    if not pictures.num:
        what = "no pictures in" if pictures.is_there else "no such folder:"
        yield Problem("--pictures", f"{what} {pictures.path}; name the folder that they are in")
    elif lacking and not (pictures.concepts or wishes.trigger):
        what = (
            f"is missing, and {lacking} of {_counted(pictures.num)} in {pictures.path} have no caption: give the word "
            "that is to stand for them, or write a caption for each into a .txt file of the same name"
        )
        yield Problem("--trigger", what)


def written_first(wishes: Wishes, overrides: Sequence[str], *, resume: bool = False) -> Written:
    """Return the table of a run without a config, with overrides. Raises UserError with all that is missing.

    A model that is named by a hub id and not on this machine is fetched, for it says how large pictures are to be;
    not where the run cannot begin anyway, which is then told.
    """
    source, seen = f"fit --model {wishes.model} --pictures {wishes.pictures}", look(wishes, "fit")
    written = overridden(read_toml(first_config(wishes, seen)), source, overrides)
    draft = draft_run(written, resume=resume)
    if seen.resolution_px is not None or not draft.is_sound or not is_missing(draft.config.model):
        return written
    fetch_if_missing(draft.config.model)
    return overridden(read_toml(first_config(wishes, look(wishes, "fit"))), source, overrides)


def first_config(wishes: Wishes, seen: Seen, file: str = "FILE") -> str:
    """Return the config of a first run as TOML, with what was inferred and why in comments. file: how it is called."""
    return "\n".join(_written(_sections(wishes, seen), _head(wishes, seen, file))) + "\n"


def name_of(wishes: Wishes) -> str:
    """Return the name of a run: the one that was wished for, or what is left of its trigger or its folder's name."""
    folder = wishes.pictures.rpartition(":")[2]
    named = (wishes.name, _plain(wishes.trigger), _plain(Path(folder).absolute().name))
    return next((name for name in named if name), "first")


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60]


@dataclass(frozen=True)
class Line:
    """A setting, and why it is so."""

    key: str
    value: object
    why: str = ""


Sections = Sequence[tuple[str, Sequence[Line]]]


def _sections(wishes: Wishes, seen: Seen) -> Sections:
    steps = _steps(wishes, seen.pictures)
    output = [Line("output", wishes.output)] if wishes.output else []
    return [
        ("", [Line("name", name_of(wishes)), *output, steps]),
        ("[model]", [Line("path", wishes.model)]),
        ("[method]", [Line("kind", "lora"), _rank(seen.pictures)]),
        ("[[data.folder]]", list(_folder(wishes, seen.pictures))),
        *_sizes(wishes, seen),
        ("[optimizer]", [Line("preset", "lora", _why_preset(seen.pictures))]),
        ("[preview]", [_previews(steps.value)]),
    ]


def _steps(wishes: Wishes, pictures: Pictures) -> Line:
    if wishes.steps is not None:
        return Line("steps", wishes.steps, "as asked for; more can be added later: --resume --set steps=+500")
    wanted = round(pictures.num * VIEWS / IMAGES_A_STEP / 50) * 50
    steps = min(MOST_STEPS, max(FEWEST_STEPS, wanted))
    times = round(steps * IMAGES_A_STEP / pictures.num)
    why = f"{_counted(pictures.num)}, each seen up to {times} times, {IMAGES_A_STEP} a step"
    if steps != wanted:
        why += f" (at {'least' if steps > wanted else 'most'} {steps})"
    return Line("steps", steps, f"{why}; more later: --resume --set steps=+500")


def _rank(pictures: Pictures) -> Line:
    if pictures.num < MANY_PICTURES:
        return Line("rank", RANK, f"enough for {_counted(pictures.num)}; {RANK_OF_MANY} from {MANY_PICTURES} on")
    return Line("rank", RANK_OF_MANY, f"{_counted(pictures.num)} hold more than rank {RANK} keeps")


def _why_preset(pictures: Pictures) -> str:
    return f"a LoRA of the U-Net alone: {_counted(pictures.num)} need no change of what words mean"


def _previews(steps: object) -> Line:
    assert isinstance(steps, int)
    every = max(LEAST_EVERY, steps // NUM_PREVIEWS)
    return Line(
        "every",
        every - every % 10,
        "steps; without `prompts`, the first captions of your own pictures are drawn",
    )


def _folder(wishes: Wishes, pictures: Pictures) -> Iterator[Line]:
    yield Line("path", wishes.pictures)
    if pictures.concepts:
        yield Line("folder_names", "repeats_concept", "folders named 10_sks dog: seen 10 times, captioned so")
    elif pictures.captions != "txt":
        yield Line("captions", pictures.captions, "that is where the captions were found")
    if wishes.trigger:
        yield Line("trigger", wishes.trigger, "put in front of the captions that lack it; use it in prompts")
    lacking = pictures.num - pictures.num_captioned
    if lacking and wishes.trigger and not pictures.concepts:
        yield Line("missing_captions", "empty", f"{lacking} of {pictures.num} have none: the trigger alone is theirs")
    if pictures.has_masks:
        yield Line("masks", "beside", "name.mask.png says which part of name.png counts")


def _sizes(wishes: Wishes, seen: Seen) -> Iterator[tuple[str, Sequence[Line]]]:
    """Yield the sections that say how large pictures are and how many are computed at once."""
    side = seen.resolution_px or FAMILIES["sdxl"].resolution_px
    why = "what the model was made for" if seen.resolution_px else "that of SDXL; the model is not on this machine yet"
    lines = [Line("resolution_px", side, why)]
    if side < 512:
        lines.append(Line("bucket_step_px", 32, "small pictures need finer steps between their shapes"))
    memory, source = _memory(wishes, seen)
    area = (side / FAMILIES["sdxl"].resolution_px) ** 2
    batch = next((num for num in (4, 2, 1) if FIXED_GIB + num * PICTURE_GIB * area <= USABLE * memory), 0)
    recomputes = batch == 0 or (batch == 1 and memory < ROOMY_GIB)
    doubt = "" if batch else ", which may be too little: `sdtrain plan` says"
    lines += [
        Line("batch_size", max(1, batch), f"pictures at once, {source}{doubt}"),
        Line("gradient_accumulation", IMAGES_A_STEP // max(1, batch), f"times: {IMAGES_A_STEP} pictures a step"),
    ]
    yield "[data]", lines
    adapts = (
        [] if wishes.several_cards else [Line("on_oom", "adapt", "go on with fewer pictures at once, if it must be")]
    )
    saving = Line("gradient_checkpointing", recomputes, "less memory, slower steps" if recomputes else "not needed")
    yield "[memory]", [saving, *adapts]


def _memory(wishes: Wishes, seen: Seen) -> tuple[float, str]:
    if wishes.memory_gib is not None:
        return wishes.memory_gib, f"for {wishes.memory_gib:g} GB"
    if seen.card_gib is not None:
        return seen.card_gib, f"for this card's {seen.card_gib:.0f} GB"
    return USUAL_MEMORY_GIB, f"for a card of {USUAL_MEMORY_GIB:g} GB; no card was found here that tells its own"


def _head(wishes: Wishes, seen: Seen, file: str) -> list[str]:
    return [
        f"# A LoRA of {printable(wishes.model)} on {_counted(seen.pictures.num)} in {printable(wishes.pictures)}.",
        "# Everything that is not said here has a default: `sdtrain explain` tells them all.",
        f"#   sdtrain check {printable(file)}",
        f"#   sdtrain fit {printable(file)}",
    ]


def _written(sections: Sections, head: Sequence[str]) -> Iterator[str]:
    yield from head
    for title, lines in sections:
        yield ""
        if title:
            yield title
        for line in lines:
            text, why = f"{line.key} = {toml_value(line.value)}", f"# {line.why}"
            both = f"{text:<{COMMENT_COLUMN}} {why}"
            if not line.why:
                yield text
            elif len(both) <= LONGEST_LINE:
                yield both
            else:
                yield from (why, text)


def _counted(num: int) -> str:
    return f"{num:,} picture{'' if num == 1 else 's'}"
