"""`sdtrain check`: finds everything that can be wrong with a run, without torch and without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sdtrain.commands.notes import notes
from sdtrain.config.read import read_draft
from sdtrain.config.schema import Config
from sdtrain.data.identity.held_out import held_out_examples, training_examples
from sdtrain.data.report import DataReport, summarise
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.start import inspect_run
from sdtrain.training.watching.text import say
from sdtrain.training.weights_files import reader_lines


def check_config(path: Path, overrides: Sequence[str], console: Console) -> None:
    """Check the config, its model and every picture; print what a run would see.

    Raises UserError with all that is wrong; each part is looked at as far as the others allow.
    """
    draft = read_draft(path, overrides)
    facts, examples = inspect_run(draft, decode=True)
    config = draft.require_sound()
    report = summarise(training_examples(examples), config.data)
    say(console, f"{path}: no problems found")
    validation = _validation_lines(config, len(held_out_examples(examples)))
    for line in (*_model_lines(config, facts), *report_lines(report), *validation, *notes(config, facts)):
        say(console, "  " + line)


def _model_lines(config: Config, facts: OpenedModel) -> list[str]:
    end = "zero terminal SNR" if facts.zero_terminal_snr else "the usual schedule"
    freeze = config.optimizer.prodigy_steps
    no_caption = facts.no_caption if config.model.no_caption == "auto" else config.model.no_caption
    nothing = "zeros" if no_caption == "zeros" else "the encoded empty text"
    return [
        f"model: {config.model.path}, {facts.prediction}, {end}",
        f"no caption: {nothing}, for empty and dropped captions and for an empty negative prompt",
        f"method: {config.method.kind} on {', '.join(config.method.train)}, {config.steps} steps",
        *(f"file: {line}" for line in reader_lines(config)),
        f"optimizer: preset {config.optimizer.preset}, prodigy_steps {freeze}, d0 {config.optimizer.d0:g}",
    ]


def _validation_lines(config: Config, num_pictures: int) -> list[str]:
    if not num_pictures:
        return []
    validation = config.validation
    when = f"every {validation.every} steps" if validation.every else "never, for validation.every is 0"
    return [f"held out: {num_pictures} pictures, validated {when} at {validation.noise_levels} noise levels each"]


def report_lines(report: DataReport) -> list[str]:
    """Return what the pictures are like, one fact per line."""
    buckets = ", ".join(f"{num} at {width}x{height}" for (width, height), num in report.buckets)
    lines = [
        f"pictures: {report.num_pictures}, {report.num_images} an epoch of {report.steps_per_epoch:.1f} steps; "
        f"{report.num_captioned} with a caption, {report.num_uncaptioned} without",
        f"buckets: {buckets}",
    ]
    share, path = report.worst_cropped
    lines.append(f"cropped: {report.mean_cropped_share:.1%} of a picture on average, at most {share:.1%} ({path.name})")
    factor, path = report.worst_upscale
    if report.num_upscaled:
        lines.append(f"enlarged: {report.num_upscaled} pictures, at most {factor:.2f} times ({path.name})")
    return lines
