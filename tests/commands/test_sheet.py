"""The contact sheet shows what the model will see: crops and tokens are those of the training, numbers `check`'s."""

from __future__ import annotations

import html
import io
import re
import shutil
import unicodedata
import weakref
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from sdtrain.commands.sheet import cards
from sdtrain.commands.sheet.captions import ShownCaption, shown_caption
from sdtrain.commands.sheet.cards import PER_PAGE, sheet_of
from sdtrain.commands.sheet.page import Heading, page_name, page_parts
from sdtrain.commands.sheet.write import write_sheet
from sdtrain.config.from_python import make_config
from sdtrain.config.schema import FolderConfig, ModelConfig
from sdtrain.config.write import config_to_toml
from sdtrain.data.buckets import bucket_sizes, place
from sdtrain.data.examples import Example
from sdtrain.data.report.thumbnails import Thumbnail, crop_shares
from sdtrain.errors import UserError
from sdtrain.models.checkpoints.inspect import OpenedModel, open_model
from sdtrain.models.token_counts import load_tokenizers

SCRIPT = '<script>alert("1")</script> & <b>bold</b>'
LONG = "sks, " + ", ".join(f"thing {number}" for number in range(40)) + ", a RED UMBRELLA"


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return open_model(ModelConfig(path="builtin:tiny-sdxl"), "test")


@pytest.fixture(scope="module")
def tokenizers(opened: OpenedModel) -> list[Any]:
    return load_tokenizers(opened.tokenizers)


@pytest.fixture
def folder(tmp_path: Path, pictures: Path) -> Path:
    """The small pictures, and some that are worth a look."""
    copied = shutil.copytree(pictures, tmp_path / "pictures & <i>others")
    Image.effect_mandelbrot((300, 60), (-2, -1, 1, 1), 50).save(copied / "wide <u>.png")
    (copied / "wide <u>.txt").write_text(SCRIPT)
    (copied / "2.txt").write_text(LONG)
    Image.new("RGBA", (128, 96), (200, 0, 0, 90)).save(copied / "clear.png")
    (copied / "clear.txt").write_text("sks glass")
    return copied


@pytest.fixture
def config(tmp_path: Path, table: dict[str, Any], folder: Path, pictures: Path) -> Path:
    table["data"]["folder"] = [{"path": str(folder), "trigger": "sks"}]
    table["validation"] = {"folder": [{"path": str(pictures)}]}
    shutil.copytree(pictures, tmp_path / "held")
    for path in (tmp_path / "held").glob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    table["validation"] = {"folder": [{"path": str(tmp_path / "held")}]}
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(make_config(table)))
    return path


def written(config: Path, *overrides: str, png: bool = False, out: Path | None = None) -> list[Path]:
    return write_sheet(config, overrides, out, Console(file=io.StringIO(), width=200), png=png)


class Elements(HTMLParser):
    """What a browser would make of a page: tags with their attributes, and the text in each card."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: dict[str, str] = {}
        self._card = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._card = dict(attrs).get("id") or "" if tag == "article" else self._card

    def handle_data(self, data: str) -> None:
        if self._card:
            self.cards[self._card] = self.cards.get(self._card, "") + data


def read_part(shown: ShownCaption) -> str:
    return "".join(span.text for span in shown.spans if "cut" not in span.kinds.split())


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(0, 30))
@example("", 0)
@example("👩‍🚀 café İ ﬁne 日本語 <|endoftext|>", 30)
@settings(deadline=None, max_examples=60)
def test_tokens_are_those_of_the_tokenizer_and_the_cut_is_where_training_cuts(
    tokenizers: list[Any], text: str, times: int
) -> None:
    caption = " ".join([text] * (times + 1))
    shown = shown_caption(tokenizers, caption, 1, FolderConfig(path="."))
    ids = max((tokenizer.encode(caption, add_special_tokens=False) for tokenizer in tokenizers), key=len)
    assert shown.num_tokens == len(ids)
    assert shown.is_cut == (len(ids) > 75)
    if caption.isprintable():
        assert "".join(span.text for span in shown.spans) == caption
        decoded = tokenizers[0].decode(ids[:75]).rstrip("\ufffd")  # a character that is cut through
        assert bare(read_part(shown)) == bare(decoded)


def bare(text: str) -> str:
    """A text without what the tokenizer does not keep: spaces, capitals, how accents are written."""
    return "".join(char.lower() for char in unicodedata.normalize("NFC", text) if not char.isspace())


def test_the_last_token_that_is_read_is_named_and_the_setting_reads_all(tokenizers: list[Any]) -> None:
    folder = FolderConfig(path=".", trigger="sks", shuffle_tags=True)
    shown = shown_caption(tokenizers, LONG, 1, folder)
    assert shown.is_cut and not shown_caption(tokenizers, LONG, shown.needed, folder).is_cut
    assert shown_caption(tokenizers, LONG, shown.needed - 1, folder).is_cut
    assert read_part(shown).strip().endswith(re.findall("“(.*?)”", shown.last)[0].strip())
    kinds = {span.text: span.kinds for span in reversed(shown.spans)}
    assert "trigger" in next(span.kinds for span in shown.spans)
    assert "separator" in kinds[","] and sum("first" in span.kinds for span in shown.spans) == 1


@given(st.integers(16, 9000), st.integers(16, 9000))
def test_the_drawn_crop_is_what_place_crops(width: int, height: int) -> None:
    placement = place(width, height, bucket_sizes(1024, 64, 2.5))
    left, top, across, down = crop_shares(placement)
    scaled_width, scaled_height = placement.scaled
    assert left * scaled_width == pytest.approx(placement.crop_left)
    assert top * scaled_height == pytest.approx(placement.crop_top)
    assert across * scaled_width == pytest.approx(placement.bucket[0])
    assert down * scaled_height == pytest.approx(placement.bucket[1])


def test_the_page_says_what_check_says(config: Path) -> None:
    from sdtrain.commands.check import check_config

    (path,) = written(config)
    told = io.StringIO()
    check_config(config, [], Console(file=told, width=500))
    facts, notes = told.getvalue().split("worth a look:\n")
    page = html.unescape(path.read_text())
    for line in (*[line for line in facts.splitlines() if re.match(" +(pictures|buckets|cropped):", line)],):
        assert f"<li>{line.strip()}</li>" in page
    assert len(notes.splitlines()) > 4
    for line in notes.splitlines():
        assert f"<li>{line.strip()}</li>" in page
    cropped = re.search(r"wide <u>.png (\d+%)", notes)
    assert cropped and f"<li>cropped hard: {cropped[1]}</li>" in page
    enlarged = re.search(r"wide <u>.png ([\d.]+x)", notes)
    assert enlarged and f"<li>enlarged: {enlarged[1]}</li>" in page


def test_nothing_of_the_users_becomes_markup_and_nothing_is_fetched(config: Path) -> None:
    (path,) = written(config)
    page = path.read_text()
    found = Elements(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "u", "link", "iframe", "object"}
    assert any(SCRIPT in text for text in found.cards.values())
    for _, attributes in found.tags:
        assert all(not name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert "http:" not in page and "https:" not in page and "@import" not in page


def test_crops_notes_and_held_out_pictures_stand_in_the_page(config: Path, folder: Path) -> None:
    (path,) = written(config)
    page = path.read_text()
    found = Elements(page)
    assert len(found.cards) == 14
    (wide,) = [text for text in found.cards.values() if "wide <u>.png" in text]
    assert "300x60 scaled to" in wide and "cropped hard" in wide
    placement = place(300, 60, bucket_sizes(96, 32, 2.5))
    expected = 100 * placement.crop_left / placement.scaled[0]
    lefts = [float(left) for left in re.findall(r'<i style="left:([\d.]+)%', page)]
    assert any(left == pytest.approx(expected, abs=1e-3) for left in lefts)
    (clear,) = [text for text in found.cards.values() if "clear.png" in text]
    assert "on white" in clear
    (cut,) = [text for text in found.cards.values() if "caption cut" in text]
    assert "2.png" in cut and "data.caption_chunks = " in cut
    assert page.index("trained on") < page.index("held out, only validated on") < page.index('id="p9"')


def test_copies_across_the_split_are_told(config: Path, folder: Path, tmp_path: Path) -> None:
    Image.open(folder / "wide <u>.png").resize((600, 120)).save(tmp_path / "held" / "larger.png")
    (tmp_path / "held" / "larger.txt").write_text("larger")
    found = Elements(written(config)[0].read_text())
    (wide,) = [text for text in found.cards.values() if "wide <u>.png" in text and "300x60" in text]
    assert "nearly the same picture as held/larger.png, which is held out" in wide
    (larger,) = [text for text in found.cards.values() if "600x120 scaled" in text]
    assert "which is trained on" in larger


def test_wordings_are_those_that_are_encoded(config: Path, folder: Path) -> None:
    from sdtrain.data.captions.wording import worded, wording_of

    setting = {"path": str(folder), "shuffle_tags": True}
    (path,) = written(config, f"data.folder=[{{path='{folder}', shuffle_tags=true}}]", "data.caption_variants=3")
    (card,) = [text for text in Elements(path.read_text()).cards.values() if "2.png" in text and "cut" in text]
    _, varied = worded([LONG], wording_of(FolderConfig.model_validate(setting)))
    assert varied is not None
    for variant in varied.variants(3):
        assert variant in card.replace("✂ 75", "")
    assert "3 wordings, of which each step draws one; 3 cut" in card


def test_pages_of_two_thousand_pictures_hold_few_of_them_at_a_time(
    table: dict[str, Any], opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[int] = []
    num = most = 0

    def small(one: Example, placement: Any) -> Thumbnail:
        nonlocal num, most
        image = Image.new("RGB", (40, 30), (len(one.caption), 0, 0))
        weakref.finalize(image, gone.append, 1)
        num += 1
        most = max(most, num - len(gone))
        return Thumbnail(image, (0, 0, 1, 1))

    monkeypatch.setattr(cards, "thumbnail", small)
    examples = [Example(Path(f"{number}.png"), f"picture {number}", 120, 90, 1) for number in range(2000)]
    sheet = sheet_of(make_config(table), opened.tokenizers, examples, [])
    assert sheet.num_pages == 20
    heading, seen = Heading("x", "y", [], []), []
    for page in range(sheet.num_pages):
        text = "".join(page_parts(sheet, heading, page))
        links = set(re.findall(r"<nav.*?</nav>", text, flags=re.DOTALL)[0].split('"')) & {
            page_name(n) for n in range(20)
        }
        assert len(links) == 19 and page_name(page) not in links
        seen += re.findall(r'<article id="p(\d+)"', text)
        assert len(text) < 400_000
    assert seen == [str(number + 1) for number in range(2000)]
    assert most < PER_PAGE / 2


def test_many_pictures_become_a_folder_of_pages(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cards, "PER_PAGE", 6)
    monkeypatch.setattr("sdtrain.commands.sheet.page.PER_PAGE", 6)
    monkeypatch.setattr("sdtrain.commands.sheet.drawing.PER_PAGE", 6)
    paths = written(config, png=True)
    stem = tmp_path / "runs" / "small-sheet"
    assert paths == [stem / "index.html", *(stem.with_name(f"small-sheet-00{page}.png") for page in (1, 2, 3))]
    assert sorted(path.name for path in stem.iterdir()) == ["index.html", "page-002.html", "page-003.html"]
    for href in re.findall(r'href="([^"#]+)', (stem / "index.html").read_text()):
        assert (stem / href).exists()
    assert written(config, png=True) == paths, "its own are written anew"


def test_what_is_no_contact_sheet_is_never_written_over(config: Path, folder: Path, tmp_path: Path) -> None:
    mine, picture = tmp_path / "mine.html", tmp_path / "other.png"
    mine.write_text("<p>mine")
    Image.new("RGB", (20, 20)).save(picture)
    before = picture.read_bytes()
    for out, png in ((mine, False), (picture, True)):
        with pytest.raises(UserError, match="is no contact sheet"):
            written(config, png=png, out=out)
    assert mine.read_text() == "<p>mine" and picture.read_bytes() == before
    assert not (tmp_path / "other.html").exists() and not (tmp_path / "runs").exists()


def test_a_folder_of_pictures_is_never_taken_for_pages(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "PER_PAGE", 6)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="is no contact sheet"):
        written(config, out=folder)
    assert sorted(folder.iterdir()) == before


def test_the_picture_shows_every_crop(config: Path) -> None:
    page, path = written(config, png=True)
    assert page.suffix == ".html"
    with Image.open(path) as drawn:
        assert drawn.width > 6 * 320 and drawn.height > 3 * 320
        white = sum(drawn.convert("L").histogram()[255:])
    assert white > 14 * 300, "frames"
