"""How much faster a run would be on several cards, reckoned from its plan: what each computes and what they exchange.

It is a reckoning and no measurement. A step has the same pictures on any number of cards, so each computes fewer of
them. Where each holds all that is trained, the gradients are added up once all are there, and what that takes is not
hidden behind anything. Where they hold it between them, weights and gradients travel while layers compute: a
micro-batch takes as long as the slower of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from sdtrain.config.method_rules import shards, split_over
from sdtrain.config.schema import Config
from sdtrain.data.examples import Example
from sdtrain.data.identity.held_out import training_examples
from sdtrain.data.order import Order
from sdtrain.data.placing import placements_of
from sdtrain.training.keeping.disk import size
from sdtrain.training.planning.plan import Plan
from sdtrain.training.ranks.group import Exchanged
from sdtrain.training.ranks.shards import Travel

PER_MACHINE = 8
"""So many cards are in one machine, joined by NVLink."""
RATE = 1.28e14
"""Floating point operations a second of an H100 in this program: measured, one picture of SDXL keeps it busy for 93 ms,
which are 11.9 TFLOP."""
LAUNCH_S = 4.2e-6
"""Seconds a processor takes to launch an operation: measured, of 72,000 a step of SDXL takes 0.395 s, 0.093 of them the
card's own. With four pictures the sum of both is 0.68 s, where 0.64 to 0.70 were measured."""
UPDATE_S, UPDATE_S_A_BYTE = 4.6e-3, 4.5e-12
"""What the optimizer takes, of a step and of a byte of gradients: measured on an H200, 5.4 ms for a LoRA of SDXL and 51
for its whole U-Net. Each card does all of it."""
STEPS = 200
"""So many steps at most stand for all: which pictures meet in one, and who computes them."""
WORTH_IT = 1.3
"""Twice as many cards are worth it from so many times the speed on."""


@dataclass(frozen=True)
class Link:
    """How machines are joined. bytes_per_s: of one machine in each direction. call_s: what a call costs a hop."""

    name: str
    bytes_per_s: float
    call_s: float


NVLINK = Link("NVLink", 360e9, 10e-6)
"""Within a machine, for each card: 80 % of the 450 GB/s of an H100."""
INFINIBAND = Link("InfiniBand", 8 * 45e9, 20e-6)
"""400 Gbit/s for each card, of which 90 % are reached."""
ETHERNET = Link("Ethernet", 2.8e9, 60e-6)
"""25 Gbit/s for the whole machine, of which 90 % are reached."""
BETWEEN = (INFINIBAND, ETHERNET)


@dataclass(frozen=True)
class Scaled:
    """A run on so many cards: the pictures that the busiest computes in a step, the seconds that it takes with the
    optimizer's, and those that all wait for what they exchange, by what joins their machines. is_split: whether they
    hold what is trained between them."""

    cards: int
    pictures: float
    compute_s: float
    exchange_s: dict[str, float]
    is_split: bool = False

    def step_s(self, link: str) -> float:
        """Return what a step takes."""
        return self.compute_s + self.exchange_s[link]


def scaled_runs(config: Config, plan: Plan, examples: Sequence[Example], most: int) -> list[Scaled]:
    """Return a run on one card, on two, four and so on up to `most`, as far as they can share a step equally."""
    assert plan.exchanged is not None
    order = _order(config, training_examples(examples))
    pictures = config.data.batch_size * config.data.gradient_accumulation
    numbers = sorted({1, *_doubling(most), most})
    possible = [num for num in numbers if pictures % num == 0]
    runs = [
        _scaled(config, plan, order, plan.exchanged, num) for num in possible if num == 1 or not shards(config, num)
    ]
    return runs + [
        _split(config, plan, order, num)
        for num in possible
        if shards(config, num) and num % config.parallel.replicas == 0
    ]


def exchange_s(exchanged: Exchanged, cards: int, between: Link) -> float:
    """Return the seconds that a ring takes to add up on so many cards, within each machine and between machines.

    Each byte goes 2 (n - 1) / n times through each card of a ring of n: once to be added up, once to be told.
    """
    within, machines = min(cards, PER_MACHINE), -(-cards // PER_MACHINE)
    seconds = _ring_s(exchanged, within, NVLINK)
    return seconds + _ring_s(exchanged, machines, between)


def travel_s(travel: Travel, cards: int, replicas: int, between: Link) -> float:
    """Return the seconds that the weights and gradients of a micro-batch travel, on cards in so many groups that hold
    what is trained between them. Each byte goes (n - 1) / n times through a ring of n; groups add up their shares."""
    group = cards // replicas
    within, machines = min(group, PER_MACHINE), -(-group // PER_MACHINE)
    both = Exchanged(travel.calls, travel.num_bytes)
    seconds = (_ring_s(both, within, NVLINK) + _ring_s(both, machines, between)) / 2
    if replicas > 1:  # the cards of a machine have different shares
        share = Exchanged(travel.reductions, travel.reduced_bytes // group)
        one_machine = cards <= PER_MACHINE
        link = NVLINK if one_machine else between
        seconds += _ring_s(share if one_machine else replace(share, num_bytes=share.num_bytes * within), replicas, link)
    return seconds


def _ring_s(exchanged: Exchanged, size: int, link: Link) -> float:
    if size == 1:
        return 0.0
    hops = exchanged.calls * 2 * math.ceil(math.log2(size))  # short messages go through a tree
    return 2 * (size - 1) / size * exchanged.num_bytes / link.bytes_per_s + hops * link.call_s


def _doubling(most: int) -> Iterator[int]:
    number = 2
    while number <= most:
        yield number
        number *= 2


def _order(config: Config, examples: Sequence[Example]) -> Order:
    return Order(
        [placement.bucket for placement in placements_of(examples, config.data)],
        [example.repeats for example in examples],
        batch_size=config.data.batch_size,
        accumulation=config.data.gradient_accumulation,
        seed=config.seed,
    )


def _scaled(config: Config, plan: Plan, order: Order, exchanged: Exchanged, cards: int) -> Scaled:
    pictures, _, seconds = _computed(config, plan, order, cards)
    update_s = UPDATE_S + UPDATE_S_A_BYTE * exchanged.num_bytes
    exchange = {link.name: exchange_s(exchanged, cards, link) if cards > 1 else 0.0 for link in BETWEEN}
    return Scaled(cards, pictures, seconds + update_s, exchange)


def _split(config: Config, plan: Plan, order: Order, cards: int) -> Scaled:
    pictures, batches, seconds = _computed(config, plan, order, cards)
    update_s = UPDATE_S + UPDATE_S_A_BYTE * plan.travel.reduced_bytes * config.parallel.replicas / cards
    travels = {link.name: travel_s(plan.travel, cards, config.parallel.replicas, link) for link in BETWEEN}
    waits = {name: max(0.0, batches * each - seconds) for name, each in travels.items()}
    return Scaled(cards, pictures, seconds + update_s, waits, is_split=True)


def _computed(config: Config, plan: Plan, order: Order, cards: int) -> tuple[float, float, float]:
    """Return the most pictures and micro-batches that a card has in a step, and the seconds that the slowest takes."""
    flops_a_pixel = plan.flops / (config.data.batch_size * config.data.gradient_accumulation * math.prod(plan.bucket))
    steps = min(STEPS, math.ceil(order.steps_per_epoch))
    most_pictures, most_batches, seconds = 0, 0, 0.0
    for step in range(steps):
        parts, pixels, dealt = order.dealt(step, config.data.batch_size, cards)
        costs = [plan.operations * LAUNCH_S + flops_a_pixel * num / RATE for num in pixels]
        sizes = [sum(piece.stop - piece.start for piece in part) for part in parts]
        seconds += max(sum(costs[index] for index in hand) for hand in dealt)
        most_pictures += max(sum(sizes[index] for index in hand) for hand in dealt)
        most_batches += max(map(len, dealt))
    return most_pictures / steps, most_batches / steps, seconds / steps


def last_worth_it(runs: Sequence[Scaled], link: str) -> int:
    """Return the largest number of cards up to which twice as many were worth it each time."""
    reached = runs[0]
    for run in runs[1:]:
        gain = reached.step_s(link) / run.step_s(link)
        if gain < WORTH_IT ** math.log2(run.cards / reached.cards):
            break
        reached = run
    return reached.cards


def scaling_lines(config: Config, plan: Plan, runs: Sequence[Scaled]) -> dict[str, str]:
    """Return what a person reads of it, a row for each number of cards."""
    assert plan.exchanged is not None
    alone, last = runs[0], runs[-1]
    told = f"{plan.exchanged.calls} calls and {size(plan.exchanged.num_bytes)} a step: gradients and what is agreed on"
    if last.is_split:
        travel = plan.travel
        told = f"{travel.calls} calls and {size(travel.num_bytes)} a micro-batch"
        told += ", while layers compute: weights and gradients"
    rows = {"H100 cards": f"reckoned, not measured; {told}", "1 card": f"{alone.compute_s:.3g} s a step"}
    for run in runs[1:]:
        fast = f"{alone.compute_s / run.step_s(INFINIBAND.name):.2f} x as fast"
        waits = "to wait for weights and gradients" if run.is_split else "to add up"
        parts = f"{run.compute_s:.3g} s to compute, {run.exchange_s[INFINIBAND.name]:.2g} s {waits}"
        rows[f"{run.cards} cards"] = f"{run.step_s(INFINIBAND.name):.3g} s a step, {fast}: {parts}"
        if run.cards > PER_MACHINE:
            slow = f"{alone.compute_s / run.step_s(ETHERNET.name):.2f} x"
            rows[f"{run.cards} cards"] += f" over InfiniBand; over Ethernet {run.step_s(ETHERNET.name):.3g} s, {slow}"
    rows["pays"] = _paying(runs)
    if last.is_split:
        group = split_over(config, last.cards)
        most = size(plan.of_each(group, offload=config.parallel.offload).worst.peak_bytes)
        rows["fsdp"] = (
            f"on {last.cards} cards each holds {size(plan.trained_bytes // group)} of the {size(plan.trained_bytes)} "
            f"that trained weights, their gradients and the optimizer take, and one layer whole: {most} at most in all"
        )
    if last.cards > 1:
        seconds = alone.compute_s + last.exchange_s[INFINIBAND.name]
        gain = last.cards * alone.compute_s / seconds
        more = f"data.gradient_accumulation = {config.data.gradient_accumulation * last.cards}"
        rows["more pictures"] = f"{more} on {last.cards} cards: {gain:.2f} x the pictures a second"
    return rows


def scaling_answer(plan: Plan, runs: Sequence[Scaled]) -> dict[str, object]:
    """Return the same for programs."""
    assert plan.exchanged is not None
    links = [link.name for link in BETWEEN]
    return {
        "exchanged": asdict(plan.exchanged),
        "trained_bytes": plan.trained_bytes,
        "travel": asdict(plan.travel),
        "cards": [asdict(run) | {"step_s": {link: run.step_s(link) for link in links}} for run in runs],
        "pays_up_to": {link: last_worth_it(runs, link) for link in links},
    }


def _paying(runs: Sequence[Scaled]) -> str:
    fast, slow = (last_worth_it(runs, link.name) for link in BETWEEN)
    cards = f"up to {fast} card{'s' * (fast > 1)}"
    if slow != fast:
        cards += f", or {slow} where Ethernet joins the machines"
    return f"{cards}: twice as many must make a step {WORTH_IT} x as fast"
