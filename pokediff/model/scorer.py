"""Scorer: which of several drawings people would rate highest.

The base has learnt what creatures look like, so its own maps tell whole ones from torn ones: a linear regression of
ratings by eye on them is a reward model (Xu et al., "ImageReward", 2023) that chooses the best of several drawings.
scripts/train_scorer.py trains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import cosine_sigmas


class Scorer(ModelMixin, ConfigMixin):
    """A linear regression of ratings on the maps of a denoiser.

    Args:
        features: their number, F of `map_statistics`.
        timestep: of the noise that a picture gets before the denoiser sees it.
    """

    __module__ = "pokediff"  # as `Denoiser`

    @register_to_config
    def __init__(self, features: int = 2400, timestep: float = 300.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)

    @torch.inference_mode()
    def forward(self, denoiser: Denoiser, x0: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B,) expected ratings of pictures x0 (B, C, S, S) in [-1, 1] with text vectors (B, D)."""
        features = map_statistics(denoiser, x0, text, self.config.timestep)
        return F.linear(features, self.linear.weight.float(), self.linear.bias.float())[:, 0]  # sums of thousands


def feature_count(widths: Sequence[int]) -> int:
    """How many features `map_statistics` gives for a denoiser whose levels have these widths."""
    return 3 * (sum(widths[1:]) + sum(widths))


@torch.inference_mode()
def map_statistics(denoiser: Denoiser, x0: torch.Tensor, text: torch.Tensor, timestep: float) -> torch.Tensor:
    """(B, F) mean, standard deviation and maximum over the pixels of each channel of the maps that leave a level of the
    denoiser, but for the first on the way down. All pictures get the same noise.
    """
    config, maps = denoiser.config, list[torch.Tensor]()
    levels = [*denoiser.down[1:], *denoiser.up]
    handles = [level[-1].register_forward_hook(lambda *args: maps.append(args[2])) for level in levels]
    noise = torch.randn(1, *x0.shape[1:], generator=torch.Generator().manual_seed(0)).to(x0)
    sigma = cosine_sigmas(torch.tensor(timestep), config.num_train_timesteps, *config.noise_range).item()
    try:
        # not called as a module: where that is compiled, it does not see the hooks
        denoiser.forward((x0 + sigma * noise) / (1 + sigma**2) ** 0.5, timestep, text)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([stat for h in maps for stat in (h.mean((2, 3)), h.std((2, 3)), h.amax((2, 3)))], dim=1).float()
