"""Palette: reduce a picture to few colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from pokediff.data.images import fit_square, unpremultiply
from pokediff.demo import show
from pokediff.demo.controls import (
    BEGUN,
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
from pokediff.demo.downloads import Downloads, name_of
from pokediff.demo.history import History
from pokediff.demo.studio import Studio
from pokediff.demo.uploads import read_picture
from pokediff.drawing.jobs import make_jobs, slug
from pokediff.drawing.pixelart import finish, read_palette
from pokediff.errors import PokediffError


def palette_tab(studio: Studio, downloads: Downloads, history: History) -> Controls:
    gr.Markdown("Reduce a picture to few colours: an uploaded one, or one drawn from a prompt and a seed.")
    with gr.Row():
        upload = gr.File(label="Picture (optional)", file_count="single", height=150)
        file = gr.File(
            label="Palette, .gpl or .hex (optional)", file_count="single", file_types=[".gpl", ".hex"], height=150
        )
    prompt = prompt_box(value="pixel sprite of a red fire dragon")
    with gr.Row():
        colors = gr.Slider(2, 64, 12, step=1, label="Colours", info="Ignored when a palette is uploaded.")
        hard = gr.Checkbox(True, label="Hard edges", info="Every pixel opaque or transparent.")
        seed = seed_box()
    model = model_controls(studio)
    with gr.Accordion("More settings", open=False):
        steps = step_controls(studio, model)
    buttons, outputs = go_and_stop("Reduce colours", "reduce"), results("palette")
    inputs = {
        "upload": upload,
        "file": file,
        "prompt": prompt,
        "colors": colors,
        "hard": hard,
        "seed": seed,
        **model,
        **steps,
    }
    on_draw(history, "Palette", buttons, draw, [studio, downloads], inputs, outputs, prompt)
    return inputs


def draw(
    studio: Studio,
    downloads: Downloads,
    keep: Keep,
    upload: str | None,
    file: str | None,
    prompt: str,
    colors: int,
    hard: bool,
    **settings: Any,
) -> Iterator[tuple[Any, Any, Any]]:
    """Updates of the status, of the pictures before and after, and of the file."""
    palette = palette_of(file, int(colors))
    config = studio.settings(prompt=(prompt.strip() or "a picture" if upload else prompt,), raw=True, **settings)
    (job,) = make_jobs(config.prompt, config)
    yield BEGUN, show.empty(""), offered()
    if upload:
        before, name = (
            unpremultiply(fit_square(read_picture(upload), config.sampling.size or 0)),
            slug(Path(upload).stem),
        )
    else:
        for frame in studio.draw(config):
            before, name = frame.x0[0], name_of(job)
            yield SKIP, SKIP, SKIP
        before = finish(before)
    after = finish(before, palette, hard, clean=False)
    keep(config, [job], [after])
    number = show.colors_of(after)
    path = downloads.write_picture(after, f"{name}-{number}-colours", factor=8)
    yield f"Done: {number} colours.", show.before_and_after(before, after), offered([path])


def palette_of(file: str | None, colors: int) -> int | np.ndarray:
    """A number of colours, or those of an uploaded file. Raises PokediffError for a file without a palette."""
    try:
        return read_palette(file or str(colors))
    except PokediffError as error:  # it names a path of the server
        raise PokediffError(str(error).replace(str(file), "file")) from None
