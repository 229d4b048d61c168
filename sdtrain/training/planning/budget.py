"""The plan that a run is started with: what it is held against, and what is given up to fit into a budget."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrain import __version__
from sdtrain.config.method_rules import split_over
from sdtrain.config.schema import Config
from sdtrain.data.examples import Example
from sdtrain.errors import UserError, user_error
from sdtrain.files.hashes import digest_of
from sdtrain.files.writer import write_text
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.keeping.disk import size
from sdtrain.training.keeping.standing import cache_folder
from sdtrain.training.planning.levers import budget_bytes, fit_to
from sdtrain.training.planning.plan import Plan, largest_bucket, plan_run
from sdtrain.training.planning.trace import Part, Phase
from sdtrain.training.ranks.shards import Travel

NO_MATTER = ("name", "output", "seed", "steps", "tracking", "export")
"""Settings that change nothing of what a run needs at most."""
KEPT = 50
"""So many plans are remembered beside the cache."""
SURPRISE = 1.1
"""From this many times the plan on, what was measured is told as a surprise."""
OF_LIBRARIES = 256 * 2**20
"""What cuBLAS, cuDNN and the like keep for themselves, however small a run is; so much more is no surprise."""


@dataclass(frozen=True)
class Expected:
    """What a run is started with. plan: None where none was made. notes: what was given up for it, a line each."""

    config: Config
    plan: Plan | None = None
    notes: tuple[str, ...] = ()
    processes: int = 1
    """Over how many processes what is trained is split."""

    def line(self) -> str:
        """Return what the plan says, in one line; nothing where none was made."""
        if self.plan is None:
            return ""
        phases = self._of_each(self.plan).phases
        each = " on each card" if self.processes > 1 else ""
        return f"planned{each}: " + ", ".join(f"{size(phase.peak_bytes)} to {phase.name}" for phase in phases)

    def _of_each(self, plan: Plan) -> Plan:
        return plan.of_each(self.processes, offload=self.config.parallel.offload)

    def judged(self, device: torch.device) -> str:
        """Return what tensors took of a card at most, beside what was planned; nothing where that is not known."""
        if self.plan is None or device.type != "cuda":
            return ""
        measured = torch.cuda.max_memory_allocated(device)
        planned = self._of_each(self.plan).worst.peak_bytes
        text = f"{size(measured)} at most, {size(planned)} planned"
        if measured <= max(SURPRISE * planned, planned + OF_LIBRARIES):
            return text
        more = f"{measured / planned - 1:.0%} more than planned"
        return f"{text}: {more}, which the plan should have known: `sdtrain doctor` tells what a report of it needs"


def expected(
    config: Config, opened: OpenedModel, examples: Sequence[Example], base: str, device: torch.device, ranks: int = 1
) -> Expected:
    """Return the plan of a run, and its settings with levers pulled where `memory.budget` asks for it.

    base: the digest of the model. ranks: how many processes train it. Without a budget a run on the CPU is not planned,
    where tensors are a part only of what a process needs. A plan that was made before is remembered beside the cache.
    Raises UserError where nothing fits.
    """
    budget = config.memory.budget
    if budget == "off" and device.type != "cuda":
        return Expected(config)
    plans = _Remembered(cache_folder(config) / "plans.json", base)

    def planned(one: Config) -> Plan:
        one = one.model_copy(update={"device": device.type})
        facts = (largest_bucket(one, examples), len(examples))
        return plans.of(one, facts, lambda: plan_run(one, opened, examples))

    try:
        if budget == "off":
            return Expected(config, planned(config), processes=split_over(config, ranks))
        choice, plan = fit_to(config, _budget(budget, device), planned, "memory.budget", ranks)
    finally:
        plans.keep()
    plan, split = plan.whole or plan, split_over(choice.config, ranks)
    if not choice.settings:
        return Expected(config, plan, processes=split)
    told = f"memory.budget = {budget}: {', '.join(choice.settings)}"
    return Expected(choice.config, plan, (told, *(f"  costs {cost}" for cost in choice.costs)), split)


def _budget(text: str, device: torch.device) -> int:
    if text != "auto":
        return budget_bytes(text, "memory.budget")
    if device.type != "cuda":
        what = "auto asks the card how much memory it has, and this run computes on the CPU; write 8GB, or off"
        raise user_error("memory", "memory.budget", what)
    return int(torch.cuda.get_device_properties(device).total_memory)


class _Remembered:
    """Plans of runs on one model, by all that they follow from; a file that cannot be used is begun anew."""

    def __init__(self, path: Path, base: str) -> None:
        self._path, self._base, self._changed = path, base, False
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            stored = json.loads(path.read_bytes())
            self._known = stored if isinstance(stored, dict) else {}

    def of(self, config: Config, facts: Sequence[object], make: Callable[[], Plan]) -> Plan:
        """Return the plan of a config; facts: what else it follows from."""
        settings = config.model_dump(mode="json", exclude={**dict.fromkeys(NO_MATTER, True), "memory": {"budget"}})
        key = digest_of(json.dumps([self._base, settings, facts, __version__, torch.__version__]).encode())
        if (known := _read(self._known.get(key))) is not None:
            return known
        plan = make()
        self._known[key], self._changed = asdict(plan), True
        return plan

    def keep(self) -> None:
        """Write what was learnt; where that fails, only time is lost."""
        if self._changed:
            newest = dict(list(self._known.items())[-KEPT:])
            with contextlib.suppress(UserError):
                write_text(self._path, json.dumps(newest))


def _phase(stored: Any) -> Phase:
    parts = {str(name): int(num) for name, num in stored["parts"].items()}
    return Phase(str(stored["name"]), parts, int(stored["away_bytes"]))


def _read(stored: Any) -> Plan | None:
    """Return a plan as it was written; None for anything else."""
    try:
        phases = tuple(_phase(one) for one in stored["phases"])
        width, height = stored["bucket"]
        parts = tuple(Part(str(one["name"]), int(one["saved_bytes"]), int(one["flops"])) for one in stored["parts"])
        known = (str(stored["device"]), (int(width), int(height)), phases, stored["disk"], int(stored["flops"]))
        travel = Travel(**{str(name): int(num) for name, num in stored["travel"].items()})
        return Plan(*known, parts=parts, trained_bytes=int(stored["trained_bytes"]), travel=travel)
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
