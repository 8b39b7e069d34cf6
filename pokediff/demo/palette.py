"""Palette: reduce a picture to few colours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from pokediff.data.images import fit_square, unpremultiply
from pokediff.demo import show
from pokediff.demo.controls import SKIP, download, offered, on_click, prompt_box, sampling_controls, seed_box
from pokediff.demo.downloads import Downloads
from pokediff.demo.studio import Studio
from pokediff.demo.uploads import read_picture
from pokediff.drawing.pixelart import finish, read_palette
from pokediff.errors import PokediffError


def palette_tab(studio: Studio, downloads: Downloads) -> None:
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
    with gr.Accordion("More settings", open=False):
        sampling = sampling_controls(studio)
    go = gr.Button("Reduce colours", variant="primary", elem_id="reduce")
    result = gr.HTML(elem_id="palette-result")
    files = download("PNG")
    inputs = {
        "upload": upload,
        "file": file,
        "prompt": prompt,
        "colors": colors,
        "hard": hard,
        "seed": seed,
        **sampling,
    }
    on_click(go, draw, [studio, downloads], inputs, [result, files], show_progress_on=result)


def draw(
    studio: Studio,
    downloads: Downloads,
    upload: str | None,
    file: str | None,
    prompt: str,
    colors: int,
    hard: bool,
    **settings: Any,
) -> Iterator[tuple[Any, Any]]:
    """Updates of the pictures before and after, and of the file."""
    palette = palette_of(file, int(colors))
    if upload:
        size = studio.resolved(settings["checkpoint"], size=settings["size"]).size
        before = unpremultiply(fit_square(read_picture(upload), size or 0))
    else:
        for frame in studio.draw(studio.settings(prompt=(prompt,), raw=True, **settings)):
            before = frame.x0[0]
            yield SKIP, SKIP
        before = finish(before)
    after = finish(before, palette, hard, clean=False)
    yield show.before_and_after(before, after), offered([downloads.write_picture(after, factor=8)])


def palette_of(file: str | None, colors: int) -> int | np.ndarray:
    """A number of colours, or those of an uploaded file. Raises PokediffError for a file without a palette."""
    try:
        return read_palette(file or str(colors))
    except PokediffError as error:  # it names a path of the server
        raise PokediffError(str(error).replace(str(file), "file")) from None
