"""Round the weights of a checkpoint's denoisers to 255 steps a row, which `pokediff web` stores in eight bits without a
loss: half the download. In place.

python scripts/round_weights.py checkpoints/pokediff base-32 refiner-32
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pokediff.drawing.export import LARGEST_MULTIPLE, in_steps

WEIGHTS = "diffusion_pytorch_model.safetensors"


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """(O, ...) float16, each row the nearest whole multiples, -127 to 127, of a step of its own. Steps have four
    significant bits and their multiples seven, together the eleven of float16: every product is exact.
    """
    rows = weight.double().flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True) / LARGEST_MULTIPLE
    unit = torch.ldexp(torch.ones_like(step), torch.frexp(step).exponent - 4).clamp(min=2.0**-24)  # float16's smallest
    step = torch.ceil(step / unit) * unit
    multiples = (rows / step.clamp(min=2.0**-24)).round()
    return (multiples * step).view_as(weight).half()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("denoisers", nargs="+")
    arguments = parser.parse_args()
    for name in arguments.denoisers:
        path = arguments.checkpoint / "cascade" / name / WEIGHTS
        tensors = load_file(path)
        again = {key for key, value in tensors.items() if value.ndim > 1 and in_steps(value.float().numpy()) is None}
        weights = {key: rounded(value) if key in again else value for key, value in tensors.items()}
        error = sum((weights[key].double() - tensors[key].double()).square().sum() for key in tensors)
        whole = sum(tensor.double().square().sum() for tensor in tensors.values())
        print(f"{name}: relative error {float(error / whole) ** 0.5:.2%}")
        save_file(weights, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
