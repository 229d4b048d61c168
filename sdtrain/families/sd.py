"""The records of Stable Diffusion 1.x and 2.x and their fine-tunes."""

from __future__ import annotations

from typing import Any

from sdtrain.families.family import Family, TextEncoder, Words
from sdtrain.families.published_configs import CLIP_L_TEXT, OPEN_CLIP_G_TEXT, SDXL_UNET, SDXL_VAE

UNET: dict[str, Any] = {
    **SDXL_UNET,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "sample_size": 64,
}
VAE: dict[str, Any] = {**SDXL_VAE, "sample_size": 512, "force_upcast": False, "scaling_factor": 0.18215}
INDEX: dict[str, Any] = {"safety_checker": [None, None], "requires_safety_checker": False}
ORIGINAL = "https://github.com/CompVis/stable-diffusion"

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            prefix="cond_stage_model.transformer.",
            lora_prefix="lora_te_",
            config=CLIP_L_TEXT,
            constants=("text_model.embeddings.position_ids",),
        ),
    ),
    words=Words(
        architecture="stable-diffusion-v1",
        implementation=ORIGINAL,
        lora_implementation="diffusers",
        base_version="sd_v1",
        base_version_v="sd_v1_v",
        pipeline="StableDiffusionPipeline",
        index=INDEX,
    ),
    resolution_px=512,
    unet=UNET,
    vae=VAE,
    num_heads=8,
    linear_projections=False,
)

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            prefix="cond_stage_model.model.",
            lora_prefix="lora_te_",
            config={**OPEN_CLIP_G_TEXT, "architectures": ["CLIPTextModel"]},
            layout="open-clip",
            spare_layers=1,  # the last layer but one is read, with the final norm on it
            constants=("logit_scale",),
        ),
    ),
    words=Words(
        architecture="stable-diffusion-v2-512",
        architecture_large_v="stable-diffusion-v2-768-v",
        implementation=ORIGINAL,
        lora_implementation="diffusers",
        base_version="sd_v2",
        base_version_v="sd_v2_v",
        second_version=True,
        pipeline="StableDiffusionPipeline",
        index=INDEX,
    ),
    resolution_px=512,
    resolution_v_px=768,
    unet=UNET,
    vae=VAE,
    text_width=1024,
    linear_projections=True,
    no_single_file="SD 2.x files hold a layer that is not read here; write a diffusers folder instead",
)
