"""Which networks a foreign config trains, and how their step sizes are weighed against each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sdtrain.config.kohya.importing.findings import Became, Finding, read_as, unread
from sdtrain.config.kohya.importing.options import ForeignConfig, Option, Options
from sdtrain.config.kohya.importing.values import UnreadableError, flag, numbers
from sdtrain.config.kohya.known import FULL_MARKS, NETWORK_MARKS
from sdtrain.families.words import DENOISER, TrainableNetwork

_SDXL = re.compile(r"xl|pony|illustrious|noob|animagine", re.IGNORECASE)
_SD = re.compile(r"v1-[45]|v2-[01]|sd[-_]?1[._]?[45]|sd[-_]?15|stable-diffusion-2", re.IGNORECASE)
_SDXL_FROM_PX = 768
_RATES = ("unet_lr", "text_encoder_lr", "learning_rate", "text_encoder_lr1", "text_encoder_lr2")
_FULL_RATES = ("learning_rate_te1", "learning_rate_te2", "learning_rate_te")
_CACHED_TEXT = ("cache_text_encoder_outputs", "sdxl_cache_text_encoder_outputs")


@dataclass(frozen=True)
class Trained:
    """The networks that are trained, the learning rate of each (0: not said), and the options that tell so."""

    rates: dict[TrainableNetwork, float]
    options: tuple[Option, ...]
    note: str = ""


def has_training(options: Options) -> bool:
    """Return whether anything is said of a training; a dataset config alone says nothing."""
    return options.find(*NETWORK_MARKS, *FULL_MARKS) is not None


def is_full(options: Options) -> bool:
    """Return whether a config trains whole networks: it names a model or an optimizer, but no network to add."""
    if options.find(*NETWORK_MARKS):
        return False
    return options.find(*FULL_MARKS) is not None


def is_sdxl(options: Options) -> tuple[bool, str]:
    """Return whether a config is for SDXL, and what tells so."""
    if option := options.find("sdxl", "sdxl_checkbox"):
        return read_as(option, flag, True), f"{option.name} says so"
    if (option := options.find("v2")) and read_as(option, flag, False):
        return False, "v2 says so"
    if option := options.find("pretrained_model_name_or_path"):
        if _SDXL.search(str(option.value)):
            return True, "by the model's name"
        if _SD.search(str(option.value)):
            return False, "by the model's name"
    if option := options.find("max_resolution", "resolution"):
        return max(read_as(option, numbers, [float(_SDXL_FROM_PX)])) >= _SDXL_FROM_PX, f"by {option.name}"
    return True, "not said"


def trained_networks(config: ForeignConfig) -> Trained:
    """Return what is trained. A rate of 0 leaves a network out, unless that leaves nothing."""
    options = config.arguments
    sdxl, reason = is_sdxl(options)
    note = f"taken for {'SDXL' if sdxl else 'Stable Diffusion 1.x or 2.x'} ({reason})"
    trained = _of_full(options, sdxl) if is_full(options) else _of_lora(options, sdxl)
    return Trained(trained.rates, trained.options, note if len(trained.rates) > 1 else "")


def translate_networks(config: ForeignConfig) -> Iterator[Finding]:
    """Yield the trained networks, the preset that suits them, and their weights where the rates differ."""
    if not has_training(config.arguments):
        return
    trained = trained_networks(config)
    for name in (*_RATES, *_FULL_RATES):
        yield from unread(config.arguments.find(name), _rates)
    yield Became("method.train", list(trained.rates), trained.options, trained.note)
    if set(trained.rates) - {DENOISER}:
        preset = "full-text-encoders" if is_full(config.arguments) else "lora-text-encoders"
        yield Became("optimizer.preset", preset, note="the values for trained text encoders")
    known = {name: rate for name, rate in trained.rates.items() if rate > 0}
    base = known.get(DENOISER, max(known.values(), default=0.0))
    weights = {name: float(f"{rate / base:.6g}") for name, rate in known.items() if rate != base}
    if weights and all(0 < weight < 1e6 for weight in weights.values()):
        there = [option for option in map(config.arguments.find, (*_RATES, *_FULL_RATES)) if option is not None]
        yield Became("method.lr", weights, tuple(there), "the ratios of the learning rates")


def _of_lora(options: Options, sdxl: bool) -> Trained:
    general = _rate(options.find("learning_rate"))
    unet, text = options.find("unet_lr"), options.find("text_encoder_lr", "text_encoder_lr1")
    unet_off, text_off = unet is not None and not _rate(unet), text is not None and not any(_all_rates(text))
    told: list[Option] = []
    only_unet = _switched(options, told, "network_train_unet_only", *_CACHED_TEXT)
    only_text = not only_unet and _switched(options, told, "network_train_text_encoder_only")
    if unet_off != text_off:
        only_unet, only_text = only_unet or text_off, only_text or unet_off
        told += [option for option, off in ((unet, unet_off), (text, text_off)) if off and option is not None]
    unet_rate = _rate(unet) or general
    text_rates = _all_rates(text) if text is not None and not text_off else [general]
    second = options.find("text_encoder_lr2")
    if second is not None:
        text_rates = [text_rates[0], _rate(second)]
    rates: dict[TrainableNetwork, float] = {} if only_text and not only_unet else {DENOISER: unet_rate}
    if not only_unet:
        rates |= _text_encoders(text_rates, sdxl)
    return Trained(rates, tuple(told))


def _of_full(options: Options, sdxl: bool) -> Trained:
    rates: dict[TrainableNetwork, float] = {DENOISER: _rate(options.find("learning_rate"))}
    told = options.find("train_text_encoder")
    found = [options.find("learning_rate_te1", "learning_rate_te"), options.find("learning_rate_te2")]
    wanted = read_as(told, flag, False) if told else any(_rate(option) for option in found)
    if not wanted:
        return Trained(rates, (told,) if told else ())
    general = rates[DENOISER]
    text = [general if option is None else _rate(option) for option in found]
    names: tuple[TrainableNetwork, ...] = ("text_encoder", "text_encoder_2") if sdxl else ("text_encoder",)
    for name, option, rate in zip(names, found, text, strict=False):
        if option is None or rate:
            rates[name] = rate
    return Trained(rates, (told,) if told else tuple(option for option in found if option is not None))


def _text_encoders(rates: list[float], sdxl: bool) -> dict[TrainableNetwork, float]:
    first, second = rates[0], rates[1] if len(rates) > 1 else rates[0]
    if not sdxl:
        return {"text_encoder": first}
    both: dict[TrainableNetwork, float] = {"text_encoder": first, "text_encoder_2": second}
    return {name: rate for name, rate in both.items() if rate} or both


def _switched(options: Options, told: list[Option], *names: str) -> bool:
    """Return whether one of these options is on; it is added to those that tell what is trained."""
    for name in names:
        option = options.find(name)
        if option is not None and read_as(option, flag, False):
            told.append(option)
            return True
    return False


def _rates(value: object) -> list[float]:
    read = numbers(value)
    if min(read) < 0:
        raise UnreadableError("learning rates from 0 on")
    return read


def _all_rates(option: Option) -> list[float]:
    return read_as(option, _rates, [0.0])


def _rate(option: Option | None) -> float:
    return read_as(option, _rates, [0.0])[0]
