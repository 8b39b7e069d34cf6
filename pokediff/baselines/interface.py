"""DrawsAtOnce: a generator in the place of a PokeDiffPipeline, without steps to show; and its folders."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pokediff.config import BaselineConfig, Precision, Sampling, from_values, plain
from pokediff.files import read_json, write_whole
from pokediff.model.inspection import check_file
from pokediff.model.pipeline import Evaluation

CONFIG = "baseline.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name


def is_baseline(folder: str | Path) -> bool:
    """Whether a folder holds a baseline, or LoRA weights of SDXL."""
    return (Path(folder) / CONFIG).is_file() or (Path(folder) / LORA_WEIGHTS).is_file()


def read_config(folder: Path) -> BaselineConfig:
    """The configuration of a baseline; that of an SDXL where there are LoRA weights alone. Raises PokediffError."""
    path = folder / CONFIG
    for file in (path, folder / LORA_WEIGHTS):
        check_file(file, folder)
    if not path.is_file():
        return BaselineConfig(system="sdxl-lora")
    return from_values(read_json(path), BaselineConfig, str(path))


def write_config(folder: Path, config: BaselineConfig) -> None:
    write_whole(folder / CONFIG, json.dumps(plain(config), indent=1) + "\n")


class DrawsAtOnce(ABC):
    """What drawing, evaluation and demo ask of a baseline."""

    name: str
    image_size: int  # px, by default
    sizes: tuple[int, ...]
    device: torch.device
    slow = False  # it takes seconds or more for a picture
    has_fast = False
    pixel_art = False

    @property
    @abstractmethod
    def parameters(self) -> int:
        """The number of parameters of its networks, without text encoder, as for a cascade."""

    @abstractmethod
    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with defaults in place of None. Raises PokediffError for what it does not have."""

    @abstractmethod
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> np.ndarray:
        """Straight RGBA uint8 (N, S, S, 4), one picture for each prompt and seed; the same seed, the same picture."""

    def evaluations(self, sampling: Sampling, strength: float = 1.0) -> list[Evaluation]:
        """The denoising steps that are shown: none."""
        return []

    def in_bf16(self, precision: Precision) -> bool:
        """It draws in the precision in which it was loaded."""
        return False
