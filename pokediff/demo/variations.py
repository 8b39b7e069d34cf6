"""Variations: pictures at a chosen distance from that of one seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pokediff.demo.controls import (
    Controls,
    Keep,
    film_and_files,
    go_and_stop,
    model_controls,
    on_draw,
    prompt_box,
    results,
    seed_box,
    step_controls,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.history import History
from pokediff.demo.studio import Studio


def variations_tab(studio: Studio, downloads: Downloads, history: History) -> Controls:
    prompt = prompt_box()
    with gr.Row():
        distance = gr.Slider(
            0.05, 1, 0.3, step=0.05, label="Distance", info="From the picture of this seed; 1: unrelated."
        )
        number = gr.Slider(2, 12, 6, step=1, label="Pictures", info="The first is the picture of this seed.")
        seed = seed_box()
    model = model_controls(studio)
    with gr.Accordion("More settings", open=False):
        steps = step_controls(studio, model)
    buttons, outputs = go_and_stop("Draw variations", "variations"), results("variations")
    inputs = {"prompt": prompt, "variation": distance, "num_images_per_prompt": number, "seed": seed, **model, **steps}
    on_draw(history, "Variations", buttons, draw, [studio, downloads], inputs, outputs, prompt)
    return inputs


def draw(
    studio: Studio, downloads: Downloads, keep: Keep, prompt: str, **settings: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Updates of status, film and files."""
    yield from film_and_files(studio, downloads, keep, studio.settings(prompt=(prompt,), enlarge=8, **settings))
