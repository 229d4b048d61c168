"""Adapters of every kind on the layers of a frozen network, by peft, and their weights read out and put in.

peft builds the layers; their first values come from the generator that is handed in, because peft draws from the
global one. A network with fresh adapters computes exactly what it computed before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, assert_never

import torch
from torch import Generator, Tensor, nn

from sdtrain.adapters.formats.tensor_names import encode
from sdtrain.adapters.kinds import (
    AdapterKind,
    AdapterWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    kind_of,
)
from sdtrain.adapters.quantised.layer import original_weight
from sdtrain.adapters.targets import last_match
from sdtrain.errors import Problem, UserError
from sdtrain.families.adapter_names import ADAPTER as NAME

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class AdapterSettings:
    """Kind and size of the adapters of a run.

    `rank` is the inner dimension; for OFT the size of the blocks that are rotated, and alpha means nothing there.
    `ranks` and `alphas` map shell patterns over module names to values; where several match, the last counts.
    `weights` do so, too: what they say multiplies alpha. An optimizer whose steps do not depend on the size of the
    gradient moves the factors of dW as before, so dW moves that many times as far.
    """

    kind: AdapterKind = "lora"
    rank: int = 16
    alpha: float = 16.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Return the rank of one layer."""
        return last_match(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of one layer, its weight included."""
        return last_match(self.alphas, module, self.alpha) * self.weight_of(module)

    def weight_of(self, module: str) -> float:
        """Return how many times as far as others one layer moves."""
        return last_match(self.weights, module, 1.0)


def attach_adapters(
    network: nn.Module, modules: Sequence[str], settings: AdapterSettings, generator: Generator
) -> dict[str, nn.Parameter]:
    """Give the named modules of a network adapters and freeze the rest; return the new float32 parameters by name.

    Raises UserError where a layer cannot carry this kind.
    """
    from peft import inject_adapter_in_model

    from sdtrain.adapters.lean.layers import make_lean

    _check_layers(network, modules, settings)
    frozen = {id(parameter) for parameter in network.parameters()}
    with torch.random.fork_rng():  # peft draws from the global generator; ours must not move it
        inject_adapter_in_model(_peft_config(modules, settings), network)
    _fix_scale_of_whole_factors(network, settings)
    keep_quiet(network)
    parameters = {}
    for name, parameter in network.named_parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
            continue
        parameter.data = _first_values(network, name, parameter, generator).to(parameter.device)
        parameter.requires_grad_(True)
        parameters[name] = parameter
    make_lean(network)  # once it is known what is frozen
    return parameters


def _fix_scale_of_whole_factors(network: nn.Module, settings: AdapterSettings) -> None:
    """Every reader of LoKr files ignores alpha where no rank is left. Raises UserError for a weight there."""
    from peft.tuners.lokr import LoKrLayer

    problems = []
    for name, layer in network.named_modules():
        if isinstance(layer, LoKrLayer) and NAME in layer.lokr_w1 and NAME in layer.lokr_w2:
            layer.scaling[NAME] = 1.0
            if settings.weight_of(name) != 1:
                what = f"are {settings.weight_of(name):g} for {name}, but at rank {settings.rank_of(name)} both of its "
                what += "Kronecker factors are whole and no alpha scales them: lower method.rank, or leave it at 1"
                problems.append(Problem("method.layer_weights", what))
    if problems:
        raise UserError("method", problems[:4])


def live_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a network that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def keep_quiet(network: nn.Module) -> None:
    """Put adapters into evaluation mode, whatever the network is in: in training mode peft's layers draw numbers.

    They draw them from the global generator, even with nothing to drop. What is dropped here is in `dropout.py`.
    """
    for layer in live_layers(network):
        layer.eval()


def _check_layers(network: nn.Module, modules: Sequence[str], settings: AdapterSettings) -> None:
    problems = []
    if settings.kind == "oft" and (settings.ranks or settings.alphas):
        problems.append(
            Problem("method.ranks", "and alphas mean nothing to OFT, whose blocks have one size: drop them")
        )
    for name in modules:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d), f"{name} is neither linear nor a convolution"
        if settings.kind != "oft":
            continue
        rank, width = settings.rank_of(name), layer.weight[0].numel()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            problems.append(Problem(name, "looks at several pixels, which OFT cannot rotate: leave it out"))
        elif width % rank or rank < 2:
            problems.append(Problem(name, f"has {width} inputs, which blocks of {rank} do not divide: change rank"))
    if problems:
        raise UserError("method", problems[:4])


def _peft_config(modules: Sequence[str], settings: AdapterSettings) -> PeftConfig:
    """peft's description of the adapters; sizes that differ stand in patterns for exactly their modules."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    kind, targets = settings.kind, list(modules)
    rank, alpha = settings.rank, settings.alpha
    ranks = _by_value({module: settings.rank_of(module) for module in modules}, rank)
    alphas = _by_value({module: settings.alpha_of(module) for module in modules}, alpha)
    match kind:
        case "lora" | "rslora" | "dora":
            return LoraConfig(
                r=rank,
                lora_alpha=alpha,
                rank_pattern=ranks,
                alpha_pattern=alphas,
                target_modules=targets,
                use_rslora=kind == "rslora",
                use_dora=kind == "dora",
                init_lora_weights=False,
            )
        case "loha":
            return LoHaConfig(r=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, target_modules=targets)
        case "lokr":
            return LoKrConfig(r=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, target_modules=targets)
        case "oft":
            return OFTConfig(oft_block_size=rank, r=0, target_modules=targets, use_cayley_neumann=False)
        case _:
            assert_never(kind)


def _by_value(values: Mapping[str, Any], common: float) -> dict[str, Any]:
    """One pattern for each value that is not the common one: peft tries every pattern on every layer."""
    modules: dict[float, list[str]] = {}
    for module, value in values.items():
        if value != common:
            modules.setdefault(value, []).append(re.escape(module))
    return {f"^(?:{'|'.join(names)})": value for value, names in modules.items()}


ZERO = {"lora_B", "hada_w2_b", "lokr_w1", "lokr_w1_a", "oft_R"}
"""The factor of each kind that starts at zero, so that dW does."""


def _first_values(network: nn.Module, name: str, parameter: Tensor, generator: Generator) -> Tensor:
    """Zeros, the lengths of the frozen rows, or uniform in +-1/sqrt(fan_in) (He et al. 2015 with a = sqrt(5))."""
    layer, part = _layer_and_part(name)
    if part in ZERO:
        return torch.zeros(parameter.shape, dtype=torch.float32)
    if part == "lora_magnitude_vector":
        frozen = network.get_submodule(layer).get_submodule("base_layer")
        return _row_lengths(original_weight(frozen)).view(parameter.shape)
    bound = 1 / math.sqrt(parameter[0].numel())
    return (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound


def layer_of(name: str) -> str:
    """Return the layer that a parameter of an adapter belongs to: `a.b.lora_A.default.weight` -> `a.b`."""
    return _layer_and_part(name)[0]


def _layer_and_part(name: str) -> tuple[str, str]:
    """`a.b.lora_A.default.weight` -> `a.b`, `lora_A`."""
    match = re.fullmatch(r"(.*)\.(\w+)\.default(\.weight)?", name)
    assert match, name
    return match[1], match[2]


def _row_lengths(weight: Any) -> Tensor:
    """Norms over everything but the output axis, computed as peft computes them: their quotient must be exactly 1."""
    wide: Tensor = weight.detach().float()
    lengths: Tensor = torch.linalg.norm(wide, dim=1) if wide.dim() == 2 else wide.norm(p=2, dim=(1, 2, 3))
    return lengths


def adapter_weights(network: nn.Module) -> dict[str, AdapterWeights]:
    """Return the adapters of a network by the name of their layer; the tensors are views of the parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: _weights_of(module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _weights_of(layer: Any) -> AdapterWeights:
    from peft.tuners.loha import LoHaLayer
    from peft.tuners.lokr import LoKrLayer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.oft import OFTLayer

    match layer:
        case LoraLayer():
            lora = LoraWeights(
                layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach(), _scaled_alpha(layer)
            )
            if NAME not in layer.lora_magnitude_vector:
                return lora
            return DoraWeights(lora, layer.lora_magnitude_vector[NAME].weight.detach().reshape(-1))
        case LoHaLayer():
            w1_a, w1_b = layer.hada_w1_a[NAME].detach(), layer.hada_w1_b[NAME].detach()
            w2_a, w2_b = layer.hada_w2_a[NAME].detach(), layer.hada_w2_b[NAME].detach()
            return LohaWeights(w1_a, w1_b, w2_a, w2_b, float(layer.alpha[NAME]))
        case LoKrLayer():
            return LokrWeights(_factor(layer, "lokr_w1"), _factor(layer, "lokr_w2"), alpha=float(layer.alpha[NAME]))
        case OFTLayer():
            return OftWeights(layer.oft_R[NAME].weight.detach(), int(layer.oft_block_size[NAME]))
        case _:
            raise TypeError(f"{type(layer).__name__} is no kind of adapter known here")


def _scaled_alpha(layer: Any) -> float:
    """The alpha that makes alpha / rank the scale in use: peft's own, or the larger one of a rank-stabilised LoRA."""
    rank, alpha, scale = layer.r[NAME], float(layer.lora_alpha[NAME]), float(layer.scaling[NAME])
    return alpha if scale == alpha / rank else scale * rank


def _factor(layer: Any, name: str) -> Tensor | tuple[Tensor, Tensor]:
    factors = layer.get_submodule(name)
    if NAME in factors:
        whole: Tensor = factors[NAME].detach()
        return whole
    return layer.get_submodule(f"{name}_a")[NAME].detach(), layer.get_submodule(f"{name}_b")[NAME].detach()


def copy_into(layer_weights: AdapterWeights, values: AdapterWeights) -> None:
    """Copy the tensors of `values` into the parameters that `layer_weights` views, of the same kind and sizes.

    Raises ValueError with a sentence about what differs; nothing has been copied then.
    """
    if kind_of(layer_weights) != kind_of(values):
        raise ValueError(f"is {kind_of(values)} in the file and {kind_of(layer_weights)} in this run")
    if isinstance(values, DoraWeights) and values.on_inputs:
        raise ValueError("has lengths for each input, and those that are trained here are for each output")
    if isinstance(values, OftWeights) and (values.on_outputs or values.terms):
        raise ValueError("turns outputs or by a series, and what is trained here turns inputs, exactly")
    there, here = encode(values, "diffusers"), encode(layer_weights, "diffusers")
    if {name: tensor.shape for name, tensor in there.items()} != {name: tensor.shape for name, tensor in here.items()}:
        raise ValueError(
            f"has rank {values.rank} in the file and {layer_weights.rank} in this run: set `method.rank` or "
            "`method.ranks` to the file's, or change the file with `sdtrain resize`"
        )
    for name, tensor in here.items():
        tensor.copy_(there[name])
