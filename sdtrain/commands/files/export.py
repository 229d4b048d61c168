"""`sdtrain export`: writes the averaged weights of a run in another format, or those of an earlier step."""

from __future__ import annotations

from pathlib import Path

from optim import averaged
from sdtrain.commands.reached import open_reached
from sdtrain.config.schema import Config
from sdtrain.data.examples import scan_folders
from sdtrain.data.identity.held_out import hold_out, training_examples
from sdtrain.training.export import Format, export_weights
from sdtrain.training.start import stored_config


def export_run(folder: Path, kind: Format, step: int | None, out: Path | None) -> Path:
    """Write the averaged weights of a run's training state in a format; return the path. Raises UserError.

    step: which state, None for the newest. out: where to write, None for the run's `weights/`.
    """
    config = stored_config(folder)
    reached = open_reached(folder, config, step)
    model, optimizer = reached.model, reached.optimizer
    found, _ = scan_folders(config.data, decode=False)  # for the tag counts; pictures may be gone by now
    examples = training_examples(hold_out(found, [], config.validation)[0])
    target = out or folder / "weights" / _file_name(config, reached.step, kind)
    with averaged(optimizer):
        export_weights(
            model, config, target, kind=kind, step=reached.step, examples=examples, groups=optimizer.metrics()
        )
    return target


def _file_name(config: Config, step: int, kind: Format) -> str:
    name = f"{config.name}-{kind}-step-{step:06d}"
    return name if kind == "folder" else f"{name}.safetensors"
