"""Small data that the tests draw themselves, and what they share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pokediff.config import DatasetConfig, ModelConfig, TrainConfig
from pokediff.data.images import encode_png
from pokediff.data.records import Record, write_records

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
COLORS = {"red": (220, 40, 40), "green": (50, 170, 60), "blue": (60, 90, 220), "yellow": (245, 215, 40)}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    if not (SHARED / "data" / "pokemon" / "metadata.jsonl").is_file():
        pytest.skip("needs the real data in ../shared")
    return SHARED


def draw_creature(color: tuple[int, int, int], shape: str, size: int = 40, seed: int = 0) -> np.ndarray:
    """A round or square creature with two eyes, straight RGBA uint8 (size, size, 4), transparent around it."""
    rng = np.random.default_rng(seed)
    rgba = np.zeros((size, size, 4), np.uint8)
    middle = tuple(int(v) for v in size // 2 + rng.integers(-2, 3, 2))
    reach = int(size * rng.uniform(0.28, 0.38))
    paint = (*color, 255)
    if shape == "round":
        cv2.circle(rgba, middle, reach, paint, -1)
    else:
        cv2.rectangle(rgba, (middle[0] - reach, middle[1] - reach), (middle[0] + reach, middle[1] + reach), paint, -1)
    for side in (-1, 1):
        cv2.circle(rgba, (middle[0] + side * reach // 3, middle[1] - reach // 3), 2, (0, 0, 0, 255), -1)
    return rgba


def write_data(folder: Path, number: int = 80) -> Path:
    """A data set of drawn creatures, four colours by two shapes, four a family (39 and 49 test, 46 validation)."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(number):
        color, shape = list(COLORS)[index % 4], ("round", "square")[index // 4 % 2]
        name = f"images/{index:04}.png"
        (folder / name).write_bytes(encode_png(draw_creature(COLORS[color], shape, seed=index)))
        style = "artwork" if index % 3 else "sprite"
        records.append(
            Record(
                name,
                name=f"Creature{index}",
                family=30 + index // 4,
                color=color,
                shape=shape,
                style=style,
                types=("water",),
            )
        )
    write_records(folder, records)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set of 80 drawn creatures."""
    return write_data(tmp_path_factory.mktemp("data") / "creatures")


def tiny_config(data: Path, out: Path, **changes) -> TrainConfig:
    """A run of a few seconds."""
    values = dict(
        data=str(data),
        out=str(out),
        dataset=DatasetConfig(image_size=16),
        model=ModelConfig(widths=(32, 64), attention=(False, True), blocks=(1, 1), embedding_dim=64),
        max_steps=6,
        batch_size=8,
        warmup_steps=2,
        log_every=1,
        validate_every=3,
        preview_every=6,
        checkpoint_every=3,
        preview_prompts=("a red round creature", "a blue square creature"),
        precision="fp32",
    )
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def features(tmp_path_factory) -> str:
    """A MobileNetV2 file in the real format, with random weights."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    convolutions = [m for m in mobilenet_v2().features.modules() if isinstance(m, torch.nn.Conv2d)]
    names = ["stem", "blocks.0.0", "blocks.0.1"]
    names += [f"blocks.{block}.{layer}" for block in range(1, 17) for layer in range(3)]
    names.append("head")
    tensors = {}
    for name, convolution in zip(names, convolutions, strict=True):
        weight = convolution.weight.detach()
        tensors[f"{name}.weight"] = torch.randn_like(weight) * (2 / weight[0].numel()) ** 0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(len(weight))
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(tensors, path)
    return f"mobilenet_v2:{path}"
