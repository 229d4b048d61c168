"""What is written is there whole or not at all, whoever writes it and whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from optim import ProdigyPlusScheduleFree
from sdtrain.adapters.formats.lora_file import write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import LoraWeights
from sdtrain.config.schema import CheckpointConfig, ModelConfig
from sdtrain.data import cache as store
from sdtrain.data.order import Plan
from sdtrain.errors import UserError
from sdtrain.families.modelspec import Description
from sdtrain.files import temporary, tensors
from sdtrain.files.temporary import NAME, temporary_name
from sdtrain.files.tensors import planned, write_safetensors
from sdtrain.files.writer import atomic_folder, remove_folder, write_bytes, write_json, write_text
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.inspect import open_model
from sdtrain.models.checkpoints.single_file import write_single_file
from sdtrain.training.keeping.manifest import saved_states
from sdtrain.training.keeping.states import Background, numbers_of, save_state
from sdtrain.training.parameters import Group, Trainable
from sdtrain.training.watching.grid import save_picture
from sdtrain.training.watching.log import _drop_records_after

MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@dataclass(frozen=True)
class Writer:
    """One kind of file that the program writes: where, and with a content that differs by a number from 0 on."""

    name: str
    write: Callable[[Path, int], object]
    is_folder: bool = False


@pytest.fixture(scope="session")
def tiny() -> Components:
    return load_components(open_model(ModelConfig(path="builtin:tiny-sdxl"), "model"), torch.float32)


def is_temporary(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None


def description(number: int) -> Description:
    return Description(title=f"number {number}", resolution_px=(128, 128), date="2026-01-01T00:00:00Z")


def write_a_lora(tiny: Components, path: Path, number: int) -> None:
    width = tiny.unet.get_submodule(MODULE).weight.shape
    lora = LoraWeights(torch.full((2, width[1]), number + 1.0), torch.ones(width[0], 2), 2.0)
    facts = FileFacts(title="lora", date="2026-01-01T00:00:00Z")
    write_lora(path, {"unet": {MODULE: lora}}, {"unet": tiny.unet}, names="sd-scripts", facts=facts)


def write_a_state(path: Path, number: int) -> None:
    """A state of step 1 lies where `path` says only when it is called step-000001."""
    parameter = nn.Parameter(torch.full((64,), float(number)))
    optimizer = ProdigyPlusScheduleFree([{"params": [parameter], "name": "unet"}])
    trainable = Trainable((Group("unet", {"a": parameter}, 1.0, 0.0, 0),))
    background = Background("", "", Plan(1, 1), "")
    numbers = numbers_of(trainable, optimizer)
    save_state(path.parent, 1, numbers, background, CheckpointConfig(keep=9))


def write_a_log(path: Path, number: int) -> None:
    """Before the first call there is no log; a resumed run finds one and drops its end."""
    if not path.exists():
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(99)))
    _drop_records_after(path, 98 - number)


WRITERS = [
    Writer("text", lambda path, number: write_text(path, f"{number} {'grün ' * 99}")),
    Writer("json", lambda path, number: write_json(path, {"number": number, "text": "x" * 999})),
    Writer("bytes", lambda path, number: write_bytes(path, bytes([number]) * 9999)),
    Writer("picture", lambda path, number: save_picture(Image.effect_noise((64, 64), 50.0 + number), path)),
    Writer("log", write_a_log),
    Writer("tensors", lambda path, number: write_safetensors(path, planned({"a": torch.full((999,), number)}), {})),
    Writer("cache", lambda path, number: store.write(path, {"a": torch.full((999,), number)})),
    Writer("state", write_a_state, is_folder=True),
]
MODELS = ["lora", "single file", "folder"]
NAMES = [*(writer.name for writer in WRITERS), *MODELS]


@pytest.fixture(params=NAMES)
def writer(request: pytest.FixtureRequest) -> Writer:
    name: str = request.param
    if name not in MODELS:
        return next(writer for writer in WRITERS if writer.name == name)
    tiny: Components = request.getfixturevalue("tiny")
    match name:
        case "lora":
            return Writer(name, lambda path, number: write_a_lora(tiny, path, number))
        case "single file":
            return Writer(name, lambda path, number: write_single_file(tiny, path, description(number)))
        case _:
            return Writer(name, lambda path, number: write_folder(tiny, path, description(number)), is_folder=True)


@pytest.fixture
def target(writer: Writer, tmp_path: Path) -> Path:
    """Where it is written; two folders deep, because an entry of the cache names the folder above them."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    return folder / ("step-000001" if writer.name == "state" else "target")


def content(path: Path) -> dict[str, bytes]:
    """Every file at and below a path."""
    return {
        str(file.relative_to(path.parent)): file.read_bytes() for file in (path, *path.rglob("*")) if file.is_file()
    }


def everything(target: Path) -> dict[str, bytes]:
    return content(target.parent)


# ---- whole or not at all


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """The system refuses to make any file longer, in the middle of writing it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["before the rename", "in the rename"])
def moment(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("older", [True, False], ids=["replacing", "new"])
def test_a_crash_leaves_what_was_there_and_nothing_else(
    writer: Writer, target: Path, monkeypatch: pytest.MonkeyPatch, moment: str, *, older: bool
) -> None:
    if older or writer.name == "log":
        writer.write(target, 0)
    before = everything(target)
    if moment == "in the rename":
        monkeypatch.setattr(Path, "replace", stopped)
        monkeypatch.setattr(Path, "rename", stopped)
    else:
        monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        writer.write(target, 1)
    monkeypatch.undo()
    assert everything(target) == before
    assert [path.name for path in target.parent.iterdir() if is_temporary(path)] == []
    writer.write(target, 1)
    assert everything(target) != before


@pytest.mark.parametrize("how", ["before the first byte", "in the middle", "at the end"])
def test_a_full_disk_is_told_and_changes_nothing(
    writer: Writer, target: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    writer.write(target, 0)
    before = everything(target)
    with pytest.raises(UserError) as caught:
        match how:
            case "before the first byte":
                if writer.name == "picture":
                    pytest.skip("how large a picture becomes is known when it is written")
                monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
                monkeypatch.setattr(Path, "open", stopped_when_writing)
                writer.write(target, 1)
            case "in the middle":
                with small_disk(64):
                    writer.write(target, 1)
            case _:
                monkeypatch.setattr(os, "fsync", full)
                writer.write(target, 1)
    monkeypatch.undo()
    (problem,) = caught.value.problems
    if how != "in the middle":
        assert "No space left on device" in problem.what or "are needed and 0 bytes free" in problem.what
        assert "make room" in problem.what or "free some space" in problem.what
    assert "another folder" in problem.what
    assert everything(target) == before


open_path = Path.open


def stopped_when_writing(path: Path, mode: str = "r", *more: object, **settings: object) -> object:
    assert "r" in mode, "no file is made where there is no room for it"
    return open_path(path, mode, *more, **settings)  # type: ignore[call-overload]


def fork() -> int:
    """Fork as `os.fork` does; a child that hangs, for threads do not come along, is ended and fails its test."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
    return child


def test_a_kill_leaves_the_old_and_the_next_writer_cleans_up(writer: Writer, target: Path) -> None:
    writer.write(target, 0)
    before = content(target)
    child = fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        writer.write(target, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert content(target) == before
    left = [path.name for path in target.parent.iterdir() if path != target]
    assert len(left) == 1 and is_temporary(target.with_name(left[0]))
    writer.write(target, 1)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert content(target) != before


# ---- on the disk when the call returns


def test_content_is_flushed_before_it_has_its_name_and_the_name_after(
    writer: Writer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if writer.name == "log":
        writer.write(target, 0)
    done: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def flushed(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append(("folder" if is_folder else "file", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def moved(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def note(path: Path, to: Path) -> Path:
            done.append(("named", str(to)))
            return move(path, to)

        return note

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", moved(replace))
    monkeypatch.setattr(Path, "rename", moved(rename))
    writer.write(target, 1)
    monkeypatch.undo()
    last = done.index(("named", str(target)))
    assert ("folder", str(target.parent)) in done[last + 1 :], "the name is not flushed after it was given"
    flushed_before = [Path(name) for what, name in done[:last] if what == "file"]
    num_files = len([path for path in (target, *target.rglob("*")) if path.is_file()])
    assert len(flushed_before) >= num_files, "a file is not flushed before it has its name"
    if writer.is_folder:
        folders = [Path(name) for what, name in done[:last] if what == "folder"]
        partial = next(path for path in folders if is_temporary(path) and path.parent == target.parent)
        inner = {path.relative_to(target): path.is_dir() for path in target.rglob("*")}
        for path, is_dir in inner.items():
            assert partial / path in (folders if is_dir else flushed_before), f"{path} is not flushed"
    else:
        assert all(is_temporary(path) and path.parent == target.parent for path in flushed_before)


# ---- only what is meant is replaced


def wrong_target(kind: str, target: Path, *, is_folder: bool) -> None:
    match kind:
        case "the other kind":
            if is_folder:
                target.write_bytes(b"mine")
            else:
                target.mkdir()
        case "a pipe":
            os.mkfifo(target)
        case "a device":
            try:
                os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("devices are made by the administrator")
        case _:
            os.mkfifo(target.with_name("pipe"))
            target.symlink_to("pipe")


@pytest.mark.parametrize("kind", ["the other kind", "a pipe", "a device", "a link to a pipe"])
def test_nothing_but_what_is_meant_is_replaced(writer: Writer, target: Path, kind: str) -> None:
    if writer.name == "log":
        pytest.skip("it is read before it is written")
    wrong_target(kind, target, is_folder=writer.is_folder)
    before = {path.name: path.lstat().st_mode for path in target.parent.iterdir()}
    with pytest.raises(UserError, match=r"which .*replace|is there already"):
        writer.write(target, 1)
    assert {path.name: path.lstat().st_mode for path in target.parent.iterdir()} == before


def test_a_link_stays_and_what_it_means_is_written(writer: Writer, target: Path) -> None:
    meant = target.parent.parent / "elsewhere"
    if writer.name == "log":
        writer.write(meant, 0)
    target.symlink_to("../elsewhere")
    for number in (0, 1):  # what it means is not there yet, then it is
        writer.write(target, number)
        assert target.is_symlink() and not meant.is_symlink()
        assert meant.is_dir() == writer.is_folder
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]
    assert sorted(path.name for path in meant.parent.iterdir()) == ["b", "elsewhere"]


def test_a_folder_that_is_a_file_is_told(writer: Writer, target: Path) -> None:
    if writer.name == "log":
        pytest.skip("there is none to shorten")
    (target.parent / "letter").write_text("dear")
    path = target.parent / "letter" / target.name
    with pytest.raises(UserError, match=r"another folder|no permission"):
        writer.write(path, 1)
    assert (target.parent / "letter").read_text() == "dear"


# ---- what was left over


def leave(folder: Path, name: str, *, age_s: float = 0.0, is_folder: bool = False) -> Path:
    path = folder / name
    inner = path / "inner" if is_folder else path
    inner.parent.mkdir(exist_ok=True)
    inner.write_bytes(b"half")
    for each in (inner, path):
        os.utime(each, (time.time() - age_s,) * 2)
    return path


def test_only_what_nobody_will_finish_is_removed(tmp_path: Path) -> None:
    mine = temporary_name(tmp_path / "model", "partial").name
    machine = mine.split(".")[2].split("-")[0]
    ended = fork()
    if ended == 0:
        os._exit(0)
    os.waitpid(ended, 0)
    gone = [
        leave(tmp_path, f".a.{machine}-{ended}-00000000.partial"),
        leave(tmp_path, f".b.{machine}-{ended}-00000000.partial", is_folder=True),
        leave(tmp_path, f".c.{machine}-{os.getpid()}-00000000.partial", age_s=25 * 3600),
        leave(tmp_path, ".d.00000000-1-00000000.partial", age_s=3700, is_folder=True),
    ]
    kept = [
        leave(tmp_path, mine),
        leave(tmp_path, f".e.{machine}-{os.getppid()}-00000000.partial", age_s=3700),
        leave(tmp_path, ".f.00000000-1-00000000.partial", age_s=3500),
        leave(tmp_path, ".g.partial", age_s=10**6),
        leave(tmp_path, f"h.{machine}-{ended}-00000000.partial", age_s=10**6),
    ]
    write_text(tmp_path / "new", "x")
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)


def test_a_folder_in_use_elsewhere_is_as_young_as_its_youngest_file(tmp_path: Path) -> None:
    path = leave(tmp_path, ".a.00000000-1-00000000.partial", age_s=7200, is_folder=True)
    (path / "young").write_bytes(b"more")
    os.utime(path, (time.time() - 7200,) * 2)
    write_text(tmp_path / "new", "x")
    assert path.exists()


def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    child = fork()
    if child == 0:
        rename = Path.rename

        def die_at_the_second(path: Path, to: Path) -> None:
            if to == tmp_path / "model":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(path, to)

        Path.rename = die_at_the_second
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("new")
        os._exit(0)
    os.waitpid(child, 0)
    assert not (tmp_path / "model").exists()
    write_text(tmp_path / "other", "x")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_cut_removal_of_a_folder_is_finished_by_the_next_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "state.json").write_text("{}")
    child = fork()
    if child == 0:
        temporary.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        remove_folder(tmp_path / "step-000001")
        os._exit(0)
    os.waitpid(child, 0)
    assert saved_states(tmp_path) == []
    write_text(tmp_path / "new", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_is_not_finished_is_listed_nowhere(tmp_path: Path) -> None:
    for name in ("step-000003", "model.safetensors", "picture.png"):
        path = temporary_name(tmp_path / name, "partial")
        path.mkdir()
        (path / "state.json").write_text("{}")
        assert is_temporary(path) and not is_temporary(tmp_path / name)
        assert path not in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.png"), *tmp_path.glob("step-*")]
    assert saved_states(tmp_path) == []


def test_names_that_are_nearly_too_long_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write_text(tmp_path / name, "x")
    with pytest.raises(UserError, match="choose a shorter name"):
        write_text(tmp_path / ("x" * 256), "x")


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_seen_in_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, value: float
) -> None:
    monkeypatch.setattr(tensors, "PIECE", 4)
    broken = torch.zeros(3, 3)
    broken.view(-1)[place] = value
    with pytest.raises(UserError, match="not finite"):
        write_safetensors(tmp_path / "x.safetensors", planned({"a": broken}), {}, finite_only=True)
    assert not list(tmp_path.iterdir())
