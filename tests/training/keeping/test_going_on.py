"""What a run that goes on refuses and allows, and that what it allows does not corrupt it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from sdtrain.data.batches import Batch
from sdtrain.errors import UserError
from sdtrain.training.computing.objective import Objective
from tests.conftest import one_in

Fit = Callable[..., tuple[Path, str]]
BUILTIN = Path(__file__).parents[3] / "sdtrain" / "builtin" / "tiny-sdxl"


def bits(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if '"groups"' in line]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.batch_size=4", "2 x 1 when this run began, is 4 x 1 now; a step must keep its 2 pictures"),
        ("data.gradient_accumulation=2", "2 x 1 when this run began, is 2 x 2 now; a step must keep its 2 pictures"),
        ("method.rank=4", "was 2 when this run began, is 4 now"),
        ("steps=1", "1, but 2 are done"),
        ("data.folder[0].repeats=2", "was 1 when this run began, is 2 now; add --accept-data"),
    ],
)
def test_what_could_corrupt_is_refused_with_both_values_before_the_model_is_loaded(
    fit: Fit, saved_run: Path, no_model: None, override: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        fit({"steps": 2}, [override], resume=True)
    assert told in caught.value.text()


@pytest.fixture
def saved_run(fit: Fit) -> Path:
    """A run with a state of step 2."""
    return fit({"steps": 2})[0]


def test_memory_precision_d_coef_and_the_split_may_change_and_more_steps_are_added(fit: Fit) -> None:
    run, _ = fit({"steps": 2, "data.batch_size": 4, "method": {"kind": "full"}, "optimizer.d0": 1e-6})
    changes = [
        "steps=+1",
        "memory.gradient_checkpointing=true",
        "model.dtype=bfloat16",
        "optimizer.d_coef=0.5",
        "data.batch_size=2",
        "data.gradient_accumulation=2",
        "preview.prompts=['another']",
        "checkpoint.keep_every=3",
    ]
    text = {"steps": 2, "data.batch_size": 4, "method": {"kind": "full"}, "optimizer.d0": 1e-6}
    fit(text, changes, resume=True)
    assert steps_of(run) == [1, 2, 3]
    more = ["steps=+2", "data.batch_size=1", "data.gradient_accumulation=4"]
    fit(path=run / "config.toml", overrides=more, resume=True)
    assert steps_of(run) == [1, 2, 3, 4, 5], "so many more than the run planned, not than are done"


@pytest.mark.slow
def test_a_split_on_resume_is_the_run_that_was_not_split_up_to_rounding(fit: Fit) -> None:
    whole, _ = fit({"name": "whole", "steps": 5, "data.batch_size": 4})
    parts, _ = fit({"name": "parts", "steps": 2, "data.batch_size": 4})
    fit(
        {"name": "parts", "steps": 2, "data.batch_size": 4},
        ["steps=+3", "data.batch_size=1", "data.gradient_accumulation=4"],
        resume=True,
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    assert losses(parts)[2] == pytest.approx(losses(whole)[2], rel=1e-5)
    fit(path=parts / "config.toml", overrides=["steps=+1"], resume=True)
    index = json.loads((parts / "checkpoints" / "step-000006" / "state.json").read_text())
    assert (index["batch_size"], index["accumulation"]) == (4, 1), "the plan is that of the beginning"


def test_more_steps_without_a_run_that_goes_on_are_refused(fit: Fit, no_model: None) -> None:
    with pytest.raises(UserError, match=r"\+500 adds to the steps of a run that goes on: add --resume"):
        fit({}, ["steps=+500"])


# ---------------------------------------------------------------- pictures and the model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that were trained on, in their order."""
    names: list[str] = []
    original = Objective.__call__

    def watched(self: Objective, batch: Batch, generator: Any) -> Any:
        names.extend(example.path.name for example in batch.examples)
        return original(self, batch, generator)

    monkeypatch.setattr(Objective, "__call__", watched)
    return names


def test_renamed_pictures_are_the_same_pictures_bit_for_bit(fit: Fit, own_pictures: Path) -> None:
    straight, _ = fit({"name": "straight", "steps": 5})
    resumed, _ = fit({"name": "resumed", "steps": 2})
    for suffix in (".png", ".txt"):
        (own_pictures / f"0{suffix}").rename(own_pictures / f"zz{suffix}")
        (own_pictures / f"4{suffix}").rename(own_pictures / f"00{suffix}")
    fit({"name": "resumed", "steps": 5}, resume=True)
    assert bits(straight, 5) == bits(resumed, 5)


@pytest.mark.slow
def test_pictures_that_joined_another_bucket_stay_in_it_when_they_are_renamed(
    fit: Fit, own_pictures: Path, seen: list[str]
) -> None:
    """Which of two that fit alike joins the other follows from their numbers, and those from the state, not the names.

    Whoever numbers them anew puts other pictures into one batch.
    """
    for number, size in enumerate([(160, 224), (224, 160), *4 * [(384, 96)]]):  # the first two are alone
        Image.new("RGB", size, (30 * number, 200, 0)).save(own_pictures / f"{number}.png")
    merging = {"data.ragged": "merge", "data.resolution_px": 192, "data.max_aspect": 4.0}
    straight, _ = fit({"name": "straight", "steps": 6, **merging})
    assert len(seen) == 12, "no picture is alone"
    fit({"name": "resumed", "steps": 2, **merging})
    for suffix in (".png", ".txt"):
        for name in ("0", "2", "4"):
            (own_pictures / f"{name}{suffix}").rename(own_pictures / f"z{name}{suffix}")
    resumed, _ = fit({"name": "resumed", "steps": 6, **merging}, resume=True)
    assert bits(straight, 6) == bits(resumed, 6)


def change(folder: Path) -> None:
    """One picture goes, one comes, one is painted over, one caption is another."""
    for suffix in (".png", ".txt"):
        (folder / f"0{suffix}").unlink()
    shutil.copy(folder / "1.png", folder / "new.png")
    Image.new("RGB", (64, 64), "white").save(folder / "new.png")
    (folder / "new.txt").write_text("white")
    Image.new("RGB", (96, 64), "black").save(folder / "1.png")
    (folder / "2.txt").write_text("another caption")


def test_changed_pictures_are_told_in_one_line_and_refused(
    fit: Fit, own_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = fit({"steps": 2})
    change(own_pictures)
    with monkeypatch.context() as patched:
        patched.setattr("sdtrain.training.fit.load", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(UserError) as caught:
            fit({"steps": 4}, resume=True)
    (problem,) = caught.value.problems
    told = "since step 2, pictures: 1 added (R/new.png), 1 removed (R/0.png), 2 changed (R/1.png, R/2.png); undo it, or"
    assert problem.what.replace(str(own_pictures), "R").startswith(told)
    assert steps_of(run) == [1, 2]


def test_accepted_pictures_are_neither_lost_nor_doubled_in_the_epoch_that_was_begun(
    fit: Fit, own_pictures: Path, seen: list[str]
) -> None:
    run, _ = fit({"steps": 2, "data.batch_size": 1})
    assert len(seen) == 2
    change(own_pictures)
    _, text = fit({"steps": 6, "data.batch_size": 1}, resume=True, accept_data=True)
    assert "1 added" in text and "are still to be seen in the epoch that was begun" in text
    still_there = {"1.png", "2.png", "3.png", "4.png", "5.png", "new.png"}
    left = 6 - len(still_there.intersection(seen[:2]))
    epoch = Counter(seen[: 2 + left])
    assert all(epoch[name] == 1 for name in still_there)
    again = seen[2:].copy()
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    seen.clear()
    fit({"name": "straight", "steps": 6, "data.batch_size": 1})
    assert again != seen[2:], "or the pictures had not changed"


def test_a_run_with_accepted_pictures_goes_on_bit_for_bit(fit: Fit, own_pictures: Path) -> None:
    for name in ("straight", "resumed"):
        fit({"name": name, "steps": 2})
    change(own_pictures)
    straight, _ = fit({"name": "straight", "steps": 8}, resume=True, accept_data=True)
    fit({"name": "resumed", "steps": 3}, resume=True, accept_data=True)
    fit({"name": "resumed", "steps": 5}, resume=True)
    resumed, _ = fit({"name": "resumed", "steps": 8}, resume=True)
    assert bits(straight, 8) == bits(resumed, 8)
    assert losses(straight) == losses(resumed)


def test_another_model_at_the_same_path_is_refused_and_one_with_another_title_is_not(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(BUILTIN, tmp_path / "model"))
    fit({"steps": 1, "model.path": str(model)})
    weights = next((model / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr("sdtrain.training.fit.load", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(UserError, match=r"model.path  holds other weights than this run trained on"):
            fit({"steps": 2, "model.path": str(model)}, resume=True)
    content[-1] ^= 1
    weights.write_bytes(content)
    tensors = load_file(weights)
    from safetensors.torch import save_file

    save_file(tensors, weights, metadata={"title": "the same weights"})
    fit({"steps": 2, "model.path": str(model)}, resume=True)


# ---------------------------------------------------------------- states and settings on disk


def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before_bit_for_bit(fit: Fit) -> None:
    straight, _ = fit({"name": "straight", "steps": 4})
    run, _ = fit({"steps": 3, "checkpoint.every": 1})
    damaged = run / "checkpoints" / "step-000003" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    _, text = fit({"steps": 4}, resume=True)
    assert "step-000003 is passed over: it is damaged (optimizer.safetensors has 1,000 bytes where" in text
    assert "going on from step 2 instead" in text
    assert bits(run, 4) == bits(straight, 4)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_a_state_of_before_goes_on_and_is_said_to_be_unchecked(fit: Fit) -> None:
    straight, _ = fit({"name": "straight", "steps": 3})
    run, _ = fit({"steps": 2})
    state = run / "checkpoints" / "step-000002"
    for name in ("config.toml", "pictures.json"):
        (state / name).unlink()
    (state / "state.json").write_text('{"version": 1, "step": 2}')
    with pytest.raises(UserError, match="must stay 2 until this run has saved a state in this version"):
        fit({"steps": 3}, ["data.batch_size=1", "data.gradient_accumulation=2"], resume=True)
    _, text = fit({"steps": 3}, resume=True)
    assert "step 2 was saved by an older version: not checked" in text
    assert bits(run, 3) == bits(straight, 3)


@pytest.mark.parametrize("how", one_in(2, ["removed", "truncated", "cut between two tables", "emptied"]))
def test_a_run_whose_settings_are_gone_goes_on_with_the_copy_in_its_state(fit: Fit, how: str) -> None:
    run, _ = fit({"steps": 2})
    own = run / "config.toml"
    content = own.read_text()
    match how:
        case "removed":
            own.unlink()
        case "truncated":
            own.write_text(content[:-3])
        case "cut between two tables":
            own.write_text(content[: content.index("[optimizer]")])
        case _:
            own.write_text("")
    if how == "removed":
        with pytest.raises(UserError, match=r"states of an earlier run, whose config.toml is gone; move its"):
            fit({"steps": 2, "seed": 7})
    with pytest.raises(UserError, match="seed  was 0 when this run began, is 7 now"):
        fit({"steps": 3, "seed": 7}, resume=True)
    _, text = fit(path=own, overrides=["steps=+1"], resume=True)
    assert "is gone or damaged: reading its copy" in text
    assert steps_of(run) == [1, 2, 3]
    assert own.read_text().replace("steps = 3", "steps = 2") == content


def test_a_disk_that_is_too_small_for_the_run_is_told_in_one_sentence_before_the_first_step(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil as disk

    fit({"name": "first", "steps": 1})  # the cache is there
    usage = disk.disk_usage(tmp_path)
    monkeypatch.setattr(disk, "disk_usage", lambda _: usage._replace(free=300_000))
    with pytest.raises(UserError) as caught:
        fit({"name": "second", "steps": 1, "checkpoint.keep": 5})
    text = caught.value.text()
    assert "output  this run needs " in text and " for 6 training states, " in text and " and 0.3 MiB are free;" in text
    assert not (tmp_path / "runs" / "second").exists()
    with pytest.raises(UserError, match=r"data.cache  this run needs .* latents of 6 pictures, .* for captions"):
        fit({"name": "third", "steps": 1, "data.cache": str(tmp_path / "another")})


# ---------------------------------------------------------------- warm starts


def test_a_cold_start_decodes_each_picture_once_and_a_warm_one_reads_none_but_to_verify(
    fit: Fit, own_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.data import encoding
    from sdtrain.data.identity import digests
    from sdtrain.files import remembered

    read: Counter[str] = Counter()

    def counted(what: str, module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(path: Path) -> Any:
            read[what] += 1
            return original(path)

        monkeypatch.setattr(module, name, call)

    counted("hashed", digests, "_digest")
    counted("decoded", encoding, "read_whole")
    monkeypatch.setattr(remembered, "SETTLED_S", -1.0)
    short = {"steps": 1, "validation.share": 0.5, "validation.noise_levels": 1}  # held-out pictures count as well
    cold, _ = fit(short | {"name": "cold"})
    assert read == {"hashed": 6, "decoded": 6}
    warm, _ = fit(short | {"name": "warm"})
    assert read == {"hashed": 6, "decoded": 6}
    verified, text = fit(short | {"name": "verified"}, verify_cache=True)
    assert read == {"hashed": 12, "decoded": 6} and "changed though" not in text
    assert bits(cold, 1) == bits(warm, 1) == bits(verified, 1)
