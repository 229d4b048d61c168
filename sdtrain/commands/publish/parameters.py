"""What a picture was drawn from, in the words that web interfaces and Civitai look for in a PNG."""

from __future__ import annotations

from sdtrain.config.schema import Config
from sdtrain.diffusion.words import Sampler
from sdtrain.errors import printable

SAMPLERS: dict[Sampler, str] = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
}
"""By what names A1111 knows them."""


def parameters(prompt: str, seed: int | str, config: Config, model: str) -> str:
    """Return what a picture was drawn from in A1111's form. config: how its previews are sampled. model: its name."""
    preview = config.preview
    negative = f"Negative prompt: {printable(preview.negative_prompt)}\n" if preview.negative_prompt else ""
    values = {
        "Steps": preview.num_inference_steps,
        "Sampler": SAMPLERS[preview.sampler],
        "CFG scale": f"{preview.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{preview.width_px or config.data.resolution_px}x{preview.height_px or config.data.resolution_px}",
        "Model": model,
    }
    return f"{printable(prompt)}\n{negative}" + ", ".join(f"{name}: {value}" for name, value in values.items())
