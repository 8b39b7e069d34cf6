"""img2img and inpainting: start from an uploaded picture or a sketch, or redraw the part under a mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pokediff.demo.controls import (
    AT_ONCE,
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
    uploaded,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.history import History
from pokediff.demo.patches import sketch_pad
from pokediff.demo.studio import Studio
from pokediff.demo.uploads import canvas_mask, canvas_picture, read_picture

MODES = [
    ("img2img: start from the picture, strokes included", "img2img"),
    ("inpainting: redraw under the strokes", "inpainting"),
]


def img2img_tab(studio: Studio, downloads: Downloads, history: History) -> Controls:
    gr.Markdown("Upload a picture or sketch one; the strokes are part of it (img2img) or a mask over it (inpainting).")
    with gr.Row():
        with gr.Column():
            upload = gr.UploadButton("Upload a picture", file_count="single", elem_id="upload")
            message = gr.Markdown()
            canvas = sketch_pad(
                label="Sketch, or mask", sources=(), layers=False, transforms=(), height=340,
                canvas_size=(256, 256), brush=gr.Brush(default_size=14, colors=["#3b82f6", "#ef4444", "#22c55e"]),
                elem_id="canvas",
            )  # fmt: skip
        with gr.Column():
            prompt = prompt_box()
            mode = gr.Radio(MODES, value="img2img", label="Mode")
            strength = gr.Slider(
                0.05,
                1,
                0.6,
                step=0.05,
                label="Strength",
                info="img2img: fraction of the noise schedule; 1: ignore the picture.",
            )
            number = gr.Slider(1, 8, 4, step=1, label="Pictures", info="With seed, seed + 1, ...")
            seed = seed_box()
            model = model_controls(studio)
            with gr.Accordion("More settings", open=False):
                steps = step_controls(studio, model)
            buttons = go_and_stop("Draw", "img2img")
    outputs = results("img2img")
    inputs = {
        "canvas": canvas,
        "prompt": prompt,
        "mode": mode,
        "strength": strength,
        "num_images_per_prompt": number,
        "seed": seed,
        **model,
        **steps,
    }
    upload.upload(uploaded(canvas_value), upload, [canvas, message], **AT_ONCE)
    on_draw(history, "img2img", buttons, draw, [studio, downloads], inputs, outputs, prompt)
    return inputs


def canvas_value(path: str) -> dict[str, Any]:
    """The value of a sketch pad with an uploaded picture on it."""
    return {"background": read_picture(path), "layers": [], "composite": None}


def draw(
    studio: Studio, downloads: Downloads, keep: Keep, canvas: Any, prompt: str, mode: str, **settings: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Updates of status, film and files."""
    picture, mask = (canvas_picture(canvas), None) if mode == "img2img" else canvas_mask(canvas)
    given = downloads.keep_input(picture, mask)
    config = studio.settings(prompt=(prompt,), enlarge=8, **given, **settings)
    yield from film_and_files(studio, downloads, keep, config)
