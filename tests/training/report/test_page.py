"""report.html tells what the run's files say, all of it as text, in one small file."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdtrain.commands.pages.report import write_report
from sdtrain.errors import UserError
from sdtrain.training.watching.grid import Compared, labelled_grid, save_picture
from sdtrain.training.watching.records import EndRecord, PictureRecord, RunRecord, StepRecord
from sdtrain.training.watching.report import page as pages
from sdtrain.training.watching.report import pictures
from sdtrain.training.watching.report.about import About
from sdtrain.training.watching.report.chart import Chart, Line, thinned
from sdtrain.training.watching.report.numbers import read_numbers
from sdtrain.training.watching.report.pictures import Shelf, evenly
from sdtrain.training.watching.report.watcher import EVERY_S, ReportWriter
from tests.training.report.small_folders import SCRIPT, run_folder

ROOT = Path(__file__).parent.parent.parent.parent

Train = Callable[..., tuple[Path, str]]


class Read(HTMLParser):
    """What is in a page: its tags, its text, and the numbers of its tables by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "table" and found.get("id"):
            self._table = self.tables.setdefault(str(found["id"]), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag == "data" and self._table is not None:
            self._table[-1].append(str(found["value"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def folder(tmp_path: Path, table: dict[str, Any]) -> Path:
    return run_folder(tmp_path / "runs" / "small", table)


def read(folder: Path) -> Read:
    return Read(write_report(folder).read_text(encoding="utf-8"))


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_the_numbers_are_those_of_the_log(folder: Path) -> None:
    found = read(folder).tables
    steps = {line["step"]: line for line in logged(folder) if "groups" in line}
    rows = [row for row in found["steps"] if row]
    assert len(rows) == pages.MOST_ROWS
    for row in rows:
        line = steps[int(row[0])]
        loss = [] if line["loss"] is None else [line["loss"]]
        groups = [group[key] for group in line["groups"].values() for key in ("d", "applied_d", "effective_lr")]
        assert [float(value) for value in row[1:]] == [*loss, line["images_per_s"], line["peak_memory_gib"], *groups]
    assert {int(rows[0][0]), int(rows[-1][0])} == {1, 60}
    told = [
        [one["step"], *(one["validation"][key] for key in ("loss", "standard_error", "pictures"))]
        for one in logged(folder)
        if "validation" in one
    ]
    assert [[float(value) for value in row] for row in found["validations"] if row] == told


def test_a_prompt_that_is_a_script_stays_text(folder: Path) -> None:
    page = read(folder)
    scripts = [tag for tag, _ in page.tags if tag == "script"]
    assert len(scripts) == 1, "the page's own"
    assert "".join(page.words).count(SCRIPT) >= 3, "the prompt of the rows, the note and the settings"
    assert SCRIPT not in (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_is_asked_of_a_network(folder: Path, tmp_path: Path, table: dict[str, Any]) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w", re.sub(r"data:image/webp;base64,[\w+/=]+", "", text))
    for tag, attributes in Read(text).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "data:,")), (tag, value)
    other = run_folder(tmp_path / "other", {**table, "model": {"path": "https://a.example/x.safetensors"}})
    links = [tag for tag, _ in read(other).tags if tag == "a"]
    assert not links, "an address of the user's is text"


def test_a_thousand_previews_make_a_small_page(tmp_path: Path, table: dict[str, Any]) -> None:
    prompts = ("very long " * 400, *(f"prompt {index}" for index in range(5)))
    folder = run_folder(tmp_path / "many", table, steps=3000, previews=1000, prompts=prompts, side_px=256, drawn=2)
    path = write_report(folder)
    assert path.stat().st_size < 5_000_000
    page = Read(path.read_text(encoding="utf-8"))
    shown = [attributes.get("alt") for tag, attributes in page.tags if tag == "img" and attributes.get("src")]
    assert shown.count("step 2997") == pictures.MOST_STRIPS, "the newest is there"
    assert "988 steps between these" in "".join(page.words)
    assert len(shown) <= pictures.MOST_STRIPS * (pictures.MOST_STEPS + 1)
    sizes = [len(attributes["src"] or "") for tag, attributes in page.tags if tag == "img" and "src" in attributes]
    assert sum(sizes) > pictures.MOST_BYTES / 10, "the bound is used"


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=60), st.integers(2, 15))
def test_of_many_steps_the_first_and_the_last_are_shown(steps: set[int], most: int) -> None:
    items = [(step, Path(str(step))) for step in sorted(steps)]
    chosen = evenly(items, most)
    assert len(chosen) <= most
    assert chosen[0] == items[0]
    assert chosen[-1] == items[-1]
    assert chosen == sorted(set(chosen))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(6, 12))
def test_a_thinned_line_keeps_its_ends_and_its_extremes(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = thinned(points, most)
    assert len(kept) <= most
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    found = [value for _, value in kept]
    assert (min(found), max(found)) == (min(values), max(values))


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300), max_size=5),
    st.booleans(),
)
def test_any_numbers_make_a_chart(values: list[float], logarithmic: bool) -> None:
    chart = Chart("a", [Line("b", list(enumerate(values)))], logarithmic=logarithmic)
    if chart.has_points:
        assert "nan" not in chart.svg()
        assert "inf" not in chart.svg()


def test_the_pictures_are_cut_out_of_the_grids(tmp_path: Path) -> None:
    colours = [["red", "lime"], ["blue", "white"]]
    rows = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    beside = Compared([[Image.new("RGB", (64, 64), "grey")] * 2] * 2, "base", "now")
    save_picture(labelled_grid(rows, ["a", "b"], [7, 8], "title", beside), tmp_path / "step-000003.png")
    strips = Shelf().strips(tmp_path).strips
    assert [(strip.prompt, strip.seed) for strip in strips] == [("a", "7"), ("a", "8"), ("b", "7"), ("b", "8")]
    for strip, colour in zip(strips, ["red", "lime", "blue", "white"], strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(strip.pictures[0].uri.partition(",")[2]))).convert("RGB")
        wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        for corner in ((2, 2), (picture.width - 3, picture.height - 3)):
            found = picture.getpixel(corner)
            assert isinstance(found, tuple)
            assert isinstance(wanted, tuple)
            assert all(abs(a - b) < 12 for a, b in zip(found, wanted, strict=True)), (colour, found)


def test_damaged_files_are_passed_over(folder: Path) -> None:
    (folder / "previews" / "step-000020.png").write_bytes(b"no picture")
    (folder / "config.toml").write_text("name = ", encoding="utf-8")
    (folder / "about.json").write_text("[1, 2", encoding="utf-8")
    page = read(folder)
    assert "The settings cannot be read" in "".join(page.words)
    assert page.tables["steps"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in this folder"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_one_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(folder).read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_the_log_is_read_as_far_as_it_can_be(folder: Path) -> None:
    numbers = read_numbers(folder / "log.jsonl")
    assert len(numbers.steps) == 60
    assert numbers.steps[4].loss is None
    assert numbers.frozen_at("unet") == 41
    assert numbers.best is not None
    assert numbers.best.step == 60


class Clock:
    """A clock that moves when it is told to, and by `cost` whenever a page was written."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_page_is_written_at_pictures_and_now_and_then_and_never_costs_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written, cost = Clock(), list[tuple[float, str]](), [0.1]

    def write(folder: Path, outcome: str, shelf: Shelf) -> None:
        clock.now += cost[0]
        written.append((clock.now, outcome))

    monkeypatch.setattr("sdtrain.training.watching.report.watcher.write_page", write)
    writer = ReportWriter(tmp_path, About(), clock)
    writer.see(RunRecord("a", tmp_path, 9, 0, 1e-6, ""))
    writer.see(PictureRecord(0, tmp_path))
    assert len(written) == 1
    for second in range(3 * int(EVERY_S)):
        clock.now += 1
        writer.see(StepRecord(second, 0.1, 1, 1.0, ()))
    assert len(written) == 4, "once a minute where nothing but steps happens"
    cost[0] = 30.0
    clock.now += 100
    writer.see(PictureRecord(1, tmp_path))
    for second in range(1000):
        clock.now += 1
        writer.see(PictureRecord(second, tmp_path))
    assert len(written) == 5, "a page that takes 30 s is not written again for 25 minutes"
    writer.see(EndRecord(9, "finished"))
    assert written[-1][1] == "finished"


def test_a_run_writes_its_report_which_is_the_same_when_it_is_written_anew(train: Train) -> None:
    run, _ = train({"preview.every": 2, "validation.share": 0.2, "validation.every": 2})
    text = (run / "report.html").read_text(encoding="utf-8")
    assert write_report(run).read_text(encoding="utf-8") == text
    assert 'id="outcome">finished' in text
    assert "6 pictures" in text or "pictures: " in text
    assert json.loads((run / "about.json").read_text())["machine"]["device"].startswith("cpu")


def test_a_report_that_fails_does_not_change_the_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with_report, _ = train({"name": "with"})

    def fail(*_: object) -> None:
        raise RuntimeError("no page today")

    monkeypatch.setattr("sdtrain.training.watching.report.watcher.write_page", fail)
    without, said = train({"name": "without"})
    assert not (without / "report.html").exists()
    assert said.count("no page today") == 1
    states = [run / "checkpoints" / "step-000004" for run in (with_report, without)]
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        assert (states[0] / name).read_bytes() == (states[1] / name).read_bytes()


def test_the_bench_of_the_page_measures_pages(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "scripts" / "bench_report.py")
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.main(["--previews", "1", "3", "--side", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "3"]
    assert all(re.search(r": \d\.\d\d MB, first \d\.\d\d s, again \d\.\d\d s$", line) for line in lines)
