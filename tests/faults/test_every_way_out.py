"""Every way out of a run saves what was reached, and says so; who only looks ends no run."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optim.stepper import Stepper
from optim.steps import plain
from sdtrain import NoteRecord, Record, StepRecord
from sdtrain.errors import Interrupted, OutOfMemoryError
from sdtrain.models import sampling
from sdtrain.training import outputs
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.signals import StopRequests
from sdtrain.training.watching.log import Log
from sdtrain.training.watching.screen import Screen
from tests.faults.conftest import Ran, Run, until

FULL = {"method": {"kind": "full"}, "memory.fused_back_pass": True}


def losses(ran: Ran) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (ran.folder / "log.jsonl").read_text().splitlines() if '"groups"' in line
    ]


def at_step(number: int, signal_number: int) -> Callable[[Record], None]:
    def watch(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == number:
            signal.raise_signal(signal_number)

    return watch


def raising_at(call: int, error: Exception, original: Callable[..., Any]) -> Callable[..., Any]:
    """The original, but for one call, which raises."""
    calls = 0

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*arguments, **named)

    return broken


def assert_equal_in_the_end(straight: Ran, run: Run, name: str) -> None:
    """A run that ended early goes on and is what it would have been."""
    resumed = run({"name": name}, resume=True)
    assert resumed.result is not None and resumed.result.finished
    assert resumed.state(4) == straight.state(4)
    assert losses(resumed) == losses(straight)


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGHUP, "SIGHUP", 129),
        (signal.SIGUSR1, "SIGUSR1", 138),
    ],
)
def test_a_signal_saves_state_and_weights_and_says_how_to_go_on(
    run: Run, straight: Ran, number: int, name: str, code: int
) -> None:
    handler = signal.getsignal(number)
    ran = run(watchers=[at_step(2, number)])
    assert signal.getsignal(number) is handler, "the signals do what they did before"
    assert ran.result is not None and not ran.result.finished and ran.result.exit_code == code
    assert ran.state(2) == straight.state(2)
    assert ran.weights() == ["small-step-000002.safetensors"]
    assert f"{name}: finishing step 2, saving" in ran.text
    assert ("once more leaves now" in ran.text) == (number == signal.SIGINT)
    assert f"stopped by {name} after 2 of 4 steps" in ran.text
    assert f"go on: sdtrain fit {ran.folder}/config.toml --resume" in ran.text
    assert_equal_in_the_end(straight, run, "small")


def test_weights_of_a_stop_are_the_averaged_ones_and_as_many_stay_as_states(run: Run) -> None:
    early = run({"name": "early"}, watchers=[at_step(2, signal.SIGTERM)])
    for step in (3, 4):
        run({"name": "early", "steps": 9}, resume=True, watchers=[at_step(step, signal.SIGTERM)])
    assert early.weights() == ["early-step-000003.safetensors", "early-step-000004.safetensors"]
    whole = run({"name": "whole"})
    assert whole.weights() == ["whole.safetensors"]
    found = load_file(early.folder / "weights" / "early-step-000004.safetensors")
    expected = load_file(whole.folder / "weights" / "whole.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_repeated_signal_of_a_machine_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.training.ending.signals.SAME_PRESS_S", 0.0)

    def twice(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)

    ran = run(watchers=[twice])
    assert ran.result is not None and ran.result.exit_code == 129
    assert ran.states() == ["step-000002"]


def test_a_second_ctrl_c_leaves_at_once_and_says_what_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.training.ending.signals.SAME_PRESS_S", 0.0)
    original, calls = Objective.__call__, itertools.count(1)

    def impatient(self: Objective, *arguments: Any) -> torch.Tensor:
        if next(calls) == 3:
            # States are written beside the training: the one of step 2 may not be there yet.
            until(lambda: (Path(self.config.output) / "small" / "checkpoints" / "step-000002").exists())
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(Objective, "__call__", impatient)
    ran = run({"checkpoint.every": 2})
    assert isinstance(ran.error, KeyboardInterrupt)
    assert ran.states() == ["step-000002"] and not ran.weights()
    newest = ran.folder / "checkpoints" / "step-000002"
    assert f"leaving at once; the newest whole training state is {newest}; go on: sdtrain fit" in ran.text


def test_a_signal_before_the_first_step_is_answered_and_leaves_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtrain.training.fit.load", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    ran = run()
    assert isinstance(ran.error, Interrupted) and ran.error.exit_code == 143
    assert "SIGTERM: stopped while loading the model; nothing was trained yet, so there is nothing to save" in ran.text
    assert not ran.folder.exists()


def test_the_answer_tells_what_was_done_when_the_signal_came_however_late_it_is() -> None:
    said, doing = list[str](), ["giving up the preview"]
    stop = StopRequests(said.append, leave=False)
    stop.finish_first(lambda: doing[0], str)
    stop._handle(signal.SIGTERM, None)
    doing[0] = "finishing the step"
    stop._answer(signal.SIGTERM)
    assert said == ["SIGTERM: giving up the preview"]


def test_a_preview_is_given_up_between_two_sampling_steps(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, after = sampling.guided, list[int]()

    def guided(*arguments: Any) -> torch.Tensor:
        after.append(1)
        if len(after) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(sampling, "guided", guided)
    ran = run({"preview.every": 2, "preview.num_inference_steps": 2})  # 0 draws the first two steps, 2 the third
    assert len(after) == 3, "no sampling step after the signal"
    assert "Ctrl-C: giving up the preview of step 2, saving; once more leaves now" in ran.text
    assert ran.state(2) == straight.state(2)
    assert not (ran.folder / "previews" / "step-000002.png").exists()
    assert_equal_in_the_end(straight, run, "small")


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error",
    [RuntimeError("the card fell out"), OSError(5, "Input/output error"), ValueError("a bug"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_a_step_keeps_the_steps_before(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", raising_at(3, error, Objective.__call__))
        ran = run()
    assert ran.error is error or isinstance(ran.error, OutOfMemoryError)
    assert ran.state(2) == straight.state(2)
    assert ran.weights() == ["small-step-000002.safetensors"]
    assert "stopped by an error after 2 of 4 steps" in ran.text and "--resume" in ran.text
    assert_equal_in_the_end(straight, run, "small")


def test_an_update_that_is_interrupted_in_its_middle_is_not_saved(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = 0

    def update(*arguments: Any, original: Callable[..., Any] = plain.update) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == per_step * 2 + per_step // 2:
            raise RuntimeError("the card fell out")
        original(*arguments)

    with monkeypatch.context() as patch:
        per_step = 10**9
        patch.setattr(plain, "update", update)
        run({"name": "counted", "steps": 1})
        per_step, pieces = pieces, 0
        assert per_step > 1
        ran = run({"checkpoint.every": 1})
    assert isinstance(ran.error, RuntimeError)
    assert ran.states() == ["step-000001", "step-000002"] and not ran.weights()
    assert "came in the middle of an update, so the weights are of no step and were not saved" in ran.text
    assert f"training state: {ran.folder}/checkpoints/step-000002" in ran.text
    assert_equal_in_the_end(straight, run, "small")


def test_an_update_that_has_not_moved_anything_yet_is_given_up(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = 0

    def measure(*arguments: Any, original: Callable[..., Any] = plain.measure) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == per_step * 2 + per_step // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(*arguments)

    with monkeypatch.context() as patch:
        per_step = 10**9
        patch.setattr(plain, "measure", measure)
        run({"name": "counted", "steps": 1})
        per_step, pieces = pieces, 0
        ran = run()
    assert isinstance(ran.error, OutOfMemoryError) and ran.error.exit_code == 1
    assert ran.states() == ["step-000002"]
    assert_equal_in_the_end(straight, run, "small")


def test_a_fused_backward_that_is_interrupted_is_not_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def step(self: Stepper, *arguments: Any, original: Callable[..., Any] = Stepper.step) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 45:  # the parameters of a step are stepped in some thirty goes
            raise RuntimeError("the card fell out")
        return original(self, *arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(Stepper, "step", step)
    ran = run(FULL | {"checkpoint.every": 1})
    assert ran.error is not None and "the card fell out" in str(ran.error)
    assert ran.states() == ["step-000001"] and not ran.weights()
    assert "came in the middle of an update" in ran.text


# ---------------------------------------------------------------------- who only looks


def test_a_preview_that_fails_is_told_and_changes_nothing(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "save_picture", raising_at(2, OSError(28, "No space left on device"), print))
    ran = run({"preview.every": 2})
    assert ran.result is not None and ran.result.finished
    assert ran.text.count("note: no preview of step 2: OSError: [Errno 28] No space left on device") == 1
    assert ran.state(4) == straight.state(4)


def test_weights_come_back_where_memory_runs_out_while_they_are_averaged(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optim import state

    monkeypatch.setattr(state, "average", raising_at(50, torch.OutOfMemoryError("CUDA out of memory"), state.average))
    ran = run({"preview.every": 2})
    assert "note: no preview of step" in ran.text
    assert ran.state(4) == straight.state(4)


def test_a_screen_that_fails_is_dropped_and_told_to_the_others(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Screen, "_step", raising_at(2, RuntimeError("no such colour"), print))
    ran = run()
    notes = [record.text for record in ran.records if isinstance(record, NoteRecord)]
    assert [note for note in notes if "the watcher Screen.see failed" in note and "no such colour" in note]
    assert ran.state(4) == straight.state(4)


def test_a_log_that_cannot_be_written_is_told_once_and_catches_up(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def write(self: Log, original: Callable[[Log], None] = Log.write) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise OSError(28, "No space left on device")
        original(self)

    monkeypatch.setattr(Log, "write", write)
    ran = run()
    assert ran.text.count("note: log.jsonl cannot be written (No space left on device)") == 1
    assert losses(ran) == losses(straight)
    assert ran.state(4) == straight.state(4)


def test_half_a_line_does_not_stay_in_the_log(tmp_path: Path) -> None:
    class Full:
        """A file on a disk that takes 10 more bytes."""

        def __init__(self) -> None:
            self.content, self.room = b"", 10

        def seek(self, offset: int, whence: int) -> int:
            return len(self.content)

        def write(self, data: bytes) -> int:
            taken = data[: self.room]
            self.content += taken
            return len(taken)

        def truncate(self, size: int) -> None:
            self.content = self.content[:size]

    log = Log(tmp_path / "log.jsonl", 0)
    log._file = full = Full()  # type: ignore[assignment]
    record = StepRecord(1, 0.5, 2, 10.0, ())
    with pytest.raises(OSError, match="only a part"):
        log.see(record)
    assert full.content == b""
    full.room = 10**6
    log.see(StepRecord(2, 0.5, 2, 10.0, ()))
    assert [json.loads(line)["step"] for line in full.content.splitlines() if b"groups" in line] == [1, 2]


@pytest.mark.parametrize(
    "odd", [b"\xff\xfe", b"5\n", b"[]\n", b'{"step": null}\n', b'{"step": ' + b"9" * 5000 + b"}\n"]
)
def test_a_log_with_odd_lines_does_not_keep_a_run_from_going_on(run: Run, odd: bytes) -> None:
    run({"steps": 1})
    log = run({"steps": 1}).folder / "log.jsonl"
    log.write_bytes(log.read_bytes() + odd)
    ran = run({"steps": 2}, resume=True)
    assert ran.error is None
    assert [json.loads(line)["step"] for line in log.read_bytes().splitlines() if b"groups" in line] == [1, 2]


def test_a_state_that_cannot_be_written_is_told_and_tried_again(
    run: Run, straight: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "TRY_AGAIN_STEPS", 2)
    broken = raising_at(1, OSError(28, "No space left on device"), outputs.save_state)
    monkeypatch.setattr(outputs, "save_state", broken)
    ran = run({"checkpoint.every": 1, "checkpoint.keep": 9, "checkpoint.in_background": False})
    assert ran.text.count("could not be saved") == 1
    assert "note: the training state of step 1 could not be saved: OSError: [Errno 28] No space left" in ran.text
    assert ran.states() == ["step-000003", "step-000004"]
    assert ran.state(4) == straight.state(4)
