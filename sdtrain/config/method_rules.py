"""Rules about what adapters can and cannot do; `rules.py` lists them with the settings that they look at."""

from __future__ import annotations

from collections.abc import Iterator

from sdtrain.config.paths import path_text
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import Problem
from sdtrain.families.words import DENOISER

NO_PRODUCT = ("dora", "oft")
"""The kinds whose change dW is not a multiple of one product of their tensors."""


def words_for_the_form(config: Config) -> Iterator[Problem]:
    """OFT itself exports under diffusers' names only, and a whole change under those of sd-scripts."""
    if not isinstance(config.method, LoraConfig):
        return
    names, form = config.export.names, config.export.form
    if config.method.adapter == "oft" and form == "native" and names == "sd-scripts":
        what = 'oft has no words in sd-scripts names; leave export.form at "auto", or set export.names = "diffusers"'
        yield Problem("method.adapter", what)
    if form == "diff" and names == "diffusers":
        what = 'diff has no words in diffusers names; set export.names = "sd-scripts", or export.form = "lora"'
        yield Problem("export.form", what)


def oft_rotates_no_convolutions(config: Config) -> Iterator[Problem]:
    """A rotation of the inputs has no meaning for a layer that looks at several pixels."""
    method = config.method
    if isinstance(method, LoraConfig) and method.adapter == "oft" and method.targets == "all":
        what = 'all, but its convolutions look at several pixels, which oft cannot rotate; use "all-linear"'
        yield Problem("method.targets", what)


def dropout_needs_ranks(config: Config) -> Iterator[Problem]:
    """Neurons and ranks are dropped between a LoRA's two matrices."""
    method = config.method
    if not isinstance(method, LoraConfig) or method.adapter in ("lora", "rslora"):
        return
    for name, rate in (("dropout", method.dropout), ("rank_dropout", method.rank_dropout)):
        if rate:
            what = f"{rate:g}, but {method.adapter} has no place for it; it is for lora and rslora"
            yield Problem(f"method.{name}", what if method.adapter in NO_PRODUCT else f"{what}, or use module_dropout")


def module_dropout_needs_a_product(config: Config) -> Iterator[Problem]:
    """Only a dW with a factor in front can be dropped such that its mean stays right."""
    method = config.method
    if isinstance(method, LoraConfig) and method.module_dropout and method.adapter in NO_PRODUCT:
        yield Problem("method.module_dropout", f"{method.module_dropout:g}, but {_no_factor(method)}; leave it out")


def norm_limit_needs_a_product(config: Config) -> Iterator[Problem]:
    """Only a dW with a factor in front can be scaled by scaling its tensors."""
    method = config.method
    if isinstance(method, LoraConfig) and method.scale_weight_norms and method.adapter in NO_PRODUCT:
        what = f"{method.scale_weight_norms:g}, but {_no_factor(method)}; leave it out"
        yield Problem("method.scale_weight_norms", what)


def layer_weights_need_a_product(config: Config) -> Iterator[Problem]:
    """A weight other than 0 and 1 scales dW."""
    method = config.method
    if not isinstance(method, LoraConfig) or method.adapter not in NO_PRODUCT:
        return
    for pattern, weight in method.layer_weights.items():
        if weight not in (0, 1):
            yield Problem(_weight_of(pattern), f"{weight:g}, but {_no_factor(method)}; use 0 or 1")


def layer_weights_of_full(config: Config) -> Iterator[Problem]:
    """A full fine-tune has no factor beside its weights that could hold another pace."""
    if not isinstance(config.method, FullConfig):
        return
    for pattern, weight in config.method.layer_weights.items():
        if weight not in (0, 1):
            what = f"{weight:g}, but all layers of a full fine-tune move at one pace; 0 freezes a layer, and "
            yield Problem(_weight_of(pattern), what + 'method.kind = "lora" can weigh layers')


def dropout_is_not_compiled(config: Config) -> Iterator[Problem]:
    """Every step drops something else, which compiled blocks would be compiled anew for."""
    if config.memory.compile and (used := _dropouts(config)):
        what = f"compiles each block once, but {' and '.join(used)} would change it every step: choose one"
        yield Problem("memory.compile", what)


def nothing_against_graphs(config: Config) -> Iterator[Problem]:
    """What was captured once is replayed as it is."""
    if config.memory.cuda_graphs == "on" and (found := list(against_graphs(config))):
        yield Problem("memory.cuda_graphs", f"on, but {'; '.join(found)}; use auto or off")


def against_graphs(config: Config) -> Iterator[str]:
    """Yield the settings because of which gradients cannot come from CUDA graphs, each with the reason."""
    method, memory = config.method, config.memory
    if set(method.train) != {DENOISER}:
        yield "method.train names text encoders, for which the host reads the captions of every step"
    for setting in _dropouts(config):
        yield f"{setting} leaves out something else in every step"
    if isinstance(method, LoraConfig) and method.adapter == "oft":
        yield "method.adapter = oft solves equations, which a card may stop for"
    if memory.compile:
        yield "memory.compile compiles what would be captured"
    if memory.fused_back_pass:
        yield "memory.fused_back_pass moves weights within backward"


def _dropouts(config: Config) -> list[str]:
    """Return the settings by which adapters drop something, as they are written."""
    method = config.method
    if not isinstance(method, LoraConfig):
        return []
    rates = {"dropout": method.dropout, "rank_dropout": method.rank_dropout, "module_dropout": method.module_dropout}
    return [f"method.{name}" for name, rate in rates.items() if rate]


def only_full_weights_are_sharded(config: Config) -> Iterator[Problem]:
    """Adapters are small, and what is frozen beside them needs no gradients."""
    parallel = config.parallel
    if parallel.kind == "fsdp" and (found := list(against_shards(config))):
        yield Problem("parallel.kind", f"fsdp, but {'; '.join(found)}; use auto or ddp")
    if parallel.replicas > 1 and (parallel.kind == "ddp" or not isinstance(config.method, FullConfig)):
        what = f"{parallel.replicas}, but only fsdp has any, which is for full fine-tunes; leave it at 1"
        yield Problem("parallel.replicas", what)
    if parallel.offload and not may_split(config):
        what = "true, but only fsdp has shares that could lie elsewhere, and this run is not split; set it to false"
        yield Problem("parallel.offload", what)


def may_split(config: Config) -> bool:
    """Return whether several processes would hold what is trained between them."""
    return config.parallel.kind != "ddp" and not any(against_shards(config))


def shards(config: Config, num_ranks: int) -> bool:
    """Return whether what is trained is split over the processes of a run."""
    return num_ranks > 1 and may_split(config)


def split_over(config: Config, num_ranks: int) -> int:
    """Return over how many of the processes of a run what is trained is split; 1 where each holds all of it."""
    return num_ranks // config.parallel.replicas if shards(config, num_ranks) else 1


def against_shards(config: Config) -> Iterator[str]:
    """Yield the settings because of which weights cannot be split over processes, each with the reason."""
    if isinstance(config.method, LoraConfig):
        yield "method.kind = lora trains adapters, which are small enough for every process"
    if config.memory.fused_back_pass:
        yield "memory.fused_back_pass moves weights before the gradients of all are there"
    if config.method.stop:
        yield "method.stop would leave the processes with gradients that nobody asked for"


def only_adapters_have_a_base(config: Config) -> Iterator[Problem]:
    """A full fine-tune changes the base itself, so that nothing is left to be asked."""
    if config.preserve.weight and isinstance(config.method, FullConfig):
        what = f"{config.preserve.weight:g}, but a full fine-tune changes the base that would teach; use 0, or a LoRA"
        yield Problem("preserve.weight", what, ("preserve.weight", "method.kind"))


def only_a_frozen_base_is_packed(config: Config) -> Iterator[Problem]:
    """A full fine-tune trains the weights themselves, whose small steps 8 bits cannot hold."""
    precision = config.model.base_precision
    if precision != "full" and isinstance(config.method, FullConfig):
        what = (
            f'{precision}, but a full fine-tune changes the base, which few bits cannot follow; use "full", or a LoRA'
        )
        yield Problem("model.base_precision", what)


def _weight_of(pattern: str) -> str:
    return path_text(("method", "layer_weights", pattern))


def _no_factor(method: LoraConfig) -> str:
    return f"{method.adapter} changes weights by no product that could be scaled"
