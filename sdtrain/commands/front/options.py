"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The config, a .toml file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; can be given repeatedly.")
]
Step = Annotated[int | None, typer.Option("--step", help="Which training state of a run; default the newest.")]
VerifyCache = Annotated[
    bool,
    typer.Option("--verify-cache", help="Read every byte of pictures and cache, also where nothing seems changed."),
]
