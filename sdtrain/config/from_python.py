"""Makes configs in Python, rather than reading them from a file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sdtrain.config.read import resolve
from sdtrain.config.schema import Config


def make_config(settings: Mapping[str, Any]) -> Config:
    """Return the config that nested settings mean, as from a TOML file: the preset filled in, everything checked.

    Raises UserError with every problem found.
    """
    return resolve(copy.deepcopy(dict(settings)), "config")


def chosen_settings(config: Config) -> dict[str, Any]:
    """Return the settings that were chosen when a config was made, as a TOML file would have them.

    Defaults and the preset's values are left out.
    """
    return config.model_dump(mode="python", exclude_unset=True)
