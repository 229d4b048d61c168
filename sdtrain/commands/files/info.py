"""`sdtrain info`: shows what a safetensors file says about itself; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from sdtrain.adapters.formats.describe import FileDescription, describe_file
from sdtrain.training.watching.text import facts_table


def file_info(path: Path) -> Table:
    """Return what is in a file as a table of two columns. Raises UserError when it is missing or damaged."""
    found = describe_file(path)
    rows = {key: value for key, value in _rows(found).items() if value}
    return facts_table({"file": f"{path}, {found.num_bytes / 2**20:.1f} MiB", **rows})


def _rows(found: FileDescription) -> dict[str, str]:
    layers = ", ".join(f"{network} {number}" for network, number in found.num_modules.items())
    return {
        "kind": f"{found.kind} in {found.names} names" if found.kind else "no adapters; tensors of a model",
        "layers": layers,
        "ranks": _counted(found.ranks),
        "alphas": _counted(found.alphas),
        "stored as": ", ".join(found.dtypes),
        "title": found.title,
        "date": found.date,
        "base": found.base_model,
        "prediction": found.prediction,
        "steps": str(found.steps or ""),
        "pictures": str(found.num_images or ""),
        "d": ", ".join(f"{network} {d:.2e}" for network, d in found.d.items()),
        "tags": ", ".join(f"{tag} ({number})" for tag, number in found.top_tags),
        "config": "in the header" if found.config_toml else "",
    }


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    """Return `16` where all layers have that value, else each value with its number of layers."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({layers} layers)" for value, layers in values.items())
