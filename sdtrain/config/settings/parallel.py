"""The settings of several processes that train one run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdtrain.config.settings.values import Settings


class ParallelConfig(Settings):
    """How several processes share a run; alone, nothing of it is used."""

    kind: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="`ddp`: each process holds all weights; `fsdp`: each holds its share of them, of their gradients "
        "and of the optimizer's state (FSDP2, full fine-tunes); `auto`: that for full fine-tunes where it can be.",
    )
    replicas: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=1,
        description="Under `fsdp`: the groups of processes that each hold all weights between them, usually one for "
        "each machine, so that weights travel within it and gradients alone between them (HSDP).",
    )
    offload: bool = Field(
        default=False,
        description="Under `fsdp`: what each process holds of weights, gradients and the optimizer's state lies in the "
        "memory of its host, where the update is computed; a card has layers for a moment only.",
    )
