"""`sdtrain cache` encodes what a run needs, and removes nothing that a config uses or that is no entry."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError
from tests.conftest import merged

Write = Callable[..., Path]
SHARE = {"validation.share": 0.5, "validation.noise_levels": 1}


@pytest.fixture
def write(table: dict[str, Any], tmp_path: Path) -> Write:
    """Writes a config with changes; returns its file."""

    def write(name: str, changes: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(config_to_toml(resolve(merged(table, changes | {"name": name}), "test")))
        return path

    return write


def called(name: str, *arguments: Any, **options: Any) -> str:
    from sdtrain.commands.files import cache

    text = io.StringIO()
    getattr(cache, name)(*arguments, [], Console(file=text, width=300), **options)
    return text.getvalue()


def entries(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_encoded_ahead_is_all_that_a_run_needs(
    write: Write, train: Callable[..., tuple[Path, str]], tmp_path: Path
) -> None:
    changes = {"steps": 1, "data.caption_dropout": 0.5, **SHARE}
    told = called("fill_cache", [write("ahead", changes)], verify=False)
    filled = {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    assert f"used by the config: {len(filled)} files" in told and len(filled) >= 12
    train(changes | {"name": "run"})
    assert {path: path.stat().st_mtime_ns for path in entries(tmp_path)} == filled


def test_pruning_removes_what_no_config_uses_and_what_kills_left_and_nothing_else(write: Write, tmp_path: Path) -> None:
    one, other = write("one", SHARE), write("other", {"data.resolution_px": 128})
    gone = write("gone", {"data.resolution_px": 192})
    called("fill_cache", [one, other], verify=False)
    used = entries(tmp_path)
    called("fill_cache", [gone], verify=False)
    unused = entries(tmp_path) - used
    assert len(unused) == 6
    cache = tmp_path / "cache"
    entry = next(iter(used))
    left = [
        entry.with_name(f".{entry.name[:48]}.00000000-1-00000000.partial"),
        entry.with_name(f".{entry.stem}.4711.0123abcd.tmp"),
    ]
    mine = [cache / "notes.txt", cache / "latents" / "mine.safetensors", entry.with_name("mine.safetensors")]
    mine += [entry.parent / f"{'0' * 39}.safetensors", entry.with_name(".mine.00000000-1-00000000.partial")]
    wrong_folder = cache / "latents" / "zz" / entry.name
    wrong_folder.parent.mkdir()
    for path in (*left, *mine, wrong_folder):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 1e6,) * 2)
    link = entry.with_name(entry.parent.name + "0" * 38 + ".safetensors")
    link.symlink_to(mine[0])

    sizes = called("size_up", [one, other])
    assert f"used by the 2 configs: {len(used)} files" in sizes and "not used by the 2 configs: 6 files" in sizes
    assert "left by killed processes: 2 files" in sizes
    with pytest.raises(UserError, match=r"8 files, .* would be removed; add --yes"):
        called("prune_caches", [one, other], yes=False, ask=None)
    assert "nothing was removed" in called("prune_caches", [one, other], yes=False, ask=lambda _: False)
    assert all(path.exists() for path in (*unused, *left))

    assert "removed 8 files" in called("prune_caches", [one, other], yes=True, ask=None)
    assert not any(path.exists() for path in (*unused, *left))
    assert all(path.exists() for path in (*used, *mine, wrong_folder, link))
    assert "nothing to remove" in called("prune_caches", [one, other], yes=True, ask=None)


def test_a_cache_behind_a_link_loses_nothing_that_is_used(write: Write, tmp_path: Path) -> None:
    real = tmp_path / "real"
    for kind in ("latents", "captions"):
        (real / kind).mkdir(parents=True)
    cache = tmp_path / "cache"
    cache.mkdir()
    for kind in ("latents", "captions"):
        (cache / kind).symlink_to(real / kind)
    (tmp_path / "linked").symlink_to(cache)
    configs = [write("one", {"data.cache": str(tmp_path / "linked")}), write("two", {"data.resolution_px": 128})]
    called("fill_cache", configs, verify=False)
    filled = set(real.rglob("*.safetensors"))
    assert len(filled) == 18
    assert "nothing to remove" in called("prune_caches", configs, yes=True, ask=None)
    assert set(real.rglob("*.safetensors")) == filled


def test_other_runs_that_share_the_cache_are_named_before_anything_is_removed(
    write: Write, train: Callable[..., tuple[Path, str]]
) -> None:
    run, _ = train({"steps": 1, "name": "elsewhere"})
    told = called("prune_caches", [write("one", {})], yes=True, ask=None)
    assert f"other runs with this cache: {run}/config.toml" in told
