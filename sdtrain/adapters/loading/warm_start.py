"""Starting a run from the adapters in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sdtrain.adapters.attach import adapter_weights, copy_into
from sdtrain.adapters.formats.alphas import rescaled
from sdtrain.adapters.formats.lora_file import read_lora, shortened
from sdtrain.adapters.formats.metadata import json_table, number_of
from sdtrain.adapters.kinds import is_beyond_layers
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.metadata import D_KEY


@torch.no_grad()
def start_from(path: Path, networks: Mapping[str, nn.Module]) -> dict[str, float]:
    """Copy a file's adapters, in either naming, into those attached to the networks; return the file's d by network.

    `networks` are all networks of the model, those without adapters too. The change dW is the file's; where the run's
    alpha is another, a factor makes up for it. Raises UserError for a file of another model, kind or rank, for
    layers of it that the run does not train, and for trained layers it lacks: after any of these the run would not
    start from what the file is.
    """
    file = read_lora(path, networks)
    problems = []
    for component, network in networks.items():
        live = adapter_weights(network)
        values = file.adapters.get(component, {})
        for module, weights in live.items():
            if module not in values:
                problems.append(Problem(f"{component}.{module}", "is trained in this run, but not in the file"))
                continue
            try:
                copy_into(weights, rescaled(values[module], weights.alpha))
            except ValueError as error:
                problems.append(Problem(f"{component}.{module}", str(error)))
        setting = "widen `method.targets`" if live else f"add `{component}` to `method.train`"
        for module in sorted(values.keys() - live.keys()):
            what = f"is in the file, but not trained in this run: {setting}"
            if is_beyond_layers(values[module]):
                what = "changes a bias or a normalisation, which no run here trains: choose a file without"
            problems.append(Problem(f"{component}.{module}", what))
    if problems:
        raise UserError(str(path), shortened(problems))
    return _stored_d(path, file.metadata)


def _stored_d(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """Step size d by network, empty for files that other tools made."""
    try:
        return {name: number_of(d, D_KEY) for name, d in json_table(metadata, D_KEY).items()}
    except ValueError:
        raise user_error(str(path), D_KEY, "is not a table of step sizes; the file's header was changed") from None
