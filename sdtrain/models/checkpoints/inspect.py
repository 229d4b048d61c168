"""Opens a model on disk and tells what it says about itself, without torch, so that `sdtrain check` is quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdtrain.config.schema import ModelConfig
from sdtrain.diffusion.words import Prediction
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.family import Family
from sdtrain.families.words import DENOISER, Component, NoCaption
from sdtrain.files.header import FRACTIONS, Header, explain, read_header
from sdtrain.models.checkpoints.configs_from_shapes import config_of, trusted_config_of
from sdtrain.models.checkpoints.locate import (
    Checkpoint,
    DiffusersFolder,
    SingleFile,
    fallback_config,
    fallback_folder,
    locate,
    missing_parts,
    open_checkpoint,
    read_json,
    weight_files,
)
from sdtrain.models.checkpoints.markers import Markers, markers_of, no_caption_of, scheduler_of, stored_configs
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, find_tokenizers
from sdtrain.models.checkpoints.vae import VaeSource, vae_source

Result = TypeVar("Result")
PACKING = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant")
"""What keys end in that tools keep beside weights in eight bits, to unpack them."""


@dataclass(frozen=True)
class OpenedModel:
    """A whole model that was looked through once: what it says about itself, and all that loading it needs."""

    checkpoint: Checkpoint
    headers: Mapping[Component, tuple[Header, ...]]
    """The headers of the files with each network's weights, but for a VAE that is named on its own."""
    vae: VaeSource | None
    """The VAE that is named on its own in `model.vae`, None where none is."""
    fallback: Path | None
    """The folder named in `model.components`, for what a single file does not hold; None where none is named."""
    tokenizers: tuple[TokenizerSource, ...]
    scheduler: Mapping[str, Any]
    """The configuration of the noise schedule."""
    latent_step_px: int
    """Widths and heights of pictures must be multiples of this, or the U-Net's halvings do not fit."""
    no_caption: NoCaption
    """What conditions the U-Net where a picture has no caption, by the model's own word or its family's custom."""

    @property
    def family(self) -> Family:
        """The family that the model is of."""
        return self.checkpoint.family

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header of the model's file says about it; for a folder, that of its first U-Net file."""
        return self.headers[DENOISER][0].metadata

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts, as the model's scheduler says."""
        return "v_prediction" if self.scheduler.get("prediction_type") == "v_prediction" else "epsilon"

    @property
    def num_timesteps(self) -> int:
        """Timesteps of its noise schedule, counted from 0."""
        return int(self.scheduler.get("num_train_timesteps", 1000))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the noise schedule ends in pure noise, as the model's scheduler says."""
        return bool(self.scheduler.get("rescale_betas_zero_snr", False))


def open_model(config: ModelConfig, source: str) -> OpenedModel:
    """Open a model that can be loaded. Raises UserError, naming `source`, with all that keeps it from loading."""
    opened, problems = inspect_model(config)
    if problems or opened is None:
        raise UserError(source, problems)
    return opened


def inspect_model(config: ModelConfig) -> tuple[OpenedModel | None, list[Problem]]:
    """Open a model once and return it, with everything that keeps it from loading. Never uses the network.

    The model is None where too much is wrong for it to be described.
    """
    problems: list[Problem] = []
    checkpoint = _attempt(
        "model.path", problems, lambda: open_checkpoint(locate(config.path, config.variant), config.variant)
    )
    if checkpoint is None:
        _look_for_others(config, problems)
        return None, problems
    headers = _headers(config, checkpoint, problems)
    vae = None
    if config.vae:
        vae = _attempt("model.vae", problems, lambda: vae_source(config.vae, config.variant, checkpoint.family))
    fallback, tokenizers = _fallbacks(config, checkpoint, problems)
    opened = None
    if not problems:
        opened = _attempt("model.path", problems, lambda: _opened(checkpoint, headers, vae, fallback, tokenizers))
    if opened is not None:
        problems += untrainable_problems(opened)
    if opened is None:
        markers = _attempt("model.path", [], lambda: markers_of(checkpoint)) or Markers()
        return None, [*problems, *_contradictions(config, markers)]
    markers = _attempt("model.path", problems, lambda: markers_of(checkpoint)) or Markers()
    return opened, [*problems, *_conflicts(config, opened, markers)]


def _look_for_others(config: ModelConfig, problems: list[Problem]) -> None:
    """Look for the other files that the settings name; nothing more can be told while the model itself is not there."""
    if config.vae:
        _attempt("model.vae", problems, lambda: locate(config.vae, config.variant))
    if config.components:
        _attempt("model.components", problems, lambda: locate(config.components, "", weights=False))


def _attempt(setting: str, problems: list[Problem], call: Callable[[], Result]) -> Result | None:
    """Return the call's result; where it fails, return None and add a problem at the setting that named the file."""
    try:
        return call()
    except UserError as error:
        problems.append(Problem(setting, explain(error)))
        return None


def _headers(
    config: ModelConfig, checkpoint: Checkpoint, problems: list[Problem]
) -> dict[Component, tuple[Header, ...]]:
    """Return the headers of every part's files.

    Adds a problem for each that is missing, cut off, pickled or of no known shape.
    """
    missing = missing_parts(checkpoint, own_vae=not config.vae)
    problems += [Problem(*_missing(checkpoint, part)) for part in missing]
    found: dict[Component, tuple[Header, ...]] = {}
    for part in checkpoint.family.components:
        if part not in missing and not (part == "vae" and config.vae):
            found[part] = _attempt("model.path", problems, lambda part=part: _read_part(checkpoint, part)) or ()  # type: ignore[misc]
    return found


def _fallbacks(
    config: ModelConfig, checkpoint: Checkpoint, problems: list[Problem]
) -> tuple[Path | None, tuple[TokenizerSource, ...]]:
    """Return the folder named in `model.components`, and the tokenizers from there or from elsewhere."""

    def find() -> tuple[Path | None, tuple[TokenizerSource, ...]]:
        fallback = fallback_folder(config.components)
        return fallback, find_tokenizers(checkpoint, fallback)

    return _attempt("model.components", problems, find) or (None, ())


def _missing(checkpoint: Checkpoint, part: str) -> tuple[str, str]:
    if part == "vae":
        return "model.vae", f"{checkpoint.path} holds no VAE: name one here, a folder or a .safetensors file"
    return "model.path", f"{checkpoint.path} is not a whole model folder: {part}/config.json is missing"


def _read_part(checkpoint: Checkpoint, component: Component) -> tuple[Header, ...]:
    match checkpoint:
        case SingleFile(header, family):
            config_of(header, family, component)
            return (header,)
        case DiffusersFolder(path, variant):
            read_json(path / component / "config.json")
            return tuple(read_header(file) for file in weight_files(path / component, component, variant))


def _opened(
    checkpoint: Checkpoint,
    headers: Mapping[Component, tuple[Header, ...]],
    vae: VaeSource | None,
    fallback: Path | None,
    tokenizers: tuple[TokenizerSource, ...],
) -> OpenedModel:
    halvings = _shrinking(network_config(checkpoint, DENOISER, fallback), checkpoint, DENOISER)
    pixels = _shrinking(vae.config if vae else network_config(checkpoint, "vae", fallback), checkpoint, "vae")
    return OpenedModel(
        checkpoint=checkpoint,
        headers=headers,
        vae=vae,
        fallback=fallback,
        tokenizers=tokenizers,
        scheduler=scheduler_of(checkpoint, fallback),
        latent_step_px=pixels * halvings,
        no_caption=no_caption_of(checkpoint),
    )


def untrainable_problems(opened: OpenedModel) -> list[Problem]:
    """Return the problems of weights in eight bits or less, which hold too little to be trained or merged into."""
    folder = isinstance(opened.checkpoint, DiffusersFolder)
    parts = [("" if folder else opened.family.prefix_of(name), headers) for name, headers in opened.headers.items()]
    told = [Problem("model.path", what) for prefix, headers in parts for what in _packed(prefix, headers)][:1]
    if opened.vae is not None:
        told += [Problem("model.vae", what) for what in _packed(opened.vae.prefix or "", opened.vae.headers)][:1]
    return told


def _packed(prefix: str, headers: Sequence[Header]) -> list[str]:
    """Return what says that weights are packed: keys beside them that unpack them, or their type."""
    entries = {key: (header, entry) for header in headers for key, entry in header.entries.items()}
    ours = sorted(key for key in entries if key.startswith(prefix))
    scales = [f"{key} belongs to weights that are packed" for key in ours if key.endswith(PACKING)]
    types = [
        f"{key} is stored as {entries[key][1].dtype}"
        for key in ours
        if key.endswith(("weight", "bias")) and entries[key][1].dtype not in FRACTIONS
    ]
    path = headers[0].path.name if headers else ""
    return [f"{path}: {what}, which cannot be trained; get fp16 or more" for what in types + scales]


def _shrinking(config: dict[str, Any], checkpoint: Checkpoint, component: Component) -> int:
    """Return by how much a network divides the sides of a picture: every block but the last halves them."""
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list):
        raise user_error(str(checkpoint.path), f"{component}/config.json", "has no list `block_out_channels`")
    return int(2 ** (len(blocks) - 1))


def network_config(checkpoint: Checkpoint, component: Component, fallback: Path | None) -> dict[str, Any]:
    """Return the configuration that comes with a network, or else the one that follows from its shapes."""
    match checkpoint:
        case SingleFile(header, family):
            own = stored_configs(header).get(component)
            if own or fallback_config(fallback, component):
                return own or config_of(header, family, component)  # whether the fallback fits is seen on loading
            return trusted_config_of(header, family, component)
        case DiffusersFolder(path):
            return read_json(path / component / "config.json")


def _contradictions(config: ModelConfig, markers: Markers) -> list[Problem]:
    """Return problems for settings that contradict what the model says; what it leaves open is the user's to decide."""
    problems = []
    if markers.prediction and config.prediction not in ("auto", markers.prediction):
        problems.append(
            Problem(
                "model.prediction",
                f"{config.prediction}, but the model says {markers.prediction} ({markers.prediction_source}); "
                "leave it at `auto`",
            )
        )
    if markers.zero_terminal_snr and config.zero_terminal_snr == "off":
        problems.append(
            Problem(
                "model.zero_terminal_snr",
                f"off, but the model was trained with it ({markers.zero_source}); leave it at `auto`",
            )
        )
    return problems


def _conflicts(config: ModelConfig, facts: OpenedModel, markers: Markers) -> list[Problem]:
    """Return problems for settings that contradict the model, or that leave nothing to learn together with it."""
    problems = _contradictions(config, markers)
    prediction = facts.prediction if config.prediction == "auto" else config.prediction
    zero = facts.zero_terminal_snr if config.zero_terminal_snr == "auto" else config.zero_terminal_snr == "on"
    if zero and prediction == "epsilon" and not problems:
        problems.append(_nothing_to_learn(config, markers))
    return problems


def _nothing_to_learn(config: ModelConfig, markers: Markers) -> Problem:
    why = "at pure noise, epsilon is the input itself and there is nothing to learn"
    if config.zero_terminal_snr == "on":
        return Problem("model.zero_terminal_snr", f"on, but the model predicts epsilon: {why}; use `off` or `auto`")
    return Problem(
        "model.prediction",
        f"epsilon, but the model has zero terminal SNR ({markers.zero_source or 'its scheduler config'}): {why}; "
        "set it to `v_prediction` if that is what the model predicts",
    )
