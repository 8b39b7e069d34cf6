"""Batch: many prompts, one ZIP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from pokediff.demo import show
from pokediff.demo.controls import (
    AT_ONCE,
    EXAMPLES,
    SKIP,
    download,
    offered,
    on_click,
    sampling_controls,
    seed_box,
    uploaded,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.studio import LIMITS, Studio
from pokediff.demo.uploads import read_lines
from pokediff.drawing.sample import make_jobs


def batch_tab(studio: Studio, downloads: Downloads) -> None:
    prompts = gr.Textbox(
        "\n".join(EXAMPLES[:4]), label="Prompts", lines=6, elem_id="prompts",
        info=f"One per line, at most {LIMITS.prompts}; lines that begin with # are skipped.",
    )  # fmt: skip
    upload = gr.UploadButton("Read prompts from a text file", file_types=[".txt"], file_count="single")
    with gr.Row():
        number = gr.Slider(1, 8, 2, step=1, label="Pictures per prompt", info="With seed, seed + 1, ...")
        seed = seed_box()
    sampling = sampling_controls(studio)
    with gr.Row():
        go = gr.Button("Draw all", variant="primary", elem_id="draw-all")
        stop = gr.Button("Stop", variant="stop")
    status = gr.Markdown("Ready.", elem_id="batch-status")
    bundle = download("one ZIP with the pictures, a labelled sheet and the settings")
    sheet = gr.HTML(show.empty("The pictures appear here, batch by batch."), elem_id="sheet")
    inputs = {"prompts": prompts, "num_images_per_prompt": number, "seed": seed, **sampling}
    outputs = [status, sheet, bundle]
    drawing = on_click(go, draw, [studio, downloads], inputs, outputs, show_progress_on=sheet)
    stop.click(lambda: "Stopped; the finished pictures stay.", None, status, cancels=[drawing], **AT_ONCE)
    upload.upload(uploaded(read_lines), upload, [prompts, status], **AT_ONCE)


def draw(studio: Studio, downloads: Downloads, prompts: str, **settings: Any) -> Iterator[tuple[Any, ...]]:
    """Updates of status, sheet and ZIP after every batch."""
    lines = tuple(line.strip() for line in prompts.splitlines() if line.strip() and not line.startswith("#"))
    config = studio.settings(prompt=lines, enlarge=8, **settings)
    total = len(make_jobs(config.prompt, config))
    yield f"0 of {total} pictures.", SKIP, SKIP
    for part in studio.draw_all(config):
        if part is None:
            yield SKIP, SKIP, SKIP
            continue
        jobs, drawn = part
        labels = [f"{job.prompt} · seed {job.seed}" for job in jobs]
        words = f"{len(jobs)} of {total} pictures." + (" Done." if len(jobs) == total else "")
        bundle = downloads.write_zip(studio.pipeline_of(config), config, jobs, drawn)
        yield words, show.labelled(drawn, labels), offered([bundle])
