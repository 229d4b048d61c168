"""Settings that are fine alone and impossible together, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import Problem
from sdtrain.families.words import LATENT_FACTOR_PX

NOT_A_MULTIPLE = f"is not a multiple of {LATENT_FACTOR_PX}, the VAE's factor"


def impossible_pairs(config: Config) -> list[Problem]:
    """Everything in the config that cannot be meant."""
    return [*_model(config), *_method(config), *_data(config), *_optimizer(config), *_preview(config)]


def _model(config: Config) -> Iterator[Problem]:
    if config.model.zero_terminal_snr == "on" and config.model.prediction == "epsilon":
        yield Problem(
            "model.zero_terminal_snr",
            "on, with model.prediction = epsilon: at pure noise nothing is left to learn; use v_prediction or off",
        )
    if config.timesteps.first >= config.timesteps.last:
        yield Problem(
            "timesteps.first", f"{config.timesteps.first} is not below timesteps.last = {config.timesteps.last}"
        )


def _method(config: Config) -> Iterator[Problem]:
    repeated = sorted({name for name in config.method.train if config.method.train.count(name) > 1})
    if repeated:
        yield Problem("method.train", f"names {', '.join(repeated)} twice")
    for name in sorted(set(config.method.lr) - set(config.method.train)):
        yield Problem("method.lr", f"weighs {name}, which is not trained; method.train = {list(config.method.train)}")
    if isinstance(config.method, LoraConfig) and config.method.adapter == "oft" and config.export.names == "sd-scripts":
        yield Problem("method.adapter", 'oft has no words in sd-scripts names; set export.names = "diffusers"')
    for name in sorted(set(config.method.stop) - set(config.method.train)):
        yield Problem("method.stop", f"stops {name}, which is not trained; method.train = {list(config.method.train)}")
    if set(config.method.stop) >= set(config.method.train) and max(config.method.stop.values()) < config.steps:
        last = max(config.method.stop.values())
        yield Problem("method.stop", f"stops every network by step {last}, before steps = {config.steps}")
    if config.model.dtype == "mixed" and isinstance(config.method, LoraConfig):
        yield Problem(
            "model.dtype", "mixed keeps float32 weights to be trained; under a LoRA they are frozen: use bfloat16"
        )
    if config.memory.fused_back_pass and not isinstance(config.method, FullConfig):
        yield Problem(
            "memory.fused_back_pass",
            "saves the gradients of a full fine-tune; the gradients of adapters are small: leave it off",
        )
    if config.memory.fused_back_pass and config.data.gradient_accumulation > 1:
        yield Problem(
            "memory.fused_back_pass",
            f"drops gradients at once, data.gradient_accumulation = {config.data.gradient_accumulation} keeps them: "
            "choose one",
        )


def _data(config: Config) -> Iterator[Problem]:
    if config.data.bucket_step_px % LATENT_FACTOR_PX:
        yield Problem("data.bucket_step_px", f"{config.data.bucket_step_px} {NOT_A_MULTIPLE}")
    if config.data.bucket_step_px > config.data.resolution_px:
        yield Problem(
            "data.bucket_step_px",
            f"{config.data.bucket_step_px} is above data.resolution_px = {config.data.resolution_px}",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if isinstance(optimizer.prodigy_steps, int) and optimizer.prodigy_steps > config.steps:
        yield Problem(
            "optimizer.prodigy_steps",
            f"{optimizer.prodigy_steps} lies beyond steps = {config.steps}, so d would never freeze; 0 says so plainly",
        )
    if not optimizer.split_groups and optimizer.split_groups_mean != "off":
        yield Problem(
            "optimizer.split_groups_mean",
            f"{optimizer.split_groups_mean}, but split_groups = false leaves one d, nothing to average; leave it out",
        )
    if optimizer.betas[0] == 0 or 1.0 in optimizer.betas:
        yield Problem("optimizer.betas", f"found {list(optimizer.betas)}; beta1 in (0, 1), beta2 in [0, 1)")


def _preview(config: Config) -> Iterator[Problem]:
    for side in ("width_px", "height_px"):
        size = config.preview.width_px if side == "width_px" else config.preview.height_px
        if size % LATENT_FACTOR_PX:
            yield Problem(f"preview.{side}", f"{size} {NOT_A_MULTIPLE}")
