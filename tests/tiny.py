"""Cascades that train in seconds, and a small CLIP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from pokediff.config import ModelConfig, StageConfig, TrainConfig

BASE = ModelConfig(
    widths=(32, 64), attention=(False, True), blocks=(1, 1), embedding_dim=64, guidance_scale=1.5, steps=10
)
DETAIL = ModelConfig(
    patch=1, widths=(32,), attention=(False,), blocks=(1,), embedding_dim=64,
    norm_free=True, sigma_data=0.3, gate=True, below=1.0, steps=3,
)  # fmt: skip


def tiny_stage(**changes) -> StageConfig:
    """Six steps of a base of 16 px."""
    values = dict(
        image_size=16,
        model=BASE,
        max_steps=6,
        batch_size=8,
        warmup_steps=2,
        validate_every=3,
        preview_every=6,
        checkpoint_every=3,
    )
    return StageConfig(**{**values, **changes})


REFINER = tiny_stage(model=DETAIL)
UPSCALER = tiny_stage(image_size=32, model=replace(DETAIL, patch=2, upscale=2, below=2.0))


def tiny_config(data: Path, out: Path, stages: dict[str, StageConfig] | None = None, **changes) -> TrainConfig:
    """A run of one base, or of the given stages; single fields of the run may be changed."""
    values = dict(
        data=(str(data),),
        out=str(out),
        stages=stages or {"base-16": tiny_stage()},
        log_every=1,
        preview_prompts=("a red round creature", "a blue square creature"),
        precision="fp32",
        threads=1,
    )
    return TrainConfig(**{**values, **changes})


def with_stage(config: TrainConfig, name: str = "base-16", **changes) -> TrainConfig:
    """A run with some fields of one stage changed."""
    return replace(config, stages={**config.stages, name: replace(config.stages[name], **changes)})


def write_open_clip(folder: Path) -> str:
    """Write a random CLIP with vectors of 24 numbers in open_clip's format. Returns the folder."""
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)
