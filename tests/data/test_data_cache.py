"""Laws of the cache: entries are whole, never stale, and damage is noticed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdtrain.data import cache as store
from sdtrain.data.buckets import place
from sdtrain.errors import UserError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


def entry(tmp_path: Path, caption: str = "a") -> Path:
    return store.caption_path(tmp_path, caption, "text")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "transposed": torch.arange(12).reshape(3, 4).to(dtype).T,
        "number": torch.ones((), dtype=dtype),
        "nothing": torch.zeros((0, 3), dtype=dtype),
    }
    store.write(entry(tmp_path), tensors)
    read = store.read(entry(tmp_path))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())


def test_any_flipped_byte_and_any_cut_is_noticed(tmp_path: Path) -> None:
    path = entry(tmp_path)
    store.write(path, {"latents": torch.arange(6, dtype=torch.float32)})
    content = path.read_bytes()
    for place_ in range(len(content)):
        path.write_bytes(content[:place_] + bytes([content[place_] ^ 0x11]) + content[place_ + 1 :])
        tensors = store.read(path) if store.is_whole(path, thorough=True) else None
        assert tensors is None or torch.equal(tensors["latents"], torch.arange(6, dtype=torch.float32))
        path.write_bytes(content[:place_])
        assert not store.is_whole(path, thorough=True)
        assert not store.is_whole(path, thorough=False)
    assert not store.is_whole(tmp_path / "absent", thorough=False)


def test_a_file_that_another_program_wrote_is_not_an_entry(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"latents": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(store.DamagedError, match="checksum"):
        store.read(tmp_path / "a.safetensors")


def test_many_writers_of_one_entry_leave_one_whole_file_and_nothing_else(tmp_path: Path) -> None:
    def write(_: int) -> None:
        store.write(entry(tmp_path), {"a": torch.arange(1000)})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(40)))
    assert [path.name for path in entry(tmp_path).parent.iterdir()] == [entry(tmp_path).name]
    assert store.is_whole(entry(tmp_path), thorough=True)


def test_a_failed_write_leaves_the_old_entry_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(entry(tmp_path), {"a": torch.zeros(3)})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*data\.cache"):
        store.write(entry(tmp_path), {"a": torch.ones(3)})
    assert torch.equal(store.read(entry(tmp_path))["a"], torch.zeros(3))
    assert len(list(entry(tmp_path).parent.iterdir())) == 1


def test_a_write_that_is_interrupted_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(entry(tmp_path), {"a": torch.zeros(3)})

    def interrupt(_: Path, __: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write(entry(tmp_path), {"a": torch.ones(3)})
    assert torch.equal(store.read(entry(tmp_path))["a"], torch.zeros(3))
    assert len(list(entry(tmp_path).parent.iterdir())) == 1


@given(st.text(), st.text(), st.text(), st.text())
def test_different_captions_or_encoders_are_different_entries(a: str, b: str, c: str, d: str) -> None:
    cache = Path("cache")
    assert (store.caption_path(cache, a, b) == store.caption_path(cache, c, d)) == ((a, b) == (c, d))


def test_everything_that_latents_follow_from_is_in_their_name(tmp_path: Path) -> None:
    square = place(100, 100, [(64, 64)])
    names = {
        store.latents_path(tmp_path, b"1", square, "vae"),
        store.latents_path(tmp_path, b"2", square, "vae"),
        store.latents_path(tmp_path, b"1", place(100, 101, [(64, 64)]), "vae"),
        store.latents_path(tmp_path, b"1", place(100, 100, [(32, 32)]), "vae"),
        store.latents_path(tmp_path, b"1", square, "another"),
    }
    assert len(names) == 5
    assert store.latents_path(tmp_path, b"1", place(100, 100, [(64, 64)]), "vae") in names


def test_entries_of_earlier_versions_are_found_again() -> None:
    """These names may only change together with a version that is part of them: a change would encode all anew."""
    cache, placement = Path("cache"), place(100, 141, [(64, 96)])
    flipped = replace(placement, flipped=True)
    names = [
        store.caption_path(cache, "a photo, é", "text encoders"),
        store.latents_path(cache, b"digest", placement, "vae"),
        store.latents_path(cache, b"digest", flipped, "vae"),
        store.mask_path(cache, b"digest", placement, is_alpha=True),
        store.mask_path(cache, b"digest", placement, is_alpha=False),
    ]
    assert [path.relative_to(cache).as_posix() for path in names] == [
        "captions/d7/d7ed33d16ed48d2b049de8735138850398f5954b.safetensors",
        "latents/58/580c886abf0f99dde3189068e65d0ee55e3503f4.safetensors",
        "latents/c2/c234c84338e9ddd9ac3bd1b2c1b395a8aba4602f.safetensors",
        "masks/11/1106431b40e58615e58856b138c514a9a723810d.safetensors",
        "masks/27/27ea8637312c0b0ead9435d2f6263073f1b20894.safetensors",
    ]


def test_held_and_read_entries_are_equal_and_the_budget_decides(tmp_path: Path) -> None:
    tensors: dict[Path, dict[str, Tensor]] = {
        entry(tmp_path, caption): {"a": torch.full((5,), float(ord(caption)))} for caption in "abc"
    }
    for path, named in tensors.items():
        store.write(path, named)
    exactly = store.num_bytes(tensors)
    held, read = store.hold([*tensors, *tensors], exactly), store.hold(tensors, exactly - 1)
    assert len(held.held) == 3 and len(read.held) == 0
    assert all(torch.equal(held.get(path)["a"], read.get(path)["a"]) for path in tensors)
