"""Write web/test/values/: what Python computes, against which web/test checks the page's TypeScript.

python scripts/web_values.py
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import web_picture_values

from pokediff import __version__
from pokediff.config import Sampling
from pokediff.data.images import composite, enlarge, from_model
from pokediff.drawing.atlas import WRITERS, Sprite, make_layout
from pokediff.drawing.jobs import slug
from pokediff.drawing.pixelart import finish, is_pixel_prompt, pick_palette, read_palette, remove_specks
from pokediff.drawing.web import describe
from pokediff.model.cascade import Cascade, guidance_at
from pokediff.model.diffusion import schedule_sigmas
from pokediff.model.interface import make_generators, make_noises
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.plan import plan
from pokediff.model.samplers import slerp
from pokediff.paths import shipped

FOLDER = Path(__file__).parents[1] / "web" / "test" / "values"
PROMPTS = [
    "a blue water turtle",
    "",
    "A  RED\tdragon, pixel-art!",
    "it's 3 cats & 12 dogs; don't",
    "élan vital, naïve über-fox",
    "жаба 猫 🐸🐸",
    "</w> <|endoftext|> end",
    "supercalifragilisticexpialidocious " * 12,
]


def sections() -> dict[str, Any]:
    """{name of the file: its content}."""
    pipeline = PokeDiffPipeline.from_pretrained(shipped("checkpoints", "pokediff"))
    return {
        "noise": noise(),
        "tokens": tokens(pipeline),
        "sampling": sampling(pipeline),
        "pictures": pictures(),
        "sheets": sheets(),
        **web_picture_values.sections(),
    }


def noise() -> dict[str, Any]:
    """The first noise of each leg, shortened: every 97th number."""
    seeds, sizes = [0, 7, 4294967295, 2**40 + 3], (32, 64)
    drawn = make_noises(make_generators(seeds), 4, sizes)
    between = slerp(drawn[0][:1], drawn[0][1:2], 0.3)[0]
    return {
        "seeds": seeds,
        "sizes": sizes,
        "every": 97,
        "noise": [[shortened(leg[row]) for leg in drawn] for row in range(len(seeds))],
        "slerp": {"of": [0, 1], "share": 0.3, "value": shortened(between)},
    }


def shortened(x: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in x.flatten()[::97].tolist()]


def tokens(pipeline: PokeDiffPipeline) -> list[dict[str, Any]]:
    """Ids as the text encoder receives them."""
    rows, model = [], pipeline.text_encoder
    length, end = model.config.max_position_embeddings, pipeline.tokenizer.eos_token_id
    for prompt in PROMPTS:
        ids = pipeline.tokenizer(prompt)["input_ids"]
        rows.append({"prompt": prompt, "ids": ids if len(ids) <= length else [*ids[: length - 1], end]})
    return rows


class Toy(torch.nn.Module):
    """A denoiser that both languages have: x0 = tanh(.5 x + .3 mean of the small picture + .2 text[0] - t / 2000)."""

    def __init__(self, config: Any, null_text: torch.Tensor) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.below = float("inf") if config.below is None else config.below
        self.register_buffer("null_text", null_text)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        augment: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        small = 0 if low_res is None else low_res.mean((1, 2, 3))
        shift = 0.3 * small + 0.2 * text[:, 0] - torch.as_tensor(timestep).expand(len(x)) / 2000
        return torch.tanh(0.5 * x + shift[:, None, None, None])


def sampling(pipeline: PokeDiffPipeline) -> dict[str, Any]:
    """Plans of drawings, and drawings by toy denoisers."""
    cascade = Cascade({name: Toy(denoiser.config, denoiser.null_text) for name, denoiser in pipeline.cascade.items()})
    toy = pipeline.with_components(cascade=cascade)
    plans = []
    for size, steps in [(32, None), (64, None), (128, None), *((64, steps) for steps in (1, 2, 3, 7, 14, 20, 33, 100))]:
        for sampler in ("dpmpp_2m", "ddim"):
            options = Sampling(size=size, num_inference_steps=steps, sampler=sampler)
            rows = [
                e
                for leg in plan(cascade, pipeline.scheduler, options, 1.0, torch.device("cpu"))
                for e in leg.evaluations
            ]
            plans.append({
                "size": size, "steps": steps, "sampler": sampler,
                "timesteps": [row.timestep for row in rows], "denoisers": [row.denoiser for row in rows],
            })  # fmt: skip
    text = torch.zeros(1, len(pipeline.base.null_text))
    text[:, 0] = 1
    drawings = []
    for steps, guidance, sampler, size in [(5, None, "dpmpp_2m", 64), (20, 3.0, "dpmpp_2m", 32), (4, 1.0, "ddim", 64)]:
        options = Sampling(
            size=size, num_inference_steps=steps, guidance_scale=guidance, sampler=sampler, precision="fp32"
        )
        *_, last = toy.denoise(text, [7], options)
        picture = last.x0.numpy().astype("<f4")
        drawings.append({
            "steps": steps, "guidance": guidance, "sampler": sampler, "size": size, "seed": 7,
            "x0": base64.b64encode(picture[0, :, ::4, ::4].tobytes()).decode(),
        })  # fmt: skip
    scales = [
        [sigma, scale, guidance_at(pipeline.base, sigma, scale)] for sigma in (0.5, 9, 11) for scale in (None, 1.0, 3.0)
    ]
    return {
        "sigmas": schedule_sigmas(pipeline.scheduler).tolist(),
        "denoisers": [describe(name, part) for name, part in pipeline.cascade.items() if not part.config.fast],
        "plans": plans,
        "drawings": drawings,
        "guidance": scales,
        "null": pipeline.base.null_text.tolist(),
    }


def pictures() -> dict[str, Any]:
    """Model outputs, and pictures after each post-processing."""
    rows = []
    for seed, (side, channels) in enumerate([(32, 4), (40, 4), (16, 3), (16, 1), (8, 4)]):
        x = blob(np.random.default_rng(seed), channels, side)
        if side == 8:
            x[:] = -1  # an empty picture
        picture = from_model(torch.from_numpy(x)[None])[0]
        specks = remove_specks(picture)
        palettes = {str(k): pick_palette(picture, k).tolist() for k in (2, 6, 14, 256)}
        gpl = np.array(GREYS, np.uint8)
        finished = [finish(picture, None), finish(picture, 14, True), finish(picture, gpl, False, False)]
        given = {
            "specks": specks,
            "composite": np.dstack([composite(picture), np.full((side, side, 1), 255, np.uint8)]),
        }
        given |= {"enlarged": enlarge(picture[:8, :8], 3), **{f"finish{k}": one for k, one in enumerate(finished)}}
        rows.append({
            "side": side, "channels": channels, "x": packed(x), "picture": packed(picture), "palettes": palettes,
            **{name: packed(one) for name, one in given.items()},
        })  # fmt: skip
    files = {name: read_palette(path_of(name, text)).tolist() for name, text in PALETTES.items()}
    prompts = [
        "pixel sprite of a cat",
        "a Pixel-Art dragon",
        "pixels",
        "a pixel icons, red",
        "unpixel art",
        "pixel tile",
    ]
    return {
        "rows": rows,
        "greys": GREYS,
        "files": [{"name": name, "text": text, "colors": files[name]} for name, text in PALETTES.items()],
        "pixel": {prompt: is_pixel_prompt(prompt) for prompt in prompts},
        "slugs": {prompt: slug(prompt) for prompt in [*PROMPTS, "__a__", "é" * 50, "a-b" * 20]},
    }


GREYS = [[0, 0, 0], [90, 90, 90], [180, 180, 180], [255, 255, 255]]
PALETTES = {
    "a.hex": "ff0000\n#00FF00\r\n\n0000ff\n",
    "b.gpl": "GIMP Palette\nName: b\nColumns: 2\n# note\n255 0 10 Red\n  0\t3 300\tblue\n",
}


def path_of(name: str, text: str) -> str:
    path = Path(tempfile.mkdtemp()) / name
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def blob(random: np.random.Generator, channels: int, side: int) -> np.ndarray:
    """(C, S, S) in about [-1, 1]: a figure with a soft edge and shading, a speck, noise; some values outside."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    alpha = np.clip(1.5 - 5 * np.hypot(x, y * 1.3), 0, 1)
    alpha[1:3, 1:3] = 1
    tint = random.uniform(0, 1, 3)[:, None, None] + 0.5 * np.stack([x, y, -x]) + random.normal(0, 0.06, (3, side, side))
    rgba = np.concatenate([tint * alpha, alpha[None]])
    return (2 * rgba[:channels] - 1).astype(np.float32)


def packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def sheets() -> list[dict[str, Any]]:
    """Sheets of single pictures and of animations."""
    random, rows = np.random.default_rng(0), []
    prompts = ['a "red" <cat> & 猫', "a dog's\tday", "x"]
    for frames in (1, 3):
        images = random.integers(0, 256, (3, frames, 8, 8, 4)).astype(np.uint8)
        times = (100,) * (frames - 1) + (350,)
        sprites = [Sprite(f"s-{k}", prompts[k], 2**32 + k, tuple(images[k]), times) for k in range(3)]
        layout, sheet = make_layout(sprites)
        texts = {tool: write(layout) for tool, write in WRITERS.items()}
        rows.append({
            "frames": [[packed(frame) for frame in sprite.frames] for sprite in sprites], "times": times,
            "prompts": prompts, "version": __version__, "sheet": packed(sheet), "width": layout.width, "texts": texts,
        })  # fmt: skip
    return rows


def write() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, values in sections().items():
        (FOLDER / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
