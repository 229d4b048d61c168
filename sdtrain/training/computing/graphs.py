"""The gradients of micro-batches as CUDA graphs: what a card is told once is told again as a whole.

A U-Net is thousands of small kernels, and with a few pictures at once the host takes longer to launch them than the
card to run them. A graph is launched as one. It has the addresses of its tensors: so inputs are copied into the same
place every time, and gradients are added up in the same place. Numbers that Python knows stay as they were when the
graph was made; therefore all that changes from step to step comes in tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sdtrain.config.method_rules import against_graphs
from sdtrain.config.schema import Config, LoraConfig
from sdtrain.data.batches import Batch
from sdtrain.errors import user_error
from sdtrain.models.placing import pinned
from sdtrain.training.computing.objective import Objective
from sdtrain.training.ending.guard import backward
from sdtrain.training.ending.memory import is_out_of_memory, release
from sdtrain.training.run import Run

Key = tuple[tuple[str, torch.Size], ...]

FEW = 64
"""The number of graphs that are made before it is asked whether they pay."""
LEFT_FREE = 2**29
"""The bytes that a card must have free, or an older graph goes for a new one: one of SDXL's takes 0.11 GiB beside the
tensors, as measured on an H100, and all share the memory of their tensors."""
PAYS = 3
"""How often a graph must be launched to be worth its making: that took twice as long as what it spares, on an H100."""


def uses_graphs(run: Run) -> bool:
    """Return whether a run's gradients come from graphs. Raises UserError where they must, and cannot."""
    there = run.device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None
    if run.config.memory.cuda_graphs == "on" and not there:
        raise user_error("this machine", "memory.cuda_graphs", "on, but the run computes on no NVIDIA card; use auto")
    return there and wants_graphs(run.config, num_ranks=run.ranks.place.size)


def wants_graphs(config: Config, *, num_ranks: int = 1) -> bool:
    """Return whether a run's gradients come from graphs where it computes on an NVIDIA card.

    `auto` takes them where they were seen to pay and to be right: for adapters of the U-Net, on one card.
    """
    if config.memory.cuda_graphs != "auto":
        return config.memory.cuda_graphs == "on"
    return num_ranks == 1 and isinstance(config.method, LoraConfig) and not any(against_graphs(config))


@dataclass(frozen=True)
class _Graph:
    """A micro-batch of one kind. inputs, loss: where they lie on the device. replay: launches it."""

    inputs: Mapping[str, Tensor]
    loss: Tensor
    replay: Callable[[], None]


class Graphs:
    """Adds up gradients of micro-batches, by a graph for each kind: of the same sizes, and with the same inputs."""

    def __init__(self, objective: Objective, parameters: Sequence[nn.Parameter], tell: Callable[[str], None]) -> None:
        """parameters: all that are trained. tell: is told when graphs are given up."""
        self._objective, self._parameters, self._tell = objective, parameters, tell
        self._made: dict[Key, _Graph] = {}
        self._trained: list[bool] = []
        self._reached: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []
        self._pool: Any = None
        self._num_made = self._num_used = 0
        self._are_given_up = False
        """Whether they would take more time than they spare, or more memory than there is."""

    def add(self, batch: Batch, generator: Callable[[int], Generator], share: float, scale: float) -> Tensor:
        """Add the gradients of `share` times the loss of a micro-batch, times `scale`; return that share, ().

        The number lies where the next graph writes its own: who keeps it adds it up at once.
        """
        inputs = self._objective.inputs(batch, generator)
        inputs |= {"share": torch.tensor(share), "scale": torch.tensor(scale)}
        graph = self._graph_of(inputs)
        if graph is None:
            loss = self._compute(self._objective.sent(inputs))
            if not self._reached:  # which are reached is seen once
                self._reached = [parameter for parameter in self._parameters if parameter.grad is not None]
                self._gradients = [parameter.grad for parameter in self._reached if parameter.grad is not None]
            return loss
        self._num_used += 1
        for name, there in graph.inputs.items():
            there.copy_(pinned(inputs[name], there.device), non_blocking=True)
        graph.replay()
        return graph.loss

    def forget(self) -> None:
        """Free all graphs and what they hold on the card; what comes next makes them anew."""
        self._free(*self._made)
        self._gradients = []

    def _free(self, *keys: Key) -> None:
        if keys and self._objective.device.type == "cuda":
            torch.cuda.synchronize(self._objective.device)  # they may be under way
        for key in keys:
            del self._made[key]
        if not self._made:
            self._pool = None

    def _begin(self) -> None:
        """Put the gradients of a step where graphs add to them."""
        trained = [parameter.requires_grad for parameter in self._parameters]
        if trained != self._trained:  # a network was stopped, or thawed
            self.forget()
            self._trained, self._reached = trained, []
        if self._reached and not self._gradients:
            self._gradients = [torch.zeros_like(parameter) for parameter in self._reached]
        if self._reached and self._reached[0].grad is not self._gradients[0]:  # the first micro-batch of a step
            torch._foreach_zero_(self._gradients)
            for parameter, gradient in zip(self._reached, self._gradients, strict=True):
                parameter.grad = gradient

    def _graph_of(self, inputs: Mapping[str, Tensor]) -> _Graph | None:
        """Return the graph of inputs of this kind, which is made when they are first met.

        None: graphs are given up, or nothing was computed yet, so that libraries have not set up what they do on first
        use.
        """
        if self._are_given_up:
            return None
        self._begin()
        if not self._reached:
            return None
        key = tuple((name, tensor.shape) for name, tensor in inputs.items())
        if key in self._made:
            self._made[key] = self._made.pop(key)  # the one that was used last stands last
            return self._made[key]
        if self._num_made >= FEW and self._num_used < PAYS * self._num_made:
            self._give_up("there are as many sizes of pictures as steps, so that CUDA graphs would be made for nothing")
            return None
        while self._made and free_bytes(self._objective.device) < LEFT_FREE:
            self._free(next(iter(self._made)))
        graph = self._capture(inputs) or self._capture(inputs, last=True)
        if graph is not None:
            self._made[key] = graph
            self._num_made += 1
        return graph

    def _give_up(self, why: str) -> None:
        self.forget()
        self._are_given_up = True
        self._tell(f"{why}; the steps are the same without, and slower where the pictures of one are few")

    def _capture(self, inputs: Mapping[str, Tensor], *, last: bool = False) -> _Graph | None:
        """Return a new graph; None where that was not possible, for which all others went.

        last: whether graphs are given up then.
        """
        there = {name: tensor.clone() for name, tensor in self._objective.sent(inputs).items()}
        try:
            loss, replay, self._pool = captured(lambda: self._compute(there), self._pool)
        except Exception as error:
            if not is_out_of_memory(error) and "captur" not in str(error):
                raise
            why = "there is too little memory for" if is_out_of_memory(error) else "this card refuses"
            release(error)
            self._free(*self._made)
            if last:
                self._give_up(f"{why} CUDA graphs")
            return None
        return _Graph(there, loss, replay)

    def _compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        loss = inputs["share"] * self._objective.loss(inputs, ())
        backward(loss, inputs["scale"])
        return loss.detach()


def free_bytes(device: torch.device) -> float:
    """Return how much memory of a card is free, once nothing is held for later."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def captured(compute: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None], Any]:
    """Return what `compute` will return on the device, what computes it, and the memory it computes in.

    pool: the memory of another graph, which is used by both in turn; None: new memory. Threads that read ahead go on.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        loss = compute()
    return loss, graph.replay, pool or graph.pool()
