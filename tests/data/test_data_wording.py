"""Laws of how texts become captions: what is kept, what moves, and what a draw depends on."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.data.captions.text import normalise, texts_of
from sdtrain.data.captions.wording import Varied, Wording, holds_word, worded

TAGS = st.lists(st.text("abc xyz", min_size=1).map(normalise).filter(bool), min_size=1, max_size=8, unique=True)


def caption(text: str, **wording: object) -> str:
    return worded((text,), Wording(**wording))[0]


@given(st.text())
def test_without_settings_a_caption_is_its_text(text: str) -> None:
    assert worded(texts_of(text, "joined"), Wording()) == (normalise(text), None)


@pytest.mark.parametrize(
    ("wording", "expected"),
    [
        ({"prefix": "photo of"}, "photo of a dog"),
        ({"suffix": "on grass"}, "a dog on grass"),
        ({"suffix": ", film grain"}, "a dog, film grain"),
        ({"trigger": "sks"}, "sks, a dog"),
        ({"trigger": "a dog"}, "a dog"),
        ({"trigger": "A DOG", "prefix": "photo of"}, "photo of a dog"),
        ({"trigger": "do"}, "do, a dog"),
    ],
)
def test_prefix_suffix_and_trigger_stand_where_they_should(wording: dict[str, str], expected: str) -> None:
    assert caption("a dog", **wording) == expected


def test_a_picture_without_a_text_is_captioned_by_the_trigger_alone() -> None:
    assert worded((), Wording(trigger="sks", prefix="photo of")) == ("photo of sks", None)
    assert worded((), Wording()) == ("", None)


@pytest.mark.parametrize(("text", "held"), [("a SKS dog", True), ("sks", True), ("sksy", False), ("c++ sks, x", True)])
def test_a_word_is_found_whole_and_in_any_case(text: str, held: bool) -> None:
    assert holds_word(text, "sks") is held


@given(TAGS, st.integers(0, 4), st.integers(0, 99))
def test_shuffled_tags_are_the_same_tags_and_the_first_ones_stay(tags: list[str], keep: int, seed: int) -> None:
    wording = Wording(shuffle=True, keep=keep)
    plain, varied = worded((", ".join(tags),), wording)
    assert plain == ", ".join(tags)
    assert (varied is not None) == (len(tags) - keep > 1)
    if varied:
        drawn = varied.draw(Random(seed)).split(", ")
        assert sorted(drawn) == sorted(tags) and drawn[:keep] == tags[:keep]


def test_every_tag_comes_to_every_place() -> None:
    varied = worded(("a, b, c, d",), Wording(shuffle=True, keep=1))[1]
    assert varied is not None
    drawn = {varied.draw(Random(seed)) for seed in range(200)}
    assert len(drawn) == 6 and all(one.startswith("a, ") for one in drawn)


def test_tags_before_the_sign_stay_and_the_sign_is_gone() -> None:
    plain, varied = worded(("a, b ||| c, d",), Wording(shuffle=True, keep_separator="|||"))
    assert plain == "a, b, c, d" and varied is not None
    assert {varied.draw(Random(seed)) for seed in range(30)} == {"a, b, c, d", "a, b, d, c"}


def test_left_out_tags_are_the_share_that_was_asked_for_and_kept_ones_stay() -> None:
    varied = worded((", ".join("abcdefghij"),), Wording(dropout=0.3, keep=2))[1]
    assert varied is not None
    drawn = [varied.draw(Random(seed)).split(", ") for seed in range(2000)]
    assert all(tags[:2] == ["a", "b"] and tags == sorted(tags) for tags in drawn)
    share = 1 - sum(len(tags) - 2 for tags in drawn) / (8 * len(drawn))
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / (8 * len(drawn))) ** 0.5  # four standard errors


def test_tags_are_cut_at_the_separator_of_the_settings() -> None:
    varied = worded(("a b; c, d",), Wording(shuffle=True, separator=";"))[1]
    assert varied is not None
    assert {varied.draw(Random(seed)) for seed in range(30)} == {"a b; c, d", "c, d; a b"}


def test_wildcards_are_drawn_inside_out_and_only_where_asked_for() -> None:
    text = "a {red|blue|{light|dark} green} {cat}"
    assert worded((text,), Wording()) == (text, None)
    plain, varied = worded((text,), Wording(wildcards=True))
    assert plain == "a red {cat}" and varied is not None
    colours = ("red", "blue", "light green", "dark green")
    assert {varied.draw(Random(seed)) for seed in range(99)} == {f"a {colour} {{cat}}" for colour in colours}


@given(st.text("{|}ab", max_size=30))
def test_any_braces_end_in_a_caption(text: str) -> None:
    plain, varied = worded((text,), Wording(wildcards=True))
    assert worded((plain,), Wording(wildcards=True))[1] is None
    if varied:
        assert worded((varied.draw(Random(0)),), Wording(wildcards=True))[1] is None


def test_lines_are_one_caption_or_several_as_chosen() -> None:
    text = "a cat\r\n\n  on a  mat \na cat\n"
    assert texts_of(text, "joined") == ("a cat on a mat a cat",)
    assert texts_of(text, "drawn") == ("a cat", "on a mat")
    _, varied = worded(("one", "two"), Wording(trigger="sks"))
    assert varied is not None
    assert {varied.draw(Random(seed)) for seed in range(30)} == {"sks, one", "sks, two"}


def test_what_is_encoded_ahead_is_each_text_once_or_up_to_the_number_of_wordings() -> None:
    still = Varied(("one", "two", "three"), Wording())
    assert still.variants(2) == ("one", "two", "three")
    moving = Varied(("a, b, c, d, e", "still"), Wording(shuffle=True))
    variants = moving.variants(4)
    assert variants == moving.variants(4) and variants[-1] == "still"
    assert 2 <= len(variants) <= 5 and len(set(variants)) == len(variants)
    assert moving.variants(1)[0] == variants[0]  # more of them are more, not others
