"""Interpolation: the pictures between two prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pokediff.demo import show
from pokediff.demo.controls import EXAMPLES, SKIP, download, offered, on_click, prompt_box, sampling_controls, seed_box
from pokediff.demo.downloads import Downloads
from pokediff.demo.studio import LIMITS, Studio
from pokediff.errors import PokediffError


def interpolation_tab(studio: Studio, downloads: Downloads) -> None:
    with gr.Row():
        first, second = prompt_box("From"), prompt_box("To", EXAMPLES[1])
    with gr.Row():
        number = gr.Slider(
            4, LIMITS.interpolation, 16, step=1, label="Pictures", info="More pictures make it smoother."
        )
        seed = seed_box()
    with gr.Accordion("More settings", open=False):
        sampling = sampling_controls(studio)
    go = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
    result = gr.HTML(elem_id="interpolation-result")
    files = download("a GIF, and a ZIP of all pictures with the settings")
    inputs = {"first": first, "second": second, "interpolate": number, "seed": seed, **sampling}
    on_click(go, draw, [studio, downloads], inputs, [result, files], show_progress_on=result)


def draw(studio: Studio, downloads: Downloads, first: str, second: str, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Updates of the pictures and the files."""
    if not first.strip() or not second.strip():
        raise PokediffError("Write both prompts first.")
    config = studio.settings(prompt=(first, second), enlarge=8, **settings)
    for part in studio.draw_all(config):
        if part is None:
            yield SKIP, SKIP
            continue
        jobs, drawn = part
        pictures = show.labelled(drawn, [f"{job.share:.0%}" for job in jobs])
        yield pictures, SKIP
    bundle = downloads.write_zip(studio.pipeline_of(config), config, jobs, drawn)
    animation = bundle.with_name("interpolation.gif")
    yield show.animation(animation) + pictures, offered([animation, bundle])
