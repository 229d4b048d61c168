"""No caption is one thing: what dropout trains is what guidance moves away from, while training and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain.config.read import resolve
from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.components import load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.inspect import inspect_model, open_model
from sdtrain.models.checkpoints.single_file import write_single_file
from sdtrain.models.load import load_model
from sdtrain.models.model import Model
from sdtrain.training.start import as_it_began, keep_stored
from sdtrain.training.watching.preview import prepare_prompts
from tests.conftest import one_in

TINY = BUILTIN_FOLDER / "tiny-sdxl"
DESCRIPTION = Description(title="tiny", resolution_px=(128, 128), date="2026-01-01T00:00:00Z")
CPU = torch.device("cpu")
KINDS = ("folder that says zeros", "folder that says text", "folder that says nothing", "single file", "older family")
MEANT = {"folder that says zeros": "zeros"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of every kind."""
    from tests.models.test_second_family import small_sd

    root = tmp_path_factory.mktemp("models")
    made = {"single file": root / "tiny.safetensors", "older family": root / "sd"}
    words = {"folder that says zeros": True, "folder that says text": False, "folder that says nothing": None}
    for name, word in words.items():
        made[name] = shutil.copytree(TINY, root / name)
        set_word(made[name], word)
    save_without_own_words(made["single file"])
    write_folder(small_sd("sd1"), made["older family"], DESCRIPTION)
    return made


def set_word(folder: Path, word: bool | None) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("force_zeros_for_empty_prompt", None)
    (folder / "model_index.json").write_text(
        json.dumps(index | ({} if word is None else {"force_zeros_for_empty_prompt": word}))
    )


def save_without_own_words(path: Path) -> None:
    """A single file as other tools write it: nothing in its header says what no caption is."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    parts = load_components(open_model(ModelConfig(path=str(TINY)), "model"), torch.float32)
    write_single_file(parts, path, DESCRIPTION)
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sdtrain.no_caption"}
    save_file(load_file(path), path, metadata=metadata)


def config_of(path: Path, no_caption: str) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(path), "components": str(TINY), "no_caption": no_caption})


def load(config: ModelConfig) -> Model:
    return load_model(open_model(config, "model"), config, device=CPU, dtype=torch.float32)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def row(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index] for key, value in tensors.items()}


@pytest.mark.parametrize("setting", ["auto", "empty-text", "zeros"])
@pytest.mark.parametrize("kind", one_in(3, KINDS))
def test_dropped_captions_and_empty_negative_prompts_are_the_same_bits(
    paths: dict[str, Path], table: dict[str, Any], tmp_path: Path, kind: str, setting: str
) -> None:
    from rich.console import Console

    from sdtrain.data.examples import scan_folders
    from sdtrain.training.prepare import make_batches
    from sdtrain.training.run import open_run

    model_config = config_of(paths[kind], setting)
    model = load(model_config)
    table["model"] = model_config.model_dump()
    table["data"]["caption_dropout"] = 0.5
    config = resolve(table, "test")
    negative = row(prepare_prompts(model, config, trains_text=False).conditioning(model)[1], 0)

    examples, _ = scan_folders(config.data, decode=False)
    batches = make_batches(model, open_run(config), examples, Console(quiet=True))
    seen = [
        same(row(batch.text or {}, place), negative)
        for step in range(4)
        for batch, _ in batches.at(step)
        for place, caption in enumerate(batch.captions)
        if not caption
    ]
    assert seen and all(seen), "captions that are dropped"

    with torch.no_grad():
        together = model.encode_captions(["a red thing", "", "a thing", ""])
    assert same(row(together, 1), negative) and same(row(together, 3), negative), "as where the loop encodes captions"
    meant = MEANT.get(kind, "empty-text") if setting == "auto" else setting
    assert all(bool((value == 0).all()) for value in negative.values()) == (meant == "zeros")


def test_sample_guides_away_from_what_the_training_dropped_to(
    train: Callable[..., tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from sdtrain.commands.sample import sample_to_files
    from sdtrain.training.watching import preview

    seen: list[Mapping[str, Tensor]] = []
    drawn = preview.sample

    def watched(model: Model, positive: Any, negative: Any, *rest: Any) -> Tensor:
        seen.append(negative)
        return drawn(model, positive, negative, *rest)

    run, _ = train({"optimizer.d0": 1e-2, "data.caption_dropout": 0.5})
    monkeypatch.setattr(preview, "sample", watched)
    sample_to_files(run, ["a cat"], [0], tmp_path / "pictures", [], Console(quiet=True))
    with torch.no_grad():
        assert len(seen) == 1 and same(seen[0], load(config_of(TINY, "auto")).encode_captions([""]))


def test_no_caption_stays_differentiable_and_other_captions_are_untouched(paths: dict[str, Path]) -> None:
    for setting in ("zeros", "empty-text"):
        model = load(config_of(paths["single file"], setting))
        model.networks["text_encoder"].requires_grad_(True)
        encoded = model.encode_captions(["a red thing", ""])["prompt_embeds"]
        assert torch.equal(encoded[0], model.encode_captions(["a red thing"])["prompt_embeds"][0])
        encoded[1].sum().backward()
        weights = model.networks["text_encoder"].parameters()
        reached = sum(float(weight.grad.abs().sum()) for weight in weights if weight.grad is not None)
        assert (reached > 0) == (setting == "empty-text")


def test_another_meaning_of_no_caption_is_another_cache_entry(paths: dict[str, Path]) -> None:
    one, other = (load(config_of(TINY, setting)).fingerprints() for setting in ("zeros", "empty-text"))
    assert one[0] == other[0] and one[1] != other[1]


@pytest.mark.parametrize("word", ["empty-text", "zeros"])
def test_what_is_written_says_what_no_caption_was(tmp_path: Path, word: str) -> None:
    model = load(config_of(TINY, word))
    for layout, path in (("single-file", tmp_path / "one.safetensors"), ("folder", tmp_path / "one")):
        model.write_checkpoint(path, DESCRIPTION, layout=layout)  # type: ignore[arg-type]
        opened, problems = inspect_model(config_of(path, "auto"))
        assert opened and not problems and opened.no_caption == word, layout


def test_a_word_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    set_word(folder, "perhaps")  # type: ignore[arg-type]
    opened, problems = inspect_model(config_of(folder, "auto"))
    assert opened is None and "force_zeros_for_empty_prompt is 'perhaps'" in problems[0].what


def test_a_run_from_before_the_setting_goes_on_as_it_began(table: dict[str, Any]) -> None:
    older = resolve(table, "test").model_dump(mode="python")
    del older["model"]["no_caption"]
    assert "no_caption" not in as_it_began(older)["model"], "nothing was dropped, so nothing was trained on it"
    older["data"]["caption_dropout"] = 0.1
    assert as_it_began(older)["model"]["no_caption"] == "empty-text"
    assert keep_stored(table, older)["model"]["no_caption"] == "empty-text"
    chosen = {**table, "model": {**table["model"], "no_caption": "zeros"}}
    assert keep_stored(chosen, older)["model"]["no_caption"] == "zeros", "which the comparison of settings then refuses"
