"""Variations: pictures at a chosen distance from that of one seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pokediff.demo.controls import download, film_and_files, on_click, prompt_box, sampling_controls, seed_box
from pokediff.demo.downloads import Downloads
from pokediff.demo.studio import Studio


def variations_tab(studio: Studio, downloads: Downloads) -> None:
    prompt = prompt_box()
    with gr.Row():
        distance = gr.Slider(
            0.05, 1, 0.3, step=0.05, label="Distance", info="From the picture of this seed; 1: unrelated."
        )
        number = gr.Slider(2, 12, 6, step=1, label="Pictures", info="The first is the picture of this seed.")
        seed = seed_box()
    with gr.Accordion("More settings", open=False):
        sampling = sampling_controls(studio)
    go = gr.Button("Draw variations", variant="primary", elem_id="variations")
    result = gr.HTML(elem_id="variations-result")
    files = download("pictures, animation, and settings")
    inputs = {"prompt": prompt, "variation": distance, "num_images_per_prompt": number, "seed": seed, **sampling}
    on_click(go, draw, [studio, downloads], inputs, [result, files], show_progress_on=result)


def draw(studio: Studio, downloads: Downloads, prompt: str, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Updates of the film and the files."""
    yield from film_and_files(studio, downloads, studio.settings(prompt=(prompt,), enlarge=8, **settings))
