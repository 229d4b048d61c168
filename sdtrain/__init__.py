"""sdtrain: fine-tuning SDXL-style diffusion models with Prodigy + Schedule-Free."""

__version__ = "0.1.0"
