"""pokediff: text-to-sprite diffusion in pixel space.

from pokediff import PokeDiffPipeline

pipe = PokeDiffPipeline.from_pretrained("checkpoints/pokediff")
pipe("a blue water turtle", seed=7).images[0].save("turtle.png")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# diffusers imports ONNX Runtime where it is installed, which would tell its makers; read when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from pokediff.model.cascade import Cascade
    from pokediff.model.denoiser import Denoiser
    from pokediff.model.pipeline import PokeDiffPipeline
    from pokediff.model.scorer import Scorer

__version__ = "0.2.0"
# A checkpoint stores its components as pokediff.Cascade and pokediff.Scorer, and diffusers looks up the base class in
# the same module.
MODULES = {
    "PokeDiffPipeline": "pipeline",
    "Cascade": "cascade",
    "Denoiser": "denoiser",
    "Scorer": "scorer",
    "ModelMixin": "cascade",
}
__all__ = ["Cascade", "Denoiser", "PokeDiffPipeline", "Scorer"]


def __getattr__(name: str) -> Any:
    if name in MODULES:  # a lazy import, since torch and diffusers are slow to import
        return getattr(import_module(f"pokediff.model.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
