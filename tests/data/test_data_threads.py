"""Laws of doing things with many files at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sdtrain.data.threads import NUM_THREADS, map_ahead


def test_results_come_in_order() -> None:
    assert list(map_ahead(lambda number: number * 2, range(100))) == [number * 2 for number in range(100)]


def test_only_a_little_is_computed_ahead() -> None:
    taken: list[int] = []

    def counted() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = map_ahead(lambda number: number, counted())
    next(results)
    assert len(taken) <= 2 * NUM_THREADS + 1


def test_an_error_comes_where_its_result_would() -> None:
    results = map_ahead(lambda number: 1 // number, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
