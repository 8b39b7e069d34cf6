"""Move the weights of a checkpoint's denoiser a part of the way to those of another checkpoint, in place.

python scripts/interpolate_weights.py checkpoints/pokediff checkpoints/pokemon-preference base-32 --share 0.7

Between the weights before and after a fine-tuning lie denoisers that have most of what was gained, and of what was lost
little (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("denoiser")
    parser.add_argument("--share", type=float, required=True, help="0: as they are, 1: those of the other checkpoint")
    arguments = parser.parse_args(given)
    file = Path("cascade", arguments.denoiser, WEIGHTS)
    path, other = arguments.checkpoint / file, arguments.other / file
    here, there = load_file(path), load_file(other)
    weights = {key: torch.lerp(here[key].float(), there[key].float(), arguments.share).half() for key in here}
    save_file(weights, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
