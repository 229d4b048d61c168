"""From a model and a network there to [model], [method] and [export] here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sdtrain.config.kohya.importing.findings import Became, Finding, Lost, NotNeeded, direct, read_as, unread
from sdtrain.config.kohya.importing.networks import has_training, is_full, is_sdxl, trained_networks
from sdtrain.config.kohya.importing.options import ForeignConfig, Option, Options
from sdtrain.config.kohya.importing.values import UnreadableError, count, flag, is_off, number, text, whole
from sdtrain.config.kohya.known_network import LAYER_RATES
from sdtrain.families.words import DENOISER

ADAPTERS = {
    "standard": "lora",
    "lora": "lora",
    "locon": "lora",
    "kohya locon": "lora",
    "lycoris/locon": "lora",
    "loha": "loha",
    "lycoris/loha": "loha",
    "lokr": "lokr",
    "lycoris/lokr": "lokr",
    "oft": "oft",
    "diag-oft": "oft",
    "lycoris/diag-oft": "oft",
    "dora": "dora",
}
"""Names of networks there, in small letters, and the adapter here."""

MODULES = {"networks.oft": "oft", "networks.loha": "loha", "networks.lokr": "lokr", "networks.lora": "lora"}
LYCORIS_MODULES = ("lycoris.kohya", "locon.locon_kohya")

PRESETS = {
    "full": "all",
    "full-lin": "all-linear",
    "attn-mlp": "attention+ff",
    "attn-only": "attention",
    "unet-transformer-only": "attention+ff",
}
"""Presets of LyCORIS and `method.targets` here."""

CONVOLUTIONS = "*conv*"
DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_DROPOUTS = ("network_dropout", "rank_dropout", "module_dropout")
_DORA = ("dora_wd", "use_dora")
_RANK_STABLE = ("rs_lora", "use_rslora")
_KINDS = ("LoRA_type", "network_module", "algo", "lycoris_algo")


def translate_model(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of the options about the model."""
    options = config.arguments
    for setting, name in (("model.path", "pretrained_model_name_or_path"), ("model.vae", "vae")):
        is_pickle = str(read_as(options.find(name), text, "")).lower().endswith(PICKLES)
        note = "pickle files are not read; save it as .safetensors" if is_pickle else ""
        yield from direct(options, setting, text, name, note=note)
    predicts_v = options.find("v_parameterization")
    yield from unread(predicts_v, flag)
    if predicts_v is not None and read_as(predicts_v, flag, False):
        yield Became("model.prediction", "v_prediction", (predicts_v,))
    zero = options.find("zero_terminal_snr")
    yield from unread(zero, flag)
    if zero is not None and read_as(zero, flag, False):
        yield Became("model.zero_terminal_snr", "on", (zero,))
    yield from _precision(options)
    skip = options.find("clip_skip")
    if skip is not None and is_sdxl(options)[0]:
        yield NotNeeded(skip, "SDXL reads its text encoders at one layer, the last but one")
    elif skip is not None and read_as(skip, whole, 1) <= 1:
        yield NotNeeded(skip, "the last layer is what is read")


def translate_method(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of the options about the network that is trained."""
    options = config.arguments
    yield from _layers(options)
    if not has_training(options):
        yield Became("method.kind", "lora", note="not in the file: give the config of the training too, or choose here")
        return
    if is_full(options):
        yield Became("method.kind", "full", note="the file names no network to add, so all weights are trained")
        for option in options.having("scale_weight_norms", *_DROPOUTS, *_DORA):
            yield NotNeeded(option, "it is about adapters, and all weights are trained")
        return
    yield from _restraints(options)
    yield from _adapter(options)
    yield from _targets(config)
    rank = options.find("network_dim", "dim")
    if rank is None:
        yield Became("method.rank", 4, note="network_dim is not in the file; there it is 4 then")
    yield from direct(options, "method.rank", count, "network_dim", "dim")
    if options.find("network_alpha", "alpha") is None:
        yield Became("method.alpha", 1.0, note="network_alpha is not in the file; there it is 1 then")
    yield from direct(options, "method.alpha", _alpha(options), "network_alpha", "alpha")
    yield from direct(options, "method.init_from", text, "network_weights", "lora_network_weights")


def _restraints(options: Options) -> Iterator[Finding]:
    """Yield what holds adapters back: dropouts, and a limit of their norm."""
    yield from direct(options, "method.dropout", _rate, "network_dropout", "dropout")
    for name in ("rank_dropout", "module_dropout"):
        yield from direct(options, f"method.{name}", _rate, name)
    yield from direct(options, "method.scale_weight_norms", lambda value: number(value, least=0), "scale_weight_norms")


def _layers(options: Options) -> Iterator[Finding]:
    """Yield that learning rates of blocks have to be written as weights of layers."""
    for option in options.having(*LAYER_RATES):
        if not is_off(option.value):
            yield Lost(option, "blocks are not numbered here; write it with patterns, method.layer_weights")


def _adapter(options: Options) -> Iterator[Finding]:
    found, note, sources = _kind_of_adapter(options)
    for option in options.having(*_DORA):
        if found == "lora" and read_as(option, flag, False):
            found, sources = "dora", (*sources, option)
    for option in options.having(*_RANK_STABLE):
        if found == "lora" and read_as(option, flag, False):
            found, sources = "rslora", (*sources, option)
    yield Became("method.kind", "lora", options.having(*_KINDS))
    yield Became("method.adapter", found, sources, note)
    if found == "oft":
        yield Became("export.names", "diffusers", note="oft has no words in the names of sd-scripts")


def _kind_of_adapter(options: Options) -> tuple[str, str, tuple[Option, ...]]:
    """Return the adapter here, what has to be said about it, and the options that tell it."""
    for option in (options.find("LoRA_type"), options.find("algo", "lycoris_algo")):
        if option is not None:
            found = ADAPTERS.get(str(option.value).strip().lower())
            return found or "lora", "" if found else f"there is no {option.value} here; lora is the nearest", (option,)
    module = options.find("network_module")
    if module is None or str(module.value) in MODULES or str(module.value) in LYCORIS_MODULES:
        return MODULES.get(str(module.value) if module else "", "lora"), "", (module,) if module else ()
    return "lora", f"there is no {module.value} here; lora is the nearest", (module,)


def _targets(config: ForeignConfig) -> Iterator[Finding]:
    options = config.arguments
    preset = options.find("preset", "LyCORIS_preset") if _is_lycoris(options) else None
    conv = options.find("conv_dim")
    conv_rank = read_as(conv, whole, 0)
    yield from unread(conv, whole)
    if _kind_of_adapter(options)[0] == "oft":
        note = "oft rotates no convolutions that look at several pixels"
        yield Became("method.targets", "all-linear", (preset,) if preset is not None else (), note)
    elif preset is not None and str(preset.value) in PRESETS:
        yield Became("method.targets", PRESETS[str(preset.value)], (preset,))
    elif preset is not None:
        yield Lost(preset, "layers are chosen by `method.targets`: a preset of ours, or patterns of their names")
    elif _is_lycoris(options):
        yield Became("method.targets", "all", note="the preset of LyCORIS that is not named is `full`")
    elif conv is not None and conv_rank and _has_convolutions(options):
        yield Became("method.targets", "all", (conv,), "convolutions too")
    unused = not _has_convolutions(options) or DENOISER not in trained_networks(config).rates
    for option, setting in ((conv, "method.ranks"), (options.find("conv_alpha"), "method.alphas")):
        if option is None:
            continue
        if unused:
            yield NotNeeded(option, "no convolutions are trained")
        elif read_as(option, lambda value: number(value, least=0), 0.0) > 0 and conv_rank:
            value = conv_rank if setting == "method.ranks" else number(option.value)
            yield Became(setting, {CONVOLUTIONS: value}, (option,))


def _is_lycoris(options: Options) -> bool:
    kind, module = options.find("LoRA_type"), options.find("network_module")
    if kind is not None:
        return str(kind.value).startswith("LyCORIS/")
    return module is not None and str(module.value) in LYCORIS_MODULES


def _has_convolutions(options: Options) -> bool:
    """Return whether conv_dim counts: kohya_ss writes it for every network, a plain LoRA has none."""
    kind = options.find("LoRA_type")
    preset = options.find("preset", "LyCORIS_preset")
    if _is_lycoris(options) and preset is not None and PRESETS.get(str(preset.value)) != "all":
        return False
    return kind is None or str(kind.value).strip().lower() != "standard"


def _precision(options: Options) -> Iterator[Finding]:
    full = is_full(options)
    mixed = options.find("mixed_precision")
    whole_bf16, whole_fp16 = options.find("full_bf16"), options.find("full_fp16")
    in_bf16 = read_as(whole_bf16, flag, False)
    there = tuple(option for option in (mixed, whole_bf16 if in_bf16 else None) if option is not None)
    half = "bfloat16 has the range of float32, so nothing overflows"
    word = "" if mixed is None else str(mixed.value).strip().lower()
    if in_bf16 or (word == "bf16" and not full):
        yield Became("model.dtype", "bfloat16", there)
    elif word == "bf16":
        yield Became("model.dtype", "mixed", there)
    elif word == "no" and mixed is not None:
        yield Became("model.dtype", "float32", (mixed,))
    elif word == "fp16" and mixed is not None and full:
        yield Became("model.dtype", "mixed", (mixed,), f'{half}; "float16" is for cards without it')
    elif word == "fp16" and mixed is not None:
        yield NotNeeded(mixed, f"{half}; model.dtype = auto takes it where the card has it, and float16 elsewhere")
    if whole_fp16 is not None and read_as(whole_fp16, flag, False):
        yield NotNeeded(whole_fp16, half)
    eight_bits = options.find("fp8_base", "fp8_base_unet")
    if eight_bits is not None and read_as(eight_bits, flag, False):
        if full:
            yield NotNeeded(eight_bits, "a full fine-tune trains the weights themselves, which 8 bits cannot follow")
        else:
            yield Became("model.base_precision", "fp8", (eight_bits,), "the text encoders stay as they are")
    yield from unread(eight_bits, flag)
    saved = options.find("save_precision")
    if saved is not None and str(saved.value) in DTYPES:
        yield Became("export.dtype", DTYPES[str(saved.value)], (saved,))
    yield from unread(whole_bf16, flag)


def translate_author(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of what the author says of the file."""
    options = config.arguments
    for setting in ("author", "license", "description", "usage_hint"):
        yield from direct(options, f"export.about.{setting}", text, f"metadata_{setting}")
    yield from direct(options, "export.about.tags", _words, "metadata_tags")
    yield from direct(options, "export.about.trigger_words", _words, "metadata_trigger_phrase")
    picture = options.find("metadata_thumbnail")
    if picture is not None and str(picture.value).startswith("data:"):
        yield Lost(picture, "name the file of the picture in export.about.thumbnail")
    else:
        yield from direct(options, "export.about.thumbnail", text, "metadata_thumbnail")


def _words(value: object) -> list[str]:
    return [word.strip() for word in text(value).split(",") if word.strip()]


def _rate(value: object) -> float:
    read = number(value, least=0, most=1)
    if read == 1:
        raise UnreadableError("a number below 1")
    return read


def _alpha(options: Options) -> Callable[[object], float]:
    rank = read_as(options.find("network_dim", "dim"), count, 4)

    def read(value: object) -> float:
        """An alpha of 0 means the rank there."""
        return number(value, least=0) or float(rank)

    return read
