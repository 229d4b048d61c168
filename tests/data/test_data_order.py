"""Laws of the order in which pictures are seen."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sdtrain.data.counts import Counts
from sdtrain.data.order import Order, Piece, Start, dropped, split

SHAPES = [(64, 64), (96, 32), (32, 96)]


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int], int, int, int]:
    num = draw(st.integers(1, 20))
    buckets = draw(st.lists(st.sampled_from(SHAPES), min_size=num, max_size=num))
    repeats = draw(st.lists(st.integers(1, 3), min_size=num, max_size=num))
    return buckets, repeats, draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 9))


Setting = tuple[list[tuple[int, int]], list[int], int, int, int]


def make(setting: Setting) -> Order:
    buckets, repeats, batch_size, accumulation, seed = setting
    return Order(buckets, repeats, batch_size=batch_size, accumulation=accumulation, seed=seed)


@given(orders(), st.integers(0, 5))
def test_each_picture_is_seen_exactly_repeats_times_in_every_epoch(setting: Setting, epoch: int) -> None:
    order = make(setting)
    seen = Counter(number for batch in order.epoch(epoch) for number in batch)
    assert seen == dict(enumerate(setting[1]))
    assert order.num_images == sum(setting[1])


@given(orders())
def test_a_batch_never_mixes_buckets_and_is_never_too_large_or_empty(setting: Setting) -> None:
    for batch in make(setting).epoch(0):
        assert len({setting[0][number] for number in batch}) == 1
        assert 1 <= len(batch) <= setting[2]


@given(orders(), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_what_a_step_sees_does_not_depend_on_the_steps_before(setting: Setting, steps: list[int]) -> None:
    wandering = make(setting)
    for step in steps:
        assert wandering.step(step) == make(setting).step(step)


@given(orders())
def test_steps_one_after_the_other_are_the_epochs_one_after_the_other(setting: Setting) -> None:
    order = make(setting)
    accumulation = setting[3]
    steps = [order.step(step) for step in range(order.batches_per_epoch)]
    assert all(len(batches) == accumulation for batches in steps)
    epochs = [batch for epoch in range(accumulation) for batch in order.epoch(epoch)]
    assert [batch for batches in steps for batch in batches] == epochs
    assert order.steps_per_epoch * accumulation == order.batches_per_epoch


def test_epochs_and_seeds_differ() -> None:
    setting: Setting = ([SHAPES[0]] * 30, [1] * 30, 4, 1, 0)
    assert make(setting).epoch(0) != make(setting).epoch(1)
    assert make(setting).epoch(0) != make((*setting[:4], 1)).epoch(0)


def test_batches_of_all_buckets_are_shuffled_together() -> None:
    buckets = SHAPES[:2] * 40
    batches = make((buckets, [1] * 80, 1, 1, 0)).epoch(0)
    first_half = Counter(buckets[batch[0]] for batch in batches[:40])
    assert all(count > 10 for count in first_half.values())


def test_the_order_of_a_seed_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert make(([SHAPES[0]] * 6, [1] * 6, 2, 1, 3)).epoch(2) == [(1, 4), (3, 0), (2, 5)]


@given(st.integers(0, 9), st.integers(0, 999), st.integers(0, 3))
def test_dropout_is_a_function_of_seed_step_and_place_and_obeys_its_limits(seed: int, step: int, index: int) -> None:
    assert dropped(seed, step, index, 8, 0.5) == dropped(seed, step, index, 8, 0.5)
    assert not any(dropped(seed, step, index, 8, 0.0))
    assert all(dropped(seed, step, index, 8, 1.0))


def test_dropout_differs_from_seed_to_seed_step_to_step_and_batch_to_batch() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    assert len({tuple(dropped(*place, 64, 0.5)) for place in places}) == len(places)


def test_dropout_leaves_empty_about_its_share() -> None:
    empty = [flag for step in range(2000) for flag in dropped(0, step, 0, 4, 0.1)]
    assert 0.08 < sum(empty) / len(empty) < 0.12


@given(orders(), st.integers(0, 5), st.integers(1, 12))
def test_however_a_step_is_split_each_planned_picture_is_computed_once_and_no_batch_mixes_buckets(
    setting: Setting, step: int, size: int
) -> None:
    order = make(setting)
    planned = order.step(step)
    buckets = [order.buckets[numbers[0]] for numbers in planned]
    parts = split([len(numbers) for numbers in planned], buckets, order.batch_size, size)
    rows = [(piece.index, place) for pieces in parts for piece in pieces for place in range(piece.start, piece.stop)]
    assert sorted(rows) == [(index, place) for index, numbers in enumerate(planned) for place in range(len(numbers))]
    for pieces in parts:
        assert len({buckets[piece.index] for piece in pieces}) == 1
        assert 1 <= sum(piece.stop - piece.start for piece in pieces) <= size
        assert all(piece.total == len(planned[piece.index]) for piece in pieces)


def test_a_step_is_computed_as_it_was_planned_unless_it_is_split() -> None:
    parts = split([1, 4, 2], [SHAPES[0]] * 3, 4, 4)
    assert parts == [(Piece(0, 0, 1, 1),), (Piece(1, 0, 4, 4),), (Piece(2, 0, 2, 2),)]
    assert [len(pieces) for pieces in split([1, 4, 2], [SHAPES[0]] * 3, 4, 8)] == [3], "more at once joins them"
    assert [len(pieces) for pieces in split([1, 4, 2], [SHAPES[0], SHAPES[1], SHAPES[0]], 4, 8)] == [2, 1]


@given(orders(), st.integers(0, 40), st.data())
def test_an_order_that_takes_over_in_an_epoch_shows_what_is_left_of_it_and_then_whole_epochs(
    setting: Setting, step: int, data: st.DataObject
) -> None:
    """The pictures are the same here, in another order, so that every epoch must be whole over both."""
    buckets, repeats, batch_size, accumulation, seed = setting
    before = make(setting)
    epoch, left = before.left(step)
    places = data.draw(st.permutations(range(len(buckets))))
    start = Start(step, epoch, tuple(left[place] for place in places))
    after = Order(
        [buckets[place] for place in places],
        [repeats[place] for place in places],
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        start=start,
    )
    seen = Counter(
        place
        for index in range(step * accumulation)
        for at, position in [divmod(index, before.batches_per_epoch)]
        if at == epoch
        for place in before.epoch(at)[position]
    )
    seen.update(places[number] for numbers in after.epoch(epoch) for number in numbers)
    assert seen == dict(enumerate(repeats)), "an epoch has each picture as often as it says, whoever showed it"
    drawn = [numbers for later in range(step, step + 30) for numbers in after.step(later)]
    expected = [numbers for at in range(epoch, epoch + 200) for numbers in after.epoch(at)]
    assert drawn == expected[: len(drawn)]
    assert after.left(step) == ((epoch, start.left) if any(start.left) else (epoch + 1, after.left(step)[1]))


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[float], int, int, int]:
    """Orders with parts of repeats."""
    buckets, _, *rest = draw(orders())
    some = st.sampled_from([0.05, 0.2, 0.5, 1.0, 1.5, 2])
    repeats = draw(st.lists(some, min_size=len(buckets), max_size=len(buckets)))
    return buckets, repeats, *rest


@given(parts(), st.integers(0, 12))
def test_an_epoch_has_each_picture_whole_times_and_a_part_of_those_alike(setting: Setting, epoch: int) -> None:
    buckets, repeats, batch_size, _, _ = setting
    order = make(setting)
    seen = Counter(number for batch in order.epoch(epoch) for number in batch)
    assert [seen[number] for number in range(len(repeats))] == list(order.counts(epoch))
    for part in {times % 1 for times in repeats}:
        alike = [number for number, times in enumerate(repeats) if times % 1 == part]
        more = [seen[number] - int(repeats[number]) for number in alike]
        assert set(more) <= {0, 1}
        assert sum(more) in {int(len(alike) * part), int(len(alike) * part) + 1} or part == 0 == sum(more)
    assert all(len({buckets[number] for number in batch}) == 1 for batch in order.epoch(epoch))
    assert all(1 <= len(batch) <= batch_size for batch in order.epoch(epoch))


@given(parts(), st.lists(st.integers(0, 80), min_size=1, max_size=8))
def test_steps_follow_one_another_through_epochs_of_several_lengths(setting: Setting, steps: list[int]) -> None:
    """Also through those that have no picture at all; and a step does not depend on the ones asked for before."""
    order, accumulation = make(setting), setting[3]
    flat: list[tuple[int, ...]] = []
    epochs = itertools.count()
    while len(flat) < 81 * accumulation:
        flat += make(setting).epoch(next(epochs))
    for step in steps:
        assert order.step(step) == flat[step * accumulation : (step + 1) * accumulation]


@given(parts(), st.integers(0, 30), st.data())
def test_an_order_with_parts_goes_on_where_another_one_left_it(
    setting: Setting, step: int, data: st.DataObject
) -> None:
    """What was drawn for the epoch that is under way stays drawn, whatever comes after."""
    before, accumulation = make(setting), setting[3]
    epoch, left = before.left(step)
    seen = Counter(
        number
        for index in range(step * accumulation)
        for at, position in [before._place(*divmod(index, accumulation))]
        if at == epoch
        for number in before.epoch(at)[position]
    )
    assert [count - seen[number] for number, count in enumerate(before.counts(epoch))] == list(left)
    buckets, repeats, batch_size, _, seed = setting
    after = Order(
        buckets, repeats, batch_size=batch_size, accumulation=accumulation, seed=seed, start=Start(step, epoch, left)
    )
    drawn = [numbers for later in range(step, step + 20) for numbers in after.step(later)]
    expected = [numbers for at in range(epoch, epoch + 2000) for numbers in after.epoch(at)]
    assert drawn == expected[: len(drawn)]
    seen.update(number for numbers in after.epoch(epoch) for number in numbers)
    assert [seen[number] for number in range(len(buckets))] == list(before.counts(epoch))
    assert after.counts(epoch + 1) == before.counts(epoch + 1)


def test_a_part_is_a_probability_and_epochs_and_seeds_differ() -> None:
    repeats = [0.25] * 10
    counts = [Counts(repeats, seed=3).at(epoch) for epoch in range(2000)]
    shares = [sum(column) / len(counts) for column in zip(*counts, strict=True)]
    assert all(0.21 < share < 0.29 for share in shares)
    assert {sum(count) for count in counts} == {2, 3}
    assert len(set(counts)) > 50 and Counts(repeats, seed=4).at(0) != counts[0]


def test_whole_numbers_are_ordered_as_they_were_before_there_were_parts() -> None:
    whole, also = make(([SHAPES[0]] * 6, [1] * 6, 2, 1, 3)), make(([SHAPES[0]] * 6, [1.0] * 6, 2, 1, 3))
    assert [whole.step(step) for step in range(9)] == [also.step(step) for step in range(9)]
