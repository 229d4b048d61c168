"""One LoRA in place of several: their changes are added up, and written with a rank that is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sdtrain.adapters.formats.lora_file import without, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import (
    Adapters,
    AdapterWeights,
    DoraWeights,
    LoraWeights,
    OftWeights,
    delta,
    is_beyond_layers,
    kind_of,
)
from sdtrain.adapters.low_rank import RankRule, Summed, approximate, summed
from sdtrain.adapters.shares import Share
from sdtrain.commands.files.free import require_free
from sdtrain.commands.files.made_of import joined_words, made_of_entries
from sdtrain.commands.files.merge import Merged, ReadFiles, read_files, size_of
from sdtrain.commands.files.streamed import Adding, stored_value
from sdtrain.diffusion.words import Prediction
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.metadata import now
from sdtrain.files.progress import Progress, unseen
from sdtrain.models.checkpoints.locate import Checkpoint, fallback_folder, locate, open_checkpoint
from sdtrain.models.checkpoints.markers import scheduler_of
from sdtrain.models.checkpoints.networks import Outline, trainable_outlines


def merge_loras(
    files: Sequence[tuple[Path, Share]],
    base: str,
    out: Path,
    rank: int | None,
    energy: float,
    components: str = "",
    *,
    partial: bool = False,
    force: bool = False,
    show: Progress = unseen,
) -> Merged:
    """Write the LoRA whose change is the sum of those of `files`, each times its weights; return what was done.

    base: a model that they fit, for the names of its layers, and for its weights where a DoRA or an OFT needs them.
    rank: the highest that a layer may get; None: as high as the sum needs, so that nothing is lost. energy: see
    `RankRule`. show: is told how many layers are done. Raises UserError.
    """
    require_free(out, force=force)
    checkpoint = open_checkpoint(locate(base, ""), "")
    fallback = fallback_folder(components)
    outlines = trainable_outlines(checkpoint, fallback)
    networks = {name: outline.network for name, outline in outlines.items()}
    read = _only_products(read_files(files, networks, partial=partial), partial=partial)
    if rank is None:
        _require_ranks(read)
    layers = sorted(read.adding.layers())
    done = {}
    for number, layer in enumerate(layers, start=1):
        done[layer] = _sum(read, outlines, layer, rank, energy)
        show("layers", number, len(layers))
    if not done:
        raise user_error(str(out), "--weight", "is 0 for every layer, so that nothing would be written")
    adapters: dict[str, dict[str, AdapterWeights]] = {}
    for (component, module), one in done.items():
        adapters.setdefault(component, {})[module] = one.weights
    facts = _facts(out, base, checkpoint, fallback, read)
    hashes = write_lora(out, adapters, networks, names="sd-scripts", facts=facts)
    change = sum(one.squared_change for one in done.values())
    loss = sum(one.squared_loss for one in done.values())
    return Merged(len(done), read.left_out, f"0x{hashes.data}", (loss / change) ** 0.5 if change else 0.0)


def _only_products(read: ReadFiles, *, partial: bool) -> ReadFiles:
    """Return files without what no LoRA can hold. Raises UserError for such where leaving out was not asked for."""
    files = tuple(without(file, _no_products(file.adapters), partial=partial) for file in read.files)
    kept = {id(old.adapters): new.adapters for old, new in zip(read.files, files, strict=True)}
    return replace(read, files=files, adding=Adding([(kept[id(one)], share) for one, share in read.adding.terms]))


def _no_products(adapters: Adapters) -> dict[tuple[str, str], str]:
    return {
        (component, module): "changes a bias or a normalisation, which no LoRA can hold"
        for component, modules in adapters.items()
        for module, weights in modules.items()
        if is_beyond_layers(weights)
    }


def _require_ranks(read: ReadFiles) -> None:
    """Refuse a sum without a rank where a change is no product of two matrices: it has no small rank of its own."""
    problems = []
    for file, part in zip(read.files, read.parts, strict=True):
        kinds = {kind_of(weights) for modules in file.adapters.values() for weights in modules.values()} - {"lora"}
        if kinds:
            what = f"is missing: {part.name} holds {' and '.join(sorted(kinds))}, whose sum is no LoRA; say how large"
            problems.append(Problem("--rank", f"{what} a rank may get"))
    if problems:
        raise UserError("merge", problems)


def _sum(
    read: ReadFiles, outlines: Mapping[str, Outline], layer: tuple[str, str], rank: int | None, energy: float
) -> Summed:
    """Return the LoRA of one layer. Raises UserError."""
    component, module = layer
    terms = [
        (one[component][module], times)
        for one, share in read.adding.terms
        if module in one.get(component, {}) and (times := share.of(component, module))
    ]
    products = [(weights, times) for weights, times in terms if isinstance(weights, LoraWeights)]
    if len(products) == len(terms):
        return summed(products, RankRule(rank or sum(weights.rank for weights, _ in products), energy))
    assert rank is not None, "asked for before"
    outline = outlines[component]
    weight = outline.network.get_parameter(f"{module}.weight")
    needed = any(isinstance(weights, DoraWeights | OftWeights) for weights, _ in terms)
    base = stored_value(outline.stored[f"{module}.weight"], weight) if needed else weight
    change = torch.zeros(weight.shape)
    for weights, times in terms:
        change += times * delta(weights, base)
    found = approximate(change, RankRule(rank, energy))
    loss = float((change - found.delta()).double().square().sum())
    return Summed(found, float(change.double().square().sum()), loss)


def _facts(out: Path, base: str, checkpoint: Checkpoint, fallback: Path | None, read: ReadFiles) -> FileFacts:
    """Return what is said of the sum: what the authors of all files say, and what it is made of."""
    every = [file.metadata for file in read.files]
    scheduler = scheduler_of(checkpoint, fallback)
    prediction: Prediction = "v_prediction" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"
    size = size_of(every[0], checkpoint.family, prediction)
    more = {**joined_words(every), **made_of_entries(read.parts)}
    return FileFacts(
        title=out.stem,
        date=now(),
        prediction=prediction,
        resolution_px=size,
        base_model=Path(base).name,
        more=more,
    )
