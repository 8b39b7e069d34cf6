"""The page: its tabs, and the one public function for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from pokediff.demo import show
from pokediff.demo.batch import batch_tab
from pokediff.demo.controls import MIN_INTERVAL_S, TURNS, Controls, streamed
from pokediff.demo.downloads import Downloads
from pokediff.demo.draw import draw_tab
from pokediff.demo.history import History
from pokediff.demo.img2img import img2img_tab
from pokediff.demo.inside import inside_tab
from pokediff.demo.interpolation import interpolation_tab
from pokediff.demo.palette import palette_tab
from pokediff.demo.reports import reports_tab
from pokediff.demo.send import history_panel
from pokediff.demo.studio import Studio
from pokediff.demo.variations import variations_tab

TITLE = "pokediff: text-to-sprite diffusion"


def make_page(studio: Studio, downloads: Downloads, reports: Path, runs: Path) -> gr.Blocks:
    """The whole page; `reports` and `runs` are the folders whose reports and training runs its last tab shows."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# pokediff\nEnter a prompt and watch every denoising step.")
        history = History()
        given, boxes = (studio, downloads, history), dict[str, Controls]()
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Draw", id="Draw"):
                boxes["Draw"] = draw_tab(*given)
            with gr.Tab("Batch", id="Batch"):
                batch_tab(*given)
            with gr.Tab("img2img", id="img2img"):
                boxes["img2img"] = img2img_tab(*given)
            with gr.Tab("Interpolation", id="Interpolation"):
                boxes["Interpolation"] = interpolation_tab(*given)
            with gr.Tab("Variations", id="Variations"):
                boxes["Variations"] = variations_tab(*given)
            with gr.Tab("Palette", id="Palette"):
                boxes["Palette"] = palette_tab(*given)
            with gr.Tab("Inside", id="Inside"):
                boxes["Inside"] = inside_tab(studio, history)
            with gr.Tab("Reports", id="Reports"):
                reports_tab(page, reports, runs)
        history_panel(page, tabs, history, studio, downloads, boxes)
        gr.api(Program(studio).sprite, api_name="sprite", **TURNS)
    return page


class Program:
    """The public API for programs (docs/demo.md)."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def sprite(
        self,
        prompt: str,
        seed: int = 0,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        checkpoint: str | None = None,
        size: int | None = None,
        fast: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Draw one picture. Yields some of the steps, and last the finished picture: {"step": k, "of": n, "png": a
        transparent picture in base64, of the size of its denoiser, "settings": those that repeat it}.
        """
        settings = dict(
            checkpoint=checkpoint, prompt=(prompt,), seed=seed, negative_prompt=negative_prompt, size=size, fast=fast,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, sampler=sampler,
        )  # fmt: skip
        yield from streamed(self._draw)(settings)

    def _draw(self, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        config = self.studio.settings(**values)
        settings: dict[str, Any] = {"prompt": config.prompt[0], "seed": config.seed}
        settings |= {"checkpoint": self.studio.name_of(config)}
        settings |= {name: getattr(config.sampling, name) for name in values.keys() & vars(config.sampling).keys()}
        shown, total = time.monotonic(), len(self.studio.evaluations(config)) + 1
        for step, frame in enumerate(self.studio.draw(config), 1):
            if step == total or time.monotonic() > shown + MIN_INTERVAL_S:
                png = show.uri(frame.x0[0]).partition(",")[2]
                yield {"step": step, "of": total, "png": png, "settings": settings}
                shown = time.monotonic()
