"""Reads `log.jsonl` of a run into columns, whatever state the file is in; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrain.files.numbers import is_number
from sdtrain.training.watching.log import log_lines


@dataclass(frozen=True)
class Step:
    """One step; numbers that are missing or not finite are None."""

    step: int
    loss: float | None
    images_per_s: float | None
    peak_memory_gib: float | None
    skipped: bool
    groups: dict[str, Group]
    """By the name of the network."""


@dataclass(frozen=True)
class Group:
    """One network at a step."""

    d: float | None
    applied_d: float | None
    effective_lr: float | None
    frozen: bool
    stopped: bool


@dataclass(frozen=True)
class Validated:
    """One validation."""

    step: int
    loss: float | None
    standard_error: float | None
    pictures: int


@dataclass(frozen=True)
class Numbers:
    """What the log says, in its order."""

    steps: list[Step] = field(default_factory=list)
    validations: list[Validated] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)

    @property
    def networks(self) -> list[str]:
        """The names of all networks, each once, in the order of their first step."""
        return list(dict.fromkeys(name for step in self.steps for name in step.groups))

    @property
    def best(self) -> Validated | None:
        """The validation with the lowest loss; that of the untrained model does not count."""
        trained = [one for one in self.validations if one.step > 0 and one.loss is not None]
        return min(trained, key=lambda one: (one.loss, one.step), default=None)

    def frozen_at(self, network: str) -> int | None:
        """Return the step from which on d of a network did not change until the end; None where it still moves."""
        found = None
        for one in reversed(self.steps):
            group = one.groups.get(network)
            if group is None or not group.frozen:
                break
            found = one.step
        return found


def read_numbers(path: Path) -> Numbers:
    """Return what a log says. Lines that cannot be read, such as one that a kill cut off, are passed over."""
    numbers = Numbers()
    for line in log_lines(path):
        step = line["step"]
        if isinstance(line.get("note"), str):
            numbers.notes.append((step, line["note"]))
        elif isinstance(validation := line.get("validation"), dict):
            pictures = validation.get("pictures")
            num = pictures if isinstance(pictures, int) else 0
            loss, error = number(validation.get("loss")), number(validation.get("standard_error"))
            numbers.validations.append(Validated(step, loss, error, num))
        elif isinstance(groups := line.get("groups"), dict):
            numbers.steps.append(
                Step(
                    step,
                    number(line.get("loss")),
                    number(line.get("images_per_s")),
                    number(line.get("peak_memory_gib")),
                    line.get("skipped") is True,
                    {str(name): _group(group) for name, group in groups.items() if isinstance(group, dict)},
                )
            )
    return numbers


def number(value: object) -> float | None:
    """Return a finite number as it is, and None for anything else."""
    return value if is_number(value) else None


def _group(group: dict[str, Any]) -> Group:
    return Group(
        number(group.get("d")),
        number(group.get("applied_d")),
        number(group.get("effective_lr")),
        group.get("frozen") is True,
        group.get("stopped") is True,
    )
