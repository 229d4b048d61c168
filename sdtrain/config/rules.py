"""Rules about settings that are fine alone and impossible together, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import Problem
from sdtrain.families.words import LATENT_FACTOR_PX

NOT_A_MULTIPLE = f"is not a multiple of {LATENT_FACTOR_PX}, the VAE's factor"


@dataclass(frozen=True)
class Rule:
    """One combination of settings that is impossible.

    settings: all that `check` looks at; where one of them is wrong itself, the rule says nothing.
    """

    settings: tuple[str, ...]
    check: Callable[[Config], Iterator[Problem]]


def _zero_terminal_snr(config: Config) -> Iterator[Problem]:
    if config.model.zero_terminal_snr == "on" and config.model.prediction == "epsilon":
        yield Problem(
            "model.zero_terminal_snr",
            "on, with model.prediction = epsilon: at pure noise nothing is left to learn; use v_prediction or off",
        )


def _timesteps(config: Config) -> Iterator[Problem]:
    if config.timesteps.first >= config.timesteps.last:
        yield Problem(
            "timesteps.first", f"{config.timesteps.first} is not below timesteps.last = {config.timesteps.last}"
        )


def _repeated_networks(config: Config) -> Iterator[Problem]:
    repeated = sorted({name for name in config.method.train if config.method.train.count(name) > 1})
    if repeated:
        yield Problem("method.train", f"names {', '.join(repeated)} twice")


def _weights_of_untrained(config: Config) -> Iterator[Problem]:
    for name in sorted(set(config.method.lr) - set(config.method.train)):
        what = f"weighs {name}, which is not trained; method.train = {list(config.method.train)}"
        yield Problem("method.lr", what, (f"method.lr.{name}",))


def _names_of_oft(config: Config) -> Iterator[Problem]:
    if isinstance(config.method, LoraConfig) and config.method.adapter == "oft" and config.export.names == "sd-scripts":
        yield Problem("method.adapter", 'oft has no words in sd-scripts names; set export.names = "diffusers"')


def _stops_of_untrained(config: Config) -> Iterator[Problem]:
    for name in sorted(set(config.method.stop) - set(config.method.train)):
        what = f"stops {name}, which is not trained; method.train = {list(config.method.train)}"
        yield Problem("method.stop", what, (f"method.stop.{name}",))


def _stops_of_all(config: Config) -> Iterator[Problem]:
    if set(config.method.stop) >= set(config.method.train) and max(config.method.stop.values()) < config.steps:
        last = max(config.method.stop.values())
        yield Problem("method.stop", f"stops every network by step {last}, before steps = {config.steps}")


def _mixed_is_for_full(config: Config) -> Iterator[Problem]:
    if config.model.dtype == "mixed" and isinstance(config.method, LoraConfig):
        yield Problem(
            "model.dtype", "mixed keeps float32 weights to be trained; under a LoRA they are frozen: use bfloat16"
        )


def _fused_is_for_full(config: Config) -> Iterator[Problem]:
    if config.memory.fused_back_pass and not isinstance(config.method, FullConfig):
        yield Problem(
            "memory.fused_back_pass",
            "saves the gradients of a full fine-tune; the gradients of adapters are small: leave it off",
        )


def _fused_or_accumulated(config: Config) -> Iterator[Problem]:
    if config.memory.fused_back_pass and config.data.gradient_accumulation > 1:
        yield Problem(
            "memory.fused_back_pass",
            f"drops gradients at once, data.gradient_accumulation = {config.data.gradient_accumulation} keeps them: "
            "choose one",
        )


def _bucket_step(config: Config) -> Iterator[Problem]:
    if config.data.bucket_step_px % LATENT_FACTOR_PX:
        yield Problem("data.bucket_step_px", f"{config.data.bucket_step_px} {NOT_A_MULTIPLE}")


def _bucket_step_fits(config: Config) -> Iterator[Problem]:
    if config.data.bucket_step_px > config.data.resolution_px:
        yield Problem(
            "data.bucket_step_px",
            f"{config.data.bucket_step_px} is above data.resolution_px = {config.data.resolution_px}",
        )


def _tags_that_stay(config: Config) -> Iterator[Problem]:
    for index, folder in enumerate(config.data.folder):
        where = f"data.folder[{index}]."
        kept = [name for name in ("keep_tags", "keep_separator") if folder.model_dump()[name]]
        if kept and not folder.shuffle_tags and not folder.tag_dropout:
            what = "is set, but neither shuffle_tags nor tag_dropout is: all tags stay; set one, or leave it out"
            yield Problem(where + kept[0], what)
        elif len(kept) > 1:
            yield Problem(where + kept[1], "is set, and keep_tags too: both say which tags stay; choose one")


def _freezes_within_the_run(config: Config) -> Iterator[Problem]:
    prodigy_steps = config.optimizer.prodigy_steps
    if isinstance(prodigy_steps, int) and prodigy_steps > config.steps:
        yield Problem(
            "optimizer.prodigy_steps",
            f"{prodigy_steps} lies beyond steps = {config.steps}, so d would never freeze; 0 says so plainly",
        )


def _share_of_auto(config: Config) -> Iterator[Problem]:
    prodigy_steps, share = config.optimizer.prodigy_steps, config.optimizer.freeze_share
    if prodigy_steps != "auto" and share > 0:
        yield Problem(
            "optimizer.freeze_share",
            f"{share:g}, but prodigy_steps = {prodigy_steps} is the step itself; leave it out, or set prodigy_steps to "
            "auto",
        )


def _mean_of_one(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if not optimizer.split_groups and optimizer.split_groups_mean != "off":
        yield Problem(
            "optimizer.split_groups_mean",
            f"{optimizer.split_groups_mean}, but split_groups = false leaves one d, nothing to average; leave it out",
        )


def _betas(config: Config) -> Iterator[Problem]:
    betas = config.optimizer.betas
    if betas[0] == 0 or 1.0 in betas:
        yield Problem("optimizer.betas", f"found {list(betas)}; beta1 in (0, 1), beta2 in [0, 1)")


def _preview_width(config: Config) -> Iterator[Problem]:
    if config.preview.width_px % LATENT_FACTOR_PX:
        yield Problem("preview.width_px", f"{config.preview.width_px} {NOT_A_MULTIPLE}")


def _preview_height(config: Config) -> Iterator[Problem]:
    if config.preview.height_px % LATENT_FACTOR_PX:
        yield Problem("preview.height_px", f"{config.preview.height_px} {NOT_A_MULTIPLE}")


RULES = (
    Rule(("model.zero_terminal_snr", "model.prediction"), _zero_terminal_snr),
    Rule(("timesteps.first", "timesteps.last"), _timesteps),
    Rule(("method.train",), _repeated_networks),
    Rule(("method.lr", "method.train"), _weights_of_untrained),
    Rule(("method.adapter", "method.kind", "export.names"), _names_of_oft),
    Rule(("method.stop", "method.train"), _stops_of_untrained),
    Rule(("method.stop", "method.train", "steps"), _stops_of_all),
    Rule(("model.dtype", "method.kind"), _mixed_is_for_full),
    Rule(("memory.fused_back_pass", "method.kind"), _fused_is_for_full),
    Rule(("memory.fused_back_pass", "data.gradient_accumulation"), _fused_or_accumulated),
    Rule(("data.bucket_step_px",), _bucket_step),
    Rule(("data.bucket_step_px", "data.resolution_px"), _bucket_step_fits),
    Rule(("data.folder",), _tags_that_stay),
    Rule(("optimizer.prodigy_steps", "optimizer.preset", "steps"), _freezes_within_the_run),
    Rule(("optimizer.freeze_share", "optimizer.prodigy_steps", "optimizer.preset"), _share_of_auto),
    Rule(("optimizer.split_groups_mean", "optimizer.split_groups", "optimizer.preset"), _mean_of_one),
    Rule(("optimizer.betas",), _betas),
    Rule(("preview.width_px",), _preview_width),
    Rule(("preview.height_px",), _preview_height),
)


def broken_rules(config: Config, knows: Callable[..., bool]) -> Iterator[Problem]:
    """Yield what is impossible in a config, each problem with the settings that it follows from.

    knows: tells whether settings are as the user meant them; a rule about one that is not says nothing.
    """
    for rule in RULES:
        if knows(*rule.settings):
            for problem in rule.check(config):
                own = problem.settings or (problem.where,)
                yield replace(problem, settings=(*own, *rule.settings))
