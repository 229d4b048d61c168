"""Which modules are adapters of peft's, asked without importing peft where none was ever attached."""

from __future__ import annotations

import sys
from typing import cast

from torch import nn


def base_layer(module: nn.Module) -> nn.Module | None:
    """The frozen layer below an adapter, or None for a module that is no adapter.

    Importing peft costs seconds; as long as nobody has imported it, no module can be one of its layers.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not isinstance(module, tuners.BaseTunerLayer):
        return None
    return cast(nn.Module, module.get_base_layer())
