"""In a steady step the host waits for the card where it says so, and the card holds what it must, and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.training import fit
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.watching.records import RunRecord, StepRecord
from tests.card.fake_card import NAME, Card, card_in_use
from tests.card.test_matrix import MEMORY, settings_of

LISTED = {("copies from the card", "optim/metrics.py: return lambda: taken.cpu()")}
"""Where a step waits: for the loss and for what the optimizer did in the step before, whose copies began there. On CUDA
they are in pinned memory by then."""


@pytest.mark.parametrize(
    "changes",
    [
        {**settings_of(("unet",), "lora", "bfloat16", "accumulation"), "preserve.weight": 0.5},
        pytest.param(
            {**settings_of(("unet", "text_encoder"), "lora", "bfloat16", "plain"), "data.caption_dropout": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(settings_of(("unet",), "oft", "bfloat16", "plain"), marks=pytest.mark.slow),
        {
            **settings_of(("text_encoder",), "full", "float32", "fused"),
            "loss.kind": "huber",
            "loss.huber_schedule": "snr",
        },
    ],
    ids=["lora", "text encoder", "oft", "full"],
)
def test_a_steady_step_waits_only_for_what_the_step_before_came_to(
    on_card: Callable[..., Card], changes: dict[str, Any]
) -> None:
    waits: dict[int, int] = {}

    def watch(found: Card, record: object) -> None:
        if isinstance(record, StepRecord):
            waits[record.step] = len(found.waits)

    found = on_card({"steps": 4, **changes}, watch)
    steady = found.waits[waits[2] : waits[3]]  # step 3 is told in step 4, when its gradients are computed
    assert {(wait.what, wait.where) for wait in steady} == LISTED


def test_the_card_holds_the_trained_network_and_nothing_of_the_others(on_card: Callable[..., Card]) -> None:
    held: dict[str, int] = {}

    def watch(found: Card, record: object) -> None:
        if isinstance(record, RunRecord):
            held["before"] = found.num_bytes

    from sdtrain.training import fit

    expected: dict[str, int] = {}
    plain = fit.build_optimizer

    def spy(trainable: Any, config: Any) -> Any:
        optimizer = plain(trainable, config)
        expected["adapters"] = sum(p.numel() * p.element_size() for p in trainable.named_parameters().values())
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "build_optimizer", spy)
        load = fit.load

        def loaded(run: Any, opened: Any) -> Any:
            model = load(run, opened)
            expected["unet"] = sum(p.numel() * p.element_size() for p in model.networks["unet"].parameters())
            return model

        patch.setattr(fit, "load", loaded)
        on_card({**settings_of(("unet",), "lora", "bfloat16", "plain"), "preview.prompts": []}, watch)
    assert 0 <= held["before"] - expected["unet"] - expected["adapters"] < 16384  # the optimizer's few numbers


def test_the_unet_comes_to_the_card_when_all_is_encoded(
    on_card: Callable[..., Card], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a card must hold it beside the encoders, which take as much once more at the size of SDXL."""
    from sdtrain.models.sdxl import SDXL

    places: dict[str, set[str]] = {}

    def spy(name: str) -> None:
        original = getattr(SDXL, name)

        def watched(self: SDXL, *given: Any) -> Any:
            places.setdefault(name, set()).add(next(self.unet.parameters()).device.type)
            return original(self, *given)

        monkeypatch.setattr(SDXL, name, watched)

    for name in ("encode_pixels", "encode_captions", "predict"):
        spy(name)
    settings = settings_of(("unet",), "lora", "bfloat16", "plain")
    on_card({**settings, "data.cache": str(tmp_path / "fresh"), "validation.share": 0.4})
    assert places == {"encode_pixels": {"cpu"}, "encode_captions": {"cpu"}, "predict": {NAME}}


@pytest.mark.parametrize("is_enough", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_unet_makes_room_for_the_decoder_where_both_do_not_fit(
    on_card: Callable[..., Card], monkeypatch: pytest.MonkeyPatch, is_enough: bool
) -> None:
    """As on a card of 8 GB; where even that is too little the preview is left out, and the U-Net is back all the same.

    A picture is decoded, and the next step trains.
    """
    import torch
    from diffusers import AutoencoderKL

    from sdtrain.models.sdxl import SDXL

    model: list[SDXL] = []
    decoded: list[str] = []
    decode, predict = AutoencoderKL.decode, SDXL.predict

    def too_large(self: AutoencoderKL, *given: Any, **more: Any) -> Any:
        place = next(model[0].unet.parameters()).device.type
        decoded.append(place)
        if place == NAME or not is_enough:
            raise torch.OutOfMemoryError("no room")
        return decode(self, *given, **more)

    def predicted(self: SDXL, *given: Any) -> Any:
        model[:] = [self]
        return predict(self, *given)

    monkeypatch.setattr(AutoencoderKL, "decode", too_large)
    monkeypatch.setattr(SDXL, "predict", predicted)
    changes = {**settings_of(("unet",), "lora", "bfloat16", "plain"), "preview.every": 1, "steps": 2}
    if is_enough:
        on_card(changes)
    else:
        with pytest.raises(AssertionError, match="no preview of step"):
            on_card(changes)
    assert set(decoded) == {NAME, "cpu"}
    assert {parameter.device.type for parameter in model[0].unet.parameters()} == {NAME}


@pytest.mark.slow  # what a plan says of it is in the default suite
def test_recomputed_activations_need_fewer_bytes(on_card: Callable[..., Card], tmp_path: Any) -> None:
    changes = {**settings_of(("unet",), "lora", "bfloat16", "plain"), "data.resolution_px": 128}
    plain = on_card({**changes, "name": "plain"})
    less = on_card({**changes, **MEMORY["checkpointing"], "name": "less"})
    assert less.peak_bytes < 0.8 * plain.peak_bytes


def test_the_card_notices_a_tensor_in_the_wrong_place_and_who_asks_for_numbers() -> None:
    """The fixture itself: what it lets pass, no test of a run can see."""
    import torch

    with card_in_use() as found:
        here, there = torch.ones(4), torch.ones(4, device=found.device)
        with pytest.raises(RuntimeError, match=r"same device|different devices"):
            here + there
        there.to("cpu", non_blocking=True)
        here.to(found.device, non_blocking=True)
        assert [wait.what for wait in found.waits] == ["copies from the card"]
        here.to(found.device)
        there.sum().item()
        bool(there.isfinite().all())
        there.tolist()
        assert {wait.what for wait in found.waits[1:]} == {"copies to the card", "reads a number"}
        assert len(found.waits) == 8
        before = found.num_bytes
        more = torch.empty(1000, device=found.device)
        assert found.num_bytes - before == 4000 and more.device.type == NAME
        del more
        assert found.num_bytes == before


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_card_holds_no_copy_of_the_weights_in_training_where_they_wait_in_the_hosts_memory(on_cpu: bool) -> None:
    with card_in_use() as found, torch.no_grad():
        params = [torch.nn.Parameter(torch.zeros(64, 64, device=NAME)) for _ in range(3)]
        optimizer = ProdigyPlusScheduleFree(params, d0=1e-4, set_aside_on_cpu=on_cpu, compile=False)
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        before = found.num_bytes
        with averaged(optimizer):
            held = found.num_bytes - before
            places = {str(state["y"].device.type) for state in optimizer.state_dict()["state"].values()}
        assert (held, places) == ((0, {"cpu"}) if on_cpu else (3 * 64 * 64 * 4, {NAME}))
        assert {parameter.device.type for parameter in params} == {NAME}


@pytest.mark.parametrize("memory", ["fused", "plain"])
def test_weights_are_set_aside_on_the_host_where_they_move_within_backward(
    on_card: Callable[..., Card], monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    built: list[ProdigyPlusScheduleFree] = []

    def build(*arguments: Any) -> ProdigyPlusScheduleFree:
        built.append(build_optimizer(*arguments))
        return built[0]

    monkeypatch.setattr(fit, "build_optimizer", build)
    on_card({**settings_of(("text_encoder",), "full", "bfloat16", memory), "steps": 1})
    assert built[0].settings.set_aside_on_cpu == (memory == "fused")
