"""Draws the results of `bench_defaults.py` as three SVGs: loss over learning rate, regret, and d over steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import bench_results as results

WIDTH, HEIGHT = 250, 170  # of the inside of a panel, in px
LEFT, TOP, GAP_X, GAP_Y = 62, 54, 74, 62
COLOURS = {
    "constant": "#0072b2",
    "linear": "#009e73",
    "cosine": "#cc79a7",
    "ours": "#d55e00",
    "prodigyopt schedule=constant": "#0072b2",
    "prodigyopt schedule=cosine": "#009e73",
    "prodigy-plus": "#cc79a7",
    "schedulefree, its best": "#7f7f7f",
    "AdamW, the sweep's median": "#e69f00",
}
"""Colours that colour-blind people can tell apart (Okabe and Ito)."""
LEAST_REGRET, MOST_REGRET = -0.1, 0.4  # what lost more stands at the edge, as a triangle


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, in equal steps or in equal factors.

    marks: where it is marked, in place of even places. size_px: 0 for the usual one.
    """

    low: float
    high: float
    log: bool = False
    marks: tuple[float, ...] = ()
    size_px: int = 0

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one; what is beyond lies at the end."""
        low, high, value = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Return where the marks stand: at given places, powers of ten, or four even steps."""
        if self.marks:
            return list(self.marks)
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        return [self.low + (self.high - self.low) * index / 4 for index in range(5)]


@dataclass
class Panel:
    """One chart: its title, its axes and the pieces of SVG inside."""

    title: str
    x: Axis
    y: Axis
    pieces: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Of the inside, in px."""
        return self.x.size_px or WIDTH

    @property
    def height(self) -> int:
        """Of the inside, in px."""
        return self.y.size_px or HEIGHT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the px of a point within the panel."""
        return self.width * self.x.share(x), self.height * (1 - self.y.share(y))

    def line(self, points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> None:
        """Draw a line through points."""
        placed = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.pieces.append(f'<polyline points="{placed}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>')

    def dots(self, points: Sequence[tuple[float, float]], colour: str, radius: float = 3) -> None:
        """Draw a dot at every point."""
        for point in points:
            x, y = self.at(*point)
            self.pieces.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def beyond(self, y: float, colour: str) -> None:
        """Draw a triangle at the right edge for what lies beyond it."""
        x, y = self.at(self.x.high, y)
        self.pieces.append(f'<path d="M{x - 7:.1f} {y - 4:.1f}v8l8 -4z" fill="{colour}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "middle", colour: str = "#333") -> None:
        """Write words at a place in px."""
        self.pieces.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
        )

    def svg(self, *, rows: Sequence[str] = (), percent: bool = False) -> str:
        """Return the panel with its frame, marks and title. rows: words in place of the y axis's numbers."""
        self.text(self.width / 2, -8, self.title)
        for value in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            self.pieces.append(f'<path d="M{x:.1f} {self.height}v4" stroke="#999"/>')
            self.text(x, self.height + 16, f"{value:.0%}" if percent else f"{value:g}")
        for value in self.y.ticks() if not rows else ():
            _, y = self.at(self.x.low, value)
            self.pieces.append(f'<path d="M-4 {y:.1f}h4" stroke="#999"/>')
            self.text(-7, y + 4, f"{value:.0e}" if self.y.log else f"{value:.3f}", "end")
        for index, words in enumerate(rows):
            self.text(-7, self.height * (index + 0.5) / len(rows) + 4, words, "end")
        frame = f'<rect width="{self.width}" height="{self.height}" fill="none" stroke="#bbb"/>'
        return frame + "".join(self.pieces)


def page(
    panels: Sequence[Panel], columns: int, legend: Sequence[tuple[str, str]], caption: str, rows_of: Sequence[str] = ()
) -> str:
    """Return an SVG of panels of one size in rows under a caption and a legend of (words, colour).

    rows_of: words in place of the y axis's numbers; the x axis is in percent then.
    """
    columns, across_px, down_px = min(columns, len(panels)), panels[0].width + GAP_X, panels[0].height + GAP_Y
    left = 130 if rows_of else LEFT
    width, height = left + columns * across_px, TOP + -(-len(panels) // columns) * down_px
    parts = [f'<text x="12" y="18" fill="#333" font-weight="bold">{escape(caption)}</text>']
    across = 12.0
    for words, colour in legend:
        parts.append(f'<rect x="{across:.0f}" y="26" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{across + 14:.0f}" y="35" fill="#333">{escape(words)}</text>')
        across += 30 + 6.4 * len(words)
    for index, panel in enumerate(panels):
        x, y = left + index % columns * across_px, TOP + 12 + index // columns * down_px
        parts.append(f'<g transform="translate({x} {y})">{panel.svg(rows=rows_of, percent=bool(rows_of))}</g>')
    width = max(width, round(across))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


# ---- what is drawn ----


def swept_points(losses: results.Losses, schedule: str) -> list[tuple[float, float]]:
    """Return (learning rate, loss) of the AdamW settings with one schedule; those that came apart are left out.

    The loss is ours plus the mean difference over the seeds of both, since some settings were run with fewer seeds.
    """
    ours = results.mean_and_error(list(losses[results.OURS].values()))[0]
    points = []
    for name in losses:
        found = re.fullmatch(rf"adamw lr=(\S+) schedule={schedule}", name)
        loss = ours + results.paired_difference(losses[name], losses[results.OURS])[0]
        if found and math.isfinite(loss):
            points.append((float(found[1]), loss))
    return sorted(points)


def learning_rates(found: Sequence[results.Result]) -> str:
    """Return a panel per task and length: AdamW's loss over its learning rate, with ours as a line."""
    panels = []
    for task, steps in results.cells(found):
        losses = results.losses_of(found, task, steps)
        if results.OURS not in losses:
            continue
        lines = {schedule: swept_points(losses, schedule) for schedule in ("constant", "linear", "cosine")}
        points = [point for line in lines.values() for point in line]
        if len(points) < 2:
            continue
        ours, error = results.mean_and_error(list(losses[results.OURS].values()))
        before = results.before_of(found, task)
        low, high = min(ours, *(y for _, y in points)), min(before, max(y for _, y in points))
        room = 0.08 * (high - low)
        rates = [x for x, _ in points]
        rate_axis = Axis(min(rates), max(rates), True, tuple(sorted(set(rates))))
        panel = Panel(f"{task}, {steps} steps", rate_axis, Axis(low - room, high + room))
        for schedule, line in lines.items():
            panel.line(line, COLOURS[schedule])
            panel.dots(line, COLOURS[schedule])
        panel.line([(min(rates), ours), (max(rates), ours)], COLOURS["ours"])
        if math.isfinite(error):
            for edge in (ours - error, ours + error):
                panel.line([(min(rates), edge), (max(rates), edge)], COLOURS["ours"], "3 4")
        panels.append(panel)
    words = {
        "constant": "AdamW, constant",
        "linear": "linear",
        "cosine": "cosine with warm-up",
        "ours": "ours, no choice",
    }
    legend = [(text, COLOURS[name]) for name, text in words.items()]
    return page(panels, 4, legend, "Held-out loss over AdamW's learning rate") if panels else ""


NUM_LRS = 5  # of schedule-free AdamW


def regrets(losses: results.Losses, before: float) -> dict[str, float]:
    """Return what contestants lost against the best of the sweep, as a share of what that gained; by their name."""
    found: dict[str, float] = {}
    for name in ("ours", "prodigyopt schedule=constant", "prodigyopt schedule=cosine", "prodigy-plus"):
        if stands := results.standing(losses, name, before):
            found[name] = stands.share
            found["AdamW, the sweep's median"] = (stands.median - stands.best_loss) / (before - stands.best_loss)
    free = [results.standing(losses, name, before) for name in losses if name.startswith("schedulefree")]
    shares = [stands.share for stands in free if stands]
    if len(shares) == NUM_LRS:  # the best of fewer says less than it seems to
        found["schedulefree, its best"] = min(shares)
    return found


def regret(found: Sequence[results.Result]) -> str:
    """Return one panel: a row per task and length, a dot per contestant."""
    by_row = {
        f"{task}, {steps}": regrets(results.losses_of(found, task, steps), results.before_of(found, task))
        for task, steps in results.cells(found)
    }
    by_row = {row: shares for row, shares in by_row.items() if "ours" in shares}
    if not by_row:
        return ""
    lowest = min(LEAST_REGRET, *(share for shares in by_row.values() for share in shares.values()))
    marks = tuple(tenth / 10 for tenth in range(math.ceil(lowest * 10), round(MOST_REGRET * 10) + 1))
    across = Axis(lowest, MOST_REGRET, marks=marks, size_px=2 * WIDTH)
    title = "lost against the best AdamW, as a share of what that gained"
    panel = Panel(title, across, Axis(0, 1, size_px=24 * len(by_row)))
    panel.line([(0, 0), (0, 1)], "#bbb", "3 3")
    for index, shares in enumerate(by_row.values()):
        height = 1 - (index + 0.5) / len(by_row)
        for name in [*(other for other in shares if other != "ours"), "ours"]:
            if shares[name] > MOST_REGRET:
                panel.beyond(height, COLOURS[name])
            else:
                panel.dots([(shares[name], height)], COLOURS[name], 5 if name == "ours" else 3.5)
    names = [name for name in COLOURS if any(name in shares for shares in by_row.values())]
    legend = [(name.replace(" schedule=", ", "), COLOURS[name]) for name in names]
    caption = "Regret against the best of the AdamW sweep (0: as good, left of it: better; triangle: beyond)"
    return page([panel], 1, legend, caption, rows_of=list(by_row))


def step_sizes(found: Sequence[results.Result]) -> str:
    """Return a panel per task: d over the steps of the longest runs that there are, for all who estimate it."""
    panels = []
    for task in dict.fromkeys(one.task for one in found):
        runs = [one for one in found if one.task == task and one.d and one.contestant in COLOURS]
        if not runs:
            continue
        steps = [point[0] for one in runs for point in one.d]
        sizes = [point[1] for one in runs for point in one.d]
        panel = Panel(
            task, Axis(min(steps) / 1.2, max(steps) * 1.2, True), Axis(min(sizes) / 1.5, max(sizes) * 1.5, True)
        )
        for one in runs:
            points = [(point[0], point[1]) for point in one.d]
            panel.line(points, COLOURS[one.contestant])
            panel.dots(points, COLOURS[one.contestant], 2)
        panels.append(panel)
    estimating = ("ours", "prodigyopt schedule=constant", "prodigyopt schedule=cosine", "prodigy-plus")
    legend = [(name.replace(" schedule=", ", "), COLOURS[name]) for name in estimating]
    return page(panels, 4, legend, "d over the steps of a run, of the U-Net, every seed and length") if panels else ""


def draw_all(found: Sequence[results.Result], folder: Path, *, settings: int = 15) -> list[Path]:
    """Write the drawings that there are results for, and return their paths.

    What a sweep is needed for is drawn where so many of its settings are there.
    """
    whole = results.whole_sweeps(found, settings)
    swept = {one.task for one in whole}  # others were run for one question alone
    measured = [one for one in found if one.task in swept or not swept]
    drawings = {"lr": learning_rates(whole), "regret": regret(whole), "d": step_sizes(measured)}
    paths = []
    for name, svg in drawings.items():
        if svg:
            path = folder / f"defaults-{name}.svg"
            path.write_text(svg)
            paths.append(path)
    return paths
