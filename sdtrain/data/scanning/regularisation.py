"""Pictures of what the model knows already, beside those that teach it something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdtrain.config.schema import FolderConfig
from sdtrain.data.examples import Example


def with_regularisation(examples: Sequence[Example], folders: Sequence[FolderConfig]) -> list[Example]:
    """Return the examples, those of regularisation folders with repeats that make them as many as all others.

    folders: those of `data.folder`. Held-out pictures are left as they are; so are all where there are no others.
    """
    trained = [example for example in examples if not example.held_out]
    others = sum(one.repeats for one in trained if not folders[one.folder].regularisation)
    regular = sum(one.repeats for one in trained if folders[one.folder].regularisation)
    if not regular or not others:
        return list(examples)
    return [
        replace(one, repeats=one.repeats * others / regular)
        if not one.held_out and folders[one.folder].regularisation
        else one
        for one in examples
    ]
