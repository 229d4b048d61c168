"""The settings of what is given up for memory, and of what a step is compiled to."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sdtrain.config.settings.values import Budget, Settings


def _part(name: str) -> str:
    """Return the name of a part as it is. Raises ValueError for what names none."""
    if not re.fullmatch(r"(mid_block|(down|up)_blocks\.\d{1,3})(\.attentions\.\d{1,3})?", name, re.ASCII):
        raise ValueError("a part of the U-Net such as mid_block, up_blocks.0 or up_blocks.0.attentions.1")
    return name


Part = Annotated[str, AfterValidator(_part)]


class MemoryConfig(Settings):
    """What is given up so that a run needs less memory."""

    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in backward.")
    recompute: list[Part] = Field(
        default=[],
        description="Parts of the U-Net that alone recompute theirs, such as `up_blocks.0.attentions.1`, a "
        "transformer, or `up_blocks.0`, a block's convolutions; `sdtrain plan --fit-to` says which pay.",
    )
    compile: bool = Field(
        default=False, description="Compile the U-Net's transformer blocks: faster steps after a slow first one."
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Launch the gradients of a micro-batch at once on an NVIDIA card, which with few pictures waits "
        "for launches; `auto`: for adapters of the U-Net on one card, where nothing stands against it.",
    )
    fused_back_pass: bool = Field(
        default=False,
        description="Update weights inside backward, a few at a time, and set them aside in the host's memory while "
        "the averaged ones are looked at (full fine-tunes).",
    )
    budget: Budget = Field(
        default="off",
        description="Memory that the run must fit into, such as `8GB`; `auto`: that of the card. What it takes is "
        "given up, the cheapest first, and told: see `sdtrain plan --fit-to`.",
    )
    on_oom: Literal["stop", "adapt"] = Field(
        default="stop",
        description="Where a step finds too little memory: `stop` saves and says what would help; `adapt` goes on with "
        "recomputed activations, then with fewer pictures at once, and as many in a step.",
    )
