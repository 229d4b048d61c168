"""What is planned is what happens: the plan is made without numbers, the truth is counted in a real run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sdtrain.commands.front.plan import plan_config
from sdtrain.config.read import resolve
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.training import fit as loop
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.planning.levers import attempts, budget_bytes, fit_to, selections
from sdtrain.training.planning.plan import Plan
from sdtrain.training.planning.trace import CPU, Part, Phase, Traced, trace
from sdtrain.training.planning.tracking import Tracker
from sdtrain.training.run import Run, pick_dtype
from sdtrain.training.watching.records import PictureRecord, StepRecord
from tests.conftest import merged, small_run

MIB = 2**20


@pytest.fixture
def config_of(tmp_path: Path, pictures: Path) -> Callable[..., Config]:
    def make(changes: dict[str, Any]) -> Config:
        table = small_run(tmp_path, pictures)
        if changes.get("method.kind") == "full":
            table["method"] = {}
        base = {"device": "cpu", "steps": 3, "data.bucket_step_px": 96, "data.max_aspect": 1.0}
        return resolve(merged(table, {**base, **changes}), "test config")

    return make


def traced(config: Config, *, on_gpu: bool = False) -> Traced:
    side = config.data.resolution_px
    run = Run(Path("nowhere"), config, CPU, pick_dtype(config, CPU))
    return trace(run, open_model(config.model, "model"), (side, side), on_gpu=on_gpu, num_examples=(6, 6))


def peaks(planned: Traced) -> dict[str, int]:
    return {phase.name: phase.peak_bytes for phase in planned.phases}


def counted(config: Config) -> dict[str, int]:
    """The true peaks of a run: every storage of every tensor that it holds, weights included."""
    from sdtrain.commands.fit import fit

    tracker, found = Tracker(), dict[str, int]()

    def watch(record: object) -> None:
        if isinstance(record, StepRecord):
            found["train"] = tracker.peak_bytes
        if isinstance(record, PictureRecord):
            found["preview"] = tracker.peak_bytes
        tracker.begin_peak()

    with tracker, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_optimizer", lambda *args: build_optimizer(*args, compiled=False))
        fit(config, watchers=[watch], console=Console(file=io.StringIO()))
    return found


@pytest.mark.filterwarnings("error:Accessing the data pointer")  # which a user would read
@pytest.mark.parametrize(
    "changes",
    [
        {"preview.every": 1, "preview.seeds": [0, 1, 2]},
        pytest.param(
            {"memory.gradient_checkpointing": True, "method.train": ["unet", "text_encoder"]}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"memory.recompute": ["up_blocks.0", "down_blocks.1.attentions.0"], "data.batch_size": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"method.kind": "full", "data.gradient_accumulation": 2}, marks=pytest.mark.slow),
        {"method.kind": "full", "memory.fused_back_pass": True},
        pytest.param({"model.base_precision": "int8", "preview.every": 1}, marks=pytest.mark.slow),
        pytest.param({"model.base_precision": "nf4", "method.adapter": "dora"}, marks=pytest.mark.slow),
    ],
    ids=["lora", "checkpointing", "parts", "full", "fused", "int8", "dora nf4"],
)
def test_a_plan_is_within_three_percent_of_the_truth(config_of: Callable[..., Config], changes: dict[str, Any]) -> None:
    config = config_of(changes)
    planned, true = peaks(traced(config)), counted(config)
    assert "train" in true and ("preview" in true) == ("preview.every" in changes)
    for phase, num_bytes in true.items():
        assert planned[phase] == pytest.approx(num_bytes, rel=0.03), (phase, planned, true)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_convolution_on_a_card_holds_what_it_reads_and_what_it_makes_twice(on_gpu: bool) -> None:
    """Where its tensor cores want the channels last; in backward it holds what it makes, which is the larger one."""
    pixels, weight = torch.zeros(2, 3, 16, 16, requires_grad=True), torch.zeros(8, 3, 3, 3)
    before, after = 4 * 2 * 3 * 16 * 16, 4 * 2 * 8 * 16 * 16
    with Tracker(on_gpu=on_gpu) as tracker:
        out = torch.conv2d(pixels, weight, padding=1)
        assert tracker.bytes_now == after
        assert tracker.peak_bytes == after + on_gpu * (before + after)
        out.backward(torch.ones(2, 8, 16, 16))  # type: ignore[no-untyped-call]
        assert tracker.peak_bytes == 2 * after + before + on_gpu * (before + after)


@pytest.mark.slow
def test_a_larger_batch_and_larger_pictures_need_more_and_recomputing_needs_less(
    config_of: Callable[..., Config],
) -> None:
    first = traced(config_of({}))
    for changes in ({"data.batch_size": 3}, {"data.resolution_px": 192, "data.bucket_step_px": 192}):
        more = traced(config_of(changes))
        assert peaks(more)["train"] > peaks(first)["train"] and more.flops > first.flops
    less = traced(config_of({"memory.gradient_checkpointing": True}))
    assert peaks(less)["train"] < peaks(first)["train"] and less.flops > 1.2 * first.flops


def test_the_unet_recomputes_too_where_a_text_encoder_alone_is_trained_through_it(
    config_of: Callable[..., Config],
) -> None:
    settings = {"method.train": ["text_encoder"], "data.batch_size": 2}
    plain, recomputed = (
        traced(config_of(settings)),
        traced(config_of({**settings, "memory.gradient_checkpointing": True})),
    )
    kept = [found.phases[1].parts["kept for backward"] for found in (plain, recomputed)]
    assert kept[1] < kept[0] / 2


def test_on_a_gpu_what_does_not_train_has_left(config_of: Callable[..., Config]) -> None:
    one, all_of_them = config_of({}), config_of({"method.train": ["unet", "text_encoder"]})
    cpu, gpu, text = traced(one), traced(one, on_gpu=True), traced(all_of_them, on_gpu=True)
    weights = [found.phases[1].parts["weights"] for found in (cpu, gpu, text)]
    assert weights[1] < weights[2] < weights[0]
    unet = gpu.phases[1].parts["weights"]  # which comes there when all is encoded
    assert cpu.phases[0].parts["weights"] == gpu.phases[0].parts["weights"] + unet


@pytest.mark.slow
def test_a_plan_says_what_a_packed_base_saves(config_of: Callable[..., Config]) -> None:
    whole = traced(config_of({}))
    for precision in ("int8", "fp8", "nf4"):
        packed = traced(config_of({"model.base_precision": precision}))
        saved = whole.phases[1].parts["weights"] - packed.phases[1].parts["weights"]
        assert packed.bases == whole.bases and saved == whole.bases["full"] - whole.bases[precision] > 0


@pytest.mark.parametrize(("text", "num_bytes"), [("8GB", 8 * 2**30), ("7.5 gib", int(7.5 * 2**30)), ("512MB", 2**29)])
def test_a_budget_is_read(text: str, num_bytes: int) -> None:
    assert budget_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["8", "GB", "-8GB", "0GB", "8TBGB", "1e9GB"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write 8GB"):
        budget_bytes(text)


def made_up(config: Config) -> Plan:
    """A plan by a formula: 10 MiB a picture, a tenth of it where activations are recomputed, and 1 MiB beside."""
    a_picture = MIB if config.memory.gradient_checkpointing else 10 * MIB
    phase = Phase("train", {"weights": MIB, "kept for backward": config.data.batch_size * a_picture})
    return Plan("a GPU", (96, 96), (phase,), {}, 0)


def test_the_cheapest_setting_that_fits_is_chosen(config_of: Callable[..., Config]) -> None:
    config = config_of({"data.batch_size": 4})
    wanted = {60: (4, 1, False), 30: (4, 1, True), 6: (4, 1, True), 5: (2, 2, True), 3: (1, 4, True)}
    for budget_mib, (batch, accumulation, recomputes) in wanted.items():
        choice, _ = fit_to(config, budget_mib * MIB, made_up)
        data, memory = choice.config.data, choice.config.memory
        found = data.batch_size, data.gradient_accumulation, memory.gradient_checkpointing
        assert found == (batch, accumulation, recomputes), budget_mib
        assert bool(choice.costs) == (choice.config != config)


def with_parts(config: Config) -> Plan:
    """A plan of three parts, of which one saves as much for half of the arithmetic."""
    sizes = {"up_blocks.0": 4, "up_blocks.1": 4, "mid_block": 2}
    costs = {"up_blocks.0": 20, "up_blocks.1": 10, "mid_block": 40}
    memory = config.memory
    again = set(sizes) if memory.gradient_checkpointing else set(memory.recompute)
    kept = sum(size for name, size in sizes.items() if name not in again)
    phase = Phase("train", {"weights": 10 * MIB, "kept for backward": kept * MIB})
    parts = tuple(Part(name, sizes[name] * MIB, costs[name]) for name in sizes) if not again else ()
    return Plan("a GPU", (96, 96), (phase,), {}, 100, {}, parts)


def test_as_few_parts_are_recomputed_as_do_those_first_that_save_most_for_their_cost(
    config_of: Callable[..., Config],
) -> None:
    config = config_of({"data.batch_size": 1})
    wanted = {20: [], 16: ["up_blocks.1"], 12: ["up_blocks.0", "up_blocks.1"]}
    for usable_mib, names in wanted.items():
        choice, _ = fit_to(config, round(usable_mib * MIB / 0.9) + 1, with_parts)
        assert choice.config.memory.recompute == names and not choice.config.memory.gradient_checkpointing
        assert len(choice.costs) == bool(names)
    choice, _ = fit_to(config, round(10 * MIB / 0.9) + 1, with_parts)
    assert choice.config.memory.gradient_checkpointing and choice.config.memory.recompute == []
    names, share = next(selections(with_parts(config), 5 * MIB, 2))
    assert names == ["up_blocks.0", "up_blocks.1"] and share == pytest.approx(0.6)


@pytest.mark.slow
def test_what_parts_save_is_what_a_plan_of_them_lacks(config_of: Callable[..., Config]) -> None:
    whole = traced(config_of({"data.batch_size": 2}))
    parts = {part.name: part for part in whole.parts}
    assert {"mid_block", "mid_block.attentions.0", "up_blocks.0"} <= set(parts) and not traced(
        config_of({"memory.recompute": ["mid_block"]})
    ).parts
    chosen = ["up_blocks.0.attentions.0", "up_blocks.1"]
    some = traced(config_of({"data.batch_size": 2, "memory.recompute": chosen}))
    kept = [found.phases[1].parts["kept for backward"] for found in (whole, some)]
    assert kept[0] - kept[1] == pytest.approx(sum(parts[name].saved_bytes for name in chosen), rel=0.1)
    assert some.flops - whole.flops == pytest.approx(sum(parts[name].flops for name in chosen), rel=0.1)


def test_a_step_has_the_same_pictures_whatever_is_chosen(config_of: Callable[..., Config]) -> None:
    for changes in ({"data.batch_size": 12}, {"data.batch_size": 3}, {"method.kind": "full", "data.batch_size": 2}):
        for choice, _ in attempts(config_of(changes), 0, made_up):
            data = choice.config.data
            assert data.batch_size * data.gradient_accumulation == changes["data.batch_size"]
            assert not (choice.config.memory.fused_back_pass and data.gradient_accumulation > 1)


def test_a_budget_that_nothing_fits_says_what_the_smallest_needs(config_of: Callable[..., Config]) -> None:
    with pytest.raises(UserError) as caught:
        fit_to(config_of({"data.batch_size": 2}), MIB, made_up)
    text = caught.value.text()
    assert caught.value.exit_code == 2
    assert "train needs 2.0 MiB (weights 1.0 MiB, kept for backward 1.0 MiB)" in text
    assert "data.batch_size=1" in text and "memory.gradient_checkpointing=true" in text


def test_the_command_tells_every_phase(config_of: Callable[..., Config], tmp_path: Path) -> None:
    path, text = tmp_path / "config.toml", io.StringIO()
    path.write_text(config_to_toml(config_of({})), encoding="utf-8")
    plan_config(path, [], Console(file=text, width=200), budget="1GB")
    phases = ("encode", "train", "save", "most", "disk", "TFLOP")
    for word in (*phases, "fits into 1GB as it is", "see model.base_precision"):
        assert word in text.getvalue()
    assert not (tmp_path / "runs").exists()
