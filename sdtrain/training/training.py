"""Everything that a run holds while it trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from optim import ProdigyPlusScheduleFree
from sdtrain.config.method_rules import shards
from sdtrain.errors import UserError
from sdtrain.models.model import Model
from sdtrain.training.behind import Behind
from sdtrain.training.computing.graphs import Graphs
from sdtrain.training.ending.memory import explained, is_out_of_memory
from sdtrain.training.ending.scaling import LossScale
from sdtrain.training.ending.signals import StopRequests
from sdtrain.training.keeping.states import Background
from sdtrain.training.parameters import Trainable
from sdtrain.training.prepare import Prepared
from sdtrain.training.ranks.place import Place
from sdtrain.training.run import Run
from sdtrain.training.validating.validator import Validator


@dataclass
class Training:
    """Everything that a run holds while it trains."""

    run: Run
    model: Model
    trainable: Trainable
    optimizer: ProdigyPlusScheduleFree
    data: Prepared
    background: Background
    validator: Validator
    scale: LossScale
    step: int = 0
    """The number of steps that are done."""
    saved_step: int | None = None
    """The step whose state is on disk as it is in memory."""
    is_sound: bool = True
    """Whether the last step was taken: its loss and gradients were finite."""
    state_is_owed: bool = False
    """Whether a training state is due that could not be saved yet."""
    doing: str = "starting"
    """What is done now, for the person who stops it."""
    try_again_at: int = 0
    """The step before which saving is not tried again, after it failed."""
    settle: Callable[[], None] = field(default=lambda: None)
    """Tells of the last step, where that was not done yet; for those who end a run."""
    behind: Behind = field(default_factory=Behind)
    """Writes a training state while the training goes on."""
    graphs: Graphs | None = None
    """What launches the gradients of a micro-batch at once, on a card where that pays."""
    first_is_finished: bool = False
    """Whether the ranks agreed that the run is finished; the first one alone validates."""

    @property
    def is_sharded(self) -> bool:
        """Whether what is trained is split over processes, which then compute and put together everything at once."""
        return shards(self.run.config, self.run.ranks.place.size)

    @property
    def takes_part(self) -> bool:
        """Whether this process is needed for what is drawn and written: the first one, or all of them."""
        return self.run.ranks.is_first or self.is_sharded

    @property
    def looking(self) -> Place:
        """This process's share of what is looked at: all of it where weights are split, so that all compute in step."""
        return Place() if self.is_sharded else self.run.ranks.place

    def heeded(self, stop: StopRequests) -> StopRequests:
        """Return what is heeded while this process looks: nothing where the others would wait for it."""
        return StopRequests(lambda _: None, leave=False) if self.is_sharded else stop

    def first_writes(self, send: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Let the first process write in the block, of which the others then learn whether it could.

        send: gives what the others have of what the first one is handed out in the block.
        """
        if not self.run.ranks.is_first:
            send()
        return self.run.ranks.first_alone() if self.is_sharded else nullcontext()

    def all_agree_to_end(self, stop: StopRequests) -> bool:
        """Return whether the run ends here, finished or stopped: the same on all ranks, whoever was asked to stop."""
        number, self.first_is_finished = self.run.ranks.agree(stop.number, self.is_finished)
        if number:
            stop.ask(number)
        return bool(number) or self.first_is_finished

    def make_room(self) -> None:
        """Free what is kept on the card from step to step only to be faster."""
        if self.graphs is not None:
            self.graphs.forget()

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done, or as many as the validation found enough."""
        return self.first_is_finished or self.step >= self.run.config.steps or self.validator.is_enough

    def explain(self, error: Exception) -> UserError | None:
        """Return what a person is told instead of an error, where more can be said than the error does."""
        if not is_out_of_memory(error):
            return None
        return explained(self.model, self.run, self.trainable, self.step + 1)
