"""Laws of where captions stand: files beside pictures, tables, names of folders; and what is said when they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.examples import Example, scan_folders
from sdtrain.errors import Problem

MakeConfig = Callable[..., DataConfig]
MakePicture = Callable[..., None]


@pytest.fixture
def scan(config: MakeConfig, tmp_path: Path) -> Callable[..., tuple[list[Example], list[Problem]]]:
    """Scans the test's own folder with settings of that folder."""

    def scan(**settings: object) -> tuple[list[Example], list[Problem]]:
        folder = FolderConfig.model_validate({"path": str(tmp_path), **settings})
        return scan_folders(config(folder), decode=False)

    return scan


Scan = Callable[..., tuple[list[Example], list[Problem]]]


def captions(found: tuple[list[Example], list[Problem]]) -> dict[str, str]:
    examples, problems = found
    assert not problems
    return {example.path.name: example.caption for example in examples}


def test_captions_may_stand_in_caption_files(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "a.png", (16, 16), "not this")
    (tmp_path / "a.caption").write_text("a cat")
    assert captions(scan(captions="caption")) == {"a.png": "a cat"}
    assert captions(scan()) == {"a.png": "not this"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_may_stand_in_metadata_of_a_folder_and_of_those_below(
    tmp_path: Path, picture: MakePicture, scan: Scan, name: str
) -> None:
    for path in ("a.png", "more/b.png", "more/deep/c.png"):
        picture(tmp_path / path, (16, 16), None)
    write_table(tmp_path / name, [("a.png", 'a "cat", sitting')])
    write_table(tmp_path / "more" / name, [("b.png", "a dög"), ("deep/c.png", "a  hen")])
    assert captions(scan(captions="metadata")) == {"a.png": 'a "cat", sitting', "b.png": "a dög", "c.png": "a hen"}


def write_table(path: Path, rows: list[tuple[str, object]]) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    else:
        lines = ["text,file_name"] + ['"{}",{}'.format(str(text).replace('"', '""'), name) for name, text in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_several_captions_in_metadata_are_drawn_if_asked_for(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "a.png", (16, 16), None)
    write_table(tmp_path / "metadata.jsonl", [("a.png", ["one", "two"]), ("a.png", "three")])
    examples, problems = scan(captions="metadata", caption_lines="drawn")
    assert not problems and examples[0].varied is not None
    assert examples[0].varied.texts == ("one", "two", "three")
    (problem,) = scan(captions="metadata")[1]
    assert "names a.png again" in problem.what and "caption_lines" in problem.what


def test_everything_wrong_in_a_table_is_told_at_once(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "a.png", (16, 16), None)
    lines = ["{", '{"text": "x"}', '{"file_name": "a.png"}', '{"file_name": "a.png", "text": 3}', "[]"]
    lines += ['{"file_name": "gone.png", "text": "x"}', "1" * 5000, '{"file_name": "a.png", "text": "a"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    problems = scan(captions="metadata")[1]
    assert {problem.where for problem in problems} == {str(tmp_path / "metadata.jsonl")}
    text = "\n".join(problem.what for problem in problems)
    assert all(f"line {number}" in text for number in range(1, 8)) and "line 8" not in text
    assert "no such picture" in text and "needs one of text" in text


def test_a_row_of_metadata_names_a_picture_by_its_whole_path(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "sub" / "a.png", (16, 16), None)
    write_table(tmp_path / "metadata.jsonl", [("a.png", "a cat")])
    told = [problem.what for problem in scan(captions="metadata", missing_captions="empty")[1]]
    assert len(told) == 1 and "no such picture" in told[0]


def test_captions_may_stand_in_the_metadata_of_sd_scripts(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    for path in ("a.png", "x/b.png", "c.jpg.png"):
        picture(tmp_path / path, (16, 16), None)
    table = {
        "a": {"caption": "a cat", "tags": "cat, sitting"},
        "D:\\elsewhere\\x\\b.png": {"tags": "dog"},
        str(tmp_path / "c.jpg.png"): {"caption": "a hen", "train_resolution": [16, 16]},
    }
    (tmp_path / "meta_cap.json").write_text(json.dumps(table))
    expected = {"a.png": "a cat, cat, sitting", "b.png": "dog", "c.jpg.png": "a hen"}
    assert captions(scan(captions="meta_cap")) == expected


@pytest.mark.parametrize("content", ["[", "[]", '{"a": 3}', '{"a": {"tags": 3}}', '{"b": {"tags": "x"}}', "1" * 5000])
def test_a_strange_meta_cap_is_a_sentence(tmp_path: Path, picture: MakePicture, scan: Scan, content: str) -> None:
    picture(tmp_path / "a.png", (16, 16), None)
    (tmp_path / "meta_cap.json").write_text(content)
    (problem,) = scan(captions="meta_cap", missing_captions="empty")[1]
    assert problem.where == str(tmp_path / "meta_cap.json")


@pytest.mark.parametrize("kind", ["metadata", "meta_cap"])
def test_a_table_that_is_not_there_is_told_once(tmp_path: Path, picture: MakePicture, scan: Scan, kind: str) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.png", (16, 16), name)
    (problem,) = scan(captions=kind)[1]
    assert problem.where == "data.folder[0].captions" and f"no {kind}" in problem.what


def test_folder_names_say_repeats_and_captions_if_asked_for(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "10_sks dog" / "a.png", (16, 16), None)
    picture(tmp_path / "10_sks dog" / "b.png", (16, 16), "a sks dog running")
    picture(tmp_path / "2_dog" / "close" / "c.png", (16, 16), None)
    picture(tmp_path / "d.png", (16, 16), "no concept")
    found = scan(folder_names="repeats_concept", repeats=3)
    assert captions(found) == {
        "a.png": "sks dog",
        "b.png": "a sks dog running",
        "c.png": "dog",
        "d.png": "no concept",
    }
    assert [(example.path.name, example.repeats) for example in found[0]] == [
        ("c.png", 6), ("a.png", 30), ("b.png", 30), ("d.png", 3)
    ]  # fmt: skip
    plain = scan(missing_captions="empty")[0]
    assert {example.repeats for example in plain} == {1} and {
        example.caption for example in plain if example.beside
    } == {""}


@pytest.mark.parametrize(
    ("beside", "advice"),
    [
        ("a.caption", 'captions = "caption"'),
        ("metadata.jsonl", 'captions = "metadata"'),
        ("metadata.csv", 'captions = "metadata"'),
        ("meta_cap.json", 'captions = "meta_cap"'),
        ("a.png.txt", "rename it to a.txt"),
    ],
)
def test_captions_under_other_names_are_pointed_at(
    tmp_path: Path, picture: MakePicture, scan: Scan, beside: str, advice: str
) -> None:
    picture(tmp_path / "a.png", (16, 16), None)
    (tmp_path / beside).write_text("a cat")
    (problem,) = scan()[1]
    assert problem.where == str(tmp_path / "a.png")
    assert beside in problem.what and advice in problem.what


def test_the_name_of_a_folder_is_pointed_at(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "10_sks dog" / "a.png", (16, 16), None)
    (problem,) = scan()[1]
    assert "10_sks dog" in problem.what and 'folder_names = "repeats_concept"' in problem.what


def test_accents_in_one_sign_or_two_are_the_same_name(tmp_path: Path, picture: MakePicture, scan: Scan) -> None:
    picture(tmp_path / "caf\u00e9.png", (16, 16), None)
    (tmp_path / "cafe\u0301.txt").write_text("a café")
    picture(tmp_path / "the\u0301.png", (16, 16), None)
    assert list(captions(scan(missing_captions="empty")).values()) == ["a café", ""]
    write_table(tmp_path / "metadata.jsonl", [("cafe\u0301.png", "one"), ("th\u00e9.png", "two")])
    assert list(captions(scan(captions="metadata")).values()) == ["one", "two"]
