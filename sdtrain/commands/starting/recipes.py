"""`sdtrain configs`: the recipes that come with sdtrain, listed and copied. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sdtrain.config.text.recipes import recipe_of, recipes
from sdtrain.errors import user_error
from sdtrain.files.writer import write_text
from sdtrain.training.watching.text import shell_word

_COMMAND = re.compile(r"^#   sdtrain (\w+) configs/\S+$", re.MULTILINE)


def described() -> dict[str, str]:
    """Return what each recipe is for, by its name: the sentences at its top."""
    return {name: " ".join(_first_comment(recipe_of(name).read_text(encoding="utf-8"))) for name in recipes()}


def _first_comment(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        if line.startswith("#:"):
            continue
        if not line.startswith("# ") or line.startswith("#  "):
            return
        yield line.removeprefix("# ")


def copy_recipe(name: str, file: Path | None, *, force: bool) -> Path:
    """Write a recipe to a file of its name, or to `file`, and return where it is. Raises UserError.

    The commands in its comments are then those for the copy. force: whether a file that is there is replaced.
    """
    recipe = recipe_of(name)
    target = file or Path(recipe.name)
    if target.is_dir():
        target = target / recipe.name
    if target.exists() and not force:
        raise user_error("configs copy", str(target), "is there already; add --force to replace it, or name another")
    text = recipe.read_text(encoding="utf-8").removeprefix("#:schema ./schema.json\n")
    write_text(target, _COMMAND.sub(lambda found: f"#   sdtrain {found[1]} {shell_word(target)}", text))
    return target
