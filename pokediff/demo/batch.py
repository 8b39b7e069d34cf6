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
    Keep,
    best_of_slider,
    go_and_stop,
    model_controls,
    offered,
    on_draw,
    results,
    seed_box,
    sheet_choice,
    step_controls,
    uploaded,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.history import History
from pokediff.demo.studio import LIMITS, Studio
from pokediff.demo.uploads import read_lines
from pokediff.drawing.sample import make_jobs


def batch_tab(studio: Studio, downloads: Downloads, history: History) -> None:
    prompts = gr.Textbox(
        "\n".join(EXAMPLES[:4]), label="Prompts", lines=6, elem_id="prompts",
        info=f"One per line, at most {LIMITS.prompts}; lines that begin with # are skipped.",
    )  # fmt: skip
    upload = gr.UploadButton("Read prompts from a text file", file_types=[".txt"], file_count="single")
    with gr.Row():
        number = gr.Slider(1, 8, 2, step=1, label="Pictures per prompt", info="With seed, seed + 1, ...")
        seed = seed_box()
    model = model_controls(studio)
    with gr.Accordion("More settings", open=False):
        best_of = best_of_slider(studio, model, 1)
        steps, sheet = step_controls(studio, model), sheet_choice()
    buttons, outputs = go_and_stop("Draw all", "draw-all"), results("batch")
    inputs = {"prompts": prompts, "num_images_per_prompt": number, "seed": seed, **model, "best_of": best_of}
    inputs |= {**steps, "sheet": sheet}
    on_draw(history, "Batch", buttons, draw, [studio, downloads], inputs, outputs)
    upload.upload(uploaded(read_lines), upload, [prompts, outputs[0]], **AT_ONCE)


def draw(
    studio: Studio, downloads: Downloads, keep: Keep, prompts: str, **settings: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Updates of status, pictures and ZIP after every batch."""
    lines = tuple(line.strip() for line in prompts.splitlines() if line.strip() and not line.startswith("#"))
    config = studio.settings(prompt=lines, enlarge=8, **settings)
    total, kept = len(make_jobs(config.prompt, config)), 0
    yield f"0 of {total} pictures.", show.empty(""), offered()
    for part in studio.draw_all(config):
        if part is None:
            yield SKIP, SKIP, SKIP
            continue
        jobs, drawn = part
        keep(config, jobs[kept:], drawn[kept:])
        kept = len(jobs)
        labels = [f"{job.prompt} · seed {job.seed}" for job in jobs]
        words = "Done: " * (kept == total) + f"{kept} of {total} pictures."
        bundle = downloads.write_zip(studio.pipeline_of(config), config, jobs, drawn)
        yield words, show.labelled(drawn, labels), offered([bundle])
