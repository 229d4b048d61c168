"""Line charts as SVG, drawn by hand: a few lines over steps, told apart by dashes and names as well as by colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 26
MOST_POINTS = 400
"""The most points of a line; a longer one keeps the lowest and the highest of each stretch."""
SMALLEST = 1e-100
"""Of differences that are drawn as such; smaller ones cannot be divided by."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""How lines are dashed, in their order; they start anew after the last."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart; steps without a value are left out of `points`.

    errors: half the height of a bar at each point, for values that are marked one by one; None: a plain line.
    """

    name: str
    points: Sequence[Point]
    errors: Sequence[float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step, with a word."""

    step: int
    text: str


@dataclass(frozen=True)
class Chart:
    """One chart: what it shows, its lines, and marks at steps."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    logarithmic: bool = False

    @property
    def has_points(self) -> bool:
        """Whether there is anything to see."""
        return any(line.points for line in self.lines)

    def svg(self) -> Markup:
        """Return the chart; every text in it is escaped."""
        return _drawn(self)


@dataclass(frozen=True)
class _Scale:
    """Where numbers lie on the paper."""

    first: float
    last: float
    low: float
    high: float
    logarithmic: bool

    def x(self, step: float) -> float:
        span = self.last - self.first or 1
        return LEFT + (step - self.first) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (self._place(value) - self._place(self.low)) / (self._place(self.high) - self._place(self.low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def _place(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.logarithmic else value

    def ticks(self) -> list[float]:
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(powers) // 5)
            fine = (1, 2, 5) if len(powers) <= 3 else (1,)
            values = [factor * 10.0**power for power in powers[::every] for factor in fine]
            return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
        return _round_ticks(self.low, self.high)


def _round_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return a few round numbers between two numbers."""
    size = (high - low) / about
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(chart: Chart) -> _Scale:
    points = [point for line in chart.lines for point in line.points]
    steps = [step for step, _ in points] + [mark.step for mark in chart.marks]
    values = [value for _, value in points]
    for line in chart.lines:
        for (_, value), error in zip(line.points, line.errors or (), strict=False):
            values += [value - error, value + error]
    logarithmic = chart.logarithmic and min(values) > SMALLEST
    low, high = min(values), max(values)
    if logarithmic:
        low, high = (low / 1.3, high * 1.3) if high / low < 1.7 else (low / 1.05, high * 1.05)
    else:
        margin = 0.05 * (high - low) or 0.1 * abs(high)
        margin = margin if margin > SMALLEST else 1.0
        low, high = low - margin, high + margin
        if min(values) >= 0:
            low = max(0.0, low)
    return _Scale(min(steps), max(steps), low, high, logarithmic)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Return at most `most` points: of each stretch the lowest and the highest, in their order."""
    if len(points) <= most:
        return points
    kept: list[Point] = [points[0]]
    stretches = most // 2 - 1
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        kept += sorted({min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1])})
    return [*kept, points[-1]]


def _drawn(chart: Chart) -> Markup:
    scale = _scale(chart)
    parts = [*_axes(scale), *_marks(chart.marks, scale)]
    for index, line in enumerate(chart.lines):
        parts += _line(line, index, scale)
    names = ", ".join(line.name for line in chart.lines if line.points)
    last = [f"{line.name} ends at {short(line.points[-1][1])}" for line in chart.lines if line.points]
    label = escape(f"{chart.title} over steps: {names}. {'; '.join(last)}.")
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return head + Markup("").join(parts) + Markup("</svg>")


def _axes(scale: _Scale) -> Iterable[Markup]:
    for value in scale.ticks():
        y = f"{scale.y(value):.1f}"
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        yield Markup('<text x="{}" y="{}" dy="4" text-anchor="end">{}</text>').format(LEFT - 5, y, short(value))
    bottom = HEIGHT - BOTTOM
    yield Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, bottom, bottom)
    steps = _round_ticks(scale.first, scale.last) if scale.last > scale.first else [scale.first]
    for step in steps:
        if step == round(step):
            x = f"{scale.x(step):.1f}"
            yield Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, bottom + 16, f"{step:,.0f}")


def _marks(marks: Sequence[Mark], scale: _Scale) -> Iterable[Markup]:
    for index, mark in enumerate(marks):
        x = scale.x(mark.step)
        end = x > WIDTH / 2
        yield Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
            f"{x:.1f}", TOP, HEIGHT - BOTTOM
        )
        yield Markup('<text class="word" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            f"{x + (-4 if end else 4):.1f}", TOP + 10 + 13 * (index % 4), "end" if end else "start", mark.text
        )


def _line(line: Line, index: int, scale: _Scale) -> Iterable[Markup]:
    kind = f"line c{index % 4}" + (" faint" if line.faint else "")
    if not line.points:
        return
    if line.errors is None and len(line.points) > 1:
        path = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in thinned(line.points))
        yield Markup('<polyline class="{}" stroke-dasharray="{}" points="{}"/>').format(
            kind, "" if line.faint else DASHES[index % 4], path
        )
        return
    if len(line.points) > 1:
        path = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in thinned(line.points))
        yield Markup('<polyline class="{} faint" points="{}"/>').format(kind, path)
    errors = line.errors or [0.0] * len(line.points)
    every = max(1, len(line.points) // 120)
    for (step, value), error in list(zip(line.points, errors, strict=True))[::-every][::-1]:
        x, y = f"{scale.x(step):.1f}", f"{scale.y(value):.1f}"
        if error:
            yield Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                kind, x, x, f"{scale.y(value - error):.1f}", f"{scale.y(value + error):.1f}"
            )
        yield Markup('<circle class="{}" cx="{}" cy="{}" r="3.2"/>').format(kind, x, y)


def sample_of(index: int, line: Line) -> Markup:
    """Return a short piece of a line, for a legend."""
    kind = f"line c{index % 4}" + (" faint" if line.faint else "")
    dash = "" if line.faint or line.errors is not None else DASHES[index % 4]
    return Markup(
        '<svg class="sample" viewBox="0 0 30 10" aria-hidden="true"><line class="{}" stroke-dasharray="{}" '
        'x1="1" x2="29" y1="5" y2="5"/></svg>'
    ).format(kind, dash)


def short(value: float) -> str:
    """Return a number in few letters: 0.0123, 1.2e-05, 1,500."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.3g}"
