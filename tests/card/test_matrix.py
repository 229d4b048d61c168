"""Everything that can be trained, from the first file to the last on a card: a tensor in a wrong place ends the run.

The runs are those of `sdtrain fit`, not parts of it. The default suite has each subset of networks with two methods,
each method with both types, and each way to save memory with each of them; the whole product is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any

import pytest

from tests.card.fake_card import Card

Cell = tuple[tuple[str, ...], str, str, str]
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
SUBSETS = [chosen for num in (1, 2, 3) for chosen in combinations(NETWORKS, num)]
ADAPTERS = ("lora", "dora", "loha", "lokr", "oft")
MEMORY: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"memory.gradient_checkpointing": True},
    "accumulation": {"data.gradient_accumulation": 2, "data.batch_size": 1},
    "fused": {"memory.fused_back_pass": True},
}
WATCHED = {
    "preview.every": 1,
    "validation.share": 0.34,
    "validation.every": 1,
    "checkpoint.every": 1,
}
"""Everything that happens beside the steps."""


def cells() -> Iterator[Cell]:
    """The whole product, as far as it is allowed: mixed and fused are for full fine-tunes."""
    for subset, kind, dtype, memory in product(SUBSETS, (*ADAPTERS, "full"), ("bfloat16", "float32", "mixed"), MEMORY):
        if kind == "full" or (dtype != "mixed" and memory != "fused"):
            yield subset, kind, dtype, memory


QUICK: list[Cell] = [
    (("unet",), "lora", "bfloat16", "accumulation"),
    (("unet",), "full", "mixed", "checkpointing"),
    (("text_encoder",), "dora", "float32", "checkpointing"),
    (("text_encoder",), "full", "bfloat16", "fused"),
    (("text_encoder_2",), "loha", "bfloat16", "accumulation"),
    (("text_encoder_2",), "loha", "float32", "checkpointing"),
    (("unet", "text_encoder"), "lokr", "bfloat16", "checkpointing"),
    (("unet", "text_encoder"), "oft", "float32", "accumulation"),
    (("unet", "text_encoder_2"), "dora", "bfloat16", "accumulation"),
    (("unet", "text_encoder_2"), "lokr", "float32", "plain"),
    (("text_encoder", "text_encoder_2"), "full", "mixed", "accumulation"),
    (("text_encoder", "text_encoder_2"), "oft", "bfloat16", "checkpointing"),
    (NETWORKS, "lora", "float32", "plain"),
    (("text_encoder",), "full", "float32", "fused"),
]
"""Those of the default suite."""


def settings_of(subset: tuple[str, ...], kind: str, dtype: str, memory: str) -> dict[str, Any]:
    method: dict[str, Any] = {"method.kind": "full"}
    if kind != "full":
        method = {"method.adapter": kind, "method.rank": 4}
    if kind == "oft":
        method["export.names"] = "diffusers"
    return {**method, "method.train": list(subset), "model.dtype": dtype, **MEMORY[memory]}


def name_of(cell: Cell) -> str:
    return "-".join(["+".join(cell[0]), *cell[1:]])


LOOKED_AT: list[Cell] = [
    (("unet",), "lora", "bfloat16", "accumulation"),
    (("text_encoder",), "full", "float32", "fused"),
    (NETWORKS, "lora", "float32", "plain"),
]
"""Those that are previewed, validated and saved as well."""


@pytest.mark.parametrize("cell", QUICK, ids=name_of)
def test_everything_that_can_be_trained_runs_on_a_card(on_card: Callable[..., Card], cell: Cell) -> None:
    on_card({**settings_of(*cell), **(WATCHED if cell in LOOKED_AT else {})})


@pytest.mark.slow
@pytest.mark.parametrize("cell", list(cells()), ids=name_of)
def test_the_whole_matrix_runs_on_a_card(on_card: Callable[..., Card], cell: Cell) -> None:
    on_card({**settings_of(*cell), **WATCHED})


def test_the_quick_cells_meet_everything() -> None:
    everything = set(cells())
    assert set(LOOKED_AT) <= set(QUICK) <= everything
    for place in range(4):
        assert {cell[place] for cell in QUICK} == {cell[place] for cell in everything}
    pairs = {(cell[1], cell[2]) for cell in everything}
    assert pairs == {(cell[1], cell[2]) for cell in QUICK}
