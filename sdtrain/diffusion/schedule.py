"""The noise schedule: how much signal is left at every timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """How much signal and how much noise a picture has at each timestep.

    alphas_cumprod: (T,) float32, the squared share of signal at timestep t (DDPM, arXiv 2006.11239, eq. 4).
    """

    alphas_cumprod: Tensor

    @property
    def num_timesteps(self) -> int:
        """The number of noise levels, T."""
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t) for timesteps (n,), shaped (n, 1, 1, 1) to go with `like` (n, c, h, w)."""
        alphas = self.alphas_cumprod.to(like.device)[timesteps].float()
        shape = (-1, *[1] * (like.dim() - 1))
        return alphas.sqrt().view(shape), (1 - alphas).sqrt().view(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; latents and noise (n, c, h, w), timesteps (n,)."""
        signal, sigma = self.signal_and_noise(timesteps, latents)
        return signal * latents + sigma * noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio a_t / (1 - a_t) of timesteps (n,); 0 at a zero-terminal end."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return alphas / (1 - alphas)


def betas_of(kind: str, start: float, end: float, num_timesteps: int) -> Tensor:
    """Return the betas, (T,) float32, of a named schedule. Raises ValueError for a name that is not known."""
    if kind == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float32) ** 2
    raise ValueError(f"noise schedule {kind!r} is not known; known: linear, scaled_linear")


def schedule_of_betas(betas: Tensor, *, zero_terminal_snr: bool) -> NoiseSchedule:
    """Return the schedule that betas (T,) make, rescaled to end in pure noise where that is asked for."""
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        alphas_cumprod = to_zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(alphas_cumprod)


def to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(a_t) so that a_T = 0 and a_1 stays (arXiv 2305.08891, algorithm 1); (T,) -> (T,)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    roots = (roots - last) * (first / (first - last))
    return roots**2
