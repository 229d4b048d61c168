"""What the processes of a run do together: wait for the first one, compare, add up gradients, agree on the end.

Every step has the same pictures, noise and timesteps on any number of ranks. Each rank computes a share of the
micro-batches, weighted by pictures; the sum of their gradients over the ranks is what one process would have computed,
up to rounding. It is the same on all ranks to the bit, so d and the weights are. Collectives are those of
torch.distributed: gloo for what is decided on the CPU and for CPU tensors, NCCL for gradients on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sdtrain.errors import Problem, UserError
from sdtrain.training.ranks.place import Place
from sdtrain.training.ranks.pulse import Pulse

if TYPE_CHECKING:
    from torch import Tensor, nn

PATIENCE = timedelta(hours=24)
"""How long ranks wait for the first one, which may encode pictures or write for long. A rank that dies is known at
once, and one that cannot be reached soon, see `pulse.py`."""
MEETING = timedelta(minutes=10)
"""How long ranks wait for each other when they start, which launchers on several machines do minutes apart."""
LOOK = timedelta(seconds=1)
"""How often who waits looks whether a rank was lost."""
BUCKET_BYTES = 64 * 2**20
"""How many bytes of gradients are sent at once."""
DIGEST_BYTES = 16
OF_RANKS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""What a RuntimeError says that comes from the other ranks and not from what is computed here."""


@dataclass(frozen=True)
class Exchanged:
    """What each process of a run adds up with the others in one step: how often, and how many bytes."""

    calls: int
    num_bytes: int


class LostRankError(UserError):
    """Another process of the run ended or cannot be reached."""

    exit_code = 1


class ToldElsewhereError(Exception):
    """The run ends on all ranks for a reason that the first one tells."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"rank 0 tells why; exit code {exit_code}")


class Ranks:
    """The processes of a run, seen from one of them. Alone it does nothing, and needs no torch."""

    def __init__(self, place: Place, pulse: Pulse | None = None) -> None:
        self.place, self._pulse = place, pulse

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.place.is_first

    @property
    def are_several(self) -> bool:
        """Whether there is more than one process."""
        return self.place.size > 1

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first rank do the block before all others do it.

        So it alone tells what is wrong, and the others find what it wrote. Where it fails, the others raise
        ToldElsewhereError.
        """
        if not self.are_several:
            yield
            return
        if not self.is_first:
            if not self._hear():
                raise ToldElsewhereError(UserError.exit_code)
            yield
            return
        try:
            yield
        except BaseException:
            with _died_anyway():
                self._tell(0)
            raise
        self._tell(1)

    def require_same(self, facts: Mapping[str, bytes]) -> None:
        """End all ranks where one of them has other facts than the first one, which raises UserError.

        facts: names and digests.
        """
        if not self.are_several:
            return
        import torch
        import torch.distributed as dist

        mine = torch.tensor([list(digest[:DIGEST_BYTES]) for digest in facts.values()], dtype=torch.uint8)
        everybodys = [torch.empty_like(mine) for _ in range(self.place.size)]
        self._wait_for(lambda: dist.all_gather(everybodys, mine, async_op=True))
        problems = [
            Problem(f"rank {rank}", f"has another {name} than rank 0; all ranks must be started alike")
            for rank, theirs in enumerate(everybodys)
            for name, row, first in zip(facts, theirs, everybodys[0], strict=True)
            if not torch.equal(row, first)
        ]
        if problems and not self.is_first:
            raise ToldElsewhereError(UserError.exit_code)
        if problems:
            raise UserError("the ranks of this run", problems)

    def agree(self, number: int, is_finished: bool) -> tuple[int, bool]:
        """Return the highest signal number that any rank was sent, and whether any rank finds the run finished."""
        if not self.are_several:
            return number, is_finished
        highest, any_finished = self._highest(number, is_finished)
        return highest, bool(any_finished)

    def merge(
        self, names: Sequence[str], mine: Mapping[str, float] | None, *, failed: bool
    ) -> tuple[dict[str, float] | None, bool]:
        """Return the numbers of all ranks by name, None where one of them has none, and whether one of them failed.

        names: all that there are. mine: those of this rank, None where it gave up or failed.
        """
        if not self.are_several:
            return (dict(mine) if mine is not None else None), failed
        import torch
        import torch.distributed as dist

        lacking, any_failed = self._highest(mine is None, failed)
        mine = mine or {}
        numbers = torch.tensor(
            [[mine.get(name, 0.0) for name in names], [float(name in mine) for name in names]], dtype=torch.float64
        )
        self._wait_for(lambda: dist.all_reduce(numbers, async_op=True))
        if lacking or not numbers[1].all():
            return None, bool(any_failed)
        return dict(zip(names, (numbers[0] / numbers[1]).tolist(), strict=True)), bool(any_failed)

    def put_together(
        self, mine: Mapping[int, Tensor] | None, shape: Sequence[int], *, failed: bool
    ) -> tuple[Tensor | None, bool]:
        """Return bytes of a shape of whose rows each rank has some, None where one has none, and whether one failed.

        mine: rows of this rank by number, None where it gave up or failed.
        """
        import torch

        lacking, any_failed = self._highest(mine is None, failed)
        if lacking:
            return None, bool(any_failed)
        whole = torch.zeros(*shape, dtype=torch.uint8)
        for number, row in (mine or {}).items():
            whole[number] = row
        self._sum(whole)
        return whole, False

    def wait_for_all(self) -> None:
        """Wait until all ranks are here."""
        self.agree(0, False)

    def add_up(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace the gradients by their sums over all ranks, and return the sum of the losses, ().

        A parameter that has a gradient on no rank keeps none; on a rank without pictures it counts as zero. Gradients
        of parameters that are split over the ranks were added up in backward.
        """
        if not self.are_several:
            return loss
        import torch
        import torch.distributed as dist

        from optim import is_sharded

        trained = [parameter for parameter in parameters if parameter.requires_grad and not is_sharded(parameter)]
        present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        self._wait_for(lambda: dist.all_reduce(present, op=dist.ReduceOp.MAX, async_op=True))
        here = [p for p, is_there in zip(trained, present.tolist(), strict=True) if is_there]
        for parameter in here:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(here):
            flat = torch.cat([_gradient(parameter).reshape(-1).float() for parameter in bucket])
            self._sum(flat)
            parts = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                _gradient(parameter).copy_(part.view_as(parameter))
        total = loss.clone()
        self._sum(total)
        return total

    def _highest(self, *mine: int) -> list[int]:
        """Return the highest of each of these numbers over all ranks."""
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(mine, dtype=torch.int64)
        self._wait_for(lambda: dist.all_reduce(numbers, op=dist.ReduceOp.MAX, async_op=True))
        found: list[int] = numbers.tolist()
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise LostRankError where the block fails for a lost rank in a collective that is not of this class, as those
        are of networks that are split over the ranks."""
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in OF_RANKS):
                raise
            with _told_if_lost():
                raise

    def _sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks; on a card once its turn comes there."""
        import torch.distributed as dist

        if tensor.is_cuda:
            with _told_if_lost():
                dist.all_reduce(tensor)
            return
        self._wait_for(lambda: dist.all_reduce(tensor, async_op=True))

    def _wait_for(self, begin: Callable[[], Any]) -> None:
        """Begin a collective on the CPU and wait until it is done.

        Raises LostRankError where it fails, and where a rank is lost before it is done.
        """
        with _told_if_lost():
            work = begin()
            while not self._is_done(work):
                if self._pulse and self._pulse.lost:
                    raise RuntimeError(self._pulse.lost)

    @staticmethod
    def _is_done(work: Any) -> bool:
        """Wait a moment for a collective; return whether it is done. Raises RuntimeError where it failed."""
        try:
            work.wait(LOOK)
        except RuntimeError:  # it failed, or it was not done in this moment; it may be by now
            if not work.is_completed():
                return False
            work.wait()
        return True

    def _tell(self, flag: int) -> None:
        import torch
        import torch.distributed as dist

        told = torch.tensor([flag])
        self._wait_for(lambda: dist.broadcast(told, src=0, async_op=True))

    def _hear(self) -> bool:
        import torch
        import torch.distributed as dist

        flag = torch.zeros(1, dtype=torch.int64)
        self._wait_for(lambda: dist.broadcast(flag, src=0, async_op=True))
        return bool(flag)

    def wait_for_the_first(self) -> None:
        """Wait until the first rank has written everything; a launcher ends all ranks when one has ended."""
        if not self.are_several:
            return
        with _died_anyway():
            if self.is_first:
                self._tell(1)
            else:
                self._hear()


ALONE = Ranks(Place())
"""A run in one process."""


@contextmanager
def joined(place: Place) -> Iterator[Ranks]:
    """Give the ranks of a run, connected. Raises UserError where they cannot be reached."""
    if place.size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    has_cards = torch.cuda.is_available()
    if has_cards:
        if place.local_rank >= torch.cuda.device_count():
            what = f"needs a card of its own, but this machine has {torch.cuda.device_count()}"
            raise UserError("the ranks of this run", [Problem(f"rank {place.rank}", what)])
        if not dist.is_nccl_available():
            what = "cannot add up gradients with the others: this PyTorch was built without NCCL (or RCCL), which "
            what += "cards need for it; install one for Linux that has it, train on one card, or set device to cpu"
            raise UserError("the ranks of this run", [Problem(f"rank {place.rank}", what)])
        torch.cuda.set_device(place.local_rank)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_cards else "gloo",
            store=_meeting_place(place),
            rank=place.rank,
            world_size=place.size,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        what = f"cannot reach the others: {str(error).splitlines()[0]}; are MASTER_ADDR and MASTER_PORT right?"
        raise UserError("the ranks of this run", [Problem(f"rank {place.rank}", what)]) from error
    pulse = Pulse(_store_of_its_own(), place.rank, place.size, _end_what_cards_wait_for if has_cards else lambda: None)
    try:
        yield Ranks(place, pulse)
    finally:
        if not pulse.lost:  # else it would wait for what is lost
            dist.destroy_process_group()
        pulse.stop()


def _meeting_place(place: Place) -> Any:
    """Return the store in which the ranks find each other, once all are there. Raises RuntimeError where one is not.

    torchrun keeps its store when it starts a run again: who looked into it before the others had written would find
    where they listened before they died.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    found: Any = next(iter(rendezvous("env://", timeout=MEETING)))
    store = PrefixStore(f"attempt-{place.attempt}", found[0])
    store.set(f"here-{place.rank}", "")
    store.wait([f"here-{rank}" for rank in range(place.size)], MEETING)
    return store


def _store_of_its_own() -> Any:
    """Return another connection to the store that the ranks met at."""
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    return store.clone()


def _end_what_cards_wait_for() -> None:
    """End the collectives of NCCL, which wait on the card, where no call on the CPU could leave them."""
    from torch.distributed import distributed_c10d

    distributed_c10d._abort_process_group()


def exchanged(parameters: Sequence[nn.Parameter]) -> Exchanged:
    """Return what is added up in a step, of which all the parameters have gradients; see `agree` and `add_up`."""
    buckets = sum(1 for _ in _buckets(parameters))
    agreed, present, loss = 2 * 8, len(parameters), 4
    return Exchanged(buckets + 3, agreed + present + 4 * sum(p.numel() for p in parameters) + loss)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in groups on one device whose gradients take about BUCKET_BYTES in float32."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        size = 4 * sum(other.numel() for other in bucket)
        if bucket and (size + 4 * parameter.numel() > BUCKET_BYTES or parameter.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _told_if_lost() -> Iterator[None]:
    """Raise LostRankError where a collective fails: another rank has died, or the network between them."""
    import torch.distributed as dist

    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        why = str(error).splitlines()[0].partition(". This is typically")[0]  # what follows is a guess, and a joke
        what = f"ended or cannot be reached any more ({why}); what it said stands above"
        raise LostRankError("the ranks of this run", [Problem("another rank", what)]) from error


def _died_anyway() -> Any:
    """Leave out the news of a rank that is gone, where this one ends too."""
    return suppress(LostRankError)
