"""Laws of scanning folders: everything usable is found, everything wrong is said, at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data import examples as scanning
from sdtrain.data import pictures as opening
from sdtrain.data.examples import scan_folders
from sdtrain.data.scanning.findings import MAX_ALIKE
from sdtrain.errors import Problem, UserError

MakeConfig = Callable[..., DataConfig]
MakePicture = Callable[..., None]


def problems_of(config: DataConfig, *, decode: bool = True) -> list[Problem]:
    return scan_folders(config, decode=decode)[1]


def one_problem(config: DataConfig) -> Problem:
    (problem,) = problems_of(config)
    return problem


def test_pictures_come_in_natural_order_through_sub_folders(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    for name in ("10.png", "2.png", "b/1.png", "a10/x.png", "a9/x.png", "B2.png"):
        picture(tmp_path / name, (20, 16), name)
    examples, problems = scan_folders(config(tmp_path), decode=False)
    assert not problems
    names = [example.path.relative_to(tmp_path).as_posix() for example in examples]
    assert names == ["2.png", "10.png", "a9/x.png", "a10/x.png", "b/1.png", "B2.png"]
    assert [example.caption for example in examples] == names
    assert {(example.width_px, example.height_px, example.repeats) for example in examples} == {(20, 16, 1)}


def test_reading_every_pixel_gives_the_same_examples(pictures: Path, config: MakeConfig) -> None:
    assert scan_folders(config(pictures), decode=True) == scan_folders(config(pictures), decode=False)


def test_several_folders_keep_their_order_and_their_settings(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    picture(tmp_path / "z" / "1.png", (16, 16), "first")
    picture(tmp_path / "a" / "1.png", (16, 16), None)
    folders = [
        FolderConfig(path=str(tmp_path / "z"), repeats=4),
        FolderConfig(path=str(tmp_path / "a"), missing_captions="empty"),
    ]
    examples, problems = scan_folders(config(*folders), decode=False)
    assert not problems
    assert [(example.caption, example.repeats) for example in examples] == [("first", 4), ("", 1)]


def test_hidden_files_and_other_kinds_of_files_are_left_alone(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    picture(tmp_path / "1.png", (16, 16), "one")
    for name in ("._1.png", ".DS_Store", ".checkpoints/2.png", "notes.md", "1.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    examples, problems = scan_folders(config(tmp_path), decode=True)
    assert len(examples) == 1 and not problems


def test_suffixes_may_be_written_large(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "1.PNG", (16, 16), None)
    (tmp_path / "1.TXT").write_text("one")
    assert scan_folders(config(tmp_path), decode=True)[0][0].caption == "one"


def test_a_name_with_dots_has_its_own_caption(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "v1.5 a.png", (16, 16), "a")
    picture(tmp_path / "v1.5 b.png", (16, 16), "b")
    assert [example.caption for example in scan_folders(config(tmp_path), decode=False)[0]] == ["a", "b"]


def test_links_are_followed_but_never_in_circles(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "elsewhere" / "1.png", (16, 16), "one")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    examples, problems = scan_folders(config(tmp_path / "set"), decode=False)
    assert len(examples) == 1 and not problems


def test_a_missing_folder_names_the_setting(tmp_path: Path, config: MakeConfig) -> None:
    problem = one_problem(config(tmp_path / "absent"))
    assert problem == Problem("data.folder[0].path", f"no such folder: {tmp_path / 'absent'}")


def test_a_file_in_place_of_a_folder_is_said_to_be_one(tmp_path: Path, config: MakeConfig) -> None:
    (tmp_path / "file").write_text("")
    assert "not a folder" in one_problem(config(tmp_path / "file")).what


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path, config: MakeConfig) -> None:
    problem = one_problem(config(tmp_path))
    assert problem.where == "data.folder[0].path"
    assert "no pictures" in problem.what and ".png" in problem.what


def test_an_unknown_embedded_folder_names_those_there_are(config: MakeConfig) -> None:
    problem = one_problem(config(FolderConfig(path="builtin:cats")))
    assert "builtin:cats" in problem.what and "builtin:quickstart" in problem.what


def test_the_embedded_folder_is_read_like_any_other(
    tmp_path: Path, picture: MakePicture, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scanning.BUILTIN_FOLDERS["builtin:quickstart"].parts[-3:] == ("sdtrain", "builtin", "quickstart")
    picture(tmp_path / "1.png", (16, 16), "one")
    monkeypatch.setitem(scanning.BUILTIN_FOLDERS, "builtin:quickstart", tmp_path)
    examples, problems = scan_folders(config(FolderConfig(path="builtin:quickstart")), decode=True)
    assert len(examples) == 1 and not problems


@pytest.mark.parametrize("content", [None, "", "  \n "])
def test_a_picture_without_a_caption_is_an_error_unless_allowed(
    tmp_path: Path, picture: MakePicture, config: MakeConfig, content: str | None
) -> None:
    picture(tmp_path / "cat.png", (16, 16), content)
    problem = one_problem(config(tmp_path))
    assert problem.where == str(tmp_path / "cat.png")
    assert "cat.txt" in problem.what and 'missing_captions = "empty"' in problem.what
    allowed = config(FolderConfig(path=str(tmp_path), missing_captions="empty"))
    examples, problems = scan_folders(allowed, decode=True)
    assert examples[0].caption == "" and not problems


def test_a_caption_without_a_picture_is_named(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "cat.png", (16, 16), "a cat")
    (tmp_path / "dog.txt").write_text("a dog")
    problem = one_problem(config(tmp_path))
    assert problem.where == str(tmp_path / "dog.txt") and "without a picture" in problem.what


def test_two_pictures_that_share_a_caption_are_named(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "a.png", (16, 16), "a")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg")
    assert "a.jpg and a.png" in one_problem(config(tmp_path)).what


def test_a_caption_in_another_encoding_is_named(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "a.png", (16, 16), None)
    (tmp_path / "a.txt").write_bytes("a café".encode("latin-1"))
    problem = one_problem(config(tmp_path))
    assert problem.where == str(tmp_path / "a.txt") and "UTF-8" in problem.what


def test_a_truncated_picture_is_found_when_pixels_are_read(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    picture(tmp_path / "a.png", (200, 200), "a")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    problem = one_problem(config(tmp_path))
    assert problem.where == str(tmp_path / "a.png") and "truncated" in problem.what
    assert not problems_of(config(tmp_path), decode=False)


@pytest.mark.parametrize(("content", "what"), [(b"", "empty"), (b"<html>not found</html>", "not a picture")])
def test_a_file_that_is_no_picture_is_named_with_the_reason(
    tmp_path: Path, config: MakeConfig, content: bytes, what: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "a.txt").write_text("a")
    assert what in one_problem(config(tmp_path)).what


def test_formats_that_cannot_be_read_are_named_instead_of_passed_over(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    picture(tmp_path / "a.png", (16, 16), "a")
    (tmp_path / "b.HEIC").write_bytes(b"x")
    problem = one_problem(config(tmp_path))
    assert problem.where == str(tmp_path / "b.HEIC") and "convert" in problem.what


def test_a_speck_is_refused_with_its_size(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "a.png", (15, 400), "a")
    assert "15 x 400 px" in one_problem(config(tmp_path)).what


def test_pictures_read_by_two_folders_are_an_error(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "all" / "cats" / "a.png", (16, 16), "a")
    problem = one_problem(config(tmp_path / "all", tmp_path / "all" / "cats"))
    assert problem.where == "data.folder[1].path" and "data.folder[0]" in problem.what


def test_all_problems_come_together_and_a_long_list_is_cut_by_kind(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    for number in range(MAX_ALIKE + 37):
        picture(tmp_path / f"{number}.png", (16, 16), None)
    (tmp_path / "lonely.txt").write_text("lonely")
    (tmp_path / "0.png").write_bytes(b"x")
    problems = problems_of(config(tmp_path, tmp_path / "absent"))
    text = UserError("config.toml", problems).text()
    assert "no such folder" in text and "lonely.txt" in text and "not a picture" in text
    assert "and 37 more like this: picture without a caption" in text
    assert sum("no caption" in problem.what for problem in problems) == MAX_ALIKE


def test_checking_pictures_never_imports_torch() -> None:
    modules = ("examples", "captions.text", "buckets", "report.summary")
    code = (
        f"import sys, {', '.join('sdtrain.data.' + module for module in modules)}; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("exclude", [["masks", "old*"], ["masks/", "*/old b.png"], ["masks/*", "old b.png"]])
def test_what_is_excluded_is_not_read(
    tmp_path: Path, picture: MakePicture, config: MakeConfig, exclude: list[str]
) -> None:
    picture(tmp_path / "a.png", (16, 16), "a")
    picture(tmp_path / "sub" / "old b.png", (16, 16), None)
    picture(tmp_path / "masks" / "a.png", (16, 16), None)
    examples, problems = scan_folders(config(FolderConfig(path=str(tmp_path), exclude=exclude)), decode=True)
    assert not problems and [example.path.name for example in examples] == ["a.png"]


def test_thumbnails_of_a_network_drive_are_left_alone(tmp_path: Path, picture: MakePicture, config: MakeConfig) -> None:
    picture(tmp_path / "a.png", (16, 16), "a")
    picture(tmp_path / "@eaDir" / "a.png" / "thumb.png", (16, 16), None)
    examples, problems = scan_folders(config(tmp_path), decode=True)
    assert len(examples) == 1 and not problems


def test_links_in_a_ring_and_links_to_nowhere_are_told_once_each(
    tmp_path: Path, picture: MakePicture, config: MakeConfig
) -> None:
    picture(tmp_path / "a.png", (16, 16), "a")
    (tmp_path / "x.png").symlink_to(tmp_path / "y.png")
    (tmp_path / "y.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "z.png").symlink_to(tmp_path / "gone.png")
    told = {Path(problem.where).name: problem.what for problem in problems_of(config(tmp_path))}
    assert set(told) == {"x.png", "y.png", "z.png"} and len(problems_of(config(tmp_path))) == 3
    assert "back to itself" in told["x.png"] and "points nowhere" in told["z.png"]


def test_a_folder_that_cannot_be_read_hides_nothing_else(
    tmp_path: Path, picture: MakePicture, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png", (16, 16), None)
    picture(tmp_path / "locked" / "b.png", (16, 16), "b")
    listed = Path.iterdir

    def locked(folder: Path) -> object:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", locked)
    told = {Path(problem.where).name: problem.what for problem in problems_of(config(tmp_path))}
    assert set(told) == {"a.png", "locked"} and "Permission denied" in told["locked"]


def test_a_picture_of_an_unknown_format_is_told_once(tmp_path: Path, config: MakeConfig) -> None:
    (tmp_path / "a.jxl").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a")
    assert "convert" in one_problem(config(tmp_path)).what


def test_a_picture_beyond_the_limit_is_not_called_damaged(
    tmp_path: Path, picture: MakePicture, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    Image.new("1", (2001, 2001)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    what = one_problem(config(tmp_path)).what
    assert "more than 4 megapixels" in what and "damaged" not in what


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.jpg"])
def test_without_its_library_a_heic_picture_says_how_to_install_it(
    tmp_path: Path, config: MakeConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    opening.heif_is_there.cache_clear()
    (tmp_path / name).write_bytes(HEIC)
    (tmp_path / "a.txt").write_text("a")
    what = one_problem(config(tmp_path)).what
    assert 'pip install "sdtrain[heic]"' in what
    opening.heif_is_there.cache_clear()


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_with_its_library_a_heic_picture_is_read_as_any_other(tmp_path: Path, config: MakeConfig, name: str) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (48, 32), (200, 30, 30))).save(str(tmp_path / "a.heic"))
    (tmp_path / "a.heic").rename(tmp_path / name)
    (tmp_path / "a.txt").write_text("a")
    examples, problems = scan_folders(config(tmp_path), decode=True)
    assert not problems and (examples[0].width_px, examples[0].height_px) == (48, 32)
