"""The settings that save memory, in the order of what they cost, and the first that fit into a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sdtrain.config.schema import Config, FullConfig
from sdtrain.config.settings.values import memory_bytes
from sdtrain.errors import Problem, UserError
from sdtrain.training.ending.memory import RECOMPUTING
from sdtrain.training.keeping.disk import size
from sdtrain.training.planning.plan import Plan

USABLE = 0.9
"""The share of a card that tensors may take: the rest is the driver's, and what lies between them."""


@dataclass(frozen=True)
class Choice:
    """A config with levers pulled: what was set, and what each costs."""

    config: Config
    settings: tuple[str, ...]
    costs: tuple[str, ...]


def budget_bytes(text: str, where: str = "--fit-to") -> int:
    """Return the bytes that a budget such as `8GB` means; as cards are sold, a GB is 2^30 bytes.

    where: what holds it, for the UserError that is raised for what is no size.
    """
    num_bytes = memory_bytes(text)
    if not num_bytes:
        raise UserError("plan", [Problem(where, f"{text!r} is no size of a memory; write 8GB or 7.5GB")])
    return num_bytes


def choices(config: Config) -> Iterator[Choice]:
    """Yield the config as it is, then with more and more given up, in the order of what it costs.

    Micro-batches become smaller only where a step still has exactly as many pictures.
    """
    fused = isinstance(config.method, FullConfig) and config.data.gradient_accumulation == 1
    yield (first := Choice(config, (), ()))
    if fused and not config.memory.fused_back_pass:
        memory = config.memory.model_copy(update={"fused_back_pass": True})
        yield Choice(
            config.model_copy(update={"memory": memory}), ("memory.fused_back_pass=true",), ("no time to speak of",)
        )
    yield from _smaller(first)
    if config.memory.gradient_checkpointing:
        return
    memory = config.memory.model_copy(update={"gradient_checkpointing": True})
    recomputing = Choice(
        config.model_copy(update={"memory": memory}), ("memory.gradient_checkpointing=true",), (RECOMPUTING,)
    )
    yield recomputing
    yield from _smaller(recomputing)


def _smaller(choice: Choice) -> Iterator[Choice]:
    data = choice.config.data
    if choice.config.memory.fused_back_pass:
        return
    batch, accumulation = data.batch_size, data.gradient_accumulation
    while batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2
        update = {"batch_size": batch, "gradient_accumulation": accumulation}
        yield Choice(
            choice.config.model_copy(update={"data": data.model_copy(update=update)}),
            (*choice.settings, f"data.batch_size={batch}", f"data.gradient_accumulation={accumulation}"),
            (*choice.costs, "a GPU is less busy with smaller micro-batches; a step has the same pictures"),
        )


def fit_to(
    config: Config, num_bytes: int, plan: Callable[[Config], Plan], where: str = "--fit-to"
) -> tuple[Choice, Plan]:
    """Return the first choice whose plan fits into a memory of `num_bytes`, with its plan.

    where: what holds the budget. Raises UserError where none does, with what the smallest would need, by part.
    """
    smallest: tuple[Choice, Plan] | None = None
    for choice in choices(config):
        planned = plan(choice.config)
        if planned.tightest.least_bytes <= USABLE * num_bytes:
            return choice, planned
        if smallest is None or planned.tightest.least_bytes < smallest[1].tightest.least_bytes:
            smallest = choice, planned
    assert smallest is not None
    choice, planned = smallest
    tight = planned.tightest
    parts = ", ".join(f"{what} {size(part)}" for what, part in tight.parts.items() if part)
    with_what = f"even with {', '.join(choice.settings)}" if choice.settings else "with no setting left to give up"
    what = (
        f"{size(num_bytes)} are too little {with_what}: {tight.name} needs {size(tight.least_bytes)} "
        f"({parts}), and {USABLE:.0%} of the memory are for tensors. What is left: a smaller data.resolution_px, "
        "method.rank or preview, or a larger card"
    )
    raise UserError("plan", [Problem(where, what)])
