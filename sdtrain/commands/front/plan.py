"""`sdtrain plan`: what a run will need, before it is run, without a GPU and without reading a weight."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sdtrain.commands.libraries import importing_less
from sdtrain.config.read import read_draft
from sdtrain.config.schema import Config
from sdtrain.data.report.previewed import with_prompts
from sdtrain.training.ending.signals import speaker, stop_requests
from sdtrain.training.ranks.refused import rank_problems
from sdtrain.training.start import inspect_run
from sdtrain.training.watching.progress import waiting
from sdtrain.training.watching.text import facts_table, say

if TYPE_CHECKING:
    from sdtrain.training.planning.levers import Choice


def plan_config(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    budget: str = "",
    measure: bool = False,
    gpus: int = 1,
) -> dict[str, object]:
    """Print and return the plan of a run; with a budget such as `8GB`, that of the cheapest settings which fit into it.

    measure: whether some steps are made here, with these settings, to say how long they take. gpus: up to how many
    cards it is said how much faster they would be. Raises UserError with all that is wrong with the run, also on so
    many cards, and where nothing fits.
    """
    draft = read_draft(path, overrides)
    draft = draft.with_problems(rank_problems(draft, gpus))
    opened, examples = inspect_run(draft, decode=False)
    config = with_prompts(draft.require_sound(), examples)
    quantised = bool(budget) or config.model.base_precision != "full"
    with importing_less(compiles=measure and config.memory.compile, quantised=quantised):
        from sdtrain.training.planning.levers import budget_bytes, fit_to
        from sdtrain.training.planning.plan import Plan, lines_of, plan_answer, plan_run

    tried = 0

    def planned(config: Config) -> Plan:
        nonlocal tried
        tried += 1
        what = f"planning, choice {tried} of what could be given up" if tried > 1 else "planning"
        with waiting(console, what):
            return plan_run(config, opened, examples)

    found: dict[str, object] = {}
    if budget:
        choice, plan = fit_to(config, budget_bytes(budget), planned, processes=gpus)
        console.print(facts_table(lines_of(plan)))
        _tell(choice, f"{budget} on each of {gpus} cards" if gpus > 1 else budget, console)
        config, found = choice.config, {"fits_into": budget, "settings": choice.settings, "costs": choice.costs}
    else:
        plan = planned(config)
        console.print(facts_table(lines_of(plan)))
    if gpus > 1:
        from sdtrain.training.planning.scaling import scaled_runs, scaling_answer, scaling_lines

        whole = plan.whole or plan
        runs = scaled_runs(config, whole, examples, gpus)
        console.print(facts_table(scaling_lines(config, whole, runs)))
        found |= {"gpus": scaling_answer(whole, runs)}
    if measure:
        from sdtrain.training.planning.measure import measure_steps

        with stop_requests(speaker(console)) as stop:
            measured = measure_steps(config, opened, examples, console, stop)
        console.print(facts_table(measured.rows(config.steps)))
        found |= {"measured": asdict(measured)}
    return plan_answer(plan) | found


def _tell(choice: Choice, budget: str, console: Console) -> None:
    """Say what was chosen and what it costs."""
    named = " ".join(f"--set {shlex.quote(setting)}" for setting in choice.settings)
    say(console, f"fits into {budget} with {named}" if named else f"fits into {budget} as it is")
    say(console, *(f"  costs {cost}" for cost in choice.costs))
