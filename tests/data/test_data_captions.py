"""Laws of reading captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.data.captions.text import CaptionError, decode, normalise, read_text, texts_of


@given(st.text())
def test_a_normalised_caption_is_one_line_and_stays_as_it_is(text: str) -> None:
    caption = normalise(text)
    assert normalise(caption) == caption
    assert caption == caption.strip() and len(caption.splitlines()) <= 1
    assert caption.split() == text.split()


@given(st.text().filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_a_byte_order_mark_changes_nothing(text: str) -> None:
    assert decode(text.encode("utf-8")) == decode(text.encode("utf-8-sig")) == text


def test_newlines_become_spaces() -> None:
    assert texts_of("a red circle\r\n  on white\n\n", "joined") == ("a red circle on white",)


@given(st.binary())
def test_any_bytes_are_a_caption_or_refused_with_a_reason(content: bytes) -> None:
    try:
        decode(content)
    except CaptionError as error:
        assert "UTF-8" in str(error)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_other_encodings_are_refused_instead_of_garbled(encoding: str) -> None:
    with pytest.raises(CaptionError, match="save it as UTF-8"):
        decode("a café".encode(encoding))


def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="No such file"):
        read_text(tmp_path / "absent.txt")
