"""Beginning without a config: what is made passes `check`, says why it is so, and never takes what is somebody's."""

from __future__ import annotations

import io
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from sdtrain.commands.starting import first_config as first
from sdtrain.commands.starting import seen as what_is_seen
from sdtrain.commands.starting.first_config import FEWEST_STEPS, MOST_STEPS, Seen, Wishes, first_config, written_first
from sdtrain.commands.starting.init import init
from sdtrain.commands.starting.seen import Pictures, card_memory_gib, picture_folders_here, pictures_in, resolution_of
from sdtrain.config.draft import draft_of
from sdtrain.config.read import overridden, read_config, resolve
from sdtrain.errors import UserError
from tests.commands.starting.conftest import ran

TINY = "builtin:tiny-sdxl"


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(what_is_seen.shutil, "which", lambda name: None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "pictures", 4)
    return tmp_path


def folder(path: Path, num: int, captions: str = ".txt") -> Path:
    path.mkdir(parents=True)
    for index in range(num):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(path / f"{index}.png")
        if captions:
            (path / f"{index}{captions}").write_text(f"a thing {index}")
    return path


def begin(where: str = ".", wishes: Wishes | None = None, answers: list[str] | None = None) -> tuple[Path, list[str]]:
    """Call `init`; return the file and the questions."""
    asked: list[str] = []

    def ask(question: str, otherwise: str) -> str:
        asked.append(question)
        return answers.pop(0) or otherwise if answers else otherwise

    file = init(
        Path(where),
        wishes or Wishes(model=TINY),
        Console(file=io.StringIO()),
        force=False,
        ask=None if answers is None else ask,
    )
    return file, asked


def test_init_writes_a_config_that_passes_check_and_says_what_comes_next(here: Path) -> None:
    said = ran("init", "--yes", "--model", TINY)
    assert "wrote pictures.toml: 4 pictures, 300 steps" in said
    assert said.splitlines()[-1] == "next: sdtrain fit pictures.toml"
    assert "no problems found" in ran("check", "pictures.toml")
    config = read_config(Path("pictures.toml"))
    assert config.data.resolution_px == 128
    assert config.optimizer.preset == "lora"
    text = Path("pictures.toml").read_text()
    assert "# 4 pictures, each seen up to 300 times, 4 a step (at least 300)" in text
    assert "# what the model was made for" in text


def test_a_file_that_is_there_is_replaced_with_force_only(here: Path) -> None:
    (here / "my.toml").write_text("mine")
    assert "is there already; add --force" in ran("init", "my.toml", "--yes", "--model", TINY, code=2)
    assert (here / "my.toml").read_text() == "mine"
    ran("init", "my.toml", "--yes", "--model", TINY, "--force")
    assert read_config(here / "my.toml").name == "my"


def test_the_folder_that_is_named_is_that_of_the_pictures_where_it_has_some(here: Path) -> None:
    folder(here / "other" / "cats", 2)
    file, _ = begin("other/cats")
    assert file == Path("cats.toml")
    assert read_config(file).data.folder[0].path == "other/cats"
    (here / "configs").mkdir()
    file, _ = begin("configs", Wishes(model=TINY, pictures="pictures"))
    assert file == Path("configs/pictures.toml")


def test_what_was_not_told_is_asked_and_what_is_there_is_offered(here: Path) -> None:
    file, asked = begin(".", Wishes(), ["", TINY, "zorbit", "24GB"])
    assert [question.split()[0] for question in asked] == ["Which", "Which", "Which", "How"]
    config = read_config(file)
    assert (file.name, config.name, config.data.folder[0].path) == ("zorbit.toml", "zorbit", "pictures")
    assert config.data.folder[0].trigger == "zorbit"
    assert "for 24 GB" in file.read_text()


def test_nothing_is_asked_where_nobody_can_answer_and_all_that_is_missing_is_told_at_once(here: Path) -> None:
    folder(here / "more", 1)
    told = ran("init", "--yes", code=2)
    assert "--model" in told and "--pictures" in told and "2 problems" in told
    assert "'lots' is no size" in ran("init", "--memory", "lots", code=2)
    assert not list(here.glob("*.toml"))


def test_pictures_without_captions_need_a_trigger_which_is_then_their_caption(here: Path) -> None:
    folder(here / "bare", 3, captions="")
    assert "3 of 3 pictures in bare have no caption" in ran("init", "bare", "--yes", "--model", TINY, code=2)
    file, _ = begin("bare", Wishes(model=TINY, trigger="zorbit"))
    assert read_config(file).data.folder[0].missing_captions == "empty"


def test_where_captions_stand_is_found_out(here: Path) -> None:
    folder(here / "caption", 2, ".caption")
    assert pictures_in("caption").captions == "caption"
    table = folder(here / "table", 2, "")
    (table / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "b"}\n')
    assert pictures_in("table") == Pictures("table", 2, "metadata", 2)
    folder(here / "kohya" / "3_sks dog", 2, "")
    assert pictures_in("kohya").concepts
    masked = folder(here / "masked", 2)
    Image.new("L", (64, 64)).save(masked / "0.mask.png")
    assert pictures_in("masked") == Pictures("masked", 2, "txt", 2, has_masks=True)
    for name in ("caption", "table", "kohya", "masked"):
        begin(name)


def test_runs_are_no_folders_of_pictures(here: Path) -> None:
    folder(here / "runs" / "previews", 1)
    (here / "runs" / "log.jsonl").touch()
    folder(here / "a", 1)
    assert picture_folders_here(Path()) == ["pictures", "a"]


def config_for(num: int, memory: float | None, resolution: int | None = 1024, **more: Any) -> dict[str, Any]:
    wishes = Wishes("model.safetensors", "pictures", memory_gib=memory, **more)
    return tomllib.loads(first_config(wishes, Seen(Pictures("pictures", num, "txt", num), resolution, None)))


@pytest.mark.parametrize(
    ("memory", "batch", "recomputes"),
    [(8, 1, True), (12, 1, True), (16, 1, False), (24, 2, False), (48, 4, False), (None, 1, True)],
)
def test_what_is_computed_at_once_follows_from_the_memory(memory: float | None, batch: int, recomputes: bool) -> None:
    table = config_for(20, memory)
    assert table["data"]["batch_size"] == batch
    assert table["data"]["gradient_accumulation"] * batch == 4
    assert table["memory"] == {"gradient_checkpointing": recomputes, "on_oom": "adapt"}
    assert "on_oom" not in config_for(20, memory, several_cards=True)["memory"]


@given(num=st.integers(1, 100_000), resolution=st.sampled_from([None, 64, 512, 768, 1024]))
@settings(max_examples=50, deadline=None)
def test_steps_grow_with_the_pictures_between_two_bounds(num: int, resolution: int | None) -> None:
    table, more = config_for(num, None, resolution), config_for(num + 1, None, resolution)
    assert FEWEST_STEPS <= table["steps"] <= more["steps"] <= MOST_STEPS
    assert resolve(table, "test").preview.every > 0
    assert config_for(num, None, resolution, steps=7)["steps"] == 7


@given(
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=20),
    trigger=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_of_any_letters_neither_break_the_file_nor_write_into_it(name: str, trigger: str) -> None:
    wishes = Wishes(name, name, trigger)
    text = first_config(wishes, Seen(Pictures(name, 3, "txt", 3), None, None), name)
    table = tomllib.loads(text)
    assert table["model"] == {"path": name}
    assert table["data"]["folder"] == [{"path": name} | ({"trigger": trigger} if trigger else {})]
    assert draft_of(overridden(table, "test", ())).knows("name")
    assert "\x1b" not in text and "\r" not in text


def test_the_home_of_nobody_is_told(here: Path) -> None:
    (here / "~nobody-here").mkdir()
    folder(here / "~nobody-here" / "a", 1)
    for where, wishes in (("~nobody-here", Wishes(TINY)), (".", Wishes(TINY, "~nobody-here"))):
        with pytest.raises(UserError):
            begin(where, wishes)


def test_a_name_that_is_no_text_is_told(here: Path) -> None:
    with pytest.raises(UserError, match="is not text in UTF-8"):
        begin(".", Wishes(TINY, "p\udcff"))


def test_fit_makes_the_same_table_as_init(here: Path) -> None:
    wishes = Wishes(TINY, "pictures", "zorbit", 7, output="elsewhere")
    file, _ = begin(".", wishes)
    written = written_first(wishes, ["seed=3"])
    config = draft_of(written).require_sound()
    assert config == read_config(file, ["seed=3"])
    assert (config.steps, config.output, config.seed) == (7, "elsewhere", 3)


def test_fit_without_a_config_trains_and_leaves_its_settings_as_every_run(here: Path) -> None:
    few = ["--set", "data.resolution_px=64", "--set", "method.rank=1", "--set", "preview.every=0"]
    wanted = ["fit", "--model", TINY, "--pictures", "pictures", "--trigger", "zorbit", "--set", "device=cpu", *few]
    ran(*wanted, "--steps", "1")
    stored = read_config(here / "runs" / "zorbit" / "config.toml")
    assert (stored.steps, stored.data.folder[0].trigger, stored.data.resolution_px) == (1, "zorbit", 64)
    assert "holds a finished run" in ran(*wanted, "--steps", "1", code=2)
    ran(*wanted, "--steps", "2", "--resume")
    assert len((here / "runs" / "zorbit" / "log.jsonl").read_text().splitlines()) == 2


def test_fit_says_what_is_missing_and_what_belongs_to_a_config(here: Path) -> None:
    assert "CONFIG  is missing: name a .toml file, which `sdtrain init` writes" in ran("fit", code=2)
    told = ran("fit", "--model", "nowhere.safetensors", "--pictures", "nothing", code=2)
    assert "no such folder: nothing" in told
    begin("my.toml")
    told = ran("fit", "my.toml", "--model", "x", "--trigger", "y", code=2)
    assert "use --set model.path=x" in told and "use --set data.folder[0].trigger=y" in told
    assert "steps=0" not in told


def test_steps_and_output_beside_a_config_are_its_settings(here: Path) -> None:
    begin("my.toml")
    told = ran("fit", "my.toml", "--steps", "5", "--set", "optimizer.prodigy_steps=6", code=2)
    assert "beyond steps = 5" in told


def test_the_resolution_is_that_of_the_model() -> None:
    opened = what_is_seen.opened_model(TINY)
    assert opened is not None and resolution_of(opened) == 128
    assert what_is_seen.opened_model("nowhere") is None
    assert what_is_seen.opened_model("a\0b") is None


@pytest.mark.parametrize(
    ("answer", "memory"), [("24576\n12288\n", 12.0), ("[N/A]\n", None), ("", None), (OSError(), None)]
)
def test_the_smallest_card_counts_and_one_that_does_not_tell_is_none(
    monkeypatch: pytest.MonkeyPatch, answer: str | OSError, memory: float | None
) -> None:
    def run(*arguments: Any, **how: Any) -> subprocess.CompletedProcess[str]:
        if isinstance(answer, OSError):
            raise answer
        return subprocess.CompletedProcess([], 0, answer)

    monkeypatch.setattr(what_is_seen.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(what_is_seen.subprocess, "run", run)
    assert card_memory_gib() == memory


def test_what_check_would_find_is_told_and_nothing_is_written(here: Path) -> None:
    (here / "pictures" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    told = ran("init", "my.toml", "--yes", "--model", "nowhere.safetensors", code=2)
    assert "0.png" in told and "model.path" in told
    assert not list(here.glob("*.toml"))


def test_a_model_is_fetched_for_a_run_that_can_begin_and_for_no_other(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(first, "is_missing", lambda model: True)
    monkeypatch.setattr(first, "opened_model", lambda path: None)
    monkeypatch.setattr(first, "fetch_if_missing", lambda model: fetched.append(model.path))
    wishes = Wishes("owner/name", "pictures", "zorbit")
    written_first(wishes, ["data.batch_size=0"])
    (here / "runs" / "zorbit" / "checkpoints").mkdir(parents=True)
    (here / "runs" / "zorbit" / "config.toml").write_text("")
    written_first(wishes, [])
    assert not fetched
    written = written_first(wishes, ["name=other"])
    assert fetched == ["owner/name"]
    assert written.table["data"]["resolution_px"] == 1024
