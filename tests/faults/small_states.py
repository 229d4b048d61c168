"""Training states of two small tensors, written by the real code, without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from optim import ProdigyPlusScheduleFree
from sdtrain.config.schema import CheckpointConfig
from sdtrain.data.order import Plan
from sdtrain.training.keeping.states import Background, numbers_of, save_state
from sdtrain.training.parameters import Group, Trainable


class SmallRun:
    """A run whose parameters move at every step."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, d_coef: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(4, 40, generator=generator), torch.randn(40, generator=generator)]
        self.parameters = {name: nn.Parameter(value.to(dtype)) for name, value in zip("ab", values, strict=True)}
        self.trainable = Trainable((Group("unet", self.parameters, 1.0, 0.0, 0),))
        groups = [{"params": list(self.parameters.values()), "name": "unet"}]
        self.optimizer = ProdigyPlusScheduleFree(groups, d0=1e-2, d_coef=d_coef)
        self.steps = 0

    def step(self) -> None:
        for index, parameter in enumerate(self.parameters.values()):
            parameter.grad = torch.cos(parameter.detach() + index + self.steps)
        self.optimizer.step()
        self.steps += 1

    def save(self, folder: Path, *, keep: int = 99, loss_is_finite: bool = True, **settings: int) -> Path:
        background = Background(f"steps = {self.steps}", f"[{self.steps}]", Plan(2, 1), "0" * 32)
        chosen = CheckpointConfig(keep=keep, **settings)
        numbers = numbers_of(self.trainable, self.optimizer)
        numbers.require_finite()
        return save_state(folder, self.steps, numbers, background, chosen, loss_is_finite=loss_is_finite)

    def bits(self) -> list[bytes]:
        """Parameters and the numbers of the optimizer."""
        tensors = [*self.parameters.values(), self.optimizer.state_dict()["numbers"]]
        return [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def run_with_states(folder: Path, num: int) -> SmallRun:
    """A run with states of its first `num` steps under `folder`."""
    run = SmallRun()
    for _ in range(num):
        run.step()
        run.save(folder)
    return run
