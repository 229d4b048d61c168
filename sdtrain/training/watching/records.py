"""The frozen records of what a run did, which watchers are handed; no torch.

Everything in a record is immutable down to its leaves (numbers, texts, paths, tuples of frozen records), and nothing in
it is the training's own: a watcher cannot disturb a run through what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class RunRecord:
    """The first record: a run begins or goes on."""

    name: str
    folder: Path
    steps: int
    """The number of steps that are planned."""
    first_step: int
    """The number of steps that were done before; above 0 for a resumed run."""
    d0: float
    """The first guess of d in the settings; a network may start from another, see `GroupRecord.start_d`."""
    config_toml: str
    """All settings as TOML text, because a config object holds lists, which a watcher could change."""
    usual_weight: float = 1.0
    """The weight of a network that nobody gave one: the factor that `d_coef = "auto"` makes of the number of steps."""


@dataclass(frozen=True)
class GroupRecord:
    """What the optimizer does with one network at a step."""

    name: str
    d: float
    """The network's own estimate of the step size."""
    applied_d: float
    """The d that the last step was made with: its own, or a mean over the networks."""
    effective_lr: float
    """How far a weight moves in a step; the number to compare with learning rates of other optimizers."""
    frozen: bool
    """Whether d no longer changes."""
    start_d: float
    """The d that the network started from: the settings' d0, or the d stored in `method.init_from`."""
    stopped: bool = False
    """Whether it is no longer trained (`method.stop`): it holds its weights, and its effective_lr is 0."""
    climbing: bool = False
    """Whether d has just grown by half, or had when it was frozen: it is not yet what it is going to be."""
    settled: bool = True
    """Whether d is at rest or frozen, so that the network's weight counts."""
    weight: float = 1.0
    """What the step is multiplied by then: `method.lr` times `optimizer.lr` times `optimizer.d_coef`."""
    gradient: float = 1.0
    """The length of its gradient in the step; 0 where it got none."""
    at_zero: bool = False
    """Whether the matrices of its adapters that begin at zero got no gradient yet: it changes no picture."""
    skipped: int = 0
    """How many steps of the run were left out so far, because a loss or a gradient was not finite."""
    found_d: float = 0.0
    """`d` as it was found, without `optimizer.d_coef`; 0: the same as `d`."""
    given: bool = False
    """Whether d is a value that was given and never estimated (`optimizer.prodigy_steps = 1`)."""


@dataclass(frozen=True)
class StepRecord:
    """One step was done."""

    step: int
    """The number of steps that are done, this one included."""
    loss: float
    """The mean loss of the step's pictures; where it is nan or inf, the step changed nothing."""
    num_images: int
    images_per_s: float
    """A running mean, in which previews and saves between steps do not count."""
    groups: tuple[GroupRecord, ...]
    """One record per trained network."""
    skipped: bool = False
    """Whether the step was left out, because its loss or a gradient was not finite."""
    pictures: tuple[str, ...] = ()
    """The files of the step's pictures, where it was skipped."""
    peak_memory_gib: float | None = None
    """The most memory used so far: of the GPU by tensors, or of this process on a CPU; None where it is not known."""


@dataclass(frozen=True)
class PictureRecord:
    """A grid of previews lies at `path`, drawn with the averaged weights after `step` steps."""

    step: int
    path: Path


@dataclass(frozen=True)
class ValidationRecord:
    """The loss on pictures that are held out, measured with the averaged weights after `step` steps."""

    step: int
    loss: float
    """The mean over the held-out pictures."""
    standard_error: float
    """The standard error of that mean over the pictures."""
    num_pictures: int
    best_step: int | None
    """The step of the lowest loss so far; None where none of a trained step is finite."""
    best_loss: float | None


@dataclass(frozen=True)
class SavedRecord:
    """Something was saved after `step` steps and is whole: a training state (a folder), or the averaged weights."""

    step: int
    path: Path
    what: Literal["state", "weights"]


@dataclass(frozen=True)
class NoteRecord:
    """A sentence for the person who trains: advice, or something that went wrong and was survived."""

    step: int
    text: str


@dataclass(frozen=True)
class EndRecord:
    """The last record.

    outcome: `stopped` is by Ctrl-C or another signal, `failed` is by an error.
    """

    step: int
    """The number of steps that are done."""
    outcome: Literal["finished", "stopped", "failed"]


Record: TypeAlias = RunRecord | StepRecord | PictureRecord | ValidationRecord | SavedRecord | NoteRecord | EndRecord
Watcher: TypeAlias = Callable[[Record], None]
"""Anything that can be called with a record: a function, a method, `print`."""
