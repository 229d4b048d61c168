"""The charts of a report, from the numbers of a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdtrain.training.watching.report.chart import Chart, Line, Mark, Point
from sdtrain.training.watching.report.numbers import Group, Numbers, Step

SMOOTHING = 0.98
"""The share of the smoothed loss that stays at each step, as on the screen: it looks back about 50 steps."""


def charts(numbers: Numbers) -> list[Chart]:
    """Return the charts that have something to show."""
    marks = freeze_marks(numbers)
    losses = [(one.step, one.loss) for one in numbers.steps if one.loss is not None]
    found = [
        Chart("Loss", [Line("each step", losses, faint=True), Line("smoothed", smoothed(losses))]),
        _held_out(numbers),
        Chart("Step size d", [*_networks(numbers, "d"), *_applied(numbers)], marks, logarithmic=True),
        Chart("effective_lr", _networks(numbers, "effective_lr"), marks, logarithmic=True),
        Chart("Images per second", [Line("images/s", _column(numbers, lambda one: one.images_per_s))]),
        Chart("Peak memory, GiB", [Line("GiB so far", _column(numbers, lambda one: one.peak_memory_gib))]),
    ]
    return [chart for chart in found if chart.has_points]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return a running mean that starts at the first value: the weighted mean of all before, the last ones most."""
    total = weight = 0.0
    result = []
    for step, value in points:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append((step, total / weight))
    return result


def freeze_marks(numbers: Numbers) -> list[Mark]:
    """Return a mark where d of each network froze for good."""
    marks = []
    for name in numbers.networks:
        step = numbers.frozen_at(name)
        if step is not None:
            marks.append(Mark(step, f"{name} frozen at {step}"))
    return marks


def _held_out(numbers: Numbers) -> Chart:
    found = [one for one in numbers.validations if one.loss is not None]
    points = [(one.step, one.loss) for one in found if one.loss is not None]
    errors = [one.standard_error or 0.0 for one in found]
    best = numbers.best
    marks = [Mark(best.step, f"best at {best.step}")] if best else []
    return Chart("Held-out loss", [Line("mean and its standard error", points, errors)], marks)


def _networks(numbers: Numbers, name: str) -> list[Line]:
    get: Callable[[Group], float | None] = lambda group: group.d if name == "d" else group.effective_lr  # noqa: E731
    return [
        Line(network, [(step, value) for step, value in _of(numbers, network, get) if value > 0])
        for network in numbers.networks
    ]


def _applied(numbers: Numbers) -> list[Line]:
    """Return the applied d of each network, one line where it is the same for all, none where it is d itself."""
    lines = []
    seen: list[list[Point]] = [list(_of(numbers, name, lambda group: group.d)) for name in numbers.networks]
    for name in numbers.networks:
        points = [point for point in _of(numbers, name, lambda group: group.applied_d) if point[1] > 0]
        if points and points not in seen:
            lines.append((name, points))
            seen.append(points)
    alone = len(lines) == 1
    return [Line("applied" if alone else f"applied, {name}", points) for name, points in lines]


def _of(numbers: Numbers, network: str, get: Callable[[Group], float | None]) -> list[Point]:
    found = ((one.step, one.groups.get(network)) for one in numbers.steps)
    values = ((step, get(group)) for step, group in found if group is not None)
    return [(step, value) for step, value in values if value is not None]


def _column(numbers: Numbers, get: Callable[[Step], float | None]) -> list[Point]:
    values = ((one.step, get(one)) for one in numbers.steps)
    return [(step, value) for step, value in values if value is not None]
