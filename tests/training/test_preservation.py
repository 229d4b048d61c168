"""Keeping what the model knew: its own answers, without the adapter, are the target for other captions."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain import Record, StepRecord
from sdtrain.adapters.base import without_adapters
from sdtrain.errors import UserError
from sdtrain.training import fit as loop
from sdtrain.training.computing.objective import Objective

Train = Callable[..., tuple[Path, str]]
PRESERVE = {"preserve.weight": 2.0, "preserve.captions": ["a blue square", "a green circle", ""]}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of the preservation was given, what it returned, and what it should have by the definition."""
    from sdtrain.training.computing.preservation import Preservation

    found: list[dict[str, Any]] = []
    original = Preservation.errors

    def watched(self: Preservation, noisy: Any, timesteps: Any, sizes: Any, chosen: Any) -> Any:
        got = original(self, noisy, timesteps, sizes, chosen)
        with torch.no_grad():
            answers = []
            for hidden in (False, True):
                with without_adapters(self.model.networks.values() if hidden else ()):
                    text = self.model.encode_captions([self.captions[number] for number in chosen])
                    answers.append(self.model.predict(noisy, timesteps, {**text, **sizes}))
        expected = self.weight * (answers[0] - answers[1]).square().mean((1, 2, 3))
        found.append({"got": got.detach(), "expected": expected, "chosen": chosen.tolist(), "grad": got.requires_grad})
        return got

    monkeypatch.setattr(Preservation, "errors", watched)
    return found


@pytest.mark.parametrize(
    "networks", [["unet"], ["unet", "text_encoder", "text_encoder_2"]], ids=["unet", "with text encoders"]
)
def test_the_difference_from_the_base_is_added_to_the_loss(
    train: Train, seen: list[dict[str, Any]], networks: list[str]
) -> None:
    plain, _ = train({"name": "plain", "method.train": networks, "steps": 3})
    held, _ = train({"name": "held", "method.train": networks, "steps": 3} | PRESERVE)
    assert seen[0]["got"].abs().max() == 0, "before the first step the model is its base"
    assert losses(held)[0] == losses(plain)[0]
    assert all(torch.allclose(one["got"], one["expected"], rtol=1e-3, atol=1e-9) for one in seen)
    assert seen[-1]["got"].min() > 0 and all(one["grad"] for one in seen)
    assert len({number for one in seen for number in one["chosen"]}) > 1, "captions are drawn"
    assert losses(held)[1:] != losses(plain)[1:]


def test_it_draws_nothing_that_others_would_have_drawn(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    original = Objective.errors

    def watched(self: Objective, batch: Any, noise: Any, seen: Any, timesteps: Any) -> Any:
        drawn.append(noise.numpy().tobytes() + timesteps.numpy().tobytes())
        return original(self, batch, noise, seen, timesteps)

    monkeypatch.setattr(Objective, "errors", watched)
    train({"name": "plain", "steps": 2})
    plain = drawn.copy()
    drawn.clear()
    train({"name": "held", "steps": 2} | PRESERVE)
    assert drawn == plain


def test_it_is_the_same_run_when_it_goes_on_and_previews_do_not_change_it(train: Train) -> None:
    def stop(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            signal.raise_signal(signal.SIGTERM)

    straight, _ = train({"name": "straight"} | PRESERVE)
    train({"name": "parts", "preview.every": 1} | PRESERVE, watchers=[stop])
    parts, _ = train({"name": "parts", "preview.every": 1} | PRESERVE, resume=True)
    assert losses(parts) == losses(straight)


def test_without_adapters_restores_what_was(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.adapters.attach import live_layers

    def look(training: Any, *arguments: Any) -> None:
        unet = training.model.networks["unet"]
        layers: list[Any] = list(live_layers(unet))
        needs = [parameter.requires_grad for parameter in unet.parameters()]
        with pytest.raises(ValueError, match="on purpose"), without_adapters([unet]):
            assert all(layer.disable_adapters for layer in layers)
            raise ValueError("on purpose")
        assert layers and not any(layer.disable_adapters for layer in layers)
        assert [parameter.requires_grad for parameter in unet.parameters()] == needs

    monkeypatch.setattr(loop, "preview", look)
    train({"steps": 1, "preview.every": 1})


def test_a_full_fine_tune_has_no_base_to_ask(train: Train) -> None:
    with pytest.raises(UserError, match="changes the base that would teach"):
        train({"method": {"kind": "full"}} | PRESERVE)
