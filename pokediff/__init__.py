"""pokediff: text to small creature pictures, by diffusion in pixel space.

from pokediff import PokeDiffPipeline

pipe = PokeDiffPipeline.from_pretrained("checkpoints/pokediff-32")
pipe("a blue water turtle", seed=7).images[0].save("turtle.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pokediff.model.pipeline import PokeDiffPipeline

__version__ = "0.1.0"
__all__ = ["PokeDiffPipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch and diffusers are heavy: only for who asks
        from pokediff.model.pipeline import PokeDiffPipeline

        return PokeDiffPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
