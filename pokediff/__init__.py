"""pokediff: text to small creature pictures, by diffusion in pixel space.

from pokediff import PokeDiffPipeline

pipe = PokeDiffPipeline.from_pretrained("checkpoints/pokediff")
pipe("a blue water turtle", seed=7).images[0].save("turtle.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pokediff.model.cascade import Cascade
    from pokediff.model.denoiser import Denoiser
    from pokediff.model.pipeline import PokeDiffPipeline

__version__ = "0.2.0"
# A checkpoint names its component as pokediff.Cascade, and diffusers looks for the base class in the same module.
PLACES = {"PokeDiffPipeline": "pipeline", "Cascade": "cascade", "Denoiser": "denoiser", "ModelMixin": "cascade"}
__all__ = ["Cascade", "Denoiser", "PokeDiffPipeline"]


def __getattr__(name: str) -> Any:
    if name in PLACES:  # torch and diffusers are slow to import: only when they are needed
        return getattr(import_module(f"pokediff.model.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
