"""From steps, losses, noise, saving and memory there to their sections here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from sdtrain.config.kohya.importing.data import is_of_gui
from sdtrain.config.kohya.importing.findings import Became, Finding, Lost, NotNeeded, direct, read_as, unread
from sdtrain.config.kohya.importing.networks import has_training, is_full, trained_networks
from sdtrain.config.kohya.importing.options import ForeignConfig, Option, Options
from sdtrain.config.kohya.importing.values import MOST_COUNTED, count, flag, is_off, number, text, whole
from sdtrain.diffusion.words import HuberSchedule, LossKind
from sdtrain.families.words import DENOISER

STEPS = 1600
"""The steps of sd-scripts where its config says nothing."""

_LAST_TIMESTEP = 999


def translate_steps(config: ForeignConfig, steps_per_epoch: int | None, images_per_step: int) -> Iterator[Finding]:
    """Yield the steps of the run, and of its states. steps_per_epoch: None where the pictures are not here."""
    options = config.arguments
    planned, findings = _steps(options, steps_per_epoch, images_per_step)
    yield from findings
    yield from direct(options, "seed", whole, "seed")
    yield from _saving(options, steps_per_epoch)
    yield from _stop(config, planned)


def translate_objective(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of the options about loss, noise and timesteps."""
    options = config.arguments
    yield from _loss(options)
    yield from _noise(options)
    first, last = _on(options, "min_timestep"), options.find("max_timestep")
    if first is not None:
        yield from unread(first, whole)
        yield Became("timesteps.first", min(read_as(first, whole, 0), _LAST_TIMESTEP - 1), (first,))
    if last is not None:
        yield from unread(last, count)
        end = read_as(last, count, _LAST_TIMESTEP + 1) - 1
        if end < _LAST_TIMESTEP:
            yield Became(
                "timesteps.last", max(end, 1), (last,), "the last that is trained, there the first that is not"
            )
        else:
            yield NotNeeded(last, "all timesteps are trained")


def translate_machine(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of the options about memory and names."""
    options = config.arguments
    for name, setting in (
        ("gradient_checkpointing", "memory.gradient_checkpointing"),
        ("torch_compile", "memory.compile"),
    ):
        yield from direct(options, setting, flag, name)
    fused = options.find("fused_backward_pass")
    if fused is not None and read_as(fused, flag, False):
        accumulates = read_as(options.find("gradient_accumulation_steps"), count, 1) > 1
        if is_full(options) and not accumulates:
            yield Became("memory.fused_back_pass", True, (fused,))
        else:
            yield NotNeeded(fused, "it saves the gradients of full fine-tunes that do not accumulate")
    yield from direct(options, "output", text, "output_dir", note="a run gets a folder of its name in it")


def _steps(options: Options, per_epoch: int | None, images: int) -> tuple[int, list[Finding]]:
    """Return the planned steps, and the findings about them."""
    steps, epochs = _on(options, "max_train_steps"), _on(options, "max_train_epochs", "num_epochs")
    if epochs is None and steps is None:
        epochs = _on(options, "epoch", "epochs")
    found: list[Finding] = [*unread(steps, count), *unread(epochs, count)]
    stated = read_as(steps, count, 0)
    num_epochs = read_as(epochs, count, 0)
    if num_epochs and per_epoch and epochs is not None:
        planned = min(num_epochs * per_epoch, MOST_COUNTED)
        found.append(Became("steps", planned, (epochs,), f"{_epochs(num_epochs)} of {per_epoch} steps"))
        found += [NotNeeded(steps, "the epochs count, there too")] if steps else []
        return planned, found
    if num_epochs and epochs is not None:
        note = (
            f"the pictures are not here, so that this stands in for the steps of {_epochs(num_epochs)}: "
            f"pictures x repeats x {num_epochs} / {images}"
        )
        found.append(Became("steps", stated or STEPS, tuple(one for one in (epochs, steps) if one), note))
        return stated or STEPS, found
    if stated and steps is not None:
        found += [Became("steps", stated, (steps,))]
        found += [NotNeeded(option, "max_train_steps counts") for option in options.having("epoch", "epochs")]
        return stated, found
    missing = "not in the file: say how long to train"
    if has_training(options):
        missing = f"max_train_steps is not in the file; there it is {STEPS} then"
    found.append(Became("steps", STEPS, note=missing))
    return STEPS, found


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


def _saving(options: Options, per_epoch: int | None) -> Iterator[Finding]:
    for setting, by_steps, by_epochs in (
        ("checkpoint.every", "save_every_n_steps", "save_every_n_epochs"),
        ("preview.every", "sample_every_n_steps", "sample_every_n_epochs"),
    ):
        steps, epochs = _on(options, by_steps), _on(options, by_epochs)
        yield from (*unread(steps, count), *unread(epochs, count))
        if steps is not None:
            yield Became(setting, read_as(steps, count, 500), (steps,))
            if epochs is not None:
                yield NotNeeded(epochs, f"{setting} counts steps, as {by_steps} says")
        elif epochs is not None and per_epoch:
            yield Became(
                setting,
                min(per_epoch * read_as(epochs, count, 1), MOST_COUNTED),
                (epochs,),
                f"epochs of {per_epoch} steps",
            )
        elif epochs is not None:
            yield Lost(epochs, f"the steps of an epoch are not known; set {setting} in steps")
    kept = _on(options, "save_last_n_epochs_state", "save_last_n_epochs", "keep_only_last_n_checkpoints")
    if kept is not None:
        yield from direct(options, "checkpoint.keep", count, kept.name)
    for option in (_on(options, "save_last_n_steps_state"), _on(options, "save_last_n_steps")):
        every = read_as(_on(options, "save_every_n_steps"), count, 0)
        steps_kept = read_as(option, count, 0)
        yield from unread(option, count)
        if option is not None and every and steps_kept:
            yield Became("checkpoint.keep", math.ceil(steps_kept / every), (option,), f"states of {every} steps each")
        elif option is not None:
            yield NotNeeded(option, "checkpoint.keep counts states, not steps")


def _stop(config: ForeignConfig, steps: int) -> Iterator[Finding]:
    """Yield the end of the text encoders' training: a share of the steps in kohya_ss, a step in sd-scripts."""
    option = _on(config.arguments, "stop_text_encoder_training", "stop_text_encoder_training_pct")
    if option is None:
        return
    text_encoders = [name for name in trained_networks(config).rates if name != DENOISER]
    value = read_as(option, lambda value: number(value, least=-1), 0.0)
    in_percent = option.name.endswith("_pct") or is_of_gui(config.arguments)
    if not is_full(config.arguments):
        yield NotNeeded(option, "it is ignored for LoRAs there; `method.stop` would do it here")
    elif not text_encoders or len(text_encoders) == len(trained_networks(config).rates):
        yield NotNeeded(option, "it would stop what is not trained, or all that is")
    else:
        stop = round(steps * value / 100) if in_percent else int(value)
        if 1 <= stop < steps:
            yield Became("method.stop", dict.fromkeys(text_encoders, stop), (option,))
        else:
            yield NotNeeded(option, "it lies outside of the run")


def _loss(options: Options) -> Iterator[Finding]:
    kind = options.find("loss_type")
    word = "" if kind is None else str(kind.value).strip().lower()
    if kind is not None and word in get_args(LossKind):
        yield Became("loss.kind", word, (kind,))
    elif kind is not None:
        yield Lost(kind, f"allowed are {', '.join(get_args(LossKind))}; l2 stands in")
    if word in ("huber", "smooth_l1"):
        yield from direct(options, "loss.huber_delta", _positive, "huber_c")
        yield from _huber_schedule(options)
    else:
        for option in options.having("huber_c", "huber_schedule", "huber_scale"):
            yield NotNeeded(option, "the loss is not Huber's")
    yield from _weighting(options)


def _huber_schedule(options: Options) -> Iterator[Finding]:
    option = options.find("huber_schedule")
    if option is None:
        yield Became("loss.huber_schedule", "snr", note="huber_schedule is not in the file; there it is snr then")
    elif str(option.value) in get_args(HuberSchedule):
        yield Became("loss.huber_schedule", str(option.value), (option,))
    else:
        yield Lost(option, f"allowed are {', '.join(get_args(HuberSchedule))}; constant stands in")


def _weighting(options: Options) -> Iterator[Finding]:
    """Yield the weighting of timesteps: one, where there several can be multiplied."""
    snr = _on(options, "min_snr_gamma")
    yield from unread(snr, _positive)
    gamma = read_as(snr, _positive, 0.0)
    there = {
        "min_snr": snr if gamma else None,
        "debiased_kohya": _on(options, "debiased_estimation_loss"),
        "scale_v_like_noise": _on(options, "scale_v_pred_loss_like_noise_pred"),
    }
    given = [(weighting, option) for weighting, option in there.items() if option is not None]
    for weighting, option in given[:1]:
        yield Became("loss.weighting", weighting, (option,))
    for _, option in given[1:]:
        yield Lost(option, f"one weighting at a time, and {given[0][1].name} is set too")
    if snr is not None and gamma:
        yield Became("loss.min_snr_gamma", gamma, (snr,))


def _noise(options: Options) -> Iterator[Finding]:
    style = options.find("noise_offset_type")
    levels, discount = _on(options, "multires_noise_iterations"), _on(options, "multires_noise_discount")
    by_levels = style is None or str(style.value).strip().lower() != "original"
    if style is None or str(style.value).strip().lower() == "original":
        yield from direct(options, "noise.offset", _not_negative, "noise_offset")
    elif offset := _on(options, "noise_offset"):
        yield NotNeeded(offset, "noise_offset_type says that it is not used")
    there = tuple(option for option in (levels, discount) if option is not None)
    if levels is not None and by_levels and read_as(discount, _discount, 0.3):
        yield from unread(discount, _discount)
        value = read_as(discount, _discount, 0.3)
        yield Became("noise.pyramid_discount", value, there, "as many levels as the picture has")
    elif there and not by_levels:
        for option in there:
            yield NotNeeded(option, "noise_offset_type says that it is not used")
    elif discount is not None:
        yield NotNeeded(discount, "without multires_noise_iterations it is not used")
    yield from direct(options, "noise.input_perturbation", _not_negative, "ip_noise_gamma")


def _on(options: Options, *names: str) -> Option | None:
    """Return the first of these options that is not 0 or off."""
    for name in names:
        option = options.find(name)
        if option is not None and not is_off(option.value):
            return option
    return None


def _positive(value: object) -> float:
    return number(value, above=0)


def _not_negative(value: object) -> float:
    return number(value, least=0)


def _discount(value: object) -> float:
    return min(number(value, least=0), 0.99)
