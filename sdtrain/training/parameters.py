"""What is trained: the parameters of a method in named groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.adapters.attach import AdapterSettings, attach_adapters
from sdtrain.adapters.dropout import AdapterDropout, DropoutRates
from sdtrain.adapters.loading.warm_start import start_from
from sdtrain.adapters.norms import LimitedLayer, change_norms, limited_layers, shares_within
from sdtrain.adapters.targets import select_parameters, select_targets
from sdtrain.config.method_rules import shards
from sdtrain.config.schema import FullConfig, LoraConfig
from sdtrain.errors import user_error
from sdtrain.families.words import DENOISER
from sdtrain.models.model import Model
from sdtrain.training.planning.recomputing import recompute_activations, recompute_parts
from sdtrain.training.ranks.shards import mesh_of, shard
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
class NormLimit:
    """A limit on the norm of the change dW of single layers, for the weights in training and for their average."""

    limit: float
    layers: tuple[LimitedLayer, ...]

    @torch.no_grad()
    def keep(self, optimizer: ProdigyPlusScheduleFree) -> None:
        """Scale down the adapters of layers whose |dW| is above the limit, with the weights y or with the average x.

        y and z, from which x is computed, are scaled by the same share, and x with them, for it is a sum of multiples
        of both. So what files and previews show keeps the limit as well as what is trained, and the average goes on as
        if it had always been of weights of that size. Prodigy's d is left as it is.
        """
        with averaged(optimizer):
            shipped = change_norms(self.layers)
        largest = torch.maximum(shipped, change_norms(self.layers))
        shares = shares_within(largest, self.limit, [len(layer.parameters) for layer in self.layers])
        for layer, share in zip(self.layers, shares, strict=True):
            for parameter in layer.parameters:
                parameter.mul_(share)
                if parameter in optimizer.state:
                    optimizer.state[parameter]["z"].mul_(share)


@dataclass(frozen=True)
class Trainable:
    """All groups of a run, and what is done to their adapters while a loss is computed and after a step."""

    groups: tuple[Group, ...]
    dropout: AdapterDropout = field(default_factory=AdapterDropout)
    norm_limit: NormLimit | None = None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter as `group/name`."""
        return {f"{group.name}/{name}": value for group in self.groups for name, value in group.parameters.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in the order of the optimizer's groups."""
        return [value for group in self.groups for value in group.parameters.values()]

    def require_gradients(self, step: int) -> None:
        """Let the groups that are still trained after `step` steps, and only those, take part in backward."""
        for group in self.groups:
            trained = not group.stop or step < group.stop
            for parameter in group.parameters.values():
                if parameter.requires_grad != trained:
                    parameter.requires_grad_(trained)

    def limit_norms(self, optimizer: ProdigyPlusScheduleFree) -> None:
        """Keep the limit of `method.scale_weight_norms` after a step, where there is one."""
        if self.norm_limit:
            self.norm_limit.keep(optimizer)


def train_parameters(model: Model, run: Run) -> Trainable:
    """Put the run's method on the model. Raises UserError when it finds nothing to train."""
    method = run.config.method
    networks: dict[str, nn.Module] = {name: model.networks[name].to(run.device) for name in method.train}
    match method:
        case LoraConfig():
            found, d = _attach(model, networks, method, run)
        case FullConfig():
            kept = select_parameters(networks, method.layer_weights)
            found, d = {name: _unfreeze(model, name, kept[name]) for name in networks}, {}
            if shards(run.config, run.ranks.place.size):
                found = _sharded(networks, found, run)
        case _:
            assert_never(method)
    if run.config.memory.compile:
        compile_blocks(model.networks[DENOISER])
    if run.config.memory.gradient_checkpointing:
        recompute_activations(model, run.config)
    elif names := run.config.memory.recompute:
        _recompute_parts(model, names)
    return Trainable(
        tuple(
            Group(name, found[name], method.lr.get(name, 1.0), d.get(name, 0.0), method.stop.get(name, 0))
            for name in method.train
        ),
        _dropout(networks, method),
        _norm_limit(networks, method, found),
    )


def _recompute_parts(model: Model, names: Sequence[str]) -> None:
    try:
        recompute_parts(model.networks[DENOISER], names)
    except ValueError as error:
        raise user_error("config", "memory.recompute", f"the U-Net {error}") from error


def _dropout(networks: Mapping[str, nn.Module], method: LoraConfig | FullConfig) -> AdapterDropout:
    if not isinstance(method, LoraConfig):
        return AdapterDropout()
    rates = DropoutRates(method.dropout, method.rank_dropout, method.module_dropout)
    return AdapterDropout(list(networks.values()), rates)


def _norm_limit(
    networks: Mapping[str, nn.Module],
    method: LoraConfig | FullConfig,
    parameters: Mapping[str, Mapping[str, nn.Parameter]],
) -> NormLimit | None:
    if not isinstance(method, LoraConfig) or not method.scale_weight_norms:
        return None
    layers = [layer for name, network in networks.items() for layer in limited_layers(network, parameters[name])]
    return NormLimit(method.scale_weight_norms, tuple(layers))


def _attach(
    model: Model, networks: Mapping[str, nn.Module], method: LoraConfig, run: Run
) -> tuple[dict[str, dict[str, nn.Parameter]], dict[str, float]]:
    """The adapters' parameters by network, and the d they were trained with where they come from a file."""
    modules = select_targets(
        networks,
        method.targets,
        ranks=method.ranks,
        alphas=method.alphas,
        weights=method.layer_weights,
        unused=model.unused_layers,
    )
    settings = AdapterSettings(
        method.adapter, method.rank, method.alpha, method.ranks, method.alphas, method.layer_weights
    )
    parameters = {
        name: attach_adapters(network, modules[name], settings, run.generator(f"adapter {name}"))
        for name, network in networks.items()
    }
    if not method.init_from:
        return parameters, {}
    return parameters, start_from(Path(method.init_from).expanduser(), model.networks)


def compile_blocks(unet: Any, **options: Any) -> None:
    """Regional compilation: the transformer blocks are alike, so few compilations serve all of them.

    With sizes that may change they serve all buckets, too. options: of `torch.compile`. It is what
    `compile_repeated_blocks` does, which does not know the blocks any more whose weights are split over processes.
    """
    for block in unet.modules():
        if type(block).__name__.removeprefix("FSDP") in unet._repeated_blocks:
            block.compile(dynamic=True, **options)


def _sharded(
    networks: Mapping[str, nn.Module], found: Mapping[str, Mapping[str, nn.Parameter]], run: Run
) -> dict[str, dict[str, nn.Parameter]]:
    """Split networks over the processes; return the parameters of those names, which are others now."""
    mesh = mesh_of(run.ranks.place, run.config.parallel.replicas, run.device)
    for network in networks.values():
        shard(network, mesh, offload=run.config.parallel.offload)
    named = {name: dict(network.named_parameters()) for name, network in networks.items()}
    return {name: {key: named[name][key] for key in found[name]} for name in networks}


def _unfreeze(model: Model, name: str, kept: Collection[str]) -> dict[str, nn.Parameter]:
    unused, kept = tuple(prefix + "." for prefix in model.unused_layers.get(name, ())), set(kept)
    parameters = {
        key: parameter
        for key, parameter in model.networks[name].named_parameters()
        if key in kept and not key.startswith(unused)
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters
