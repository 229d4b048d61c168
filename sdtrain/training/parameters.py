"""What is trained: the parameters of a method in named groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.targets import select_targets
from sdtrain.adapters.warm_start import start_from
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.families.words import DENOISER
from sdtrain.models.model import Model
from sdtrain.training.run import Run


@dataclass(frozen=True)
class Group:
    """The trained parameters of one network, by name.

    lr: weight of its step size. d: the step size it starts from, 0 for the optimizer's d0. stop: the step after which
    it is no longer trained, 0 for never.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    lr: float
    d: float
    stop: int

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())


@dataclass(frozen=True)
class Trainable:
    """All groups of a run."""

    groups: tuple[Group, ...]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter as `group/name`."""
        return {f"{group.name}/{name}": value for group in self.groups for name, value in group.parameters.items()}

    def require_gradients(self, step: int) -> None:
        """Let the groups that are still trained after `step` steps, and only those, take part in backward."""
        for group in self.groups:
            trained = not group.stop or step < group.stop
            for parameter in group.parameters.values():
                if parameter.requires_grad != trained:
                    parameter.requires_grad_(trained)


def train_parameters(model: Model, run: Run) -> Trainable:
    """Put the run's method on the model. Raises UserError when it finds nothing to train."""
    method = run.config.method
    networks: dict[str, nn.Module] = {name: model.networks[name].to(run.device) for name in method.train}
    match method:
        case LoraConfig():
            found, d = _attach(model, networks, method, run)
        case FullConfig():
            found, d = {name: _unfreeze(model, name) for name in networks}, {}
        case _:
            assert_never(method)
    if run.config.memory.compile:
        _compile_blocks(model.networks[DENOISER])
    if run.config.memory.gradient_checkpointing:
        recompute_activations(model, run.config)
    return Trainable(
        tuple(
            Group(name, found[name], method.lr.get(name, 1.0), d.get(name, 0.0), method.stop.get(name, 0))
            for name in method.train
        )
    )


def _attach(
    model: Model, networks: Mapping[str, nn.Module], method: LoraConfig, run: Run
) -> tuple[dict[str, dict[str, nn.Parameter]], dict[str, float]]:
    """The adapters' parameters by network, and the d they were trained with where they come from a file."""
    modules = select_targets(
        networks, method.targets, ranks=method.ranks, alphas=method.alphas, unused=model.unused_layers
    )
    settings = AdapterSettings(method.adapter, method.rank, method.alpha, method.ranks, method.alphas)
    parameters = {
        name: attach_adapters(network, modules[name], settings, run.generator(f"adapter {name}"))
        for name, network in networks.items()
    }
    if not method.init_from:
        return parameters, {}
    return parameters, start_from(Path(method.init_from).expanduser(), model.networks)


def _compile_blocks(unet: Any) -> None:
    """Regional compilation: the transformer blocks are alike, so few compilations serve all of them."""
    unet.compile_repeated_blocks()


def recompute_activations(model: Model, config: Config) -> None:
    """Let the trained networks keep few activations for backward, and compute the others again there."""
    for name in config.method.train:
        _recompute_activations(model.networks[name])


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
