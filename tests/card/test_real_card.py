"""Whole runs of the built-in model on a CUDA card, where there is one (mark `gpu`): what the fake card cannot know.

The same steps as on a CPU, no wait in a steady step, the laws bit for bit, and what happens where memory runs out.
"""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from sdtrain.training.watching.records import StepRecord
from tests.card.test_matrix import ADAPTERS, NETWORKS, WATCHED, cells, name_of, settings_of
from tests.commands.test_sample_is_preview import PROMPTS, SEEDS, bits
from tests.conftest import merged, small_run
from tests.test_laws import METHODS, state_bits, weights_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@dataclass(frozen=True)
class Ran:
    """folder: of the run. losses: of its steps. said: what was printed."""

    folder: Path
    losses: list[float]
    said: str


Fit = Callable[..., Ran]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real-card-cache")


@pytest.fixture
def on_cuda(tmp_path: Path, pictures: Path, shared_cache: Path) -> Fit:
    """Runs `sdtrain fit` on the card. Keywords are dotted settings."""

    def run(changes: dict[str, Any], *, resume: bool = False, watchers: Sequence[Callable[..., None]] = ()) -> Ran:
        from sdtrain.commands.fit import fit
        from sdtrain.config.read import resolve

        table = small_run(tmp_path, pictures)
        if changes.get("method.kind") == "full":
            table["method"] = {}
        base = {"device": "cuda", "steps": 2, "data.cache": str(shared_cache), "validation.noise_levels": 1}
        text, losses = io.StringIO(), []

        def see(record: object) -> None:
            if isinstance(record, StepRecord):
                losses.append(record.loss)

        config = resolve(merged(table, {**base, **changes}), "test config")
        console = Console(file=text, width=200)
        result = fit(config, resume=resume, watchers=[see, *watchers], console=console)
        said = text.getvalue()
        assert result.finished and result.weights is not None and result.weights.exists(), said
        assert not any(words in said for words in ("no preview of", "the validation of", "could not be saved")), said
        return Ran(result.folder, losses, said)

    return run


@pytest.mark.parametrize("cell", list(cells()), ids=name_of)
def test_everything_that_can_be_trained_runs_on_a_real_card(on_cuda: Fit, cell: Any) -> None:
    ran = on_cuda({**settings_of(*cell), **WATCHED})
    assert len(ran.losses) == 2 and all(map(math.isfinite, ran.losses))
    assert "more than planned" not in ran.said


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("packing", ["int8", "fp8", "nf4"])
def test_a_packed_base_trains_on_a_real_card_as_the_whole_one_does(on_cuda: Fit, adapter: str, packing: str) -> None:
    pytest.importorskip("bitsandbytes" if packing == "nf4" else "torchao")
    settings = settings_of(("unet",), adapter, "bfloat16", "plain")
    whole = on_cuda({**settings, "name": "whole"}).losses
    packed = on_cuda({**settings, "name": "packed", "model.base_precision": packing, "preview.every": 1}).losses
    assert packed == pytest.approx(whole, rel=0.1 if packing == "nf4" else 0.03)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_float16_trains_on_a_real_card_as_float32_does(on_cuda: Fit, kind: str) -> None:
    settings = settings_of(("unet", "text_encoder"), kind, "float32", "plain")
    wide = on_cuda({**settings, "name": "wide"}).losses
    half = on_cuda({**settings, "name": "half", "model.dtype": "float16", "preview.every": 1}).losses
    assert half == pytest.approx(wide, rel=0.03)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft", "full"])
@pytest.mark.parametrize("memory", ["plain", "checkpointing", "accumulation"])
def test_a_card_makes_the_steps_that_a_cpu_makes(on_cuda: Fit, kind: str, memory: str) -> None:
    settings = {**settings_of(NETWORKS, kind, "float32", memory), "steps": 5, "optimizer.d0": 1e-4}
    card = on_cuda({**settings, "name": "card"}).losses
    cpu = on_cuda({**settings, "name": "cpu", "device": "cpu"}).losses
    assert card == pytest.approx(cpu, rel=2e-3)
    assert len(set(cpu)) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {**settings_of(("unet",), "lora", "bfloat16", "accumulation"), "preserve.weight": 0.5},
        settings_of(("unet",), "dora", "bfloat16", "checkpointing"),
        {**settings_of(("unet", "text_encoder"), "lora", "bfloat16", "plain"), "data.caption_dropout": 0.5},
        settings_of(("text_encoder",), "full", "float32", "fused"),
        {**settings_of(("unet",), "lora", "bfloat16", "plain"), "model.base_precision": "int8"},
        {**settings_of(("unet",), "lora", "bfloat16", "accumulation"), "memory.cuda_graphs": "off"},
    ],
    ids=["lora", "dora", "text encoder", "full", "packed", "single launches"],
)
def test_a_steady_step_waits_for_nothing_on_a_real_card(on_cuda: Fit, changes: dict[str, Any]) -> None:
    """CUDA itself raises where something waits, but for the read of the step before, which waits for an event."""

    def watch(record: object) -> None:
        if isinstance(record, StepRecord):
            torch.cuda.set_sync_debug_mode("error" if 3 <= record.step < 7 else "default")

    try:
        on_cuda({**changes, "steps": 8}, watchers=[watch])
    finally:
        torch.cuda.set_sync_debug_mode("default")


GRAPHED: dict[str, dict[str, Any]] = {
    **{
        f"{kind} {dtype}": settings_of(("unet",), kind, dtype, "plain")
        for kind in ADAPTERS
        if kind != "oft"
        for dtype in ("bfloat16", "float32")
    },
    "recomputed": settings_of(("unet",), "lora", "bfloat16", "checkpointing"),
    "accumulated, preserved": {**settings_of(("unet",), "lora", "bfloat16", "accumulation"), "preserve.weight": 0.5},
    "sizes that differ": {**settings_of(("unet",), "lora", "bfloat16", "accumulation"), "data.batch_size": 3},
    "float16": settings_of(("unet",), "lora", "float16", "plain"),
    "looked at": {**settings_of(("unet",), "lora", "bfloat16", "plain"), **WATCHED, "preview.every": 2},
    **{
        packing: {**settings_of(("unet",), "lora", "bfloat16", "plain"), "model.base_precision": packing}
        for packing in ("int8", "fp8", "nf4")
    },
    "full": settings_of(("unet",), "full", "float32", "plain"),
}


@pytest.mark.parametrize("name", GRAPHED)
def test_graphs_make_the_training_that_single_launches_make_on_a_real_card(on_cuda: Fit, name: str) -> None:
    if name in ("int8", "fp8", "nf4"):
        pytest.importorskip("bitsandbytes" if name == "nf4" else "torchao")
    changes = {**GRAPHED[name], "steps": 6, "deterministic": True, "checkpoint.every": 6}
    alone = on_cuda({**changes, "name": "alone", "memory.cuda_graphs": "off"})
    graphs = on_cuda({**changes, "name": "graphs", "memory.cuda_graphs": "on"})
    assert alone.losses == graphs.losses
    assert state_bits(alone.folder, 6) == state_bits(graphs.folder, 6)


@pytest.mark.parametrize("method", METHODS)
def test_previews_do_not_change_the_training_on_a_real_card(on_cuda: Fit, method: str) -> None:
    changes = {**METHODS[method], "steps": 4, "deterministic": True}
    without = on_cuda({**changes, "name": "without"})
    with_previews = on_cuda({**changes, "name": "with", "preview.every": 1})
    assert without.losses == with_previews.losses
    assert state_bits(without.folder, 4) == state_bits(with_previews.folder, 4)
    assert weights_bits(without.folder) == weights_bits(with_previews.folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_one_that_was_not_interrupted_on_a_real_card(on_cuda: Fit, method: str) -> None:
    changes = {**METHODS[method], "deterministic": True}
    straight = on_cuda({**changes, "name": "straight", "steps": 5})
    first = on_cuda({**changes, "name": "resumed", "steps": 2})
    resumed = on_cuda({**changes, "name": "resumed", "steps": 5}, resume=True)
    assert straight.losses == first.losses + resumed.losses
    assert state_bits(straight.folder, 5) == state_bits(resumed.folder, 5)
    assert weights_bits(straight.folder) == weights_bits(resumed.folder)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_that_do_not_repeat_their_bits_differ_by_rounding_only(on_cuda: Fit, method: str) -> None:
    """Without `deterministic`, as cards are used."""
    changes = {**METHODS[method], "steps": 5}
    once, again = (on_cuda({**changes, "name": name}) for name in ("once", "again"))
    assert once.losses == pytest.approx(again.losses, rel=1e-2)


def held() -> int:
    """What the card holds of this process; what earlier tests left in cycles is freed."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("adapt", [True, False])
def test_a_step_that_does_not_fit_the_card_is_done_again_with_less(on_cuda: Fit, adapt: bool) -> None:
    """The card is made smaller than the run needs: it gives up what it may, or says what would help."""
    from sdtrain.errors import OutOfMemoryError

    settings = {**settings_of(("unet",), "lora", "float32", "plain"), "data.batch_size": 16, "data.resolution_px": 256}
    before = held()
    torch.cuda.reset_peak_memory_stats()
    plain = on_cuda({**settings, "name": "plain"})
    peak = torch.cuda.max_memory_allocated() - before
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held() + 0.6 * peak) / total)
    try:
        less = {**settings, "name": "less", "memory.on_oom": "adapt" if adapt else "stop"}
        if not adapt:
            with pytest.raises(OutOfMemoryError, match=r"gradient_checkpointing"):
                on_cuda(less)
            return
        ran = on_cuda(less)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in ran.said and "The step is done again" in ran.said
    assert ran.losses == pytest.approx(plain.losses, rel=1e-3)


def test_sample_draws_what_the_preview_drew_on_a_real_card(on_cuda: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.commands.sample import draw
    from sdtrain.training import outputs

    drawn: list[list[list[Image.Image]]] = []
    in_rows = outputs.in_rows
    monkeypatch.setattr(outputs, "in_rows", lambda *given: drawn.append(in_rows(*given)) or drawn[-1])
    looks = {"preview.every": 2, "preview.prompts": PROMPTS, "preview.seeds": SEEDS, "optimizer.d0": 1e-2}
    ran = on_cuda({**settings_of(("unet",), "lora", "bfloat16", "plain"), **looks})
    base, last = map(bits, drawn)
    assert base != last, "or there is nothing to see"
    assert bits(draw(ran.folder, PROMPTS, SEEDS, None, []).rows) == last
