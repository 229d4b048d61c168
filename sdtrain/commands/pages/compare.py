"""`sdtrain compare`: draws the steps of a run, or several runs, at several strengths, all from the same noise."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from optim import averaged
from sdtrain.adapters.kinds import Adapters
from sdtrain.adapters.merge import merge_into
from sdtrain.commands.reached import find_state
from sdtrain.config.schema import Config
from sdtrain.errors import user_error
from sdtrain.files.writer import require_place
from sdtrain.models.model import Model, SamplingSettings
from sdtrain.training.export import trained_adapters
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.states import load_state
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.parameters import train_parameters
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import Run, autocast, pick_device, pick_dtype
from sdtrain.training.start import stored_config
from sdtrain.training.watching.grid import Rows
from sdtrain.training.watching.preview import prepare_prompts, render, sampling_settings
from sdtrain.training.watching.report.comparison import Comparison, Row, write_comparison
from sdtrain.training.watching.text import say

STRENGTHS = (0.0, 0.5, 1.0)
"""The strengths where none are named."""
MOST_STEPS = 6
"""The most steps of one run that are drawn where none are named: the first, the last and others between."""


@dataclass(frozen=True)
class Trained:
    """What was trained, on the CPU: adapters, or all weights of the networks that were trained by their names."""

    adapters: Adapters
    weights: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Wanted:
    """What is drawn of every run."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    strengths: Sequence[float]
    settings: SamplingSettings


def compare_to_files(
    runs: Sequence[Path],
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    steps: Sequence[int],
    out: Path | None,
    overrides: Sequence[str],
    console: Console,
) -> list[Path]:
    """Draw; write a page, a grid and an animation, and return their paths. Raises UserError, see `compare`."""
    folder = out or runs[0] / "compare"
    require_place(folder, folder=True)
    path = write_comparison(folder, compare(runs, prompts, seeds, strengths, steps, overrides))
    say(console, f"wrote {path}, with grid.png and animation.webp beside it")
    return [path, path.with_name("grid.png"), path.with_name("animation.webp")]


def compare(
    runs: Sequence[Path],
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    strengths: Sequence[float] = STRENGTHS,
    steps: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> Comparison:
    """Draw the training states of one run, or the newest ones of several, with their averaged weights.

    All pictures are sampled as the first run's previews are, from the same noise. A strength between 0 and 1 lies
    between the base and what was trained, in a straight line; 0 is the base, bit for bit.

    Args:
        runs: folders of runs, finished or not.
        prompts, seeds: what to draw; by default the first run's previews.
        strengths: how much of what was trained counts.
        steps: which training states; by default those of one run, or the newest of each of several.
        overrides: settings of how to sample, each as `key=value`.

    Raises:
        UserError: a run has no such training state, or there is nothing to draw.
    """
    runs = list(dict.fromkeys(runs))
    first = stored_config(runs[0])
    texts = list(prompts) or list(first.preview.prompts)
    if not texts:
        raise user_error(str(runs[0]), "--prompt", "the run has no preview.prompts; say what to draw")
    drawn = stored_config(runs[0], overrides, prompts=texts)
    wanted = Wanted(texts, list(seeds) or list(first.preview.seeds), list(strengths), sampling_settings(drawn))
    several = len(runs) > 1
    chosen = [(folder, state) for folder in runs for state in chosen_states(folder, steps, several=several)]
    rows: list[Row] = []
    for folder in runs:
        config = stored_config(folder, prompts=texts)
        config = config.model_copy(update={"preview": drawn.preview})
        rows += _rows(folder, config, [state for where, state in chosen if where == folder], wanted, named=several)
    return Comparison(" and ".join(folder.name for folder in runs), texts, wanted.seeds, strengths, rows)


def chosen_states(folder: Path, steps: Sequence[int], *, several: bool) -> list[SavedState]:
    """Return the states to draw: those of `steps`, else the newest of several runs, else a few of one."""
    if steps:
        return [find_state(folder, step) for step in steps]
    newest = find_state(folder, None)
    if several:
        return [newest]
    states = [state for state in saved_states(folder / "checkpoints") if state.step < newest.step]
    places = {round(index * (len(states) - 1) / (MOST_STEPS - 2)) for index in range(MOST_STEPS - 1)}
    return [*(states[place] for place in sorted(places) if states), newest]


def _rows(folder: Path, config: Config, states: Sequence[SavedState], wanted: Wanted, *, named: bool) -> list[Row]:
    device = pick_device(config)
    run = Run(folder, config, device, pick_dtype(config, device))
    trained = _trained(run, states)
    model = open_and_load(run)
    model.place()
    model.move_encoders(run.device, text=True)
    base: Rows | None = None
    rows = []
    for state, change in zip(states, trained, strict=True):
        drawn: list[Rows] = []
        for strength in wanted.strengths:
            if strength == 0 and base is not None:
                drawn.append(base)
                continue
            with strengthened(model, change, strength):
                prompts = prepare_prompts(model, config, trains_text=False)
                computing = partial(autocast, config, device)
                drawn.append(render(model, prompts, wanted.seeds, wanted.settings, autocast=computing))
            base = drawn[-1] if strength == 0 else base
        rows.append(Row(f"{config.name}, {state.step}" if named else f"step {state.step}", drawn))
    return rows


def _trained(run: Run, states: Sequence[SavedState]) -> list[Trained]:
    """Return what the averaged weights of each state are, on the CPU; the model that they were read with is let go."""
    model = open_and_load(run)
    trainable = train_parameters(model, run)
    optimizer = build_optimizer(trainable, run.config)
    found: list[Trained] = []
    for state in states:
        load_state(state, trainable, optimizer)
        with averaged(optimizer), torch.no_grad():
            adapters = copy.deepcopy(trained_adapters(model, run.config))
            found.append(Trained(adapters, {} if adapters else _whole(model, run.config)))
    return found


def _whole(model: Model, config: Config) -> dict[str, dict[str, Tensor]]:
    return {name: {key: value.cpu() for key, value in _copied(model, name).items()} for name in config.method.train}


@contextmanager
def strengthened(model: Model, trained: Trained, strength: float) -> Iterator[None]:
    """Lend the model weights between its own, at strength 0, and what was trained, at 1; the exact bits come back."""
    if strength == 0:
        yield
        return
    names = [*trained.adapters, *trained.weights]
    before = {name: _copied(model, name) for name in names}
    try:
        with torch.no_grad():
            merge_into(model.networks, [(trained.adapters, strength)])
            for name, weights in trained.weights.items():
                _put_between(model, name, weights, strength)
        yield
    finally:
        with torch.no_grad():
            for name, weights in before.items():
                _put_between(model, name, weights, 1)


def _copied(model: Model, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.networks[name].named_parameters()}


def _put_between(model: Model, name: str, weights: Mapping[str, Tensor], strength: float) -> None:
    """Move the weights of a network towards others: at strength 1 to their exact bits."""
    for key, value in model.networks[name].named_parameters():
        after = weights[key].to(value.device)
        value.copy_(after if strength == 1 else torch.lerp(value.float(), after.float(), strength))
