"""Measures what the default presets are worth beside a swept AdamW and other optimizers without a learning rate.

    python scripts/bench_defaults.py run --lengths 100,400 --seeds 0,1          # all tasks and contestants
    python scripts/bench_defaults.py run --tasks concept --contestants "ours;ours optimizer.d_coef=0.5"
    python scripts/bench_defaults.py table                                      # regret, ranks, verdicts
    python scripts/bench_defaults.py plot                                       # SVGs into .github/pictures/

Every run adds a line to .github/evidence/defaults.jsonl, and a run that is there is not run again: stop it whenever you
like and start it anew. All contestants see the same pictures, batches, noise and timesteps in the same order. What is
measured is the loss on held-out pictures of the weights that each would ship, averaged ones where it averages.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import bench_results as results
import bench_tasks as tasks
import plot_defaults
import torch
import typer

from optim import averaged
from sdtrain.config.presets import d_coef_of
from sdtrain.config.schema import Config
from sdtrain.training.computing.objective import Objective
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.parameters import Trainable
from sdtrain.training.start import trains_text

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / ".github" / "evidence" / "defaults.jsonl"
PICTURES = ROOT / ".github" / "pictures"
PACKAGES = ("torch", "schedulefree", "prodigyopt", "prodigy-plus-schedule-free")
SCHEDULES = ("constant", "cosine", "linear")
LRS = {"lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)}
DECIDED = (
    *("preset", "d0", "d_coef", "betas", "weight_decay", "prodigy_steps", "freeze_share", "eps"),
    *("split_groups_mean", "schedulefree_c"),
)
"""The settings of the optimizer that presets decide, noted with every run of ours."""
WARM_UP = 0.1  # share of the steps, of "cosine"
CLIMB = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40)  # steps at which d is noted beside those at which a loss is measured

app = typer.Typer(add_completion=False, help="Evidence for the default presets.")


# ---- contestants ----


@dataclass
class Contestant:
    """An optimizer in a run: how a step ends, how what it ships is lent, and the d it applies to the U-Net."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    shipped: Callable[[], AbstractContextManager[None]]
    d: Callable[[], float]


def sweep(kind: str) -> dict[str, list[str]]:
    """Return the 15 AdamW settings for a kind of method: of each schedule with the three middle learning rates, and
    "outer" with the two others."""
    low, *middle, high = LRS[kind]
    settings = {schedule: [f"adamw lr={lr:g} schedule={schedule}" for lr in middle] for schedule in SCHEDULES}
    return settings | {"outer": [f"adamw lr={lr:g} schedule={name}" for name in SCHEDULES for lr in (low, high)]}


def peers(kind: str) -> dict[str, list[str]]:
    """Return all other contestants but ours: "free", who estimate d, and schedule-free AdamW."""
    free = ["prodigyopt schedule=constant", "prodigy-plus", "prodigyopt schedule=cosine"]
    return {"free": free, "schedulefree": [f"schedulefree lr={lr:g}" for lr in LRS[kind]]}


def has_horizon(contestant: str, config: Config) -> bool:
    """Whether the first steps of a run depend on how many are planned."""
    if contestant.startswith(results.OURS):
        return config.optimizer.freeze_share > 0 or config.optimizer.d_coef == "auto"
    return "schedule=linear" in contestant or "schedule=cosine" in contestant


def settings_of(contestant: str) -> list[str]:
    """Return the settings of this project that a contestant's name holds: "ours optimizer.d_coef=0.5"."""
    name, *rest = contestant.split()
    return rest if name == results.OURS else []


def build(contestant: str, trainable: Trainable, config: Config) -> Contestant:
    """Return the optimizer that a contestant's name describes. Raises ValueError for a name that is not known."""
    name, *rest = contestant.split()
    if name == results.OURS:
        ours = build_optimizer(trainable, config)
        return Contestant(ours, None, lambda: averaged(ours), lambda: ours.metrics()[0].applied_d)
    given = dict(one.split("=", 1) for one in rest)
    groups: list[dict[str, Any]] = [{"params": list(group.parameters.values())} for group in trainable.groups]
    optimizer = peer(name, groups, float(given.get("lr", "nan")))
    schedule = given.get("schedule", "constant")
    factor = functools.partial(schedule_factor, schedule, 0.0 if name == "prodigyopt" else WARM_UP, config.steps)
    scheduler = None if schedule == "constant" else torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    first = optimizer.param_groups[0]
    return Contestant(optimizer, scheduler, lambda: shipping(optimizer), lambda: float(first.get("d", math.nan)))


def peer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Return an optimizer of another package with its defaults, ready for training."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "schedulefree":
        from schedulefree import AdamWScheduleFree

        found: Any = AdamWScheduleFree(groups, lr=lr)
    elif name == "prodigyopt":
        from prodigyopt import Prodigy

        return Prodigy(groups)  # type: ignore[no-any-return]  # untyped
    elif name == "prodigy-plus":
        from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Upstream

        found = Upstream(groups)
    else:
        raise ValueError(f"no contestant is called {name!r}: adamw, schedulefree, prodigyopt, prodigy-plus or ours")
    found.train()
    return found  # type: ignore[no-any-return]  # untyped


@contextlib.contextmanager
def shipping(optimizer: Any) -> Iterator[None]:
    """Lend what an optimizer of another package would ship: the average where it has modes, else what is there."""
    has_modes = hasattr(optimizer, "eval")
    if has_modes:
        optimizer.eval()
    yield
    if has_modes:
        optimizer.train()


def schedule_factor(schedule: str, warm_up: float, steps: int, step: int) -> float:
    """Return the factor on the learning rate in a step, counted from 0, of a run of `steps` steps."""
    if schedule == "linear":
        return 1 - step / steps
    start = round(warm_up * steps)
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


# ---- a run ----


@dataclass(frozen=True)
class Job:
    """A run that gives the results of one or several lengths."""

    task: str
    contestant: str
    lengths: tuple[int, ...]
    seed: int
    judged: bool


def look_at(steps: int) -> list[int]:
    """Return the steps after which a run of this length is measured: 8 of them, 2 where it is short."""
    times = 8 if steps >= 400 else 2
    return sorted({max(1, round(steps * (index + 1) / times)) for index in range(times)})


def run_job(job: Job) -> list[results.Result]:
    """Train once, and return the result for each length of the job."""
    torch.set_num_threads(1)
    started = time.process_time()  # of one thread: what else the machine does does not count
    task = tasks.TASKS[job.task]
    config = tasks.config_of(task, max(job.lengths), job.seed, settings_of(job.contestant))
    model, trainable = tasks.trainable_copy(config)
    encodes = trains_text(config)
    before = tasks.untouched_loss(job.task)
    contestant = build(job.contestant, trainable, config)
    objective, feed = Objective(model, config, torch.device("cpu")), tasks.Feed(job.task, config)
    measured: dict[int, dict[str, float]] = {}
    d: dict[int, float] = {}
    looks = {step for length in job.lengths for step in look_at(length)}
    rates: dict[int, dict[str, float]] = {}
    for step in range(config.steps):
        tasks.backward(objective, feed, config, step)
        with contextlib.redirect_stdout(io.StringIO()):  # one of them prints
            contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
        if contestant.scheduler is not None:
            contestant.scheduler.step()
        if step + 1 in looks or step + 1 in CLIMB:
            d[step + 1] = contestant.d()
        if step + 1 in looks:
            with contestant.shipped():
                measured[step + 1] = tasks.held_out_losses(model, job.task, encodes=encodes)
                if job.judged and step + 1 in job.lengths:
                    rates[step + 1] = tasks.painted_rates(model, job.task)
    seconds = time.process_time() - started
    settings = own_settings(config) if job.contestant.startswith(results.OURS) else {}
    return [
        result_of(job, length, before, measured, d, rates.get(length, {}), seconds, settings) for length in job.lengths
    ]


def own_settings(config: Config) -> dict[str, Any]:
    """Return what the preset decided: a later one may decide otherwise under the same name."""
    values = config.optimizer.model_dump(mode="json")
    return {**{name: values[name] for name in DECIDED}, "d_coef": d_coef_of(config)}


def result_of(
    job: Job,
    length: int,
    before: float,
    measured: dict[int, dict[str, float]],
    d: dict[int, float],
    rates: dict[str, float],
    seconds: float,
    settings: dict[str, Any],
) -> results.Result:
    """Return what a run came to after `length` steps."""
    looks = look_at(length)
    curve = [rounded(measured[step]["all"]) for step in looks]
    finite = [loss for loss in curve if loss is not None]
    return results.Result(
        task=job.task,
        contestant=job.contestant,
        steps=length,
        seed=job.seed,
        loss=curve[-1],
        best=min(finite, default=None),
        before=round(before, 6),
        curve=[[step, loss] for step, loss in zip(looks, curve, strict=True)],
        d=[
            [step, float(f"{value:.4g}")]
            for step, value in sorted(d.items())
            if step <= length and math.isfinite(value)
        ],
        parts={part: rounded(value) for part, value in measured[length].items() if part != "all"},
        rates={name: round(rate, 4) for name, rate in rates.items()},
        seconds=round(seconds * length / max(job.lengths), 1),
        unet=tasks.unet_hash(),
        commit=commit(),
        versions=" ".join(version(package) for package in PACKAGES),
        settings=settings,
    )


def rounded(loss: float) -> float | None:
    """Return a loss with six digits, or None where it is not finite, which JSON cannot say."""
    return round(loss, 6) if math.isfinite(loss) else None


@functools.cache
def commit() -> str:
    """Return the commit that is measured, with a + where files were changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip()


# ---- many runs ----


def plan(chosen: list[str], contestants: list[str], lengths: list[int], seeds: list[int], *, judged: bool) -> list[Job]:
    """Return the jobs in the order in which they are run: the tasks take turns, so that any part of it is balanced.

    contestants: names, or sets of them: "sweep", and its parts "constant", "cosine", "linear" and "outer"; "free", who
    estimate d, and "schedulefree". What has no horizon is run once, for all lengths.
    """
    jobs = []
    for seed in seeds:
        queues = [task_queue(name, contestants, lengths, seed, judged=judged) for name in chosen]
        for row in range(max(map(len, queues))):
            jobs += [queue[row] for queue in queues if row < len(queue)]
    return jobs


def task_queue(name: str, contestants: list[str], lengths: list[int], seed: int, *, judged: bool) -> list[Job]:
    """Return the jobs of one task and seed."""
    task = tasks.TASKS[name]
    kind = task.method["kind"]
    swept = sweep(kind)
    sets = {**swept, "sweep": [name for part in swept.values() for name in part], **peers(kind)}
    names = [name for one in contestants for name in sets.get(one, [one])]
    queue = []
    for one in names:
        horizon = has_horizon(one, tasks.config_of(task, max(lengths), seed, settings_of(one)))
        parts = [(length,) for length in lengths] if horizon else [tuple(lengths)]
        queue += [Job(name, one, part, seed, judged) for part in parts]
    return queue


def left_to_do(jobs: list[Job], done: set[results.Key]) -> list[Job]:
    """Return the jobs of which a result is missing."""
    return [job for job in jobs if any((job.task, job.contestant, n, job.seed) not in done for n in job.lengths)]


def listed(text: str) -> list[str]:
    """Return what stands between commas."""
    return [one for one in text.split(",") if one]


@app.command()
def run(
    chosen: Annotated[str, typer.Option("--tasks")] = ",".join(tasks.MEASURED),
    contestants: Annotated[str, typer.Option(help="separated by ;")] = "ours;sweep;free;schedulefree",
    lengths: str = "100,400",
    seeds: str = "0",
    judged: Annotated[bool, typer.Option("--judge", help="let the judges look at the finished runs")] = False,
    processes: int = 1,
    file: Path = TABLE,
    minutes: Annotated[float, typer.Option(help="begin no run after this many")] = math.inf,
) -> None:
    """Run what the table lacks."""
    jobs = plan(
        listed(chosen), contestants.split(";"), [int(n) for n in listed(lengths)], list(map(int, listed(seeds))),
        judged=judged,
    )  # fmt: skip
    done = {one.key for one in results.read_results(file, tasks.unet_hash())}
    todo = left_to_do(jobs, done)
    print(f"{len(jobs)} runs, {len(todo)} left to do", flush=True)
    until = time.monotonic() + 60 * minutes
    for count, found in enumerate(done_jobs(todo, processes, until), start=1):
        for one in found:
            if one.key not in done:
                results.append_result(file, one)
        last = found[-1]
        print(f"{count}/{len(todo)} {last.task} {last.contestant} {last.steps} s{last.seed} {last.loss} "
              f"best {last.best} {last.seconds}s", flush=True)  # fmt: skip


def done_jobs(todo: list[Job], processes: int, until: float) -> Iterator[list[results.Result]]:
    """Run jobs in this process or in several, and yield what they came to as they end; begin none after `until`."""
    if processes == 1:
        for job in todo:
            if time.monotonic() < until:
                yield run_job(job)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_in_time, job, until) for job in todo]
        for future in as_completed(futures):
            if found := future.result():
                yield found


def run_in_time(job: Job, until: float) -> list[results.Result]:
    """Run a job, unless it is too late to begin one."""
    return run_job(job) if time.monotonic() < until else []


@app.command()
def table(
    file: Path = TABLE,
    contestants: str = "ours;prodigyopt schedule=constant;prodigyopt schedule=cosine;prodigy-plus",
    everything: Annotated[bool, typer.Option("--all", help="and every contestant's losses")] = False,
    unet: Annotated[str, typer.Option(help="only results of the U-Net with this digest")] = "",
    seeds: Annotated[str, typer.Option(help="only contestants that have all of these")] = "",
) -> None:
    """Print regret against the best of the AdamW sweep, ranks, and whether we are within one standard error of it."""
    found = results.read_results(file, unet or tasks.unet_hash())
    if seeds:
        found = results.with_all_seeds(found, [int(seed) for seed in listed(seeds)])
    print(results.table(found, contestants.split(";")))
    if everything:
        for task, steps in results.cells(found):
            print("\n" + results.listing(found, task, steps))
    print(f"\n{len(found)} results, {sum(one.seconds for one in found) / 3600:.1f} hours")


@app.command()
def plot(file: Path = TABLE, folder: Path = PICTURES) -> None:
    """Draw the table."""
    found = results.read_results(file, tasks.unet_hash())
    for path in plot_defaults.draw_all(found, folder):
        print(path)


if __name__ == "__main__":
    app()
