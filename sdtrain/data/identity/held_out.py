"""Which pictures are held out of the training, to be validated on; no torch.

A share is chosen by what is in the files: each picture is held out or not whatever others there are. So the choice
outlives new pictures, other names and other folders, and two copies of a file never lie on both sides.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdtrain.config.schema import ValidationConfig
from sdtrain.data.examples import Example
from sdtrain.data.threads import map_ahead
from sdtrain.errors import Problem, user_error

END_BYTES = 1 << 16
"""How much of a file's beginning and of its end names it; all of a large data set need not be read for that."""
FEWEST = 2
"""The fewest pictures whose mean loss has a standard error."""
SHOWN = 3


def training_examples(examples: Sequence[Example]) -> list[Example]:
    """Return the examples that are trained on, in their order."""
    return [example for example in examples if not example.held_out]


def held_out_examples(examples: Sequence[Example]) -> list[Example]:
    """Return the examples that are only validated on, in their order."""
    return [example for example in examples if example.held_out]


def hold_out(
    examples: Sequence[Example], validated: Sequence[Example], config: ValidationConfig
) -> tuple[list[Example], list[Problem]]:
    """Return all examples, marked by whether they are held out, and what is wrong with the choice.

    examples: the pictures of `data.folder`. validated: those of `validation.folder`.
    """
    if config.share:
        names = map_ahead(identity, [example.path for example in examples])
        chosen = [is_held_out(name, config.share, config.seed) for name in names]
        marked = [replace(example, held_out=held) for example, held in zip(examples, chosen, strict=True)]
        return marked, _share_problems(config, sum(chosen), len(chosen))
    apart = [replace(example, held_out=True, repeats=1) for example in validated]
    return [*examples, *apart], _folder_problems(config, examples, apart)


def identity(path: Path) -> str:
    """Return a name that a file's content decides: equal files have equal names, wherever they lie.

    It is a hash of the length, the beginning and the end. Raises UserError when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(f"{size}/".encode() + file.read(END_BYTES), digest_size=16)
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    except OSError as error:
        raise user_error("data", str(path), f"picture cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def is_held_out(name: str, share: float, seed: int) -> bool:
    """Return whether the picture of that identity is held out: it is for about that share of all identities."""
    digest = hashlib.blake2b(f"held out/{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _share_problems(config: ValidationConfig, num_held_out: int, num: int) -> list[Problem]:
    if FEWEST <= num_held_out < num:
        return []
    advice = "set a larger one" if num_held_out < FEWEST else "set a smaller one"
    what = (
        f"{config.share:g} holds out {num_held_out} of {num} pictures; {FEWEST} at least, and not all, are needed: "
        f"{advice}, or another validation.seed"
    )
    return [Problem("validation.share", what, ("validation.share", "validation.seed", "data.folder"))]


def _folder_problems(
    config: ValidationConfig, trained: Sequence[Example], validated: Sequence[Example]
) -> list[Problem]:
    if config.folder and len(validated) < FEWEST:
        what = f"holds {len(validated)} picture; {FEWEST} at least are needed for a standard error"
        return [Problem("validation.folder", what)]
    twice = duplicates(trained, validated)
    if not twice:
        return []
    shown = ", ".join(f"{held} is {other}" for other, held in twice[:SHOWN]) + (", ..." if len(twice) > SHOWN else "")
    what = f"holds {len(twice)} pictures that are trained on too, so they tell nothing: {shown}; remove them from one"
    return [Problem("validation.folder", what)]


def duplicates(trained: Sequence[Example], validated: Sequence[Example]) -> list[tuple[Path, Path]]:
    """Return (trained, validated) for each file to validate on that is, byte for byte, one that is trained on.

    Only files of equal length are read.
    """
    sizes = defaultdict(list)
    for example in validated:
        sizes[example.path.stat().st_size].append(example.path)
    suspects = [example.path for example in trained if example.path.stat().st_size in sizes]
    content = dict(zip(suspects, map_ahead(_digest, suspects), strict=True))
    found = []
    for path in suspects:
        found += [(path, other) for other in sizes[path.stat().st_size] if _digest(other) == content[path]]
    return found


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError as error:
        raise user_error("data", str(path), f"picture cannot be read: {error.strerror or error}") from error
