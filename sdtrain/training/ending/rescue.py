"""What is kept of a run that ends before its last step: its training state, and the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optim import ProdigyPlusScheduleFree
from sdtrain.errors import UserError
from sdtrain.files.writer import reason
from sdtrain.training.ending.memory import release


@dataclass(frozen=True)
class Kept:
    """What a run left, that ended early.

    state: the newest whole training state, None where there is none. weights: the averaged weights of the last step
    done, None where they could not be written. problems: what could not be kept, and why.
    """

    state: Path | None
    weights: Path | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saving:
    """How a run is saved. Each function writes something, and raises where it cannot be written.

    newest: gives the newest whole training state.
    """

    state: Callable[[], None]
    weights: Callable[[], Path | None]
    newest: Callable[[], Path | None]


def keep(saving: Saving, optimizer: ProdigyPlusScheduleFree) -> Kept:
    """Save what a run has reached, as far as it can be saved; one thing that fails does not keep the other from it.

    A step that was interrupted is given up. Where it had moved weights already, these are of no step and nothing is
    written: the state that was saved before is the newest whole one.
    """
    optimizer.zero_grad(set_to_none=True)
    if not optimizer.abandon_step():
        what = "the error came in the middle of an update, so the weights are of no step and were not saved"
        return Kept(saving.newest(), None, (what,))
    problems: list[str] = []
    weights: list[Path | None] = []
    for name, save in (
        ("training state", saving.state),
        ("averaged weights", lambda: weights.append(saving.weights())),
    ):
        try:
            save()
        except Exception as error:  # noqa: BLE001 - the run ends anyway, and the other thing may still be saved
            problems.append(f"the {name} could not be saved: {sentence(error)}")
            release(error)
    return Kept(saving.newest(), weights[0] if weights else None, tuple(problems))


def sentence(error: Exception) -> str:
    """Return what went wrong, without advice, for a sentence that goes on."""
    if isinstance(error, UserError):
        return "; ".join(problem.what for problem in error.problems) if error.__cause__ is None else reason(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def kept_on_errors(
    keep: Callable[[Exception], object], explain: Callable[[Exception], UserError | None]
) -> Iterator[None]:
    """Keep what a run has reached when the block raises, and raise it again, or what explains it better.

    A second Ctrl-C, which is no Exception, keeps nothing: who presses it wants to leave at once.
    """
    try:
        yield
    except Exception as error:
        release(error)
        explained = explain(error)
        keep(error)
        if explained is None:
            raise
        raise explained from error
