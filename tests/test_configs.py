"""Every shipped config is right, and what it says of itself holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtrain.config.read import read_config
from sdtrain.config.write import config_to_toml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = read_config(path)
    assert config_to_toml(config)
    assert config.name == path.stem.replace("_", "-")


def test_the_quickstart_passes_its_own_check() -> None:
    import io

    from rich.console import Console

    from sdtrain.commands.check import check_config

    check_config(Path(__file__).parent.parent / "configs" / "quickstart.toml", (), Console(file=io.StringIO()))
