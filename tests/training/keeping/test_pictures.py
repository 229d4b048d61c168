"""What has become of the pictures of a run is told rightly, and no picture is lost or doubled by position."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data.order import Order, Start
from sdtrain.training.keeping.pictures import Picture, compare, left_now, read_register, register_text, told

unhurried = settings(deadline=None, max_examples=150)


@st.composite
def registers(draw: st.DrawFn, least: int = 1) -> tuple[Picture, ...]:
    """Names differ, as files do; digests and captions may be those of another picture."""
    names = draw(st.lists(st.sampled_from("abcdefghij"), min_size=least, max_size=8, unique=True))
    return tuple(
        Picture(
            name=name,
            digest=draw(st.sampled_from(["d1", "d2", "d3", "d4", "d5", "d6"])),
            caption=draw(st.sampled_from(["c1", "c2"])),
            width_px=draw(st.sampled_from([64, 96])),
            height_px=64,
            repeats=draw(st.integers(1, 3)),
        )
        for name in names
    )


def content(picture: Picture) -> tuple[str, str, int]:
    return picture.digest, picture.caption, picture.repeats


@unhurried
@given(registers(), registers())
def test_every_picture_is_kept_added_or_removed_exactly_once(
    before: tuple[Picture, ...], now: tuple[Picture, ...]
) -> None:
    changes = compare(before, now)
    kept = [number for number in changes.before if number is not None]
    assert sorted([*kept, *changes.removed]) == list(range(len(before)))
    assert len(kept) + len(changes.added) == len(now)
    for number, old in enumerate(changes.before):
        if old is not None:
            assert (number in changes.changed) == (content(before[old]) != content(now[number]))


@unhurried
@given(registers(), st.data())
def test_other_names_and_another_order_are_no_change(before: tuple[Picture, ...], data: st.DataObject) -> None:
    now = [replace(picture, name=f"moved/{picture.name}") for picture in data.draw(st.permutations(before))]
    changes = compare(before, now)
    assert not changes and not changes.changed
    assert [content(before[number or 0]) for number in changes.before] == [content(picture) for picture in now]


@unhurried
@given(registers(), registers())
def test_nothing_is_called_unchanged_that_is_not(before: tuple[Picture, ...], now: tuple[Picture, ...]) -> None:
    same = Counter(map(content, before)) == Counter(map(content, now))
    if not compare(before, now):
        assert same


def test_an_edited_picture_is_changed_and_a_renamed_one_is_not_and_the_line_says_so() -> None:
    a, b, c = (Picture(name, name.upper(), "c", 64, 64, 1) for name in "abc")
    now = [
        replace(a, digest="other"),
        replace(c, name="z"),
        *(Picture(f"n{n}", f"N{n}", "c", 64, 64, 1) for n in range(5)),
    ]
    changes = compare([a, b, c], now)
    assert told(changes, [a, b, c], now) == ("pictures: 5 added (n0, n1, n2 and 2 more), 1 removed (b), 1 changed (a)")


@unhurried
@given(registers(), st.integers(0, 9), st.integers(1, 3))
def test_a_register_reads_back_as_it_was(pictures: tuple[Picture, ...], step: int, epoch: int) -> None:
    for start in (None, Start(step, epoch, tuple(picture.repeats for picture in pictures))):
        assert read_register(register_text(pictures, start).encode()) == (pictures, start)


def order_of(pictures: tuple[Picture, ...], start: Start | None) -> Order:
    buckets = [(picture.width_px, picture.height_px) for picture in pictures]
    repeats = [picture.repeats for picture in pictures]
    return Order(buckets, repeats, batch_size=2, accumulation=2, seed=5, start=start)


@unhurried
@given(registers(), st.lists(st.tuples(st.integers(0, 6), registers()), min_size=1, max_size=3))
def test_however_often_the_pictures_change_an_epoch_shows_each_as_often_as_its_folder_says(
    pictures: tuple[Picture, ...], sittings: list[tuple[int, tuple[Picture, ...]]]
) -> None:
    """Counted by hand: what was seen in the epoch that is under way belongs to the picture, by whatever number."""
    order, step, seen, epoch = order_of(pictures, None), 0, [0] * len(pictures), 0
    for num_steps, later in sittings:
        for _ in range(num_steps):
            for index in range(2):
                at, position = order._place(step, index)
                if at != epoch:
                    epoch, seen = at, [0] * len(pictures)
                for number in order.epoch(at)[position]:
                    seen[number] += 1
            step += 1
        at, left_before = order.left(step)
        if at != epoch:
            epoch, seen = at, [0] * len(pictures)
        assert [picture.repeats - count for picture, count in zip(pictures, seen, strict=True)] == list(left_before)
        changes = compare(pictures, later)
        counts = [pictures, later]
        whole = tuple(tuple(order_of(those, None).counts(epoch)) for those in counts)
        left = left_now(changes, pictures, later, left_before, whole)
        seen = [0 if old is None else seen[old] for old in changes.before]
        for picture, count, rest in zip(later, seen, left, strict=True):
            assert rest == picture.repeats - count, "neither lost nor doubled"
        pictures, order = later, order_of(later, Start(step, epoch, left))
