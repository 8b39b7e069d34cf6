"""Checkpoints of version 0.1 to one folder of the present form.

    python scripts/convert_checkpoint.py OLD [OLD ...] --out checkpoints/pokediff

The folders OLD share a base, and may have a refiner and an upscaler each; every network is written once. Networks that
predicted v become denoisers that predict x0: v is the negative of what a body with sigma_data = 1 gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pokediff.errors import PokediffError, one_line_errors
from pokediff.model.cascade import write_list
from pokediff.model.checkpoint import complete
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import cosine_sigmas
from pokediff.model.pipeline import PokeDiffPipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
RENAMED = {"painted.": "x0_head."}
BASE_STEPS, UPSCALER_STEPS = 15, 5  # of the 20 that version 0.1 took by default


def convert_weights(tensors: dict[str, torch.Tensor], predicts_v: bool) -> dict[str, torch.Tensor]:
    """The tensors of a network, of its average or of its moments, by their new names."""
    converted = {}
    for name, values in tensors.items():
        for old, new in RENAMED.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        converted[name] = -values if predicts_v and name in ("out.weight", "out.bias") else values
    return converted


def convert_config(old: dict[str, Any], below: float | None, guidance_scale: float | None) -> dict[str, Any]:
    """The config.json of a network of version 0.1 as that of a denoiser."""
    kept = {name: value for name, value in old.items() if not name.startswith("_")}
    norm_free = kept.pop("plain", False)
    gate = kept.get("sigma_data") is not None
    steps = UPSCALER_STEPS if kept.get("upscale", 1) > 1 else BASE_STEPS
    return {
        **kept,
        "norm_free": norm_free,
        "gate": gate,
        "sigma_data": kept["sigma_data"] if gate else 1.0,
        "below": below,
        "steps": steps,
        "guidance_scale": guidance_scale,
    }


def noise_range(scheduler: dict[str, Any]) -> tuple[float, float, float]:
    """(sigma_min, sigma_max, noise_shift) of an old scheduler_config.json: base networks did not say it."""
    alphas_cumprod = (1 - torch.tensor(scheduler["trained_betas"], dtype=torch.float64)).cumprod(0)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    first, middle, last = (float(sigmas[index]) for index in (0, len(sigmas) // 2, -1))
    low, high = first, last
    for _ in range(60):  # the larger the shift, the larger the sigma in the middle
        shift = (low * high) ** 0.5
        sigma = cosine_sigmas(torch.tensor(len(sigmas) // 2).double(), len(sigmas), first, last, shift)
        low, high = (shift, high) if sigma < middle else (low, shift)
    return tuple(float(f"{value:.4g}") for value in (first, last, shift))


def read_networks(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """{name: (config, weights)} of the denoisers of one old checkpoint."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    noise = {"noise_range": noise_range(scheduler), "num_train_timesteps": scheduler["num_train_timesteps"]}
    found = {}
    for part, kind, below in (
        ("unet", "base", None),
        ("refiner", "refiner", index.get("refine_below")),
        ("upscaler", "upscaler", index.get("upscale_below")),
    ):
        if not (folder / part / WEIGHTS).is_file():
            continue
        old = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        config = convert_config({**noise, **old}, below, index.get("guidance_scale", 1.5) if part == "unet" else None)
        weights = convert_weights(load_file(folder / part / WEIGHTS), predicts_v=old.get("sigma_data") is None)
        found[f"{kind}-{config['image_size']}"] = (config, weights)
    return found


def convert(folders: list[Path], out: Path) -> None:
    """Write `out` from old checkpoints. Raises PokediffError when they do not belong together."""
    networks: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
    for folder in folders:
        for name, (config, weights) in read_networks(folder).items():
            if name in networks and any(not torch.equal(networks[name][1][key], weights[key]) for key in weights):
                raise PokediffError(f"{folder}: its {name} is another one than in {folders[0]}")
            networks.setdefault(name, (config, weights))
    for name, (config, weights) in networks.items():
        denoiser = Denoiser(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
        denoiser.load_state_dict(weights)
        denoiser.half().save_pretrained(out / "cascade" / name)
    order = sorted(networks, key=lambda name: (networks[name][0]["image_size"], -(networks[name][0]["below"] or 1e9)))
    write_list(out / "cascade", order)
    for part in ("scheduler", "text_encoder", "tokenizer"):
        if (folders[0] / part).is_dir():
            shutil.copytree(folders[0] / part, out / part, dirs_exist_ok=True)
    index = json.loads((folders[0] / "model_index.json").read_text(encoding="utf-8"))
    shared = ("_diffusers_version", "scheduler", "text_encoder", "tokenizer", "text_encoder_name")
    index = {name: index[name] for name in shared if name in index}
    index |= {"_class_name": "PokeDiffPipeline", "cascade": ["pokediff", "Cascade"], "pixel_art": False}
    (out / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    complete(out)
    PokeDiffPipeline.from_pretrained(out)  # it loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="+", help="checkpoint folders of version 0.1")
    parser.add_argument("--out", type=Path, required=True, help="the new checkpoint folder")
    args = parser.parse_args()
    convert(args.old, args.out)
    pipeline = PokeDiffPipeline.from_pretrained(args.out)
    print(f"{args.out}: {', '.join(pipeline.cascade)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
