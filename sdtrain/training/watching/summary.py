"""The first and the last thing that a run tells its user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from rich.panel import Panel

from optim import ProdigyPlusScheduleFree
from sdtrain.config.method_rules import shards
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.data.batches import Batches
from sdtrain.data.examples import Example
from sdtrain.data.report.names import about
from sdtrain.data.report.previewed import previews_text
from sdtrain.training.computing.graphs import uses_graphs
from sdtrain.training.ending.rescue import Kept
from sdtrain.training.parameters import Trainable
from sdtrain.training.run import Run
from sdtrain.training.validating.history import Validation
from sdtrain.training.watching.text import duration, facts_table, shell_word, shown


def banner(
    run: Run,
    trainable: Trainable,
    batches: Batches,
    first_step: int,
    examples: Sequence[Example],
    d_coef: float,
    planned: str,
) -> Panel:
    """Return a panel that tells what will be trained, with what, on how many pictures, for how many steps.

    d_coef: the factor of d that is applied. planned: the memory that it will need, in a line; empty: not known.
    """
    config = run.config
    launches = ", CUDA graphs" if uses_graphs(run) else ""
    rows = {
        "model": f"{config.model.path} on {run.device}, {str(run.dtype).removeprefix('torch.')}{launches}",
        "method": _method(config),
    }
    for group in trainable.groups:
        rows[f"  {group.name}"] = f"{group.num_parameters:,} parameters in {len(group.parameters)} tensors"
    images = config.data.batch_size * config.data.gradient_accumulation
    if run.ranks.are_several:
        weights = " and hold the weights between them" if shards(config, run.ranks.place.size) else ""
        rows["processes"] = f"{run.ranks.place.size}, which share the pictures of a step{weights}"
    rows["pictures"] = (
        f"{about(batches.num_examples)} an epoch of {batches.steps_per_epoch:.1f} steps, up to {images} a step"
    )
    epochs = f"{config.steps / batches.steps_per_epoch:.1f} epochs"
    rows["steps"] = f"{config.steps}, {epochs}" + (f", of which {first_step} are done" if first_step else "")
    rows["optimizer"] = _optimizer(config, d_coef)
    if planned:
        rows["memory"] = planned
    rows["previews"] = previews_text(config, examples)
    rows["run folder"] = str(run.folder)
    return Panel(facts_table(rows), title=shown(f"sdtrain fit: {config.name}"), title_align="left", expand=False)


def _method(config: Config) -> str:
    method = config.method
    match method:
        case LoraConfig():
            start = f", starting from {method.init_from}" if method.init_from else ""
            return f"{method.adapter}, rank {method.rank}, alpha {method.alpha:g}, on {method.targets}{start}"
        case FullConfig():
            return "all weights"
        case _:
            assert_never(method)


def _optimizer(config: Config, d_coef: float) -> str:
    settings = config.optimizer
    steps = settings.prodigy_steps
    if steps == "auto":
        after = round(settings.freeze_share * config.steps)
        freeze = "d freezes when it has stopped growing" + (f", from step {after} on" if after else "")
    else:
        freeze = f"d freezes at step {steps}" if steps else "d never freezes"
    coef = "" if d_coef == 1 else f", {d_coef:.3g} x d is applied once it rests"
    return f"Prodigy + Schedule-Free, preset {settings.preset}: {freeze}{coef}, d0 {settings.d0:g}"


def summary(
    run: Run,
    optimizer: ProdigyPlusScheduleFree,
    step: int,
    seconds: float,
    best: Validation | None,
    memory: str = "",
) -> Panel:
    """Return a panel that tells where everything is, and what to do next.

    step: the steps that are done. best: the validation with the lowest loss, if there was any. memory: what was needed
    at most beside what was planned; empty: not known.
    """
    rows = {"weights": str(run.weights_path)}
    if best is not None:
        rows["best"] = f"step {best.step}, held-out loss {best.loss:.5f}: {run.best_weights_path}"
    previews = sorted((run.folder / "previews").glob("step-*.png"))
    if previews:
        rows["previews"] = f"{previews[0]} ... {previews[-1].name}" if len(previews) > 1 else str(previews[0])
    rows["report"] = str(run.folder / "report.html")
    rows["log"] = str(run.folder / "log.jsonl")
    for group in optimizer.metrics():
        rate = f"effective_lr {group.effective_lr:.2e}" if group.active else "stopped"
        rows[f"d of {group.name}"] = f"{group.d:.2e}, {rate}"
    skipped = max(group.skipped for group in optimizer.metrics())
    if skipped:
        rows["left out"] = f"{skipped} of {step} steps: loss or gradients were not finite"
    if memory:
        rows["memory"] = memory
    rows["look"] = f'sdtrain sample {shell_word(run.folder)} --prompt "..."'
    rows["go on"] = f"sdtrain fit {shell_word(run.folder / 'config.toml')} --resume --set steps={2 * run.config.steps}"
    title = f"done: {step} steps in {duration(seconds)}"
    return Panel(facts_table(rows), title=shown(title), title_align="left", expand=False)


def farewell(run: Run, step: int, cause: str, kept: Kept) -> list[str]:
    """Return what a run that ended early tells its user: what is kept, what is not, and how to go on; a line each."""
    lines = [f"stopped by {cause} after {step} of {run.config.steps} steps"]
    lines += [f"  {problem}" for problem in kept.problems]
    if kept.state is not None:
        lines.append(f"training state: {kept.state}")
    if kept.weights is not None:
        lines.append(f"averaged weights: {kept.weights}")
        lines.append(f'look: sdtrain sample {shell_word(kept.weights)} --prompt "..."')
    if kept.state is not None:
        lines.append(f"other formats: sdtrain export {shell_word(run.folder)} --format diffusers")
    lines.append(f"report: {run.folder / 'report.html'}")
    resume = f"sdtrain fit {shell_word(run.folder / 'config.toml')} --resume"
    lines.append(f"go on: {resume}" if kept.state is not None else f"begin again: {resume}")
    return lines
