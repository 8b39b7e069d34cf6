"""Interpolation: the pictures between two prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pokediff.demo import show
from pokediff.demo.controls import (
    BEGUN,
    EXAMPLES,
    SKIP,
    Controls,
    Keep,
    go_and_stop,
    model_controls,
    offered,
    on_draw,
    prompt_box,
    results,
    seed_box,
    step_controls,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.history import History
from pokediff.demo.studio import LIMITS, Studio
from pokediff.errors import PokediffError


def interpolation_tab(studio: Studio, downloads: Downloads, history: History) -> Controls:
    with gr.Row():
        first, second = prompt_box("From"), prompt_box("To", EXAMPLES[1])
    with gr.Row():
        number = gr.Slider(
            4, LIMITS.interpolation, 16, step=1, label="Pictures", info="More pictures make it smoother."
        )
        seed = seed_box()
    model = model_controls(studio)
    with gr.Accordion("More settings", open=False):
        steps = step_controls(studio, model)
    buttons, outputs = go_and_stop("Interpolate", "interpolate"), results("interpolation")
    inputs = {"first": first, "second": second, "interpolate": number, "seed": seed, **model, **steps}
    on_draw(history, "Interpolation", buttons, draw, [studio, downloads], inputs, outputs)
    return inputs


def draw(
    studio: Studio, downloads: Downloads, keep: Keep, first: str, second: str, **settings: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Updates of status, pictures and files."""
    if not first.strip() or not second.strip():
        raise PokediffError("Write both prompts first.")
    config = studio.settings(prompt=(first, second), enlarge=8, **settings)
    yield BEGUN, show.empty(""), offered()
    for part in studio.draw_all(config):
        if part is None:
            yield SKIP, SKIP, SKIP
            continue
        jobs, drawn = part
        pictures = show.labelled(drawn, [f"{job.share:.0%}" for job in jobs])
        yield f"{len(jobs)} of {config.interpolate} pictures.", pictures, SKIP
    keep(config, jobs, drawn)
    bundle, animation = downloads.write_interpolation(studio.pipeline_of(config), config, jobs, drawn)
    words = f"Done: {len(jobs)} pictures, seed {config.seed}."
    yield words, show.animation(animation) + pictures, offered([animation, bundle])
