"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The config, a .toml file or builtin:NAME.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; can be given repeatedly.")
]
Step = Annotated[
    int | None, typer.Option("--step", metavar="NUMBER", help="Which training state of a run; default the newest.")
]
VerifyCache = Annotated[
    bool,
    typer.Option("--verify-cache", help="Read every byte of pictures and cache, also where nothing seems changed."),
]
Model = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="A .safetensors file, a diffusers folder or a hub id.")
]
PictureFolder = Annotated[
    str, typer.Option("--pictures", metavar="FOLDER", help="The pictures, with captions in .txt files or a --trigger.")
]
Trigger = Annotated[str, typer.Option("--trigger", metavar="WORD", help="The word for what the pictures show.")]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="NUMBER", min=1, help="Default by the number of pictures.")
]
Output = Annotated[str, typer.Option("--output", metavar="FOLDER", help="Folder of all runs; default runs.")]
