"""Whatever is wrong with a state, it is found and named, and the one before is used; a user's copies are left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdtrain.errors import UserError
from sdtrain.files.header import read_header
from sdtrain.files.tensors import planned, read_tensors, write_safetensors
from sdtrain.training.keeping.manifest import SavedState, saved_states
from sdtrain.training.keeping.newest import find_newest
from sdtrain.training.keeping.states import UnusableNumbersError, load_state
from tests.faults.small_states import SmallRun, run_with_states

FILES = ("config.toml", "optimizer.safetensors", "parameters.safetensors", "pictures.json", "state.json")
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    run_with_states(folder, 3)
    return folder


@pytest.fixture
def states(three: Path, tmp_path: Path) -> Path:
    """States of steps 1, 2 and 3."""
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def newest_step(folder: Path) -> tuple[int, list[str]]:
    found = find_newest(folder)
    assert found.state is not None
    return found.state.step, [f"{path.name}: {reason}" for path, reason in found.passed_over]


def test_the_newest_state_is_used_when_it_is_whole(states: Path) -> None:
    assert sorted(path.name for path in (states / "step-000003").iterdir()) == list(FILES)
    assert newest_step(states) == (3, [])


@pytest.mark.parametrize("name", FILES)
@quickly
@given(data=st.data())
def test_one_flipped_bit_anywhere_in_any_file_of_a_state_is_found(three: Path, name: str, data: st.DataObject) -> None:
    path = three / "step-000003" / name
    whole = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    try:
        path.write_bytes(damaged)
        step, told = newest_step(three)
    finally:
        path.write_bytes(whole)
    assert step == 2 and len(told) == 1
    assert told[0].startswith("step-000003: it is damaged (") and name in told[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["empty", "half", "short", "long", "missing", "a folder", "of before"])
def test_a_file_that_is_cut_or_gone_or_another_is_found(states: Path, name: str, how: str) -> None:
    path = states / "step-000003" / name
    whole = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "a folder":
            path.unlink()
            path.mkdir()
        case "of before":
            earlier = (states / "step-000002" / name).read_bytes()
            assert earlier != whole
            path.write_bytes(earlier)
        case _:
            contents = {"empty": b"", "half": whole[: len(whole) // 2], "short": whole[:-1]}
            path.write_bytes(contents.get(how, whole + b" "))
    if (name, how) == ("state.json", "long"):
        assert newest_step(states) == (3, []), "a blank at the end of the index says nothing else"
        return
    step, (told,) = newest_step(states)
    assert step == 2 and name in told


@pytest.mark.parametrize(
    "content", ["{}", "5", "[]", "null", '{"version": 2}', '{"version": 3, "step": 3}', "[" * 9999]
)
def test_an_index_that_says_something_else_is_no_index(states: Path, content: str) -> None:
    (states / "step-000003" / "state.json").write_text(content)
    step, (told,) = newest_step(states)
    assert step == 2 and "state.json" in told


def test_several_damaged_states_are_all_named_and_the_newest_whole_one_is_used(states: Path) -> None:
    (states / "step-000003" / "state.json").write_bytes(b"")
    (states / "step-000002" / "optimizer.safetensors").unlink()
    step, told = newest_step(states)
    assert step == 1 and len(told) == 2


def test_where_no_state_is_whole_nothing_is_begun_anew_in_silence(states: Path) -> None:
    for folder in states.iterdir():
        (folder / "parameters.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"not one is whole .*step-000003.*step-000001.*move .* away to begin anew"):
        find_newest(states)


def test_a_users_copies_beside_the_states_are_not_states(states: Path) -> None:
    for name in ("step-000003.bak", "step-000003 (copy)", "step-000004 ", "step-4", "copy of step-000003", "step-"):
        shutil.copytree(states / "step-000003", states / name)
    (states / "step-000009").write_text("a file")
    assert newest_step(states) == (3, [])
    assert [state.step for state in saved_states(states)] == [1, 2, 3]


def test_a_folder_renamed_to_another_step_is_not_the_state_of_that_step(states: Path) -> None:
    (states / "step-000003").rename(states / "step-000007")
    step, (told,) = newest_step(states)
    assert step == 2 and "state.json is that of step 3" in told


def test_a_state_that_only_looks_whole_is_written_again(states: Path) -> None:
    (states / "step-000003" / "optimizer.safetensors").write_bytes(b"")
    run_with_states(states, 3)
    assert newest_step(states) == (3, [])


# ---------------------------------------------------------------- numbers


def test_numbers_that_are_not_finite_are_not_saved_and_the_good_states_stay(states: Path) -> None:
    run = run_with_states(states, 3)
    run.step()
    with torch.no_grad():
        run.parameters["b"][7] = float("nan")
    with pytest.raises(UnusableNumbersError, match=r"1 of .* tensors are not finite, for example unet/b"):
        run.save(states, keep=1)
    assert [state.step for state in saved_states(states)] == [1, 2, 3]


def test_large_numbers_are_finite_numbers_though_their_sum_is_not(tmp_path: Path) -> None:
    run = SmallRun()
    with torch.no_grad():
        run.parameters["a"].fill_(3e38)
    run.save(tmp_path)
    assert newest_step(tmp_path) == (0, [])


@pytest.mark.parametrize("values", [(float("inf"), float("-inf")), (float("nan"), 0.0), (float("-inf"), 1.0)])
def test_no_sort_of_number_that_is_not_finite_is_saved(tmp_path: Path, values: tuple[float, float]) -> None:
    run = SmallRun()
    with torch.no_grad():
        run.parameters["b"][:2] = torch.tensor(values)
    with pytest.raises(UnusableNumbersError):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_states_taken_while_the_loss_is_not_finite_never_push_out_a_good_one(tmp_path: Path) -> None:
    run = run_with_states(tmp_path, 2)
    for _ in range(4):
        run.step()
        run.save(tmp_path, keep=2, loss_is_finite=False)
    assert [state.step for state in saved_states(tmp_path)] == [1, 2, 6]
    step, (told,) = newest_step(tmp_path)
    assert step == 2 and "step-000006: it was taken while the loss was not finite" in told
    run.step()
    run.save(tmp_path, keep=2)
    assert [state.step for state in saved_states(tmp_path)] == [2, 7], "the loss has recovered"


def test_where_there_is_no_better_one_a_doubtful_state_is_used(tmp_path: Path) -> None:
    run = SmallRun()
    for _ in range(2):
        run.step()
        run.save(tmp_path, loss_is_finite=False)
    assert newest_step(tmp_path) == (2, [])


# ---------------------------------------------------------------- older states


def as_before(folder: Path) -> SavedState:
    """Makes the newest state one of version 1, which had two files and their step."""
    state = folder / "step-000003"
    (state / "config.toml").unlink()
    (state / "pictures.json").unlink()
    (state / "state.json").write_text('{"version": 1, "step": 3}')
    found = find_newest(folder).state
    assert found is not None
    return found


def test_a_state_of_before_is_loaded_and_known_to_be_unchecked(states: Path) -> None:
    expected = run_with_states(states.parent / "again", 3)
    state = as_before(states)
    assert state.step == 3 and not state.is_checked
    run = SmallRun()
    load_state(state, run.trainable, run.optimizer)
    assert run.bits() == expected.bits()


@pytest.mark.parametrize("how", ["truncated", "header", "of another step", "nan"])
def test_what_can_be_seen_of_an_older_state_is_looked_at(states: Path, how: str) -> None:
    state = as_before(states)
    path = state.folder / "optimizer.safetensors"
    content = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[:-1])
        case "header":
            path.write_bytes(content.replace(b"param_groups", b"param_grouqs", 1))
        case "of another step":
            path.write_bytes((states / "step-000002" / path.name).read_bytes())
        case _:
            header = read_header(state.folder / "parameters.safetensors")
            tensors = read_tensors(header)
            tensors["unet/a"][0] = float("inf")
            write_safetensors(header.path, planned(tensors), {})
    if how in ("truncated", "of another step"):
        assert newest_step(states)[0] == 2
        return
    run = SmallRun()
    before = run.bits()
    with pytest.raises(UserError, match=r"cannot be used: .*move its folder away to go on from the one before"):
        load_state(state, run.trainable, run.optimizer)
    assert run.bits() == before, "nothing was changed"


# ---------------------------------------------------------------- what may change


def test_a_loaded_state_goes_on_bit_for_bit(states: Path) -> None:
    straight, resumed = run_with_states(states.parent / "straight", 3), SmallRun()
    state = find_newest(states).state
    assert state is not None
    resumed.steps = load_state(state, resumed.trainable, resumed.optimizer)
    for run in (straight, resumed):
        run.step()
        run.step()
    assert straight.bits() == resumed.bits()


def test_d_coef_is_that_of_now_and_not_that_of_the_state(states: Path) -> None:
    state = find_newest(states).state
    assert state is not None
    run = SmallRun(d_coef=0.5)
    load_state(state, run.trainable, run.optimizer)
    assert [group["d_coef"] for group in run.optimizer.param_groups] == [0.5]


@pytest.mark.parametrize(("now", "after"), [(0.5, 0.5), (2.0, 1.0)])
def test_a_d_coef_that_follows_from_the_steps_only_falls(states: Path, now: float, after: float) -> None:
    state = find_newest(states).state
    assert state is not None
    run = SmallRun(d_coef=now)
    load_state(state, run.trainable, run.optimizer, own_d_coef=False)
    assert [group["d_coef"] for group in run.optimizer.param_groups] == [after], "that of the state is 1"


def test_a_state_in_float32_goes_on_in_bfloat16_and_back(states: Path) -> None:
    state = find_newest(states).state
    assert state is not None
    full, half = SmallRun(), SmallRun(dtype=torch.bfloat16)
    load_state(state, full.trainable, full.optimizer)
    half.steps = load_state(state, half.trainable, half.optimizer)
    for name, parameter in half.parameters.items():
        assert torch.equal(parameter, full.parameters[name].bfloat16())
    half.step()
    half.save(states)
    again = find_newest(states).state
    assert again is not None and again.step == 4
    load_state(again, full.trainable, full.optimizer)
    full.step()


def test_the_index_of_a_state_is_one_line_of_json_that_names_every_file(states: Path) -> None:
    index = json.loads((states / "step-000003" / "state.json").read_text())
    assert sorted(index["files"]) == [name for name in FILES if name != "state.json"]
    for name, facts in index["files"].items():
        assert facts["bytes"] == (states / "step-000003" / name).stat().st_size
