"""The record of SDXL, its fine-tunes and its smaller relatives."""

from __future__ import annotations

from sdtrain.families.family import Family, TextEncoder, Words
from sdtrain.families.published_configs import CLIP_L_TEXT, OPEN_CLIP_G_TEXT, SDXL_UNET, SDXL_VAE

SDXL = Family(
    name="sdxl",
    title="SDXL",
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            prefix="conditioner.embedders.0.transformer.",
            lora_prefix="lora_te1_",
            config=CLIP_L_TEXT,
            last_layer_read=False,  # the last but one hidden state is what the U-Net reads
            constants=("text_model.embeddings.position_ids",),
        ),
        TextEncoder(
            component="text_encoder_2",
            prefix="conditioner.embedders.1.model.",
            lora_prefix="lora_te2_",
            config=OPEN_CLIP_G_TEXT,
            layout="open-clip",
            pooled=True,
            constants=("logit_scale",),
            tokenizer="tokenizer_2",
            pad_token="!",
        ),
    ),
    words=Words(
        architecture="stable-diffusion-xl-v1-base",
        implementation="https://github.com/Stability-AI/generative-models",
        lora_implementation="https://github.com/Stability-AI/generative-models",
        base_version="sdxl_base_v1-0",
        pipeline="StableDiffusionXLPipeline",
        index_says_zeros=True,
    ),
    resolution_px=1024,
    unet=SDXL_UNET,
    vae=SDXL_VAE,
    takes_sizes=True,
    lora_in_original_layout=True,
)

REFINER_TEXT = "conditioner.embedders.0.model."
"""The prefix that marks SDXL's refiner, which is no base model: its only text encoder lies where the first should."""
