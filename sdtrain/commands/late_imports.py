"""What a run does not use is not imported.

diffusers, transformers and peft import the packages for quantised weights wherever they are installed, which takes up
to two seconds. The command line, whose process is its own, keeps them away. From Python, where others use the same
libraries, everything is imported as ever.
"""

from __future__ import annotations

import sys

from sdtrain.config.schema import Config

QUANTISERS = ("bitsandbytes", "torchao")


class _Process:
    is_ours = False


def process_is_ours() -> None:
    """Tell that nothing but a command of sdtrain runs in this process."""
    _Process.is_ours = True


def import_less(config: Config) -> None:
    """Keep away from this process what a run with these settings has no use for, unless somebody has it already."""
    if _Process.is_ours and config.model.base_precision == "full":
        for name in QUANTISERS:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to Python: not there
