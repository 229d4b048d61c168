"""`sdtrain info`: shows what a safetensors file says about itself, or how far a run is; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from rich.table import Table

from sdtrain.adapters.formats.describe import FileDescription, describe_file
from sdtrain.commands.run_facts import RunFacts, disk_bytes, facts_of, is_run, read_log, size_text
from sdtrain.commands.runs import run_answer
from sdtrain.errors import user_error
from sdtrain.families.metadata import started_of
from sdtrain.training.describing.author import uri_words
from sdtrain.training.watching.text import facts_table, shell_word


def file_info(path: Path) -> Table:
    """Return what is in a file as a table of two columns. Raises UserError when it is missing or damaged."""
    found = describe_file(path)
    rows = {key: value for key, value in _rows(found).items() if value}
    return facts_table({"file": f"{path}, {found.num_bytes / 2**20:.1f} MiB", **rows})


def file_answer(path: Path) -> dict[str, object]:
    """Return what is in a file for programs. Raises UserError when it is missing or damaged."""
    found = describe_file(path)
    buckets = [
        {"width_px": width, "height_px": height, "pictures": num} for (width, height), num in found.buckets.items()
    ]
    metadata = {key: value for key, value in found.metadata.items() if not key.endswith("thumbnail")}
    facts = {entry.name: getattr(found, entry.name) for entry in fields(found)}
    return {"file": str(path), **facts, "buckets": buckets, "metadata": metadata}


def run_info(folder: Path, step: int | None = None) -> Table:
    """Return how a run stands, or what is known of one of its states, as a table of two columns.

    Raises UserError when the folder is none of a run, or has no such state.
    """
    facts = _facts(folder, step)
    rows = _run_rows(facts) if step is None else _state_rows(facts, step)
    return facts_table({key: value for key, value in rows.items() if value})


def run_info_answer(folder: Path, step: int | None = None) -> dict[str, object]:
    """Return the same for programs. Raises UserError, see `run_info`."""
    facts = _facts(folder, step)
    if step is None:
        weights = sorted(path.name for path in (facts.folder / "weights").glob("*.safetensors"))
        best = facts.last.best and {"step": facts.last.best[0], "loss": facts.last.best[1]}
        return run_answer(facts) | {"d": dict(facts.last.d), "best": best, "weights": weights, "go_on": facts.go_on()}
    last = read_log(facts.folder / "log.jsonl", until=step)
    state = state_folder(facts, step)
    return {
        "folder": str(facts.folder),
        "state": str(state),
        "step": step,
        "loss": last.loss,
        "d": dict(last.d),
        "num_bytes": disk_bytes(state),
    }


def _facts(folder: Path, step: int | None) -> RunFacts:
    if not is_run(folder):
        raise user_error(str(folder), folder.name, "is not the folder of a run; name one, or a .safetensors file")
    facts = facts_of(folder)
    if step is not None and step not in facts.states:
        there = ", ".join(map(str, facts.states)) or "none"
        raise user_error(str(folder), "--step", f"no training state of step {step}; there are {there}")
    return facts


def state_folder(facts: RunFacts, step: int) -> Path:
    """Return where the training state of a step lies."""
    return facts.folder / "checkpoints" / f"step-{step:06d}"


def _run_rows(facts: RunFacts) -> dict[str, str]:
    config, last = facts.config, facts.last
    return {
        "run": f"{facts.folder}, {facts.standing}, {size_text(facts.num_bytes)}",
        "damage": facts.damage,
        "steps": f"{facts.step} of {config.steps}" if config else str(facts.step),
        "base": config.model.path if config else "",
        "method": f"{config.method.kind} on {', '.join(config.method.train)}" if config else "",
        "loss": "" if last.loss is None else f"{last.loss:.4f}, a mean of the last steps",
        "best": f"step {last.best[0]}, held-out loss {last.best[1]:.5f}" if last.best else "",
        "d": ", ".join(f"{network} {d:.2e}" for network, d in last.d),
        "states": ", ".join(f"step {step}" for step in facts.states),
        "weights": ", ".join(sorted(path.name for path in (facts.folder / "weights").glob("*.safetensors"))),
        "go on": "" if facts.damage else facts.go_on(),
    }


def _state_rows(facts: RunFacts, step: int) -> dict[str, str]:
    folder = state_folder(facts, step)
    name = shell_word(facts.folder)
    last = read_log(facts.folder / "log.jsonl", until=step)
    return {
        "state": f"{folder}, {size_text(disk_bytes(folder))}",
        "loss": "" if last.loss is None else f"{last.loss:.4f}, a mean of the steps before",
        "d": ", ".join(f"{network} {d:.2e}" for network, d in last.d),
        "look": f'sdtrain sample {name} --step {step} --prompt "..."',
        "export": f"sdtrain export {name} --step {step} --format sd-scripts",
    }


def _rows(found: FileDescription) -> dict[str, str]:
    layers = ", ".join(f"{network} {number}" for network, number in found.num_modules.items())
    norms = [f"{found.num_norms} normalisations"] if found.num_norms else []
    return {
        "kind": _kind(found),
        "layers": layers,
        "also": ", ".join([*norms, *(f"text embedding {name}" for name in found.embeddings)]),
        "ranks": _counted(found.ranks),
        "alphas": _counted(found.alphas),
        "stored as": ", ".join(found.dtypes),
        "title": found.title,
        "date": found.date,
        "base": found.base_model,
        "prediction": found.prediction,
        "steps": str(found.steps or ""),
        "pictures": str(found.num_images or ""),
        "d": ", ".join(f"{network} {d:.2e}" for network, d in found.d.items()),
        "tags": ", ".join(f"{tag} ({number})" for tag, number in found.top_tags),
        **_author_rows(found.metadata),
        "began": started_of(found.metadata),
        "buckets": ", ".join(f"{width} x {height} ({count})" for (width, height), count in found.buckets.items()),
        "folders": ", ".join(f"{name} ({count} x {repeats:g})" for name, count, repeats in found.folders),
        "config": "in the header" if found.config_toml else "",
        "hash": found.metadata.get("modelspec.hash_sha256", "") or found.metadata.get("sshs_model_hash", ""),
    }


def _kind(found: FileDescription) -> str:
    if not found.kind:
        return "no adapters; tensors of a model"
    told = f"{found.kind} in {found.names} names"
    others = " and ".join(found.not_computed)
    return f"{told}, with peft's {others}, which is not computed here" if others else told


def _author_rows(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what the author says of a file, and what it was made of."""
    rows = {
        "author": "author",
        "licence": "license",
        "about": "description",
        "keywords": "tags",
        "trigger words": "trigger_phrase",
        "usage": "usage_hint",
        "made of": "merged_from",
        "thumbnail": "thumbnail",
    }
    found = {row: metadata.get(f"modelspec.{key}", "") for row, key in rows.items()}
    return found | {"thumbnail": uri_words(found["thumbnail"])}


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    """Return `16` where all layers have that value, else each value with its number of layers."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({layers} layers)" for value, layers in values.items())
