"""A file that is not what it should be is told in one sentence, the same wherever it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sdtrain.adapters.formats.describe import describe_file
from sdtrain.adapters.formats.lora_file import read_lora
from sdtrain.commands.files.info import file_info
from sdtrain.config.schema import ModelConfig
from sdtrain.data import cache as store
from sdtrain.data.encoding import encode_captions
from sdtrain.errors import UserError
from sdtrain.files.header import Header, read_header
from sdtrain.files.tensors import DTYPES, read_tensors
from sdtrain.models.checkpoints.inspect import inspect_model
from sdtrain.training.keeping.states import _header as read_state_file


def file(header: object, num_bytes: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(num_bytes)


def tensor(start: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty; fetch it again"),
    "four bytes": (b"\x08\0\0\0", "is not a safetensors file, or cut off in its header (4 bytes); fetch it again"),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page, not a model; fetch the file itself"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, not the file"),
    "a pickle inside": (b"PK\x03\x04 and more", "is a pickle under another name"),
    "header longer than the file": (file({"a": tensor(0, 8)}, 8, 5000), "or cut off in its header"),
    "header longer than allowed": (file({}, 8, 1 << 62), "or cut off in its header"),
    "header no JSON": (file(b"{'not': 'json'}"), "has a damaged safetensors header"),
    "header no table": (file([1, 2]), "has a damaged safetensors header (it is no JSON table)"),
    "header no text": (file(b'{"\xff":1}'), "has a damaged safetensors header"),
    "header too deep": (file(b"[" * 100_000), "has a damaged safetensors header"),
    "a number too long": (file(b'{"a":' + b"9" * 5000 + b"}"), "has a damaged safetensors header"),
    "half a character": (file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8), "has a damaged"),
    "a tensor past the end": (file({"a": tensor(0, 8)}, 4), "is cut off: "),
    "overlapping tensors": (file({"a": tensor(0, 8), "b": tensor(4, 12)}, 12), "`b` does not lie where it should"),
    "a hole between tensors": (file({"a": tensor(0, 8), "b": tensor(12, 20)}, 20), "`b` does not lie where it"),
    "a hole before tensors": (file({"a": tensor(8, 16)}, 16), "`a` does not lie where it should"),
    "trailing bytes": (file({"a": tensor(0, 8)}, 10), "has 2 bytes more than its header accounts for"),
    "a wrong size": (file({"a": tensor(0, 8, (3,))}, 8), "`a` does not lie where it should"),
    "a negative shape": (file({"a": tensor(0, 8, (-1, -2))}, 8), "`a` has -1 where only a whole number"),
    "a negative place": (file({"a": tensor(-8, 0)}, 8), "`a` has -8 where only a whole number"),
    "a shape of fractions": (file({"a": tensor(0, 8, (2.0,))}, 8), "`a` has 2.0 where only a whole number"),
    "a shape of truths": (file({"a": tensor(0, 4, (True,))}, 4), "`a` has True where only a whole number"),
    "a shape past counting": (file({"a": tensor(0, 0, (0, 2**62))}), "`a` has a shape that no tensor can have"),
    "no shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8), "has a damaged safetensors header"),
    "a type that is a table": (file({"a": tensor(0, 8, (2,), {})}, 8), "`a` has no type or no shape"),
    "an unknown type": (file({"a": tensor(0, 8, (2,), "Q7")}, 8), "holds `a` in the unknown type Q7"),
    "a name twice": (file(b"{" + ONE + b"," + ONE + b"}", 8), "`a` stands in it twice"),
    "notes that are a list": (file(b'{"__metadata__":[1],' + ONE + b"}", 8), "has a damaged safetensors header"),
}
PICKLES = ("x.ckpt", "x.CKPT", "x.Pt", "x.pth", "x.BIN", "x.pkl")
"""Suffixes are refused before a look into the file."""


def bad_file(folder: Path, kind: str) -> tuple[Path, str]:
    """A bad file of a kind, and the sentence that tells it, or its middle."""
    if kind in PICKLES:
        (folder / kind).write_bytes(file({"a": tensor(0, 8)}, 8))
        return folder / kind, "is a pickle, which can run any code when it is read; get or convert it to .safetensors"
    path = folder / "x.safetensors"
    match kind:
        case "missing":
            return path, "no such file"
        case "a folder":
            path.mkdir()
            return path, "is a folder, not a safetensors file; name the file in it"
        case "a pipe":
            os.mkfifo(path)
            return path, "is a device or a pipe, not a safetensors file; name a file"
        case _:
            content, sentence = BAD[kind]
            path.write_bytes(content)
            return path, sentence


KINDS = [*BAD, *PICKLES, "missing", "a folder", "a pipe"]


def told(path: Path, call: Callable[[Path], object]) -> str:
    """The one sentence a reader gives."""
    with pytest.raises(UserError) as caught:
        call(path)
    (problem,) = caught.value.problems
    assert problem.where == path.name
    return problem.what


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_told_in_one_sentence_wherever_it_is_read(tmp_path: Path, kind: str) -> None:
    path, sentence = bad_file(tmp_path, kind)
    what = told(path, read_header)
    assert sentence in what
    for reader in (describe_file, file_info, lambda path: read_lora(path, {})):
        assert told(path, reader) == what, "as a LoRA"
    with pytest.raises(UserError) as caught:
        read_state_file(path)
    (problem,) = caught.value.problems
    assert f"cannot be read ({path.name} {what}); move its folder away" in problem.what, "as a training state"
    with pytest.raises(store.DamagedError) as damaged:
        store.read(path)
    assert what in str(damaged.value), "as a cache entry"
    assert not store.is_whole(path, thorough=False) and not store.is_whole(path, thorough=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("missing", "a folder")])
def test_a_bad_file_given_as_a_model_gets_the_same_sentence(tmp_path: Path, kind: str) -> None:
    path, _ = bad_file(tmp_path, kind)
    facts, problems = inspect_model(ModelConfig(path=str(path), components="builtin:tiny-sdxl"))
    assert facts is None
    assert [problem.what for problem in problems] == [f"{path} {told(path, read_header)}"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_cache_entry_is_encoded_anew(tmp_path: Path, kind: str) -> None:
    path = store.caption_path(tmp_path, "a cat", "text")
    path.parent.mkdir(parents=True)
    path.write_bytes(BAD[kind][0])
    encode_captions(["a cat"], lambda _: {"embeds": torch.ones(1, 3)}, "text", tmp_path, lambda *_: None)
    assert torch.equal(store.read(path)["embeds"], torch.ones(3))


def test_every_type_that_can_stand_in_a_file_is_read_as_the_reference_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"number": torch.tensor(2.5), "nothing": torch.zeros(0, 3), "none": torch.zeros(0)}
    save_file(tensors, tmp_path / "all.safetensors")
    wanted, found = load_file(tmp_path / "all.safetensors"), read_tensors(read_header(tmp_path / "all.safetensors"))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


GOOD = {"__metadata__": {"format": "pt"}, "a": tensor(0, 8), "b": tensor(8, 12, (1, 1)), "c": tensor(12, 14, (), "F16")}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["F32", "BF16", "a", -1, 8]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "a"]), inner),
    max_leaves=4,
)
PLACES = ["__metadata__", "a", "b", "c", "d", "dtype", "shape", "data_offsets"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
@example([("a", "shape", [2**70, 0])])
def test_whatever_a_header_says_the_answer_is_a_header_or_a_sentence(
    tmp_path: Path, changes: list[tuple[str, str, Any]]
) -> None:
    content: dict[str, Any] = json.loads(json.dumps(GOOD))
    for first, second, value in changes:
        inner = content.get(first)
        if isinstance(inner, dict):
            inner[second] = value
        else:
            content[first] = value
    require_header_or_sentence(tmp_path / "x.safetensors", file(content, 14))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 300), st.binary(max_size=8), st.integers(0, 8))
def test_whatever_bytes_are_changed_the_answer_is_a_header_or_a_sentence(
    tmp_path: Path, place: int, new: bytes, gone: int
) -> None:
    content = file(GOOD, 14)
    require_header_or_sentence(tmp_path / "x.safetensors", content[:place] + new + content[place + gone :])


def require_header_or_sentence(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = read_header(path)
    except UserError as error:
        str(error).encode()
        return
    assert isinstance(found, Header)
    assert sum(entry.end - entry.start for entry in found.entries.values()) <= len(content)
    read_tensors(found)
