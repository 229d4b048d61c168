"""Which tools compute from an adapter file what it did in training: by kind, by names, by reader.

Each entry was measured with the tool's own code or follows from its formula; `tests/adapters/test_reader_table.py`
computes dW by the formula of each and holds the table against it. Read right means: all layers, the same dW.

- In diffusers names ComfyUI finds the text encoders and a part of the U-Net, and says so only in its log; Forge refuses
  the file, A1111 and sd-scripts know no key of it.
- DoRA in sd-scripts names: ComfyUI and Forge divide by the rows of the base instead of those of the sum, A1111 by its
  columns; diffusers and sd-scripts leave the lengths out.
- OFT: nobody reads peft's rotation of inputs, and diffusers cannot make the layers for it.
"""

from __future__ import annotations

from typing import Literal

Reader = Literal["ComfyUI", "Forge", "A1111", "sd-scripts", "diffusers"]
"""diffusers: `load_lora_weights`. sd-scripts: its own `networks.lora`, without the LyCORIS package."""
Kind = Literal["lora", "dora", "loha", "lokr", "oft", "diff"]
Naming = Literal["sd-scripts", "diffusers"]

READERS: tuple[Reader, ...] = ("ComfyUI", "Forge", "A1111", "sd-scripts", "diffusers")
WEB: frozenset[Reader] = frozenset({"ComfyUI", "Forge", "A1111"})
NOBODY: frozenset[Reader] = frozenset()

READ_RIGHT: dict[tuple[Kind, Naming], frozenset[Reader]] = {
    ("lora", "sd-scripts"): WEB | {"sd-scripts", "diffusers"},
    ("lora", "diffusers"): frozenset({"diffusers"}),
    ("dora", "sd-scripts"): NOBODY,
    ("dora", "diffusers"): frozenset({"diffusers"}),
    ("loha", "sd-scripts"): WEB,
    ("loha", "diffusers"): NOBODY,
    ("lokr", "sd-scripts"): WEB,
    ("lokr", "diffusers"): NOBODY,
    ("oft", "diffusers"): NOBODY,
    ("diff", "sd-scripts"): WEB,
}
"""(kind, names) -> who reads it right. A pair that is missing has no words: it is never written."""


def readers_of(kind: Kind, names: Naming) -> tuple[Reader, ...]:
    """Return the tools that compute the trained change from such a file, in the order of `READERS`."""
    return tuple(reader for reader in READERS if reader in READ_RIGHT[kind, names])


def table_text() -> str:
    """Return the whole table as Markdown."""
    rows = [
        f"| {kind} | {names} | " + " | ".join("yes" if reader in right else "no" for reader in READERS) + " |"
        for (kind, names), right in READ_RIGHT.items()
    ]
    head = f"| kind | names | {' | '.join(READERS)} |"
    return "\n".join([head, "|---" * (2 + len(READERS)) + "|", *rows])
