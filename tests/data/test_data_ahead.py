"""Laws of reading ahead: the values are those of their keys, memory is bounded, and the thread ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.config.schema import DataConfig
from sdtrain.data import cache as store
from sdtrain.data.batches import Batches
from sdtrain.data.entries.ahead import DEPTH, ReadAhead
from tests.data.test_data_batches import same

Prepare = Callable[..., Batches]
MakeConfig = Callable[..., DataConfig]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=8)), max_size=12))
def test_whatever_is_expected_the_value_is_that_of_its_key(asked: list[tuple[int, list[int]]]) -> None:
    ahead = ReadAhead(lambda key: key * 10)
    for key, following in asked:
        assert ahead.get(key, following) == key * 10
        assert len(ahead._waiting) <= DEPTH
    ahead.close()


def test_what_comes_next_is_read_while_this_is_in_use() -> None:
    read, done = [], threading.Event()

    def note(key: int) -> int:
        read.append(key)
        if key == 2:
            done.set()
        return key

    ahead = ReadAhead(note, depth=2)
    assert ahead.get(0, [1, 2, 3]) == 0
    assert done.wait(10) and read == [0, 1, 2]
    assert ahead.get(1, [2]) == 1 and read == [0, 1, 2], "nothing is read twice"
    ahead.close()


def test_an_error_is_raised_where_its_value_is_asked_for() -> None:
    def read(key: int) -> int:
        if key == 1:
            raise OSError("gone")
        return key

    ahead = ReadAhead(read)
    assert ahead.get(0, [1, 2]) == 0
    with pytest.raises(OSError, match="gone"):
        ahead.get(1, [2])
    assert ahead.get(2, []) == 2
    ahead.close()


def test_steps_that_are_read_ahead_are_those_that_are_held_whoever_asks_in_what_order(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(pictures, caption_dropout=0.3, gradient_accumulation=3)
    held = prepare(settings, counting.encoders())
    monkeypatch.setattr(store, "HELD_BYTES", 0)
    ahead = prepare(settings, counting.encoders())
    before = len(threads())
    asked = [(0, None, 0, 1), (1, None, 0, 1), (2, 1, 0, 1), (2, None, 0, 1), (9, None, 1, 2), (3, None, 0, 1)]
    for step, batch_size, hand, hands in asked:
        pairs = zip(
            ahead.at(step, batch_size, hand=hand, hands=hands),
            held.at(step, batch_size, hand=hand, hands=hands),
            strict=True,
        )
        assert all(same(one, other) and share == other_share for (one, share), (other, other_share) in pairs)
        next(ahead.at(step + 1))  # a step that is given up
    assert len(threads()) == before + 1
    ahead.close()
    assert len(threads()) == before
    assert same(next(ahead.at(0))[0], next(held.at(0))[0]), "and it may begin anew"
    ahead.close()


def test_for_a_card_what_is_held_is_made_ahead_too_and_pinned_in_the_thread(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned_by: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned_by.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    held, ahead = (prepare(config(pictures), counting.encoders(), pin=pins) for pins in (False, True))
    assert all(same(next(ahead.at(step))[0], next(held.at(step))[0]) for step in (0, 1, 5))
    ahead.close()
    assert pinned_by and all(name.startswith("read-ahead") for name in pinned_by)


def test_a_run_that_reads_ahead_is_the_run_that_holds_all_also_when_it_goes_on_and_its_thread_ends(
    train: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(run: Path) -> dict[str, bytes]:
        folder = run / "checkpoints" / "step-000004"
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    before = len(threads())
    held, _ = train({"name": "held"})
    monkeypatch.setattr(store, "HELD_BYTES", 0)
    began: list[int] = []
    train({"name": "ahead", "steps": 2}, watchers=[lambda record: began.append(len(threads()))])
    assert max(began) == before + 1
    ahead, _ = train({"name": "ahead", "steps": 4}, resume=True)
    assert len(threads()) == before
    assert states(held) == states(ahead) != {}


def test_the_thread_ends_with_a_run_that_fails(
    train: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.training.computing.objective import Objective

    def fail(*_: Any) -> None:
        raise RuntimeError("the card fell out")

    before = len(threads())
    monkeypatch.setattr(store, "HELD_BYTES", 0)
    monkeypatch.setattr(Objective, "__call__", fail)
    with pytest.raises(RuntimeError, match="the card fell out"):
        train({"steps": 1})
    assert len(threads()) == before
