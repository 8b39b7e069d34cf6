"""Baseline: a trained system as a folder that draws, wherever a checkpoint draws.

baseline.json              its configuration
model.safetensors          the weights that drawing needs
text_encoder/ tokenizer/   where its words come from, in transformers' format
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pokediff.baselines.interface import CONFIG, LORA_WEIGHTS, DrawsAtOnce, read_config, write_config
from pokediff.baselines.lora import LoraGenerator, load_lora
from pokediff.baselines.networks import Drawn
from pokediff.baselines.systems import DISCRIMINATOR, SYSTEMS, System
from pokediff.config import BaselineConfig, Sampling
from pokediff.data.images import from_model
from pokediff.errors import PokediffError, first_line
from pokediff.files import write_whole
from pokediff.model.inspection import check_file, shapes_of

WEIGHTS = "model.safetensors"
BATCH_SIZE = 16
FREE = 10**7  # numbers that a network may have whatever its file holds


def load_baseline(folder: Path, device: torch.device, model: str | None = None) -> Baseline | LoraGenerator:
    """The baseline of a folder; `model` is the SDXL of LoRA weights, if another one than they were trained on.

    Raises PokediffError when it cannot be loaded.
    """
    if (folder / LORA_WEIGHTS).is_file():
        return load_lora(folder, device, model)
    return Baseline.load(folder, device)


@dataclass(frozen=True)
class Attention:
    """The weights of the tokens of one prompt in its drawing, each map and place summing to 1."""

    tokens: tuple[str, ...]  # L
    picture: np.ndarray  # straight RGBA uint8 (S, S, 4)
    maps: dict[str, np.ndarray]  # by size of the map: (L,) for the whole sentence, or (L, H, W)


class Baseline(DrawsAtOnce):
    """A trained system. It draws at one size; only the latent variant has sampler steps."""

    def __init__(self, config: BaselineConfig, system: System, device: torch.device) -> None:
        self.config, self.system, self.device = config, system.eval().to(device), device
        self.image_size, self.name = config.image_size, config.system
        self.sizes = (config.image_size,)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Baseline:
        """Raises PokediffError for files that do not fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = read_config(folder)
        if config.system not in SYSTEMS:
            raise PokediffError(f"{folder} has no {LORA_WEIGHTS}")
        check_sizes(config, folder)
        drawing = replace(config, losses={"l1": 1.0}, discriminator="none")  # needs no networks of losses
        system = SYSTEMS[config.system](drawing, f"baseline:{folder}")
        try:
            missing, unknown = system.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise PokediffError(f"{folder / WEIGHTS} does not fit {CONFIG}: {first_line(error)}") from None
        if wrong := [name for name in missing if "words." not in name] or unknown:
            raise PokediffError(f"{folder / WEIGHTS} does not fit {CONFIG}: {wrong[0]}")
        return cls(config, system, device)

    @property
    def parameters(self) -> int:
        """The number of parameters, without text encoder and discriminators."""
        return sum(p.numel() for name, p in self.system.named_parameters() if _is_drawing(name))

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with its own size and steps. Raises PokediffError for what it does not have."""
        if sampling.size not in (None, self.image_size):
            raise PokediffError(f"{self.name} draws {self.image_size} px, not {sampling.size}")
        at_once = self.system.steps is None
        given = {
            "num_inference_steps": sampling.num_inference_steps is not None and at_once,
            "guidance_scale": sampling.guidance_scale not in (None, 1.0),
            "guidance_interval": sampling.guidance_interval is not None,
            "negative_prompt": bool(sampling.negative_prompt),
            "sampler": sampling.sampler is not None,
            "fast": sampling.fast,
            "best_of": sampling.chooses,
        }
        if wrong := [name for name, is_given in given.items() if is_given]:
            reason = "has no time steps: it draws at once" if at_once else "was trained without it"
            raise PokediffError(f"{self.name} {reason}; leave out {', '.join(wrong)}")
        steps = sampling.num_inference_steps or self.system.steps
        return replace(sampling, size=self.image_size, num_inference_steps=steps)

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """(N, *noise_shape): that of a picture depends on its seed alone."""
        shape = self.system.noise_shape
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> Drawn:
        """The tensors of N prompts and seeds, the final pictures (N, C, S, S) last."""
        steps = self.resolved(sampling or Sampling()).num_inference_steps
        ids = self.system.ids(prompts).to(self.device)
        return self.system.draw(ids, self.noise(seeds).to(self.device), steps)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> np.ndarray:
        """Straight RGBA uint8 (N, S, S, 4) for N prompts and seeds."""
        parts = []
        for start in range(0, len(prompts), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            parts.append(from_model(self.draw(prompts[part], seeds[part], sampling).pictures[-1]))
        return np.concatenate(parts)

    def attention(self, prompt: str, seed: int = 0) -> Attention:
        """Which tokens it attends to. Raises PokediffError for a system without attention to words."""
        drawn = self.draw([prompt], [seed])
        if not drawn.attention or self.system.words is None:
            raise PokediffError(f"{self.name} has no attention to words")
        maps = {name: weights[0].float().cpu().numpy() for name, weights in drawn.attention.items()}
        return Attention(tuple(self.system.words.tokens(prompt)), from_model(drawn.pictures[-1])[0], maps)


def check_sizes(config: BaselineConfig, folder: Path) -> None:
    """Raise PokediffError when a configuration asks for much larger networks than the weights beside it hold."""
    check_file(folder / WEIGHTS, folder)
    held = sum(math.prod(shape) for shape in shapes_of(folder / WEIGHTS).values())
    for name, number in {**vars(config.network), "image_size": config.image_size}.items():
        if number < 0 or number**2 > 16 * held + FREE or (name == "layers" and number > held):
            raise PokediffError(f"{folder / CONFIG}: {name} {number} does not fit {WEIGHTS}, of {held:,} numbers")


def save_baseline(folder: Path, config: BaselineConfig, system: System) -> None:
    """Write a system into a folder, whole file by whole file; discriminators are left out."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: t.detach().cpu().contiguous() for name, t in system.state_dict().items() if _is_drawing(name)}
    write_whole(folder / WEIGHTS, save(kept))
    if system.words is not None:
        system.words.save(folder)
    write_config(folder, config)


def _is_drawing(name: str) -> bool:
    """Whether a tensor belongs to `model.safetensors`: neither to a discriminator nor to text_encoder/."""
    return not name.startswith(f"{DISCRIMINATOR}s.") and "words." not in name
