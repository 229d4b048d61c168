"""`sdtrain view`: reads what `check` reads, and writes it as a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sdtrain.commands.libraries import quiet_pillow
from sdtrain.commands.notes import picture_report_notes
from sdtrain.commands.sheet.cards import Sheet, sheet_of
from sdtrain.commands.sheet.drawing import is_drawn_here, picture_paths, save_page
from sdtrain.commands.sheet.page import GENERATOR, Heading, page_name, page_parts
from sdtrain.config.read import read_draft
from sdtrain.data.identity.held_out import held_out_examples, training_examples
from sdtrain.data.report.facts import fact_lines
from sdtrain.data.report.names import counted
from sdtrain.data.report.summary import summarise
from sdtrain.errors import user_error
from sdtrain.files.writer import atomic_file, atomic_folder
from sdtrain.training.start import inspect_run, run_folder
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.text import say

_HEAD_BYTES = 2048  # of a page, in which it says what made it


def write_sheet(path: Path, overrides: Sequence[str], out: Path | None, console: Console, *, png: bool) -> list[Path]:
    """Write a contact sheet of all pictures of a config, and return what was written; no torch.

    out: the file; of many pictures the folder of that name without its suffix. None: beside the run's folder. png:
    whether it is drawn as pictures, too. Raises UserError with all that is wrong with the config, its model and its
    pictures, and rather than write over anything that is not a contact sheet.
    """
    draft = read_draft(path, overrides)
    quiet_pillow()
    with ProgressLines(console) as progress:
        opened, examples = inspect_run(draft, decode=True, on_progress=progress.show)
        config = draft.require_sound()
        trained, held_out = training_examples(examples), held_out_examples(examples)
        report = summarise(trained, config.data)
        sheet = sheet_of(config, opened.tokenizers, trained, held_out)
        worth = picture_report_notes(config, opened, trained, report)
        heading = Heading(config.name, str(path), fact_lines(report, config.steps), worth)
        stem = _stem(out or run_folder(config.output, config.name + "-sheet"))
        page = stem if sheet.num_pages > 1 else stem.with_name(stem.name + ".html")
        pictures = picture_paths(stem, sheet.num_pages) if png else []
        _refuse_others([page, *pictures])
        _write_pages(sheet, heading, page, progress)
        for number, picture in enumerate(pictures):
            save_page(sheet, heading.name, number, picture)
            progress.show("drawing pages", number + 1, len(pictures))
    written = [page / page_name(0) if sheet.num_pages > 1 else page, *pictures]
    pages = f" on {counted(sheet.num_pages, 'page', 'pages')}" if sheet.num_pages > 1 else ""
    say(console, *(f"wrote {one}" for one in written), f"  {counted(len(examples))}{pages}, open it in a browser")
    return written


def _stem(target: Path) -> Path:
    """The path without the suffix of a page or a picture: a name may well have a dot in it."""
    return target.with_suffix("") if target.suffix.lower() in (".html", ".htm", ".png") else target


def _write_pages(sheet: Sheet, heading: Heading, target: Path, progress: ProgressLines) -> None:
    """Write the page, or a folder of them, whole or not at all."""
    if sheet.num_pages == 1:
        with atomic_file(target) as file:
            for part in page_parts(sheet, heading, 0):
                file.write(part.encode("utf-8", "replace"))
        return
    with atomic_folder(target) as folder:
        for page in range(sheet.num_pages):
            with (folder / page_name(page)).open("wb") as file:
                for part in page_parts(sheet, heading, page):
                    file.write(part.encode("utf-8", "replace"))
            progress.show("writing pages", page + 1, sheet.num_pages)


def _refuse_others(targets: Sequence[Path]) -> None:
    """Raise UserError for what is there and was not made by this command: it is never written over."""
    for target in targets:
        if target.is_dir():
            ours = all(_is_page(path) for path in target.iterdir())
        else:
            ours = not target.exists() or _is_page(target) or is_drawn_here(target)
        if not ours:
            what = f"{target} is there and is no contact sheet, so it is left as it is; give another path with --out"
            raise user_error("view", "--out", what)


def _is_page(path: Path) -> bool:
    """Whether a file is a page that this command wrote."""
    if path.suffix != ".html" or not path.is_file():
        return False
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(_HEAD_BYTES)
