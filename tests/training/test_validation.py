"""Pictures that are held out tell how good the weights are, and disturb nothing."""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from sdtrain.data.identity.held_out import identity, is_held_out
from sdtrain.diffusion.timesteps import draw_timesteps, stratified_timesteps
from sdtrain.errors import UserError
from sdtrain.training.computing.objective import Objective
from sdtrain.training.validating.held_out import HeldOut
from sdtrain.training.validating.history import History, Validation, is_better, read_history, write_history
from sdtrain.training.watching.records import NoteRecord, Record, StepRecord, ValidationRecord
from tests.conftest import one_in

Train = Callable[..., tuple[Path, str]]
SHARE = {"validation.share": 0.5, "validation.every": 2, "validation.noise_levels": 2}


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Any]:
    """Settings that validate on three pictures in a folder of their own."""
    folder = tmp_path / "others"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (90 * index, 20, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a blue thing {index}", encoding="utf-8")
    return {"validation.folder": [{"path": str(folder)}], "validation.noise_levels": 2}


def state_bits(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def validations(run: Path) -> list[dict[str, Any]]:
    return [{"step": line["step"], **line["validation"]} for line in log(run) if "validation" in line]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run) if "loss" in line]


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"data.caption_dropout": 0.3},
    "lora with text encoders": {"method.train": ["unet", "text_encoder", "text_encoder_2"]},
    "full": {"method": {"kind": "full", "train": ["unet"]}},
}


@pytest.mark.parametrize("method", one_in(3, METHODS))
def test_validations_do_not_change_the_training(train: Train, others: dict[str, Any], method: str) -> None:
    without, _ = train(METHODS[method] | {"name": "without"})
    validated, _ = train(METHODS[method] | others | {"name": "with", "validation.every": 1})
    assert [one["step"] for one in validations(validated)] == [0, 1, 2, 3, 4]
    assert losses(without) == losses(validated)
    assert state_bits(without, 4) == state_bits(validated, 4)


def test_validations_on_a_share_do_not_change_the_training(train: Train) -> None:
    without, _ = train(SHARE | {"name": "without", "validation.every": 0})
    validated, _ = train(SHARE | {"name": "with"})
    assert not validations(without) and len(validations(validated)) == 3
    assert losses(without) == losses(validated)
    assert state_bits(without, 4) == state_bits(validated, 4)


def test_a_validation_can_be_repeated_bit_for_bit(train: Train, others: dict[str, Any]) -> None:
    first, _ = train(others | {"name": "first", "validation.every": 2})
    again, _ = train(others | {"name": "again", "validation.every": 4})
    history = [json.loads((run / "checkpoints" / "best.json").read_text())["validations"] for run in (first, again)]
    assert history[0][0] == history[1][0] and history[0][-1] == history[1][-1]
    assert [one["step"] for one in history[0]] == [0, 2, 4]


def test_captions_that_vary_are_validated_whole_and_in_their_order(train: Train, others: dict[str, Any]) -> None:
    (folder,) = others["validation.folder"]
    for caption in Path(folder["path"]).glob("*.txt"):
        caption.write_text("blue, round, thing, {small|large}", encoding="utf-8")
    vary = {"shuffle_tags": True, "tag_dropout": 0.5, "wildcards": True}
    varied, _ = train(others | {"name": "varied", "validation.folder": [folder | vary], "validation.every": 2})
    for caption in Path(folder["path"]).glob("*.txt"):
        caption.write_text("blue, round, thing, small", encoding="utf-8")
    plain, _ = train(others | {"name": "plain", "validation.every": 2})
    assert validations(varied) == validations(plain)


def test_a_resumed_run_validates_as_one_that_was_not_interrupted(train: Train, others: dict[str, Any]) -> None:
    settings = others | {"validation.every": 1, "checkpoint.every": 1, "checkpoint.keep": 9}
    straight, _ = train(settings | {"name": "straight"})

    def stop(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            signal.raise_signal(signal.SIGINT)

    train(settings | {"name": "resumed"}, watchers=[stop])
    resumed, _ = train(settings | {"name": "resumed"}, resume=True)
    kept = [json.loads((run / "checkpoints" / "best.json").read_text()) for run in (straight, resumed)]
    assert [one["step"] for one in kept[0]["validations"]] == [0, 1, 2, 3, 4]
    assert kept[0] == kept[1], "that of step 2, given up when the run was stopped, is made up for"
    assert validations(straight) == validations(resumed)


def trained_on(run: Path, train: Train, settings: dict[str, Any], **more: Any) -> set[str]:
    """The names of the pictures whose losses a run computed in its steps."""
    seen: set[str] = set()
    original = Objective.__call__

    def watch(self: Objective, batch: Any, *rest: Any) -> torch.Tensor:
        seen.update(example.path.name for example in batch.examples)
        return original(self, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", watch)
        train(settings, **more)
    return seen


def test_held_out_pictures_are_never_trained_on_also_after_new_ones_came(
    train: Train, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(pictures, folder)
    settings = SHARE | {"data.folder": [{"path": str(folder)}], "steps": 8}
    before = trained_on(tmp_path, train, settings | {"name": "before"})
    apart = {path.name for path in folder.glob("*.png")} - before
    assert len(apart) >= 2 and len(before) >= 2
    assert apart == {path.name for path in folder.glob("*.png") if is_held_out(identity(path), 0.5, 0)}
    for index in range(8):
        Image.new("RGB", (64, 64), (3 * index, 90, 7)).save(folder / f"new-{index}.png")
        (folder / f"new-{index}.txt").write_text("another", encoding="utf-8")
    after = trained_on(tmp_path, train, settings | {"name": "after"})
    assert after > before
    assert not apart & after


def test_the_best_weights_are_those_of_the_lowest_loss(train: Train, others: dict[str, Any]) -> None:
    settings = others | {"validation.every": 1, "checkpoint.every": 1, "checkpoint.keep": 9, "optimizer.d0": 1e-2}
    run, text = train(settings | {"steps": 6})
    kept = json.loads((run / "checkpoints" / "best.json").read_text())
    found = [one for one in validations(run) if one["step"] > 0]
    assert kept["step"] == min(found, key=lambda one: one["loss"])["step"]
    assert kept["loss"] == min(one["loss"] for one in found)
    assert "held-out loss" in text and f"step {kept['step']}, held-out loss" in text
    from sdtrain.commands.files.export import export_run

    again = load_file(export_run(run, "sd-scripts", kept["step"], run / "again.safetensors").path)
    best = load_file(run / "weights" / "small-best.safetensors")
    last = load_file(run / "weights" / "small.safetensors")
    assert all(torch.equal(again[name], best[name]) for name in again)
    assert kept["step"] == 6 or any(not torch.equal(last[name], best[name]) for name in last)


def test_the_averaged_weights_are_validated_with_every_caption(
    train: Train, others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen, captions = HeldOut.losses, dict[str, torch.Tensor](), set[str]()

    def watch(
        self: HeldOut, objective: Objective, is_given_up: Callable[[], bool], **share: int
    ) -> dict[str, float] | None:
        parameters = dict(objective.model.networks["unet"].named_parameters())
        seen.update({name: value.detach().clone() for name, value in parameters.items() if "lora_" in name})
        captions.update(caption for batch in self._batches() for caption in batch.captions)
        return original(self, objective, is_given_up, **share)

    monkeypatch.setattr(HeldOut, "losses", watch)
    settings = {"method.alpha": 2.0, "export.names": "diffusers", "optimizer.d0": 1e-2, "data.caption_dropout": 0.9}
    run, _ = train(others | settings)
    saved = load_file(run / "weights" / "small.safetensors")
    trained = load_file(run / "checkpoints" / "step-000004" / "parameters.safetensors")
    names = {f"unet.{name.replace('.default', '')}": name for name in seen}
    assert set(names) == set(saved)
    assert all(torch.allclose(saved[key], seen[name], rtol=0, atol=1e-7) for key, name in names.items())
    assert any(not torch.equal(trained[f"unet/{name}"], seen[name]) for name in seen), "or this test shows nothing"
    assert captions == {"a blue thing 0", "a blue thing 1", "a blue thing 2"}


def test_training_ends_where_the_held_out_loss_no_longer_falls(
    train: Train, others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([1.0, 0.5, 0.5, 0.6, 0.7, 0.8])

    def say(self: HeldOut, *_: object, **__: object) -> dict[str, float]:
        loss = next(said)
        return {name: loss + 0.001 * index for index, name in enumerate(self.pictures)}

    monkeypatch.setattr(HeldOut, "losses", say)
    seen: list[Record] = []
    settings = others | {"validation.every": 1, "validation.patience": 2, "steps": 50, "checkpoint.every": 1}
    run, text = train(settings, watchers=[seen.append])
    assert [one["step"] for one in validations(run)] == [0, 1, 2, 3]
    assert [record.step for record in seen if isinstance(record, StepRecord)] == [1, 2, 3]
    assert [record.best_step for record in seen if isinstance(record, ValidationRecord)] == [None, 1, 1, 1]
    assert "training ends at step 3" in next(record.text for record in seen if isinstance(record, NoteRecord))
    assert (run / "weights" / "small.safetensors").exists(), "such a run is finished"
    assert "done: 3 steps" in text
    _, text = train(settings, resume=True)
    assert "done: 3 steps" in text, "and stays so"
    run, _ = train(settings | {"validation.patience": 0, "steps": 5}, resume=True)
    assert [one["step"] for one in validations(run)] == [0, 1, 2, 3, 4, 5]


def test_a_validation_is_given_up_when_the_run_is_stopped(train: Train, others: dict[str, Any]) -> None:
    run, _ = train(others | {"validation.every": 1})
    held_out = HeldOut(batches=_Batches(), identities={})  # type: ignore[arg-type]
    assert held_out.losses(None, lambda: True) is None  # type: ignore[arg-type]
    assert len(validations(run)) == 5


class _Batches:
    steps_per_epoch = 1.0

    def at(self, step: int) -> list[tuple[None, float]]:
        return [(None, 1.0)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"validation.share": 0.01}, "0.01 holds out 0 of 6 pictures"),
        ({"validation.share": 0.999}, "0.999 holds out 6 of 6 pictures"),
        ({"validation.patience": 2}, "no pictures are held out"),
        ({"validation.share": 0.5, "validation.patience": 2, "validation.every": 0}, "validation.every is 0"),
        ({"validation.share": 0.5, "validation.folder": [{"path": "."}]}, "choose one"),
        ({"validation.folder": [{"path": "nowhere"}]}, "no such folder: nowhere"),
    ],
)
def test_what_cannot_be_validated_is_refused(train: Train, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train(settings)


def test_a_picture_that_is_trained_on_cannot_be_validated_on(train: Train, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    shutil.copy(pictures / "0.png", folder / "other-name.png")
    Image.new("RGB", (64, 64)).save(folder / "own.png")
    settings = {"validation.folder": [{"path": str(folder), "missing_captions": "empty"}]}
    with pytest.raises(UserError, match=r"holds 1 pictures that are trained on too.*other-name\.png is .*0\.png"):
        train(settings)


# ---------------------------------------------------------------------- arithmetic


@given(st.floats(0.05, 0.95), st.integers(0, 2**40))
def test_about_that_share_is_held_out(share: float, seed: int) -> None:
    held = sum(is_held_out(f"picture {index}", share, seed) for index in range(2000))
    assert abs(held - 2000 * share) < 5 * math.sqrt(2000 * share * (1 - share))


@given(st.integers(0, 2**40), st.floats(0.0, 0.5), st.floats(0.0, 0.49))
def test_a_larger_share_holds_out_more_of_the_same(seed: int, share: float, more: float) -> None:
    for index in range(50):
        assert is_held_out(str(index), share, seed) <= is_held_out(str(index), share + more, seed)


def test_equal_files_have_one_identity_wherever_they_lie(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    for name, data in {"a": content, "b": content, "c": content[:-1], "d": b"x" + content[1:]}.items():
        (tmp_path / name).write_bytes(data)
    names = [identity(tmp_path / name) for name in "abcd"]
    assert names[0] == names[1] and len(set(names)) == 3


def test_stratified_timesteps_are_drawn_from_the_density_one_from_each_part() -> None:
    uniform = stratified_timesteps(10, torch.Generator().manual_seed(1), density="uniform", first=0, last=999)
    assert [int(timestep) // 100 for timestep in uniform] == list(range(10))
    narrow = stratified_timesteps(4, torch.Generator().manual_seed(1), density="uniform", first=100, last=103)
    assert narrow.tolist() == [100, 101, 102, 103]
    settings: dict[str, Any] = {
        "density": "logit_normal",
        "first": 0,
        "last": 999,
        "logit_mean": -0.5,
        "logit_std": 0.8,
    }
    drawn = draw_timesteps(200_000, torch.Generator().manual_seed(2), **settings).double()
    layered = stratified_timesteps(20_000, torch.Generator().manual_seed(3), **settings).double()
    assert abs(float(drawn.mean() - layered.mean())) < 5 * float(drawn.std()) / math.sqrt(200_000)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(drawn.quantile(quantiles), layered.quantile(quantiles), atol=3)


def validation(step: int, *losses: float) -> Validation:
    return Validation(step, {str(index): loss for index, loss in enumerate(losses)})


def test_the_standard_error_is_that_of_the_mean() -> None:
    one = validation(1, 1.0, 2.0, 3.0, 6.0)
    assert one.loss == 3.0
    assert one.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)


def test_losses_are_compared_picture_by_picture() -> None:
    before = validation(1, 1.0, 5.0, 9.0)
    assert is_better(validation(2, 0.98, 4.99, 8.97), before), "each picture gained, though pictures differ by far more"
    assert not is_better(validation(2, 0.5, 5.6, 8.8), before), "one gained, one lost"
    assert not is_better(before, before)
    assert not is_better(validation(2, math.nan, 0.0, 0.0), before)


def test_many_small_gains_count_together() -> None:
    history = History()
    for step, loss in enumerate([1.0, 0.99, 0.98, 0.97]):
        assert history.add(validation(step, loss, 1.0 + 0.02 * step)) == (step == 1) or step
    assert history.waited == 3
    history.add(validation(4, 0.5, 0.6))
    assert (history.waited, history.best and history.best.step) == (0, 4)


@given(
    st.lists(st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=3, max_size=3), max_size=6), st.integers(0, 7)
)
def test_what_is_kept_of_validations_is_what_is_read(rows: list[list[float]], step: int) -> None:
    history = History()
    for index, row in enumerate(rows):
        history.add(validation(index, *row))
    with tempfile.TemporaryDirectory() as folder:
        write_history(Path(folder), history)
        found = read_history(Path(folder), step, ["0", "1", "2"])
        others = read_history(Path(folder), step, ["0", "1", "3"])
    wanted = History([one for one in history.validations if one.step <= step])
    assert repr(found.validations) == repr(wanted.validations)
    assert not others.validations


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"pictures": ["0"], "validations": [{"step": "x"}]}', "[" * 9999, "\xff"]
)
def test_a_damaged_history_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "best.json").write_bytes(text.encode("latin-1"))
    assert read_history(tmp_path, 9, ["0"]).validations == []
