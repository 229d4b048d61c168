"""Whether a run has room on its disk, asked before it begins: how much it will write, and what for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from optim.formulas.second_moment import factored_axes
from sdtrain.config.schema import Config, LoraConfig
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.keeping.disk import require
from sdtrain.training.keeping.manifest import saved_states
from sdtrain.training.parameters import Trainable

PREVIEW_BYTES_PER_PIXEL = 2
"""About what a PNG of a photograph takes; 3 is the most."""
SLICE = 11
"""The optimizer keeps every 11th element, twice, in bfloat16, to estimate d."""


def require_room(folder: Path, config: Config, opened: OpenedModel, trainable: Trainable, step: int) -> None:
    """Raise UserError unless there is room in the folder of a run for all that it will write after `step` steps.

    The cache is written by then, and what each file needs is looked at again before it is written.
    """
    require(folder, "output", needed(folder, config, opened, trainable, step))


def needed(folder: Path, config: Config, opened: OpenedModel, trainable: Trainable, step: int) -> dict[str, int]:
    """Return how many bytes a run will write into its folder after `step` steps, by what for."""
    state = state_bytes(trainable.named_parameters().values(), factored=config.optimizer.factored)
    settings, to_come = config.checkpoint, config.steps - step
    num_states = settings.keep + 1 - min(settings.keep, len(saved_states(folder / "checkpoints")))
    if settings.keep_every:
        num_states += to_come // settings.keep_every
    num_previews = to_come // config.preview.every + 1 if config.preview.every and config.preview.prompts else 0
    export = config.export
    num_weights = min(export.keep, to_come // export.every) if export.every else 0
    return {
        f"{num_states} training states": num_states * state,
        "weights": (1 + num_weights) * _weights_bytes(config, opened, trainable),
        f"{num_previews} previews": num_previews * _preview_bytes(config),
    }


def state_bytes(parameters: Iterable[Tensor], *, factored: bool) -> int:
    """Return the size of a training state of these parameters: y, z, the second moment and what estimates d."""
    return sum(_bytes_of(parameter, factored=factored) for parameter in parameters)


def _bytes_of(parameter: Tensor, *, factored: bool) -> int:
    numel, shape = parameter.numel(), parameter.shape
    axes = factored_axes(shape) if factored else None
    moment = numel if axes is None else numel // shape[axes[0]] + numel // shape[axes[1]]
    return 2 * numel * parameter.element_size() + 4 * moment + 4 * -(-numel // SLICE)


def _weights_bytes(config: Config, opened: OpenedModel, trainable: Trainable) -> int:
    if isinstance(config.method, LoraConfig):
        width = 4 if config.export.dtype in ("auto", "float32") else 2
        return sum(group.num_parameters for group in trainable.groups) * width
    files = {header.path for headers in opened.headers.values() for header in headers}
    return sum(path.stat().st_size for path in files)


def _preview_bytes(config: Config) -> int:
    preview, side = config.preview, config.data.resolution_px
    pixels = (preview.width_px or side) * (preview.height_px or side)
    return len(preview.prompts) * len(preview.seeds) * 2 * pixels * PREVIEW_BYTES_PER_PIXEL
