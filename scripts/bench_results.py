"""The table of results of `bench_defaults.py`: a line of JSON per run, and what the lines say together.

Runs are compared in pairs, with the same pictures, batches and noise: by the mean of their differences over the seeds
that both have, and its standard error.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "ours"
Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    loss: of the weights that it would ship, on held-out pictures. best: the lowest along the run. before: the untouched
    model's. curve: [step, loss]. d: [step, applied d of the U-Net]. A loss that is not finite is None.
    """

    task: str
    contestant: str
    steps: int
    seed: int
    loss: float | None
    best: float | None
    before: float
    curve: list[list[float | None]]
    d: list[list[float]]
    parts: dict[str, float | None]
    rates: dict[str, float]
    seconds: float
    unet: str
    commit: str
    versions: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What no two runs on one model share."""
        return (self.task, self.contestant, self.steps, self.seed)


def read_results(path: Path, unet: str = "") -> list[Result]:
    """Return the results in a file, those of one U-Net where one is named; of two with one key the later counts."""
    if not path.exists():
        return []
    lines = [Result(**json.loads(line)) for line in path.read_text().splitlines() if line]
    return list({(one.key, one.unet): one for one in lines if unet in ("", one.unet)}.values())


def append_result(path: Path, result: Result) -> None:
    """Add a line to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result), separators=(",", ":")) + "\n")


def with_all_seeds(results: Sequence[Result], seeds: Sequence[int]) -> list[Result]:
    """Return the results of these seeds, of those contestants that have all of them in a task and length."""
    kept = [one for one in results if one.seed in seeds]
    num = Counter((one.task, one.steps, one.contestant) for one in kept)
    return [one for one in kept if num[one.task, one.steps, one.contestant] == len(set(seeds))]


def whole_sweeps(results: Sequence[Result], num: int = 15) -> list[Result]:
    """Return the results of tasks and lengths in which so many AdamW settings have the first seed.

    Without settings that lack it, which were run beside the sweep.
    """
    first = {(one.task, one.steps, one.contestant) for one in results if one.seed == 0}
    kept = [one for one in results if (one.task, one.steps, one.contestant) in first]
    swept = Counter((task, steps) for task, steps, name in first if name.startswith("adamw"))
    return [one for one in kept if swept[one.task, one.steps] >= num]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values and its standard error, s / sqrt(n) with n - 1 in s; NaN for a single value."""
    if any(not math.isfinite(value) for value in values):
        return math.inf, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


Losses = Mapping[str, Mapping[int, float]]
"""contestant -> seed -> loss."""


def losses_of(results: Iterable[Result], task: str, steps: int, *, best: bool = False) -> dict[str, dict[int, float]]:
    """Return the losses of one task and length; a run that came apart has lost infinitely."""
    found: dict[str, dict[int, float]] = {}
    for one in results:
        if (one.task, one.steps) == (task, steps):
            loss = one.best if best else one.loss
            found.setdefault(one.contestant, {})[one.seed] = math.inf if loss is None else loss
    return found


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, int]:
    """Return the mean of one minus other over the seeds of both, its standard error, and the number of seeds."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return math.nan, math.nan, 0
    return *mean_and_error([one[seed] - other[seed] for seed in seeds]), len(seeds)


def is_swept(contestant: str) -> bool:
    """Whether a contestant is one of the AdamW settings that a person would have to try."""
    return contestant.startswith("adamw ")


def common(losses: Losses, chosen: Iterable[str]) -> list[int]:
    """Return the seeds that all chosen contestants have."""
    seeds = [set(losses[name]) for name in chosen]
    return sorted(set.intersection(*seeds)) if seeds else []


def mean_over(losses: Losses, name: str, seeds: Sequence[int]) -> float:
    """Return a contestant's mean loss over some seeds."""
    return mean_and_error([losses[name][seed] for seed in seeds])[0]


def best_of_sweep(losses: Losses, seeds: Sequence[int]) -> str:
    """Return the AdamW setting with the lowest mean over the seeds; "" where there is none."""
    swept = [name for name in losses if is_swept(name) and set(seeds) <= set(losses[name])]
    return min(swept, key=lambda name: mean_over(losses, name, seeds)) if swept and seeds else ""


@dataclass(frozen=True)
class Standing:
    """How one contestant stands against the sweep in one task and length.

    difference: its mean loss less that of the best AdamW setting, paired by seed. error: the standard error of it.
    share: the difference as a share of what that best setting gained over the untouched model. rank: among the sweep,
    1 for ahead of all.
    """

    best: str
    best_loss: float
    loss: float
    difference: float
    error: float
    share: float
    rank: int
    num_swept: int
    median: float
    num_seeds: int

    @property
    def verdict(self) -> str:
        """The goal in words: within one standard error of the best of the sweep, and no worse than its median."""
        if self.difference <= 0:
            return "ahead"
        if self.difference <= self.error:
            return "within 1 SE"
        return "behind" if self.loss <= self.median else "behind the median"


def standing(losses: Losses, name: str, before: float) -> Standing | None:
    """Return how a contestant stands over the seeds that it has in common with the sweep; None where there are none."""
    swept = [other for other in losses if is_swept(other)]
    if name not in losses or not swept:
        return None
    seeds = common(losses, [name, *swept])
    if not seeds:
        return None
    best = best_of_sweep(losses, seeds)
    difference, error, num = paired_difference(losses[name], {seed: losses[best][seed] for seed in seeds})
    means = sorted(mean_over(losses, other, seeds) for other in swept)
    loss, best_loss = mean_over(losses, name, seeds), means[0]
    return Standing(
        best=best,
        best_loss=best_loss,
        loss=loss,
        difference=difference,
        error=error,
        share=difference / (before - best_loss),
        rank=1 + sum(mean < loss for mean in means),
        num_swept=len(means),
        median=statistics.median(means),
        num_seeds=num,
    )


def cells(results: Sequence[Result]) -> list[tuple[str, int]]:
    """Return the tasks and lengths that there are results of, in order."""
    return sorted({(one.task, one.steps) for one in results}, key=lambda cell: (cell[1], cell[0]))


def before_of(results: Iterable[Result], task: str) -> float:
    """Return the untouched model's loss in a task."""
    return statistics.fmean([one.before for one in results if one.task == task])


def table(results: Sequence[Result], chosen: Sequence[str]) -> str:
    """Return the standing of the chosen contestants as a table in Markdown: a row per task, length and contestant."""
    lines = [
        "| task | steps | contestant | loss | best AdamW (of) | its loss | difference | of its gain | rank | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, steps in cells(results):
        losses = losses_of(results, task, steps)
        for name in chosen:
            found = standing(losses, name, before_of(results, task))
            if found is None:
                continue
            lines.append(
                f"| {task} | {steps} | {name} | {found.loss:.4f} | {found.best.removeprefix('adamw ')} "
                f"({found.num_swept}) | {found.best_loss:.4f} | {found.difference:+.4f} ± {found.error:.4f} "
                f"(n={found.num_seeds}) | {found.share:+.0%} | {found.rank} | {found.verdict} |"
            )
    return "\n".join(lines)


def listing(results: Sequence[Result], task: str, steps: int, against: str = OURS) -> str:
    """Return all contestants of one task and length, best first, each with its difference to `against`."""
    losses, lowest = losses_of(results, task, steps), losses_of(results, task, steps, best=True)
    lines = [f"{task}, {steps} steps; before {before_of(results, task):.4f}"]
    for name in sorted(losses, key=lambda name: mean_and_error(list(losses[name].values()))[0]):
        loss = mean_and_error(list(losses[name].values()))[0]
        best = mean_and_error(list(lowest[name].values()))[0]
        difference, error, num = paired_difference(losses[name], losses.get(against, {}))
        paired = f"{difference:+.4f} ± {error:.4f} (n={num})" if num and name != against else ""
        lines.append(f"  {name:58} {loss:.4f}  best {best:.4f}  seeds {len(losses[name])}  {paired}")
    return "\n".join(lines)
