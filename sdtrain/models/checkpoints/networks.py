"""Builds networks without weights on torch's meta device and fills them from a checkpoint of either layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sdtrain.errors import Problem, UserError, user_error
from sdtrain.families.family import Family
from sdtrain.families.original_names import Place, old_vae_name, places_of, with_text_prefix
from sdtrain.families.words import DENOISER, Component
from sdtrain.files.header import Header, read_header
from sdtrain.models.checkpoints.configs_from_shapes import trusted_config_of
from sdtrain.models.checkpoints.fill import Fill, Stored, check_fit, fill, raise_first, stored_dtype
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.checkpoints.locate import (
    Checkpoint,
    DiffusersFolder,
    SingleFile,
    fallback_config,
    read_json,
    weight_files,
)
from sdtrain.models.checkpoints.markers import stored_configs
from sdtrain.models.checkpoints.vae import VaeSource

NOT_WEIGHTS = re.compile(r".*position_ids|logit_scale|attn_mask|text_projection(\.weight)?|loss\..*|model_ema\..*")
"""Matches keys that some writers leave beside the parameters: constants, and projections that nothing reads."""


@dataclass(frozen=True)
class Loaded:
    """A network, where each of its parameters lies, and the type in which they are stored on disk."""

    network: nn.Module
    stored: Mapping[str, Stored]
    stored_dtype: torch.dtype


@dataclass(frozen=True)
class Outline:
    """A network without values, on the meta device, and where each of its parameters lies in files."""

    network: nn.Module
    stored: dict[str, Stored]


def outline_of(
    checkpoint: Checkpoint, component: Component, headers: Sequence[Header], fallback: Path | None
) -> Outline:
    """Return what one network of a checkpoint is made of, without reading a value.

    headers: of the files with its weights. Raises UserError for a parameter that is missing or one too many.
    """
    match checkpoint:
        case DiffusersFolder(path, _, family):
            network = empty_network(family, component, read_json(path / component / "config.json"))
            return Outline(network, _named_sources(network, headers))
        case SingleFile(header, family):
            network = _fitting_network(header, family, component, fallback)
            prefix = family.prefix_of(component)
            return Outline(network, _original_sources(network, header, family, component, prefix))


def trainable_outlines(checkpoint: Checkpoint, fallback: Path | None) -> dict[str, Outline]:
    """Return the outlines of all networks that can have adapters. Raises UserError for what is no whole model."""
    found: dict[str, Outline] = {}
    for component in checkpoint.family.trainable:
        headers: list[Header] = []
        if isinstance(checkpoint, DiffusersFolder):
            files = weight_files(checkpoint.path / component, component, checkpoint.variant)
            headers = [read_header(file) for file in files]
        found[component] = outline_of(checkpoint, component, headers, fallback)
        check_fit(dict(found[component].network.named_parameters()), found[component].stored)
    return found


def load_network(opened: OpenedModel, component: Component, dtype: torch.dtype, fill: Fill = fill) -> Loaded:
    """Load one network of a model in `dtype`.

    Raises UserError when a parameter is missing, has another shape, or is one too many.
    """
    outline = outline_of(opened.checkpoint, component, opened.headers[component], opened.fallback)
    return _loaded(outline.network, outline.stored, dtype, fill)


def load_vae(source: VaeSource, family: Family, dtype: torch.dtype, fill: Fill = fill) -> Loaded:
    """Load a VAE that is named on its own, in `dtype`. Raises UserError as `load_network` does."""
    network = empty_network(family, "vae", source.config)
    if source.prefix is None:
        return _loaded(network, _named_sources(network, source.headers), dtype, fill)
    stored = _original_sources(network, source.headers[0], family, "vae", source.prefix)
    return _loaded(network, stored, dtype, fill)


def _loaded(network: nn.Module, stored: dict[str, Stored], dtype: torch.dtype, fill: Fill) -> Loaded:
    fill(network, stored, dtype)
    _fill_buffers(network)
    return Loaded(network.eval(), stored, stored_dtype(stored.values()))


def empty_network(family: Family, component: Component, config: dict[str, Any]) -> nn.Module:
    """Build the network of a configuration with parameters on the meta device: it takes no memory and draws no values.

    Raises UserError for a configuration that makes no network.
    """
    build = _builder(family, component)
    try:
        with torch.device("meta"), _Unfilled():  # for the building alone: an import makes tensors that must be real
            return build(config)
    except (TypeError, ValueError) as error:
        raise user_error(component, "config.json", f"describes no network that can be built: {error}") from None


class _Unfilled(TorchFunctionMode):
    """Leave parameters without first values, which on the meta device are no more than a way to PyTorch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def import_networks() -> None:
    """Import the classes of all networks now, which otherwise happens when the first of each is built."""
    _text_encoder_builder(with_projection=False)
    _denoiser_builder()
    _vae_builder()


def _builder(family: Family, component: Component) -> Callable[[dict[str, Any]], nn.Module]:
    encoder = family.text_encoder(component)
    if encoder:
        return _text_encoder_builder(with_projection=encoder.pooled)
    return _denoiser_builder() if component == DENOISER else _vae_builder()


# The classes' own files: diffusers and transformers import their pipelines and processors otherwise.


def _denoiser_builder() -> Callable[[dict[str, Any]], nn.Module]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    builder: Callable[[dict[str, Any]], nn.Module] = UNet2DConditionModel.from_config
    return builder


def _vae_builder() -> Callable[[dict[str, Any]], nn.Module]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    builder: Callable[[dict[str, Any]], nn.Module] = AutoencoderKL.from_config
    return builder


def _text_encoder_builder(*, with_projection: bool) -> Callable[[dict[str, Any]], nn.Module]:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    network = CLIPTextModelWithProjection if with_projection else CLIPTextModel

    def build(config: dict[str, Any]) -> nn.Module:
        built: nn.Module = network(CLIPTextConfig.from_dict(config))
        return built

    return build


def _fill_buffers(network: nn.Module) -> None:
    """Fill the buffers that no file holds: the text encoders count positions from 0."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids", f"buffer {name} has no value"
                module.register_buffer(name, torch.arange(buffer.shape[-1]).expand(1, -1).clone(), persistent=False)


def _fitting_network(header: Header, family: Family, component: Component, fallback: Path | None) -> nn.Module:
    """Build a network of a single file by the configuration that fits its tensors.

    Shapes do not tell everything, so a configuration that comes along is preferred: the header's own, or that of
    the user's folder, which may be of another model and is then not used.
    """
    own = stored_configs(header).get(component)
    if own:
        return empty_network(family, component, own)
    other = fallback_config(fallback, component)
    if other:
        network = empty_network(family, component, other)
        if fits(network, header, family, component):
            return network
    return empty_network(family, component, trusted_config_of(header, family, component))


def fits(network: nn.Module, header: Header, family: Family, component: Component) -> bool:
    """Return whether a network has just the parameters, in number and shape, that a single file has for it."""
    try:
        stored = _original_sources(network, header, family, component, family.prefix_of(component))
        check_fit(dict(network.named_parameters()), stored)
    except UserError:
        return False
    return True


def _original_sources(
    network: nn.Module, header: Header, family: Family, component: Component, prefix: str
) -> dict[str, Stored]:
    """Return where each parameter lies in a file of the original layout.

    Raises UserError where a parameter has no tensor or a tensor no parameter.
    """
    usual = family.prefix_of(component)
    places = {
        name: Place(prefix + place.key.removeprefix(usual), place.third, place.form)
        for name, place in places_of(family, component, _names(network)).items()
    }
    there = {key for key in header.entries if key.startswith(prefix)}
    places = {name: _as_written(place, there) for name, place in places.items()}
    needed = {place.key for place in places.values()}
    _check_names(header.path, needed, there, prefix, _left_out(network, family, component))
    return {name: Stored(header, place) for name, place in places.items()}


def _as_written(place: Place, there: set[str]) -> Place:
    """Return where a text projection lies: some files, such as Playground's, hold it as a layer, not transposed."""
    layer = f"{place.key}.weight"
    return Place(layer) if place.form == "transposed" and place.key not in there and layer in there else place


def _left_out(network: nn.Module, family: Family, component: Component) -> re.Pattern[str]:
    """Return a pattern for the keys, without prefix, that a file may have though the network does not."""
    encoder = family.text_encoder(component)
    if encoder is None or not encoder.spare_layers:
        return NOT_WEIGHTS
    layers: int = network.config.num_hidden_layers  # type: ignore[assignment,union-attr]
    spare = "|".join(str(layers + more) for more in range(encoder.spare_layers))
    return re.compile(rf"{NOT_WEIGHTS.pattern}|transformer\.resblocks\.({spare})\..*")


def _named_sources(network: nn.Module, headers: Sequence[Header]) -> dict[str, Stored]:
    """Return where each parameter lies in files that use the libraries' own names, present or past."""
    there = {key: header for header in headers for key in header.entries}
    keys = {}
    for name in _names(network):
        spellings = [name, with_text_prefix(name), name.removeprefix("text_model."), old_vae_name(name)]
        keys[name] = next((spelling for spelling in spellings if spelling in there), name)
    _check_names(
        headers[0].path, set(keys.values()), set(there), "", re.compile(f"(text_model.)?({NOT_WEIGHTS.pattern})")
    )
    return {name: Stored(there[key], Place(key)) for name, key in keys.items()}


def _names(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def _check_names(path: Path, needed: set[str], there: set[str], prefix: str, ignored: re.Pattern[str]) -> None:
    missing = [Problem(key, "is missing; is the file whole?") for key in sorted(needed - there)]
    extra = [
        Problem(key, "has no place in the network: the model is of a kind that is not known")
        for key in sorted(there - needed)
        if not ignored.fullmatch(key.removeprefix(prefix))
    ]
    raise_first(path, missing + extra)
