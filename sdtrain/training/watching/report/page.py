"""Makes the page out of a run's folder: the same code while it trains and afterwards; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError, printable
from sdtrain.files.header import explain
from sdtrain.files.writer import write_bytes
from sdtrain.training.start import stored_config
from sdtrain.training.watching.report.about import read_about
from sdtrain.training.watching.report.chart import sample_of, short
from sdtrain.training.watching.report.curves import charts, smoothed
from sdtrain.training.watching.report.numbers import Numbers, read_numbers
from sdtrain.training.watching.report.pictures import Shelf
from sdtrain.training.watching.report.settings import differing
from sdtrain.training.watching.report.templates import template
from sdtrain.training.watching.text import shell_word

NAME = "report.html"
MOST_ROWS = 40
"""The most rows of a table of numbers: the first, the last and others evenly between them."""
MOST_NOTES = 200
LONGEST_TEXT, LONGEST_CONFIG = 1_500, 60_000
"""Letters of a note, a prompt or a value, and of all settings; the rest is left out, which is said."""
MOST_SETTINGS = 200

Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
    """How a run stands, in a word and a sentence."""

    word: str
    sentence: str


OUTCOMES = {
    "running": Outcome("training", "It is being trained; this page is written anew from time to time: load it again."),
    "finished": Outcome("finished", "All planned steps are done, or as many as its validation found enough."),
    "stopped": Outcome("stopped", "It ended before its last step, and goes on where it was."),
    "failed": Outcome("ended by an error", "An error ended it; what it had reached was saved if it could be."),
    "damaged": Outcome("damaged", "Something in its folder cannot be read; see sdtrain runs."),
}


def write_page(folder: Path, outcome: str, shelf: Shelf) -> Path:
    """Write `report.html` of a run into its folder, whole or not at all; return its path.

    outcome: a key of OUTCOMES. Raises UserError when it cannot be written; what cannot be read is told on the page.
    """
    path = folder / NAME
    write_bytes(path, page(folder, outcome, shelf).encode("utf-8", "replace"))
    return path


def page(folder: Path, outcome: str, shelf: Shelf) -> str:
    """Return the page of a run as text."""
    numbers, about = read_numbers(folder / "log.jsonl"), read_about(folder)
    strips = shelf.strips(folder / "previews")
    config, problem = _config(folder)
    notes = [f"step {step}: {cut_off(text)}" for step, text in numbers.notes]
    settings = differing(config) if config else []
    return template(__package__, "page.html").render(
        name=printable(config.name if config else folder.name),
        outcome=OUTCOMES[outcome],
        problem=problem,
        config=config,
        toml=cut_off(config_to_toml(config), LONGEST_CONFIG) if config else "",
        settings=settings[:MOST_SETTINGS],
        settings_left_out=max(0, len(settings) - MOST_SETTINGS),
        numbers=numbers,
        last=numbers.steps[-1] if numbers.steps else None,
        smoothed=_last_smoothed(numbers),
        charts=charts(numbers),
        sample_of=sample_of,
        rows=evenly_spaced(numbers.steps, MOST_ROWS),
        validations=evenly_spaced(numbers.validations, MOST_ROWS),
        notes=[*about.notes, *notes[-MOST_NOTES:]],
        notes_left_out=max(0, len(notes) - MOST_NOTES),
        skipped=sum(step.skipped for step in numbers.steps),
        strips=strips,
        about=about,
        commands=_commands(folder, config),
        short=short,
        cut=cut_off,
    )


def evenly_spaced(items: list[Item], most: int) -> list[Item]:
    """Return at most `most` items: the first, the last and others evenly between them."""
    if len(items) <= most:
        return items
    places = sorted({round(index * (len(items) - 1) / (most - 1)) for index in range(most)})
    return [items[place] for place in places]


def _config(folder: Path) -> tuple[Config | None, str]:
    try:
        return stored_config(folder), ""
    except UserError as error:
        return None, f"The settings cannot be read: {explain(error)}"


def _commands(folder: Path, config: Config | None) -> list[tuple[str, str]]:
    run, toml = shell_word(folder), shell_word(folder / "config.toml")
    steps = config.steps if config else 1000
    name = shell_word(f"name={config.name if config else 'run'}-again")
    return [
        ("go on, where it is not finished", f"sdtrain fit {toml} --resume"),
        (f"train {steps} steps more", f"sdtrain fit {toml} --resume --set steps=+{steps}"),
        ("make pictures with it", f'sdtrain sample {run} --prompt "..."'),
        ("other formats", f"sdtrain export {run} --format diffusers"),
        ("do it all again", f"sdtrain fit {toml} --set {name}"),
        ("write this page anew", f"sdtrain report {run}"),
    ]


def _last_smoothed(numbers: Numbers) -> float | None:
    points = smoothed([(one.step, one.loss) for one in numbers.steps if one.loss is not None])
    return points[-1][1] if points else None


def cut_off(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return a text that is not longer than a page can bear."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text) - longest:,} more letters)"
