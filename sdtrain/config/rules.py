"""Rules about settings that are fine alone and impossible together, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sdtrain.config import method_rules
from sdtrain.config.presets import LEAST_TRAVEL, first_useful_step, misfits
from sdtrain.config.schema import Config, FolderConfig, FullConfig, LoraConfig
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


def _stops_of_untrained(config: Config) -> Iterator[Problem]:
    for name in sorted(set(config.method.stop) - set(config.method.train)):
        what = f"stops {name}, which is not trained; method.train = {list(config.method.train)}"
        yield Problem("method.stop", what, (f"method.stop.{name}",))


def _stops_of_all(config: Config) -> Iterator[Problem]:
    if set(config.method.stop) >= set(config.method.train) and max(config.method.stop.values()) < config.steps:
        last = max(config.method.stop.values())
        yield Problem("method.stop", f"stops every network by step {last}, before steps = {config.steps}")


def _stops_too_soon(config: Config) -> Iterator[Problem]:
    """Yield a problem for each network that is stopped before d can have grown enough to move a weight."""
    method, optimizer = config.method, config.optimizer
    if not optimizer.d_limiter or (isinstance(method, LoraConfig) and method.init_from):
        return
    fixed = optimizer.prodigy_steps if isinstance(optimizer.prodigy_steps, int) else 0
    for name, stop in method.stop.items():
        first = first_useful_step(optimizer.d0, fixed or config.steps)
        if name in method.train and stop < min(first, config.steps):
            yield Problem(
                "method.stop",
                f"stops {name} after {stop} steps, before its first useful one: d begins at optimizer.d0 = "
                f"{optimizer.d0:.0e} and doubles every 4 steps at most, so no weight would move by {LEAST_TRAVEL:.0e}; "
                f"stop it at {first} or later, or take it out of method.train",
                (f"method.stop.{name}",),
            )


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


def _all_or_parts(config: Config) -> Iterator[Problem]:
    if config.memory.gradient_checkpointing and config.memory.recompute:
        what = "names parts, but memory.gradient_checkpointing = true recomputes all of them: leave out one of the two"
        yield Problem("memory.recompute", what)


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


def _resolutions(config: Config) -> Iterator[Problem]:
    folders = {"data.folder": config.data.folder, "validation.folder": config.validation.folder}
    for setting, those in folders.items():
        for index, folder in enumerate(those):
            where = f"{setting}[{index}].resolutions_px"
            for low in (one for one in folder.resolutions_px if one < config.data.bucket_step_px):
                yield Problem(where, f"{low} is below data.bucket_step_px = {config.data.bucket_step_px}")
            if len(set(folder.resolutions_px)) < len(folder.resolutions_px):
                yield Problem(
                    where, f"{folder.resolutions_px} names one twice; use `repeats` to see pictures more often"
                )
    for index, folder in enumerate(config.validation.folder):
        for name in ("flip", "crops"):
            if folder.model_dump()[name] != FolderConfig.model_fields[name].default:
                what = "is set, but pictures are validated on as they are; leave it out"
                yield Problem(f"validation.folder[{index}].{name}", what)
        if len(folder.resolutions_px) > 1:
            yield Problem(f"validation.folder[{index}].resolutions_px", "names several; pictures are validated at one")


def _regularisation(config: Config) -> Iterator[Problem]:
    folders = config.data.folder
    if folders and all(folder.regularisation for folder in folders):
        what = "true, and no other folder has pictures that are taught; set it to false in one"
        yield Problem("data.folder[0].regularisation", what)
    for index, folder in enumerate(config.validation.folder):
        for name in ("regularisation", "loss_weight"):
            if folder.model_dump()[name] != FolderConfig.model_fields[name].default:
                what = "is set, but these pictures are not trained on; leave it out"
                yield Problem(f"validation.folder[{index}].{name}", what)


def _masks(config: Config) -> Iterator[Problem]:
    folders = {"data.folder": config.data.folder, "validation.folder": config.validation.folder}
    for setting, index, folder in (
        (setting, index, one) for setting, those in folders.items() for index, one in enumerate(those)
    ):
        where = f"{setting}[{index}]."
        if folder.masks == "folder" and not folder.mask_path:
            yield Problem(where + "masks", "folder, but mask_path does not say which; set it")
        elif folder.mask_path and folder.masks != "folder":
            what = f'is set, but masks = "{folder.masks}"; set masks = "folder", or leave it out'
            yield Problem(where + "mask_path", what)
        if folder.mask_floor and folder.masks == "none":
            yield Problem(where + "mask_floor", f"{folder.mask_floor:g}, but there are no masks; set masks")
        elif folder.mask_floor == 1:
            yield Problem(where + "mask_floor", "1, so that all counts whatever the masks say; set a smaller one")


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
        what = f"prodigy_steps = {prodigy_steps} is the step itself" if prodigy_steps else "prodigy_steps = 0 is never"
        yield Problem("optimizer.freeze_share", f"{share:g}, but {what}; leave it out, or set prodigy_steps to auto")


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


def _schedule_of_huber(config: Config) -> Iterator[Problem]:
    loss = config.loss
    if loss.huber_schedule != "constant" and loss.kind in ("l2", "l1"):
        what = f"{loss.huber_schedule}, but loss.kind = {loss.kind} has no delta; set loss.kind to huber or smooth_l1"
        yield Problem("loss.huber_schedule", what)


def _rescaled_guidance(config: Config) -> Iterator[Problem]:
    if config.preview.guidance_rescale > 0 and config.preview.guidance_scale == 1:
        what = f"{config.preview.guidance_rescale:g}, but preview.guidance_scale = 1 leaves nothing to take back; set 0"
        yield Problem("preview.guidance_rescale", what)


def _preview_width(config: Config) -> Iterator[Problem]:
    if config.preview.width_px % LATENT_FACTOR_PX:
        yield Problem("preview.width_px", f"{config.preview.width_px} {NOT_A_MULTIPLE}")


def _preview_height(config: Config) -> Iterator[Problem]:
    if config.preview.height_px % LATENT_FACTOR_PX:
        yield Problem("preview.height_px", f"{config.preview.height_px} {NOT_A_MULTIPLE}")


def _one_way_to_hold_out(config: Config) -> Iterator[Problem]:
    if config.validation.share and config.validation.folder:
        yield Problem(
            "validation.share", f"{config.validation.share:g}, and validation.folder names pictures too: choose one"
        )


def _patience_needs_validations(config: Config) -> Iterator[Problem]:
    validation = config.validation
    if validation.patience and not (validation.every and (validation.share or validation.folder)):
        lacking = "validation.every is 0" if not validation.every else "no pictures are held out"
        yield Problem(
            "validation.patience",
            f"{validation.patience}, but {lacking}; it counts validations: set validation.share, or leave it out",
        )


STOPPING = (
    *("method.stop", "method.train", "method.init_from", "optimizer.d0", "optimizer.preset"),
    *("optimizer.prodigy_steps", "optimizer.d_limiter", "steps"),
)
GRAPHS = (
    *("memory.cuda_graphs", "memory.compile", "memory.fused_back_pass", "method.train", "method.adapter"),
    *("method.dropout", "method.rank_dropout", "method.module_dropout"),
)
SHARDS = (
    *("parallel.kind", "parallel.replicas", "parallel.offload", "method.kind", "method.stop"),
    "memory.fused_back_pass",
)
RULES = (
    Rule(("model.zero_terminal_snr", "model.prediction"), _zero_terminal_snr),
    Rule(("timesteps.first", "timesteps.last"), _timesteps),
    Rule(("method.train",), _repeated_networks),
    Rule(("method.lr", "method.train"), _weights_of_untrained),
    Rule(("method.adapter", "method.kind", "export.names", "export.form"), method_rules.words_for_the_form),
    Rule(("method.targets", "method.adapter"), method_rules.oft_rotates_no_convolutions),
    Rule(("method.dropout", "method.rank_dropout", "method.adapter"), method_rules.dropout_needs_ranks),
    Rule(("method.module_dropout", "method.adapter"), method_rules.module_dropout_needs_a_product),
    Rule(("method.scale_weight_norms", "method.adapter"), method_rules.norm_limit_needs_a_product),
    Rule(("method.layer_weights", "method.adapter"), method_rules.layer_weights_need_a_product),
    Rule(("method.layer_weights", "method.kind"), method_rules.layer_weights_of_full),
    Rule(("preserve.weight", "method.kind"), method_rules.only_adapters_have_a_base),
    Rule(("model.base_precision", "method.kind"), method_rules.only_a_frozen_base_is_packed),
    Rule(
        ("memory.compile", "method.dropout", "method.rank_dropout", "method.module_dropout"),
        method_rules.dropout_is_not_compiled,
    ),
    Rule(("method.stop", "method.train"), _stops_of_untrained),
    Rule(("method.stop", "method.train", "steps"), _stops_of_all),
    Rule(("model.dtype", "method.kind"), _mixed_is_for_full),
    Rule(("memory.fused_back_pass", "method.kind"), _fused_is_for_full),
    Rule(("memory.fused_back_pass", "data.gradient_accumulation"), _fused_or_accumulated),
    Rule(("memory.recompute", "memory.gradient_checkpointing"), _all_or_parts),
    Rule(SHARDS, method_rules.only_full_weights_are_sharded),
    Rule(GRAPHS, method_rules.nothing_against_graphs),
    Rule(("data.bucket_step_px",), _bucket_step),
    Rule(("data.bucket_step_px", "data.resolution_px"), _bucket_step_fits),
    Rule(("data.folder",), _tags_that_stay),
    Rule(("data.folder", "validation.folder"), _masks),
    Rule(("data.folder", "validation.folder"), _regularisation),
    Rule(("data.folder", "validation.folder", "data.bucket_step_px"), _resolutions),
    Rule(("optimizer.prodigy_steps", "optimizer.preset", "steps"), _freezes_within_the_run),
    Rule(("optimizer.freeze_share", "optimizer.prodigy_steps", "optimizer.preset"), _share_of_auto),
    Rule(("optimizer.split_groups_mean", "optimizer.split_groups", "optimizer.preset"), _mean_of_one),
    Rule(("optimizer.betas",), _betas),
    Rule(("loss.huber_schedule", "loss.kind"), _schedule_of_huber),
    Rule(("preview.guidance_rescale", "preview.guidance_scale"), _rescaled_guidance),
    Rule(("optimizer.preset", "method.kind", "method.train"), misfits),
    Rule(STOPPING, _stops_too_soon),
    Rule(("preview.width_px",), _preview_width),
    Rule(("preview.height_px",), _preview_height),
    Rule(("validation.share", "validation.folder"), _one_way_to_hold_out),
    Rule(
        ("validation.patience", "validation.every", "validation.share", "validation.folder"),
        _patience_needs_validations,
    ),
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
