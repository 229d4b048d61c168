"""`check` and `fit` tell the same of pictures and captions that are not what they seem, before anything is trained."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

LONG = "a red thing, " + "of many words, " * 30 + "with a RED UMBRELLA"


@pytest.fixture
def folder(tmp_path: Path, pictures: Path) -> Path:
    """The small pictures, one with a caption that is too long."""
    copied = shutil.copytree(pictures, tmp_path / "copied")
    (copied / "2.txt").write_text(LONG)
    return copied


def checked(table: dict[str, Any], path: Path, *overrides: str) -> str:
    from sdtrain.commands.check import check_config
    from sdtrain.config.from_python import make_config
    from sdtrain.config.write import config_to_toml

    path.write_text(config_to_toml(make_config(table)))
    text = io.StringIO()
    check_config(path, overrides, Console(file=text, width=200))
    return text.getvalue()


def test_check_tells_what_is_cut_and_the_setting_that_reads_it(
    table: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    table["data"]["folder"] = [{"path": str(folder)}]
    told = checked(table, tmp_path / "config.toml")
    (line,) = [line for line in told.splitlines() if "captions cut" in line]
    assert "1 of 6" in line and "(2.png)" in line and "not read" in line
    chunks = int(line.split("caption_chunks = ")[1].split()[0])
    assert chunks > 1
    assert "captions cut" not in checked(table, tmp_path / "config.toml", f"data.caption_chunks={chunks}")
    assert "captions cut" in checked(table, tmp_path / "config.toml", f"data.caption_chunks={chunks - 1}")


def test_check_tells_what_varies_and_what_it_takes(table: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    table["data"]["folder"] = [{"path": str(folder), "shuffle_tags": True}]
    line = next(line for line in checked(table, tmp_path / "a.toml").splitlines() if "captions that vary" in line)
    assert "1 of 6; 8 wordings are encoded ahead" in line and " MB in the cache" in line
    table["method"]["train"] = ["unet", "text_encoder"]
    line = next(line for line in checked(table, tmp_path / "a.toml").splitlines() if "captions that vary" in line)
    assert "each step words them anew" in line


def test_pictures_without_anything_odd_get_no_notes(table: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    (folder / "2.txt").write_text("short")
    table["data"] |= {
        "folder": [{"path": str(folder), "exclude": ["[45].*", "1.*", "2.*", "3.*"]}],
        "resolution_px": 64,
    }
    table["data"] |= {"batch_size": 1}
    told = checked(table, tmp_path / "config.toml")
    assert "worth a look" not in told and "epochs: 4 steps are 4.0" in told


def test_fit_tells_the_same_before_it_trains(train: Callable[..., tuple[Path, str]], folder: Path) -> None:
    told = train({"steps": 1, "data.folder": [{"path": str(folder)}]})[1]
    assert told.index("captions cut: 1 of 6") < told.index("sdtrain fit: small")
    assert "epochs" in told
