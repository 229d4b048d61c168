"""`sdtrain check`: finds everything that can be wrong with a run, without torch and without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sdtrain.commands.libraries import quiet_pillow
from sdtrain.commands.notes import note_lines, picture_report_notes, setting_notes
from sdtrain.config.read import read_draft
from sdtrain.config.schema import Config
from sdtrain.data.identity.held_out import held_out_examples, training_examples
from sdtrain.data.report.facts import fact_lines
from sdtrain.data.report.previewed import previews_text, with_prompts
from sdtrain.data.report.summary import summarise
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.start import inspect_run
from sdtrain.training.watching.progress import ProgressLines
from sdtrain.training.watching.text import say
from sdtrain.training.weights_files import reader_lines


def check_config(path: Path, overrides: Sequence[str], console: Console) -> None:
    """Check the config, its model and every picture; print what a run would see.

    Raises UserError with all that is wrong; each part is looked at as far as the others allow.
    """
    draft = read_draft(path, overrides)
    quiet_pillow()
    with ProgressLines(console) as progress:
        facts, examples = inspect_run(draft, decode=True, on_progress=progress.show)
    config = draft.require_sound()
    trained = training_examples(examples)
    report = summarise(trained, config.data)
    validation = _validation_lines(config, len(held_out_examples(examples)))
    say(console, f"{path}: no problems found")
    previews = previews_text(with_prompts(config, examples), examples)
    for line in (*_model_lines(config, facts), *fact_lines(report, config.steps), *validation, f"previews: {previews}"):
        say(console, "  " + line)
    say(console, *note_lines([*setting_notes(config, facts), *picture_report_notes(config, facts, trained, report)]))


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
