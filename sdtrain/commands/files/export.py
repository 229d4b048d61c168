"""`sdtrain export`: writes the averaged weights of a run in another format, or those of an earlier step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optim import averaged
from sdtrain.commands.files.free import require_free
from sdtrain.commands.reached import open_reached
from sdtrain.config.schema import Config, LoraConfig
from sdtrain.data.examples import scan_folders
from sdtrain.data.identity.held_out import hold_out, training_examples
from sdtrain.errors import user_error
from sdtrain.training.export import Format, Written, export_weights
from sdtrain.training.start import stored_config
from sdtrain.training.weights_files import native_file, weights_files

FormChoice = Literal["auto", "native", "lora", "diff"]
StoredType = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written; None means as the run's settings say."""

    form: FormChoice | None = None
    dtype: StoredType | None = None
    strength: float = 1.0
    """How often the change that was trained is counted."""
    force: bool = False
    """Whether a file that is there is replaced."""


def export_run(
    folder: Path, kind: Format, step: int | None, out: Path | None, options: ExportOptions | None = None
) -> Written:
    """Write the averaged weights of a run's training state in a format; return what was written. Raises UserError.

    step: which state, None for the newest. out: where to write, None for the run's `weights/`.
    """
    options = options or ExportOptions()
    config = with_options(stored_config(folder), kind, options)
    if out is not None:
        require_free(out, force=options.force, folder=kind == "folder")
    reached = open_reached(folder, config, step)
    target = out or folder / "weights" / _file_name(config, reached.step, kind)
    require_free(target, force=options.force, folder=kind == "folder")
    model, optimizer = reached.model, reached.optimizer
    found, _ = scan_folders(config.data, decode=False)  # for the tag counts; pictures may be gone by now
    examples = training_examples(hold_out(found, [], config.validation)[0])
    is_adapter = kind in ("sd-scripts", "diffusers") and isinstance(config.method, LoraConfig)
    form = weights_files(config)[-1].form if is_adapter else "native"
    with averaged(optimizer):
        error = export_weights(
            model,
            config,
            target,
            kind=kind,
            step=reached.step,
            examples=examples,
            groups=optimizer.metrics(),
            folder=folder,
            form=form,
            strength=options.strength,
        )
    return Written(target, error, config.export.rank)


def with_options(config: Config, kind: Format, options: ExportOptions) -> Config:
    """Return the settings with which a file is written. Raises UserError for a form without words in the names."""
    changes: dict[str, object] = {"names": kind} if kind in ("sd-scripts", "diffusers") else {}
    changes |= {"form": options.form} if options.form else {}
    changes |= {"dtype": options.dtype} if options.dtype else {}
    found = config.model_copy(update={"export": config.export.model_copy(update=changes)})
    if options.form not in (None, "auto") and kind in ("single-file", "folder"):
        what = f"{options.form} is a form of adapter files, and a whole model has none; leave it out"
        raise user_error("export", "--form", what)
    if options.form == "diff" and kind == "diffusers":
        raise user_error("export", "--form", "diff has no words in diffusers names; use --format sd-scripts")
    if options.form == "native" and isinstance(found.method, LoraConfig):
        native = native_file(found.method, found.export.names)
        if kind in ("sd-scripts", "diffusers") and native.names != kind:
            raise user_error("export", "--form", f"{native.kind} has no words in {kind} names; use --format diffusers")
    return found


def _file_name(config: Config, step: int, kind: Format) -> str:
    name = f"{config.name}-{kind}-step-{step:06d}"
    return name if kind == "folder" else f"{name}.safetensors"
