"""With a local model nothing asks for the network; what is in the hub cache is used; the rest is said in one line."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import UserError
from sdtrain.families.modelspec import Description
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.hub import fetch_if_missing, files_to_fetch, is_hub_id
from sdtrain.models.checkpoints.inspect import inspect_model, open_model
from sdtrain.models.checkpoints.locate import open_checkpoint
from sdtrain.models.checkpoints.single_file import write_single_file
from sdtrain.models.checkpoints.tokenizers import CLIP_REPOSITORY, SDXL_REPOSITORY, TokenizerSource, find_tokenizers

BUILTIN = "builtin:tiny-sdxl"
TINY = BUILTIN_FOLDER / "tiny-sdxl"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put_into_cache(cache: Path, repository: str, source: Path) -> Path:
    """A snapshot as a download would leave it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0123456789012345678901234567890123456789"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_local_models_are_checked_loaded_and_written_without_network(single_file: Path, tmp_path: Path) -> None:
    for config in (ModelConfig(path=BUILTIN), ModelConfig(path=str(single_file), components=str(TINY))):
        assert inspect_model(config)[1] == []
        read = load_components(open_model(config, "model"), torch.bfloat16)
        assert read.unet.dtype == read.networks["text_encoder_2"].dtype == torch.bfloat16
        assert read.vae.dtype == torch.float32
        description = Description(title="tiny", resolution_px=(128, 128))
        write_single_file(read, tmp_path / "out.safetensors", description)
        write_folder(read, tmp_path / "out", description)


def test_a_check_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys; from sdtrain.models.checkpoints.inspect import inspect_model, open_model;"
        "from sdtrain.config.schema import ModelConfig;"
        "assert not inspect_model(ModelConfig(path='builtin:tiny-sdxl'))[1];"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]" and out.stderr == ""


def test_what_reads_like_a_hub_id() -> None:
    assert is_hub_id("stabilityai/stable-diffusion-xl-base-1.0")
    assert not any(map(is_hub_id, ("model.safetensors", "models/a.safetensors", "/a/b", "a/b/c", "./a", BUILTIN)))


def test_a_cached_hub_model_is_used(cache: Path, tiny: Components) -> None:
    put_into_cache(cache, "someone/model", TINY)
    config = ModelConfig(path="someone/model")
    facts, problems = inspect_model(config)
    assert not problems and facts.prediction == "v_prediction"
    fetch_if_missing(config)
    read = load_components(open_model(config, "model"), torch.float32)
    assert torch.equal(read.unet.conv_in.weight, tiny.unet.conv_in.weight)


def test_components_from_the_hub_need_no_weights(cache: Path, single_file: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(single_file), components="someone/model")
    _, problems = inspect_model(config)
    assert "hf download someone/model" in problems[0].what and "safetensors" not in problems[0].what
    small = shutil.copytree(TINY, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    put_into_cache(cache, "someone/model", small)
    assert inspect_model(config)[1] == []


def test_a_hub_model_that_is_not_cached_says_what_to_fetch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    config = ModelConfig(path="someone/model", variant="fp16")
    facts, problems = inspect_model(config)
    assert facts is None and problems[0].where == "model.path"
    assert "hf download someone/model" in problems[0].what and "unet/*.fp16.safetensors" in problems[0].what
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="network is off"):
        fetch_if_missing(config)


def test_only_the_parts_of_a_repository_that_are_needed_are_fetched() -> None:
    from fnmatch import fnmatch

    wanted = files_to_fetch("fp16")

    def fetched(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in wanted)

    assert fetched("unet/diffusion_pytorch_model.fp16.safetensors") and fetched("tokenizer_2/vocab.json")
    assert fetched("text_encoder/model.fp16.safetensors") and fetched("scheduler/scheduler_config.json")
    assert not fetched("sd_xl_base_1.0.safetensors") and not fetched("unet/diffusion_pytorch_model.safetensors")
    assert not fetched("unet/diffusion_pytorch_model.fp16.bin") and not fetched("vae_decoder/model.onnx")


# ---- tokenizers of a single file ----


def test_tokenizers_come_from_the_cached_sdxl_repository(cache: Path, single_file: Path) -> None:
    folder = put_into_cache(cache, SDXL_REPOSITORY, TINY)
    sources = find_tokenizers(open_checkpoint(single_file, ""), None)
    assert sources == (TokenizerSource(folder / "tokenizer"), TokenizerSource(folder / "tokenizer_2"))
    assert inspect_model(ModelConfig(path=str(single_file)))[1] == []


def test_tokenizers_come_from_the_cached_clip_repository(cache: Path, single_file: Path) -> None:
    put_into_cache(cache, CLIP_REPOSITORY, TINY / "tokenizer")
    read = load_components(open_model(ModelConfig(path=str(single_file)), "model"), torch.float32)
    assert read.tokenizers[0].pad_token_id == read.tokenizers[0].eos_token_id
    assert read.tokenizers[1].pad_token_id == 0
    text = "a teal star on a red background"
    assert read.tokenizers[0].encode(text, add_special_tokens=False) == read.tokenizers[1].encode(
        text, add_special_tokens=False
    )


def test_without_any_tokenizer_the_error_says_what_to_fetch(cache: Path, single_file: Path) -> None:
    facts, problems = inspect_model(ModelConfig(path=str(single_file)))
    assert facts is None and [problem.where for problem in problems] == ["model.components"]
    assert "hf download openai/clip-vit-large-patch14 vocab.json merges.txt" in problems[0].what


def test_a_lone_tokenizer_folder_is_enough(single_file: Path) -> None:
    sources = find_tokenizers(open_checkpoint(single_file, ""), TINY / "tokenizer")
    assert sources == (TokenizerSource(TINY / "tokenizer"), TokenizerSource(TINY / "tokenizer", "!"))
