"""sdtrain: fine-tuning SDXL-style diffusion models with Prodigy + Schedule-Free.

What stands in `__all__` is for use from Python. Names are imported when they are first asked for, so that
`import sdtrain` takes no time, and torch is imported by what needs it only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdtrain.commands.files.lora import load_lora, merge_lora
    from sdtrain.commands.fit import FitResult, fit
    from sdtrain.commands.sample import sample
    from sdtrain.config.from_python import make_config
    from sdtrain.config.read import read_config
    from sdtrain.config.schema import Config
    from sdtrain.errors import UserError
    from sdtrain.training.watching.records import (
        EndRecord,
        GroupRecord,
        NoteRecord,
        PictureRecord,
        Record,
        RunRecord,
        SavedRecord,
        StepRecord,
        ValidationRecord,
        Watcher,
    )

__version__ = "0.1.0"

__all__ = [
    "Config",
    "EndRecord",
    "FitResult",
    "GroupRecord",
    "NoteRecord",
    "PictureRecord",
    "Record",
    "RunRecord",
    "SavedRecord",
    "StepRecord",
    "UserError",
    "ValidationRecord",
    "Watcher",
    "__version__",
    "fit",
    "load_lora",
    "make_config",
    "merge_lora",
    "read_config",
    "sample",
]

_HOMES = {
    "sdtrain.commands.fit": ("FitResult", "fit"),
    "sdtrain.commands.files.lora": ("load_lora", "merge_lora"),
    "sdtrain.commands.sample": ("sample",),
    "sdtrain.config.from_python": ("make_config",),
    "sdtrain.config.read": ("read_config",),
    "sdtrain.config.schema": ("Config",),
    "sdtrain.errors": ("UserError",),
    "sdtrain.training.watching.records": (
        "EndRecord",
        "GroupRecord",
        "NoteRecord",
        "PictureRecord",
        "Record",
        "RunRecord",
        "SavedRecord",
        "StepRecord",
        "ValidationRecord",
        "Watcher",
    ),
}


if not TYPE_CHECKING:  # type checkers are to find a misspelt name, which a module with `__getattr__` seems to have

    def __getattr__(name: str) -> object:
        for module, names in _HOMES.items():
            if name in names:
                return vars(import_module(module))[name]
        raise AttributeError(f"module 'sdtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
