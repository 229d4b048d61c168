"""What a model on disk says about itself, read without torch, so that `sdtrain check` is quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdtrain.config.schema import ModelConfig
from sdtrain.diffusion.words import Prediction
from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.words import COMPONENTS, Component, Family
from sdtrain.files.header import explain, read_header
from sdtrain.models.checkpoints.configs_from_shapes import config_of, trusted_config_of
from sdtrain.models.checkpoints.locate import (
    Checkpoint,
    DiffusersFolder,
    SingleFile,
    lent_config,
    locate,
    missing_parts,
    open_checkpoint,
    read_json,
    weight_files,
)
from sdtrain.models.checkpoints.markers import Markers, markers_of, scheduler_of, stored_configs
from sdtrain.models.checkpoints.tokenizers import find_tokenizers
from sdtrain.models.checkpoints.vae import vae_source

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelFacts:
    """What can be known before the weights are read."""

    prediction: Prediction
    zero_terminal_snr: bool
    latent_step_px: int
    """Widths and heights of pictures must be multiples of this, or the U-Net's halvings do not fit."""
    family: Family = "sdxl"
    num_timesteps: int = 1000
    """Timesteps of the noise schedule, counted from 0."""

    @property
    def networks(self) -> tuple[Component, ...]:
        """The networks that can be trained."""
        return tuple(part for part in COMPONENTS[self.family] if part != "vae")


def inspect_model(config: ModelConfig) -> tuple[ModelFacts | None, list[Problem]]:
    """What the model says of itself, and everything that would keep it from loading. Never uses the network."""
    problems: list[Problem] = []
    checkpoint = _attempt(
        "model.path", problems, lambda: open_checkpoint(locate(config.path, config.variant), config.variant)
    )
    if checkpoint is None:
        _look_for_others(config, problems)
        return None, problems
    problems += _part_problems(config, checkpoint)
    _attempt("model.components", problems, lambda: find_tokenizers(checkpoint, config.components))
    facts = None if problems else _attempt("model.path", problems, lambda: _facts(config, checkpoint))
    if facts is None:
        stated = _attempt("model.path", [], lambda: markers_of(checkpoint)) or Markers()
        return None, [*problems, *_contradictions(config, stated)]
    stated = _attempt("model.path", problems, lambda: markers_of(checkpoint)) or Markers()
    return facts, [*problems, *_conflicts(config, facts, stated)]


def _look_for_others(config: ModelConfig, problems: list[Problem]) -> None:
    """Whether the other files that the settings name are there; all that can be told while the model itself is not."""
    if config.vae:
        _attempt("model.vae", problems, lambda: locate(config.vae, config.variant))
    if config.components:
        _attempt("model.components", problems, lambda: locate(config.components, "", weights=False))


def stated_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the header of a model's file says of it; of a folder, that of its U-Net. Raises UserError."""
    match checkpoint:
        case SingleFile(header):
            return header.metadata
        case DiffusersFolder(path, variant):
            return read_header(weight_files(path / "unet", "unet", variant)[0]).metadata


def _attempt(setting: str, problems: list[Problem], call: Callable[[], Result]) -> Result | None:
    """The call's result, or None and one more problem at the setting that named the file."""
    try:
        return call()
    except UserError as error:
        problems.append(Problem(setting, explain(error)))
        return None


def _part_problems(config: ModelConfig, checkpoint: Checkpoint) -> list[Problem]:
    """Parts that are missing, cut off, pickled or of a shape that no network has."""
    missing = missing_parts(checkpoint, own_vae=not config.vae)
    problems = [Problem(*_missing(checkpoint, part)) for part in missing]
    for part in COMPONENTS[checkpoint.family]:
        if part not in missing and not (part == "vae" and config.vae):
            _attempt("model.path", problems, lambda part=part: _check_part(checkpoint, part))  # type: ignore[misc]
    if config.vae:
        _attempt("model.vae", problems, lambda: vae_source(config.vae, config.variant, checkpoint.family))
    return problems


def _missing(checkpoint: Checkpoint, part: str) -> tuple[str, str]:
    if part == "vae":
        return "model.vae", f"{checkpoint.path} holds no VAE: name one here, a folder or a .safetensors file"
    return "model.path", f"{checkpoint.path} is not a whole model folder: {part}/config.json is missing"


def _check_part(checkpoint: Checkpoint, component: Component) -> None:
    match checkpoint:
        case SingleFile(header, family):
            config_of(header, family, component)
        case DiffusersFolder(path, variant):
            for file in weight_files(path / component, component, variant):
                read_header(file)


def _facts(config: ModelConfig, checkpoint: Checkpoint) -> ModelFacts:
    scheduler = scheduler_of(checkpoint, config.components)
    unet = network_config(checkpoint, "unet", config.components)
    vae = vae_source(config.vae, config.variant, checkpoint.family).config if config.vae else None
    vae = vae or network_config(checkpoint, "vae", config.components)
    pixels, halvings = _shrinking(vae, checkpoint, "vae"), _shrinking(unet, checkpoint, "unet")
    return ModelFacts(
        prediction="v_prediction" if scheduler.get("prediction_type") == "v_prediction" else "epsilon",
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        num_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
        latent_step_px=pixels * halvings,
        family=checkpoint.family,
    )


def _shrinking(config: dict[str, Any], checkpoint: Checkpoint, component: Component) -> int:
    """By how much a network makes pictures smaller: every block but the last halves them."""
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list):
        raise user_error(str(checkpoint.path), f"{component}/config.json", "has no list `block_out_channels`")
    return int(2 ** (len(blocks) - 1))


def network_config(checkpoint: Checkpoint, component: Component, components: str) -> dict[str, Any]:
    """The configuration that comes with a network, or else follows from its shapes."""
    match checkpoint:
        case SingleFile(header, family):
            own = stored_configs(header).get(component)
            if own or lent_config(components, component):
                return own or config_of(header, family, component)  # whether a lent one fits is seen on loading
            return trusted_config_of(header, family, component)
        case DiffusersFolder(path):
            return read_json(Path(path) / component / "config.json")


def _contradictions(config: ModelConfig, stated: Markers) -> list[Problem]:
    """Settings that contradict what the model says; what it does not say is the user's to decide."""
    problems = []
    if stated.prediction and config.prediction not in ("auto", stated.prediction):
        problems.append(
            Problem(
                "model.prediction",
                f"{config.prediction}, but the model says {stated.prediction} ({stated.prediction_source}); "
                "leave it at `auto`",
            )
        )
    if stated.zero_terminal_snr and config.zero_terminal_snr == "off":
        problems.append(
            Problem(
                "model.zero_terminal_snr",
                f"off, but the model was trained with it ({stated.zero_source}); leave it at `auto`",
            )
        )
    return problems


def _conflicts(config: ModelConfig, facts: ModelFacts, stated: Markers) -> list[Problem]:
    """Settings that contradict what the model says, or that leave nothing to learn together with it."""
    problems = _contradictions(config, stated)
    prediction = facts.prediction if config.prediction == "auto" else config.prediction
    zero = facts.zero_terminal_snr if config.zero_terminal_snr == "auto" else config.zero_terminal_snr == "on"
    if zero and prediction == "epsilon" and not problems:
        problems.append(_nothing_to_learn(config, stated))
    return problems


def _nothing_to_learn(config: ModelConfig, stated: Markers) -> Problem:
    why = "at pure noise, epsilon is the input itself and there is nothing to learn"
    if config.zero_terminal_snr == "on":
        return Problem("model.zero_terminal_snr", f"on, but the model predicts epsilon: {why}; use `off` or `auto`")
    return Problem(
        "model.prediction",
        f"epsilon, but the model has zero terminal SNR ({stated.zero_source or 'its scheduler config'}): {why}; "
        "set it to `v_prediction` if that is what the model predicts",
    )
