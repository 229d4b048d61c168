"""A family that nobody published, of another shape, by its record alone: files, names and a training.

It has one text encoder whose pooled vector the U-Net reads beside the sizes, prefixes of its own in files, three levels
with two layers each and one that attends, and zeros for no caption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdtrain.config.schema import ModelConfig
from sdtrain.families.family import Family, TextEncoder, Words
from sdtrain.families.known import FAMILIES
from sdtrain.families.modelspec import Description
from sdtrain.families.published_configs import CLIP_L_TEXT, SCHEDULER, SDXL_UNET, SDXL_VAE
from sdtrain.families.words import Component, FamilyName
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.models import latent_diffusion
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.folder import write_folder
from sdtrain.models.checkpoints.inspect import OpenedModel, inspect_model, open_model
from sdtrain.models.checkpoints.networks import empty_network
from sdtrain.models.checkpoints.single_file import Change, order_of_weights, write_single_file
from sdtrain.models.checkpoints.tokenizers import TokenizerSource, load_tokenizer
from sdtrain.models.model import Layout, Model
from sdtrain.models.prompts import token_chunks
from sdtrain.models.tiles import InTiles

TOKENIZER = TokenizerSource(BUILTIN_FOLDER / "tiny-sdxl" / "tokenizer")
WORDS: dict[str, int] = json.loads((TOKENIZER.folder / "vocab.json").read_text(encoding="utf-8"))
DESCRIPTION = Description(title="small", resolution_px=(64, 64), date="2026-01-01T00:00:00Z")
TEXT = {
    **CLIP_L_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "projection_dim": 32,
    "bos_token_id": WORDS["<|startoftext|>"],
    "eos_token_id": WORDS["<|endoftext|>"],
}
UNET = {
    **SDXL_UNET,
    "block_out_channels": [64, 64, 128],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "addition_time_embed_dim": 8,
}
VAE = {**SDXL_VAE, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "scaling_factor": 0.5}
POND = Family(
    name=cast(FamilyName, "pond"),
    title="Pond",
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            prefix="reader.",
            lora_prefix="lora_reader_",
            config=TEXT,
            pooled=True,
            last_layer_read=False,
        ),
    ),
    words=Words(
        architecture="pond-v1",
        implementation="https://example.org/pond",
        lora_implementation="diffusers",
        base_version="pond",
        pipeline="PondPipeline",
    ),
    resolution_px=64,
    unet=UNET,
    vae=VAE,
    takes_sizes=True,
    unet_prefix="net.",
    vae_prefix="pixels.",
    lora_in_original_layout=True,
    no_caption="zeros",
)


class Pond:
    """Fulfils `Model`; all that a family has to say itself is how it reads captions and sizes."""

    def __init__(self, components: Components, device: torch.device) -> None:
        self.components, self.family, self.device = components, components.family, device
        self.tiled: set[InTiles] = set()
        self.networks: dict[str, nn.Module] = {name: components.networks[name] for name in self.family.trainable}
        self.unused_layers = latent_diffusion.unused_layers(components)
        self.scheduler_config, self.no_caption = components.scheduler_config, components.no_caption
        self.prediction = latent_diffusion.prediction_of(self.scheduler_config)
        self.schedule = latent_diffusion.schedule_of(self.scheduler_config)
        self.latent_shape = latent_diffusion.latent_shape_of(components.vae)
        latent_diffusion.freeze(components)

    def fingerprints(self) -> tuple[str, str]:
        return latent_diffusion.fingerprints(self.components, 1)

    def place(self) -> None:
        self.components.unet.to(self.device)

    def move_encoders(self, device: torch.device, *, text: bool) -> None:
        latent_diffusion.move_encoders(self.components, device, text=text)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return latent_diffusion.encode_pixels(self.components.vae, pixels, self.tiled)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latent_diffusion.decode_latents(self.components.vae, latents, self.components.unet, self.tiled)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return latent_diffusion.encode_captions(self._encode, captions, self.no_caption)

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoder: Any = self.networks["text_encoder"]
        output = encoder(token_chunks(self.components.tokenizers[0], texts, 1)[:, 0], output_hidden_states=True)
        return {"words": output.hidden_states[-2], "whole": output.text_embeds}

    def encode_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        return {"sizes": sizes}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        unet: Any = self.components.unet
        added = {"text_embeds": conditioning["whole"], "time_ids": conditioning["sizes"]}
        output: Tensor = unet(noisy, timesteps, conditioning["words"], added_cond_kwargs=added, return_dict=False)[0]
        return output

    def write_checkpoint(
        self,
        path: Path,
        description: Description,
        *,
        layout: Layout,
        dtype: torch.dtype | None = None,
        change: Change | None = None,
    ) -> None:
        latent_diffusion.write_checkpoint(self.components, path, description, layout, dtype, change)

    def order_of_weights(self, dtype: torch.dtype | None) -> list[tuple[Component, str]]:
        return order_of_weights(self.components, dtype)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, POND.name, POND)


@pytest.fixture
def parts() -> Components:
    """Random networks of the family."""
    configs = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
    generator = torch.Generator().manual_seed(0)
    networks = {part: empty_network(POND, part, configs[part]).to_empty(device="cpu") for part in POND.components}
    for network in networks.values():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.data = scale * noise + float("norm" in name and name.endswith("weight"))
        for name, buffer in network.named_buffers():
            assert name.endswith("position_ids")
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(1, -1))
    return Components(
        POND,
        networks,
        tokenizers=(load_tokenizer(TOKENIZER),),
        scheduler_config=dict(SCHEDULER),
        no_caption="zeros",
        stored_dtypes=dict.fromkeys(networks, torch.float32),
        tokenizer_sources=(TOKENIZER,),
    )


def assert_same(one: Components, other: Components) -> None:
    for part in POND.components:
        left, right = one.networks[part].state_dict(), other.networks[part].state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left), part


@pytest.mark.parametrize("own_configs", [True, False], ids=["configs in the header", "configs from shapes"])
def test_a_single_file_comes_back_bit_for_bit(parts: Components, tmp_path: Path, own_configs: bool) -> None:
    path = tmp_path / "pond.safetensors"
    write_single_file(parts, path, DESCRIPTION)
    tensors = load_file(path)
    assert {name.split(".")[0] for name in tensors} == {"net", "reader", "pixels"}
    assert "net.input_blocks.7.1.transformer_blocks.0.attn1.to_q.weight" in tensors
    if not own_configs:
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})
    opened = open_model(ModelConfig(path=str(path), components=str(TOKENIZER.folder)), "model")
    assert opened.family is POND and opened.no_caption == "zeros" and opened.latent_step_px == 32
    assert_same(load_components(opened, torch.float32), parts)


def test_a_folder_comes_back_bit_for_bit(parts: Components, tmp_path: Path) -> None:
    write_folder(replace(parts, no_caption="empty-text"), tmp_path / "pond", DESCRIPTION)
    opened, problems = inspect_model(ModelConfig(path=str(tmp_path / "pond")))
    assert opened and not problems and opened.family is POND
    assert_same(load_components(opened, torch.float32), parts)


def test_a_lora_of_it_is_trained_written_in_its_names_and_read(
    parts: Components, tmp_path: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    from sdtrain.adapters.formats.describe import describe_file
    from sdtrain.adapters.formats.lora_file import read_lora
    from sdtrain.commands.fit import fit
    from sdtrain.config.read import resolve
    from sdtrain.training import prepare

    def load(opened: OpenedModel, config: ModelConfig, *, device: torch.device, **settings: Any) -> Model:
        return Pond(load_components(opened, torch.float32), device)

    monkeypatch.setattr(prepare, "load_model", load)  # the one `case` that a family of ours would get
    write_folder(parts, tmp_path / "pond", DESCRIPTION)
    table["model"] = {"path": str(tmp_path / "pond")}
    table["method"]["train"] = ["unet", "text_encoder"]
    table["data"]["caption_dropout"] = 0.5
    table |= {"steps": 2, "device": "cpu", "preview": {**table["preview"], "every": 2, "num_inference_steps": 1}}
    config = resolve(table, "test")
    run = fit(config).folder
    assert (run / "previews" / "step-000002.png").is_file()
    path = run / "weights" / "small.safetensors"
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert "lora_unet_input_blocks_7_1_transformer_blocks_0_attn1_to_q.lora_up.weight" in names
    assert "lora_reader_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in names
    assert not any("layers_1" in name for name in names), "the layer that nobody reads"
    assert metadata["modelspec.architecture"] == "pond-v1/lora" and metadata["ss_base_model_version"] == "pond"
    assert describe_file(path).num_modules.keys() == {"unet", "text_encoder"}
    model = Pond(parts, torch.device("cpu"))
    assert read_lora(path, model.networks).adapters.keys() == {"unet", "text_encoder"}
