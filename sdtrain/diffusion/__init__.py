"""The mathematics of diffusion training on plain tensors: no files, no models, no settings objects."""
