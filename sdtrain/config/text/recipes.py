"""The recipes that come with sdtrain: configs that are found by name, wherever it is installed."""

from __future__ import annotations

from pathlib import Path

from sdtrain.errors import user_error
from sdtrain.files.locations import BUILTIN, BUILTIN_FOLDER

FOLDER = BUILTIN_FOLDER / "configs"


def recipes() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def recipe_of(name: str) -> Path:
    """Return the file of a recipe, with or without `builtin:` and `.toml`. Raises UserError where there is none."""
    plain = name.removeprefix(BUILTIN).removesuffix(".toml").replace("-", "_")
    if plain not in recipes():
        known = ", ".join(recipes())
        raise user_error(name, "recipe", f"there is none of that name; there are {known}: see `sdtrain configs list`")
    return FOLDER / f"{plain}.toml"


def config_file(path: Path) -> Path:
    """Return the file that a config's path means: of `builtin:NAME` the recipe. Raises UserError where none is."""
    return recipe_of(str(path)) if str(path).startswith(BUILTIN) else path
