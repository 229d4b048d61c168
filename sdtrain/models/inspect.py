"""What a model on disk says about itself, read without torch, so that `sdtrain check` is quick."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sdtrain.config.schema import ModelConfig
from sdtrain.errors import Problem, user_error

BUILTIN = "builtin:"
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class ModelFacts:
    """What can be known before the weights are read."""

    prediction: Literal["epsilon", "v_prediction"]
    zero_terminal_snr: bool
    latent_step_px: int
    """Widths and heights of pictures must be multiples of this, or the U-Net's halvings do not fit."""


def builtin_folder() -> Path:
    """Where the embedded model and pictures lie."""
    return Path(__file__).parent.parent / "builtin"


def model_folder(path: str) -> Path:
    """The folder of a model path; `builtin:NAME` is inside the package."""
    if path.startswith(BUILTIN):
        return builtin_folder() / path.removeprefix(BUILTIN)
    return Path(path).expanduser()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises UserError when it is missing or not JSON."""
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise user_error(str(path), path.name, "is missing; is this a whole model?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise user_error(str(path), path.name, f"is not readable JSON: {error}") from None


def inspect_model(config: ModelConfig) -> tuple[ModelFacts | None, list[Problem]]:
    """What the model says of itself, and everything that would keep it from loading."""
    folder = model_folder(config.path)
    problems = _missing_parts(config.path, folder)
    if problems:
        return None, problems
    facts = _facts(folder)
    return facts, _conflicts(config, facts)


def _missing_parts(path: str, folder: Path) -> list[Problem]:
    if not folder.is_dir():
        names = sorted(entry.name for entry in builtin_folder().iterdir() if (entry / "model_index.json").exists())
        hint = f"built in: {', '.join(BUILTIN + name for name in names)}" if path.startswith(BUILTIN) else "no such folder"
        return [Problem("model.path", f"{hint}: {path}")]
    missing = [part for part in MODEL_PARTS if not (folder / part).is_dir()]
    if missing:
        return [Problem("model.path", f"{folder} is not an SDXL model folder: it has no {', '.join(missing)}")]
    return []


def _facts(folder: Path) -> ModelFacts:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    halvings = 2 ** (len(unet["block_out_channels"]) - 1)
    prediction = "v_prediction" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"
    return ModelFacts(
        prediction=cast(Literal["epsilon", "v_prediction"], prediction),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        latent_step_px=pixels * halvings,
    )


def _conflicts(config: ModelConfig, facts: ModelFacts) -> list[Problem]:
    problems = []
    if config.prediction not in ("auto", facts.prediction):
        problems.append(
            Problem(
                "model.prediction",
                f"{config.prediction}, but the model was trained with {facts.prediction}; leave it at `auto`",
            )
        )
    if config.zero_terminal_snr == "on" and facts.prediction == "epsilon":
        problems.append(
            Problem(
                "model.zero_terminal_snr",
                "on, but the model predicts epsilon: at pure noise there is nothing to learn from; use `off` or `auto`",
            )
        )
    return problems
