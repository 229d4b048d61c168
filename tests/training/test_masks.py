"""Laws of masks in a run: nothing is learnt outside, and a mask of ones is no mask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdtrain.diffusion.loss import error_per_image
from sdtrain.errors import UserError

Train = Callable[..., tuple[Path, str]]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


def masked(pictures: Path, folder: Path, level: int, *, left_half: bool = False) -> Path:
    """A copy of the pictures with masks of one level, or 0 in their right half."""
    shutil.copytree(pictures, folder)
    for path in pictures.glob("*.png"):
        with Image.open(path) as image:
            mask = Image.new("L", image.size, level)
            if left_half:
                mask.paste(0, (image.width // 2, 0, image.width, image.height))
        mask.save(folder / f"{path.stem}.mask.png")
    return folder


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_the_gradient_is_exactly_zero_outside_of_a_mask(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 4, 6, 6, generator=generator, requires_grad=True)
    target = torch.randn(2, 4, 6, 6, generator=generator)
    counts = torch.rand(2, 6, 6, generator=generator)
    counts[:, 2:] = 0
    error_per_image(prediction, target, kind=kind, counts=counts).sum().backward()
    assert prediction.grad is not None
    assert (prediction.grad[:, :, 2:] == 0).all() and (prediction.grad[:, :, :2] != 0).all()


def test_a_place_that_counts_pulls_as_hard_as_without_a_mask() -> None:
    target = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(1, 6, 6)
    counts[:, 0, 0] = 1
    gradients = []
    for chosen in (None, counts):
        prediction = torch.zeros(1, 4, 6, 6, requires_grad=True)
        error_per_image(prediction, target, kind="l2", counts=chosen).sum().backward()
        assert prediction.grad is not None
        gradients.append(prediction.grad[:, :, 0, 0])
    assert torch.equal(*gradients)


def test_a_mask_of_ones_is_no_mask_bit_for_bit(train: Train, pictures: Path, tmp_path: Path) -> None:
    folder = masked(pictures, tmp_path / "ones", 255)
    plain, _ = train({"name": "plain"})
    ones, _ = train({"name": "ones", "data.folder": [{"path": str(folder), "masks": "beside"}]})
    assert losses(ones) == losses(plain)
    weights = [(run / "weights" / f"{run.name}.safetensors").read_bytes()[-4096:] for run in (plain, ones)]
    assert weights[0] == weights[1]


def test_masks_change_the_loss_and_hold_for_the_validation_too(train: Train, pictures: Path, tmp_path: Path) -> None:
    def set_up(name: str, folder: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "steps": 1, "data.folder": [folder], "validation.share": 0.5, "validation.every": 1}

    def held_out(run: Path) -> list[float]:
        lines = (run / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["validation"]["loss"] for line in lines if '"validation"' in line]

    folder = masked(pictures, tmp_path / "half", 255, left_half=True)
    plain, _ = train(set_up("plain", {"path": str(pictures)}))
    half, _ = train(set_up("half", {"path": str(folder), "masks": "beside"}))
    assert 0 < losses(half)[0] < losses(plain)[0]
    assert len(held_out(half)) == 2 and 0 < held_out(half)[0] < held_out(plain)[0]


def test_a_changed_mask_is_told_when_a_run_goes_on(train: Train, pictures: Path, tmp_path: Path) -> None:
    folder = masked(pictures, tmp_path / "half", 255, left_half=True)
    settings = {"steps": 2, "data.folder": [{"path": str(folder), "masks": "beside"}]}
    train(settings)
    train({**settings, "steps": 3}, resume=True)
    Image.new("L", Image.open(folder / "0.mask.png").size, 200).save(folder / "0.mask.png")
    with pytest.raises(UserError, match=r"1 changed \(.*0\.png\)"):
        train({**settings, "steps": 4}, resume=True)
