"""What is trained: the parameters of a method in named groups, and the file they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from sdtrain.adapters.lora import attach_lora
from sdtrain.adapters.targets import select_modules
from sdtrain.config.schema import FullConfig, LoraConfig
from sdtrain.errors import user_error
from sdtrain.models.model import Model
from sdtrain.training.run import Run


@dataclass(frozen=True)
class Group:
    """The trained parameters of one network, by name, and the weight of its step size."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    lr: float

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())


@dataclass(frozen=True)
class Trainable:
    """All groups of a run."""

    groups: tuple[Group, ...]

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained in all groups."""
        return sum(group.num_parameters for group in self.groups)

    @property
    def trains_text(self) -> bool:
        """Whether captions have to be encoded anew in every step."""
        return any(group.name != "unet" for group in self.groups)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter as `group/name`."""
        return {f"{group.name}/{name}": value for group in self.groups for name, value in group.parameters.items()}


def train_parameters(model: Model, run: Run) -> Trainable:
    """Put the run's method on the model. Raises UserError when it finds nothing to train."""
    method = run.config.method
    groups = []
    for name in method.train:
        model.networks[name].to(run.device)
        match method:
            case LoraConfig():
                parameters = _attach(model, name, method, run)
            case FullConfig():
                parameters = _unfreeze(model, name)
            case _:
                assert_never(method)
        if run.config.memory.gradient_checkpointing:
            _recompute_activations(model.networks[name])
        groups.append(Group(name, parameters, method.lr.get(name, 1.0)))
    return Trainable(tuple(groups))


def _attach(model: Model, name: str, method: LoraConfig, run: Run) -> dict[str, nn.Parameter]:
    network = model.networks[name]
    modules = select_modules(network, method.targets, unused=model.unused_layers.get(name, ()))
    if not modules:
        raise user_error("config", "method.targets", f"{method.targets!r} matches no layer of {name}")
    generator = run.generator(f"adapter {name}")
    return attach_lora(network, modules, rank=method.rank, alpha=method.alpha, generator=generator)


def _recompute_activations(network: Any) -> None:
    match network:
        case ModelMixin():
            network.enable_gradient_checkpointing()
        case PreTrainedModel():  # which recomputes in training mode only; CLIP has no dropout that would notice
            network.activation_checkpointing_enable()
            network.train()
        case _:
            raise TypeError(f"no known way to recompute the activations of {type(network).__name__}")


def _unfreeze(model: Model, name: str) -> dict[str, nn.Parameter]:
    unused = tuple(prefix + "." for prefix in model.unused_layers.get(name, ()))
    parameters = {
        key: parameter for key, parameter in model.networks[name].named_parameters() if not key.startswith(unused)
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters
