"""The settings that save memory, in the order of what they cost, and the first that fit into a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate as sums

from sdtrain.adapters.quantised.packages import package_problems
from sdtrain.config.method_rules import split_over
from sdtrain.config.schema import BasePrecision, Config, FullConfig
from sdtrain.config.settings.values import memory_bytes
from sdtrain.errors import Problem, UserError
from sdtrain.training.ending.memory import RECOMPUTING
from sdtrain.training.keeping.disk import size
from sdtrain.training.planning.plan import Plan, listed
from sdtrain.training.planning.trace import Part

USABLE = 0.9
"""The share of a card that tensors may take: the rest is the driver's, and what lies between them."""
PRECISIONS: tuple[BasePrecision, ...] = ("int8", "nf4")
"""How a base may be packed, where what packs it is installed."""
FUSED = "a few seconds whenever the averaged weights are looked at, for those in training wait in the host's memory"
ROUNDED = "the frozen base is rounded and unpacked for every product; files and merges come from the exact one"


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


def fits(plan: Plan, num_bytes: int) -> bool:
    """Return whether a plan fits into a memory of `num_bytes`."""
    return plan.tightest.least_bytes <= USABLE * num_bytes


def attempts(
    config: Config, num_bytes: int, plan: Callable[[Config], Plan], processes: int = 1
) -> Iterator[tuple[Choice, Plan]]:
    """Yield the config as it is with its plan, then with more and more given up, in the order of what it costs.

    A recomputed part costs its arithmetic, a smaller micro-batch a busy GPU, a packed base the exact weights. For each,
    those parts of the U-Net are recomputed of which so many bytes are saved for so little arithmetic, and all of them
    where that is too little. Micro-batches become smaller only where a step still has exactly as many pictures.
    """
    for start in _precisions(config):
        for choice in _smaller(start):
            planned = plan(choice.config)
            yield choice, planned
            for fused in _fused(choice) if processes == 1 else ():
                choice, planned = fused, plan(fused.config)
                yield choice, planned
            if not (choice.config.memory.gradient_checkpointing or choice.config.memory.recompute):
                yield from _recomputing(choice, planned, num_bytes, plan)


def _precisions(config: Config) -> Iterator[Choice]:
    yield Choice(config, (), ())
    if isinstance(config.method, FullConfig) or config.model.base_precision != "full":
        return
    for word in PRECISIONS:
        if not package_problems(word):
            model = config.model.model_copy(update={"base_precision": word})
            yield Choice(config.model_copy(update={"model": model}), (f'model.base_precision="{word}"',), (ROUNDED,))


def _fused(choice: Choice) -> Iterator[Choice]:
    config = choice.config
    may = isinstance(config.method, FullConfig) and config.data.gradient_accumulation == 1
    if may and not config.memory.fused_back_pass:
        yield _changed(choice, "fused_back_pass", True, FUSED)


def _changed(choice: Choice, setting: str, value: bool | list[str], cost: str) -> Choice:
    memory = choice.config.memory.model_copy(update={setting: value})
    text = f"memory.{setting}={json.dumps(value)}"
    return Choice(choice.config.model_copy(update={"memory": memory}), (*choice.settings, text), (*choice.costs, cost))


def _recomputing(
    choice: Choice, planned: Plan, num_bytes: int, plan: Callable[[Config], Plan]
) -> Iterator[tuple[Choice, Plan]]:
    """Yield as few recomputed parts as might do, then a few more, then all; parts only where all would do."""
    accumulation = choice.config.data.gradient_accumulation
    cost = _more_time(_share(planned, planned.parts, accumulation)) if planned.parts else RECOMPUTING
    all_of_them = _changed(choice, "gradient_checkpointing", True, cost)
    everything = plan(all_of_them.config)
    if fits(everything, num_bytes):
        over = planned.tightest.least_bytes - int(USABLE * num_bytes)
        for names, share in selections(planned, over, accumulation):
            some = _changed(choice, "recompute", names, _more_time(share))
            yield some, plan(some.config)
    yield all_of_them, everything


def selections(planned: Plan, over: int, accumulation: int) -> Iterator[tuple[list[str], float]]:
    """Yield sets of parts that save `over` bytes, and more, each with its share of a step's arithmetic.

    First those of which the most bytes are saved for an operation. What a part computes again is there while its
    gradients are computed, so that a little more must be saved than is lacking; how much, a plan of them tells.
    """
    parts = sorted(planned.parts, key=lambda part: part.saved_bytes / max(1, part.flops), reverse=True)
    largest, before = max((part.saved_bytes for part in parts), default=0), 0
    for goal in (over, over + largest // 4, over + largest):
        saved = list(sums(part.saved_bytes for part in parts))
        num = next((index for index, total in enumerate(saved, 1) if total >= goal), len(parts))
        if before < num < len(parts):
            chosen, before = parts[:num], num
            yield sorted(part.name for part in chosen), _share(planned, chosen, accumulation)


def _share(planned: Plan, parts: Sequence[Part], accumulation: int) -> float:
    """Return how much arithmetic a step has more where parts are recomputed."""
    return accumulation * sum(part.flops for part in parts) / max(1, planned.flops)


def _more_time(share: float) -> str:
    return f"about {share:.0%} more time"


def _smaller(choice: Choice) -> Iterator[Choice]:
    yield choice
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
    config: Config, num_bytes: int, plan: Callable[[Config], Plan], where: str = "--fit-to", processes: int = 1
) -> tuple[Choice, Plan]:
    """Return the first choice whose plan fits into a memory of `num_bytes`, with its plan.

    where: what holds the budget. processes: on how many cards of that memory; the plan is that of each. Raises
    UserError where none does, with what the smallest would need, by part.
    """
    smallest: tuple[Choice, Plan] | None = None

    def of_each(one: Config) -> Plan:
        return plan(one).of_each(split_over(one, processes), offload=one.parallel.offload)

    for choice, planned in attempts(config, num_bytes, of_each, processes):
        if fits(planned, num_bytes):
            return choice, planned
        if smallest is None or planned.tightest.least_bytes < smallest[1].tightest.least_bytes:
            smallest = choice, planned
    assert smallest is not None
    choice, planned = smallest
    tight = planned.tightest
    parts = listed(tight.parts)
    with_what = f"even with {', '.join(choice.settings)}" if choice.settings else "with no setting left to give up"
    what = (
        f"{size(num_bytes)} are too little {with_what}: {tight.name} needs {size(tight.least_bytes)} "
        f"({parts}), and {USABLE:.0%} of the memory are for tensors. What is left: a smaller data.resolution_px, "
        "method.rank or preview, or a larger card"
    )
    raise UserError("plan", [Problem(where, what)])
