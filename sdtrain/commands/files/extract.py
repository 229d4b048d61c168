"""`sdtrain extract` and `sdtrain resize`: LoRAs out of two models, and LoRAs of another rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

from sdtrain.adapters.formats.lora_file import LoraFile, read_lora, without, write_lora
from sdtrain.adapters.formats.metadata import FileFacts, carried
from sdtrain.adapters.kinds import Adapters
from sdtrain.adapters.low_rank import RankRule, extract, resize, without_rank
from sdtrain.adapters.targets import TargetPreset, select_targets
from sdtrain.commands.files.free import require_free
from sdtrain.commands.files.merge import read_whole
from sdtrain.errors import user_error
from sdtrain.families.metadata import now, resolution_of
from sdtrain.families.words import Resolution
from sdtrain.models.checkpoints.markers import CONFIGS_KEY, NO_CAPTION_KEY
from sdtrain.models.model import Model


def extract_lora(
    base: str, tuned: str, rule: RankRule, targets: str, out: Path, components: str = "", *, force: bool = False
) -> int:
    """Write the LoRA that turns `base` into `tuned`, as near as its rank allows; return the number of its layers.

    force: whether a file that is there is replaced. Raises UserError.
    """
    require_free(out, force=force)
    before, after = read_whole(base, components), read_whole(tuned, components)
    meant = cast(TargetPreset, targets) if targets in get_args(TargetPreset) else [targets]
    modules = select_targets(before.model.networks, meant, unused=before.model.unused_layers)
    adapters = extract(before.model.networks, after.model.networks, rule, modules=modules)
    if not any(adapters.values()):
        raise user_error(tuned, "weights", f"are those of {base} in every layer of --targets {targets}")
    _write(out, adapters, after.model, base, after.metadata, after.resolution_px)
    return sum(map(len, adapters.values()))


def resize_lora(
    file: Path,
    base: str,
    rule: RankRule,
    out: Path,
    components: str = "",
    *,
    partial: bool = False,
    force: bool = False,
) -> LoraFile:
    """Write a LoRA file with another rank, as near as that allows; return what was read. Raises UserError.

    partial: whether layers that cannot be used are left out. force: whether a file that is there is replaced.
    """
    require_free(out, force=force)
    below = read_whole(base, components)
    read = read_lora(file, below.model.networks, partial=partial)
    read = without(read, without_rank(read.adapters), partial=partial)
    size = resolution_of(read.metadata) or below.resolution_px
    _write(out, resize(read.adapters, rule), below.model, base, read.metadata, size)
    return read


def _write(
    out: Path, adapters: Adapters, model: Model, base: str, metadata: Mapping[str, str], resolution_px: Resolution
) -> None:
    """Write adapters, with all that the file they are made of says and is as true of them."""
    facts = FileFacts(
        title=out.stem,
        date=now(),
        prediction=model.prediction,
        resolution_px=resolution_px,
        base_model=Path(base).name,
        more={key: value for key, value in carried(metadata).items() if key not in (CONFIGS_KEY, NO_CAPTION_KEY)},
    )
    write_lora(out, adapters, model.networks, names="sd-scripts", facts=facts)
