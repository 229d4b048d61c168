"""The file a run leaves: averaged weights, never the training's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from optim import GroupMetrics
from sdtrain.config.write import config_to_toml
from sdtrain.models.model import Model
from sdtrain.training.parameters import export_tensors
from sdtrain.training.run import Run


def export_weights(model: Model, run: Run, path: Path, step: int, groups: Sequence[GroupMetrics]) -> Path:
    """Write the weights the networks hold now to `path`, whole or not at all. Call it inside `averaged(optimizer)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "pt",
        "sdtrain.config": config_to_toml(run.config),
        "sdtrain.step": str(step),
        "sdtrain.d": json.dumps({group.name: group.d for group in groups}),
    }
    partial = path.with_name(path.name + ".partial")
    save_file(export_tensors(model, run), partial, metadata=metadata)
    partial.replace(path)
    return path
