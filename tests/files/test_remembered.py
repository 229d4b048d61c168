"""A digest is remembered as long as its file is the one of then, and never believed longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.files import remembered
from sdtrain.files.hashes import CHUNK_BYTES, digest_of, file_digest
from sdtrain.files.remembered import RememberedDigests


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remembered, "SETTLED_S", -1.0)  # or a test would have to wait
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    return path


def asked(memory: RememberedDigests, file: Path, kind: str = "tensors") -> tuple[str, bool]:
    """The digest, and whether the file was read for it."""
    read: list[Path] = []

    def compute(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    return memory.of(file, kind, compute), bool(read)


def test_an_unchanged_file_is_read_once_also_by_the_next_run(file: Path, tmp_path: Path) -> None:
    memory = RememberedDigests(tmp_path / "memory.json")
    assert asked(memory, file) == (digest_of(b"one"), True)
    assert asked(memory, file) == (digest_of(b"one"), False)
    assert asked(memory, file, kind="picture")[1], "digests of another kind are others"
    memory.keep()
    assert asked(RememberedDigests(tmp_path / "memory.json"), file) == (digest_of(b"one"), False)


@pytest.mark.parametrize("how", ["size", "time", "same size and time", "another file"])
def test_a_file_that_may_have_changed_is_read_again(file: Path, tmp_path: Path, how: str) -> None:
    memory = RememberedDigests(tmp_path / "memory.json")
    asked(memory, file)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if how == "another file":
        (tmp_path / "other").write_bytes(b"two")
        (tmp_path / "other").replace(file)
    else:
        time.sleep(0.02)  # longer than the clock of the file system ticks
        file.write_bytes(b"four" if how == "size" else b"two")
    if how != "time":
        os.utime(file, ns=times)
    assert asked(memory, file) == (digest_of(file.read_bytes()), True)


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    file, memory = tmp_path / "weights", RememberedDigests(tmp_path / "memory.json")
    file.write_bytes(b"one")
    assert asked(memory, file)[1] and asked(memory, file)[1]


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "files": 5}', "[" * 9999, '{"version": 9, "files": {}}'])
def test_a_damaged_memory_is_no_memory(file: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "memory.json").write_text(content)
    memory = RememberedDigests(tmp_path / "memory.json")
    assert asked(memory, file) == (digest_of(b"one"), True)
    memory.keep()
    assert not asked(RememberedDigests(tmp_path / "memory.json"), file)[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(-2, 2), st.integers(0, 9))
def test_a_file_is_hashed_as_its_bytes_are_whatever_its_length(
    tmp_path_factory: pytest.TempPathFactory, chunks: int, more: int, start: int
) -> None:
    content = bytes(range(251)) * ((CHUNK_BYTES * chunks) // 251) + b"x" * max(0, 9 + more)
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(content)
    assert file_digest(path, start) == digest_of(content[start:])


def test_a_file_that_changed_under_the_same_facts_is_found_only_by_reading_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = remembered._facts(file)
    monkeypatch.setattr(remembered, "_facts", lambda _: facts)
    memory = RememberedDigests(tmp_path / "memory.json")
    asked(memory, file)
    file.write_bytes(b"two")
    assert asked(memory, file) == (digest_of(b"one"), False)
    assert memory.of(file, "tensors", file_digest, verify=True) == digest_of(b"two")
    assert memory.contradicted == [file]
    assert asked(memory, file) == (digest_of(b"two"), False)
