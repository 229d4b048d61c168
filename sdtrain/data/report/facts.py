"""What pictures are like, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence

from sdtrain.data.report.names import about, shown_name
from sdtrain.data.report.summary import DataReport

MAX_BUCKETS = 12


def fact_lines(report: DataReport, steps: int) -> list[str]:
    """Return what pictures are like and how often a run of so many steps sees them, one fact per line."""
    epochs = steps / report.steps_per_epoch
    times = round(epochs * report.num_images / report.num_pictures)
    lines = [
        f"pictures: {report.num_pictures}, {about(report.num_images)} an epoch of {report.steps_per_epoch:.1f} steps; "
        f"{report.num_captioned} with a caption, {report.num_uncaptioned} without",
        f"epochs: {steps} steps are {epochs:.1f}, so a picture is seen "
        + (f"about {times:,} times" if times > 1 else "about once"),
        f"buckets: {_buckets(report.buckets)}",
    ]
    if report.crops:
        share, example = report.crops[0]
        lines.append(
            f"cropped: {report.mean_cropped_share:.1%} of a picture on average, at most {share:.1%} "
            f"({shown_name(example.path)})"
        )
    return lines


def _buckets(buckets: Sequence[tuple[tuple[int, int], int]]) -> str:
    fullest = sorted(sorted(buckets, key=lambda one: -one[1])[:MAX_BUCKETS])
    text = ", ".join(f"{num} at {width}x{height}" for (width, height), num in fullest)
    others = sum(num for _, num in buckets) - sum(num for _, num in fullest)
    return text + (f", and {others} in {len(buckets) - len(fullest)} more sizes" if others else "")
