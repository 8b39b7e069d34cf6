"""Inside: what each word changes, the noise schedule and its denoisers, samplers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import cv2
import gradio as gr
import numpy as np

from pokediff.baselines.attention import attention_plot
from pokediff.config import SampleConfig
from pokediff.demo import show
from pokediff.demo.controls import (
    BEGUN,
    SKIP,
    Controls,
    Keep,
    go_and_stop,
    interval_boxes,
    interval_of,
    model_controls,
    on_click,
    on_draw,
    prompt_box,
    sampler_choice,
    sampler_of,
    seed_box,
    step_controls,
)
from pokediff.demo.history import History
from pokediff.demo.studio import Compared, Studio
from pokediff.drawing.attribution import Influence
from pokediff.drawing.jobs import make_jobs
from pokediff.errors import PokediffError
from pokediff.evaluation.report import plot_uri
from pokediff.model.pipeline import Evaluation, PokeDiffPipeline
from pokediff.model.samplers import SAMPLERS


def inside_tab(studio: Studio, history: History) -> Controls:
    inputs: Controls = {"prompt": prompt_box(), "seed": seed_box(), **(model := model_controls(studio))}
    with gr.Accordion("More settings", open=False):
        inputs |= step_controls(studio, model)
    with gr.Accordion("What each word changes"):
        gr.Markdown(
            "After drawing, x0 is predicted again without each word; the maps show where it changes. "
            "The denoisers receive the text as one pooled vector, so there are no cross-attention maps. "
            "Of a baseline, the weights of its attention to each word are shown."
        )
        attribute = gr.Button("Leave out each word", variant="primary", elem_id="words")
        found = gr.HTML(elem_id="words-result")
    with gr.Accordion("Noise schedule", open=False):
        schedule_inputs = {**inputs, "sampler": sampler_choice(), **interval_boxes()}
        plot = gr.Button("Show the schedule", elem_id="schedule")
        plotted = gr.HTML(elem_id="schedule-result")
    with gr.Accordion("Samplers and steps side by side", open=False):
        samplers = gr.CheckboxGroup(
            list(SAMPLERS), value=["dpmpp_2m", "unipc", "ddim"], label="Samplers", info="All start from the same noise."
        )
        steps = gr.Textbox("4, 8, 20", label="Steps", info="Numbers, separated by commas.")
        buttons = go_and_stop("Draw", "compare")
        with gr.Column(elem_classes="result"):
            status, compared = gr.Markdown("Ready.", elem_id="compare-status"), gr.HTML(elem_id="compare-result")
    on_click(attribute, show_words, [studio], inputs, found)
    on_click(plot, show_schedule, [studio], schedule_inputs, plotted)
    compare_inputs = {**inputs, "samplers": samplers, "steps": steps}
    on_draw(history, "Inside", buttons, show_samplers, [studio], compare_inputs, [status, compared])
    return schedule_inputs


def show_words(studio: Studio, prompt: str, **settings: Any) -> Iterator[Any]:
    """Updates of the table of words; for a baseline, what it attends to."""
    config = studio.settings(prompt=(prompt,), **settings)
    if (attention := studio.attention(config)) is not None:
        words = f"attention to each word of {escape(prompt)}"
        yield f'<div class="wide"><img src="{plot_uri(attention_plot(attention))}" alt="{words}"></div>'
        return
    for found in studio.influence(config):
        yield SKIP if found is None else influence_table(found)


def show_schedule(
    studio: Studio, prompt: str, sampler: str, low: float | None, high: float | None, **settings: Any
) -> Iterator[str]:
    """An update of the plot."""
    settings |= {"sampler": sampler_of(sampler), "guidance_interval": interval_of(low, high)}
    config = studio.settings(prompt=(prompt or "a picture",), **settings)
    pipeline, evaluations = studio.cascade_of(config), studio.evaluations(config)
    scales = [pipeline.guidance(one.denoiser, one.sigma, config.sampling) for one in evaluations]
    yield schedule_plot(evaluations, scales) + denoiser_table(pipeline)


def show_samplers(
    studio: Studio, keep: Keep, prompt: str, samplers: Sequence[str], steps: str, **settings: Any
) -> Iterator[tuple[Any, Any]]:
    """Updates of the status and of the pictures, one after another."""
    config = studio.settings(prompt=(prompt,), **settings)
    parts = [part.strip() for part in steps.split(",") if part.strip()]
    if not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise PokediffError("Steps are whole numbers, separated by commas, for example 4, 8, 20.")
    yield BEGUN, show.empty("")
    done: list[Compared] = []
    for one in studio.compare(config, samplers, [int(part) for part in parts]):
        if one is None:
            yield SKIP, SKIP
            continue
        done.append(one)
        keep(one.config, make_jobs(one.config.prompt, one.config), [one.picture])
        shown = [(one.picture, f"{_way(one.config)}, {one.seconds:.2f} s") for one in done]
        yield f"{len(done)} of {len(samplers) * len(parts)} pictures.", show.pictures(shown)


def _way(config: SampleConfig) -> str:
    return f"{config.sampling.sampler}, {config.sampling.num_inference_steps} steps"


# ----------------------------------------------------------------------------------------------------------- HTML


def influence_table(found: Influence) -> str:
    """A row for each word: a bar, and a map of the change of x0 without it at every noise level."""
    highest = np.maximum(found.maps.max(axis=(0, 2, 3)), 1e-9)  # (L,): the maps of one level have one scale
    total = found.shares.mean(axis=1)
    head = "".join(f"<th>sigma {sigma:.2g}</th>" for sigma in found.sigmas)
    whole = "".join(f"<td>{show.image(picture, 'x0 of the whole prompt')}</td>" for picture in found.x0)
    rows = [
        f'<tr><th>{escape(word)}</th><td style="min-width:110px">{share:.0%}'
        f'<div class="bar" style="width:{100 * share / total.max():.0f}%"></div></td>'
        + "".join(
            f"<td>{show.image(heat(picture, values / most), f'effect of {word}')}</td>"
            for picture, values, most in zip(found.x0, maps, highest, strict=True)
        )
        + "</tr>"
        for word, share, maps in zip(found.words, total, found.maps, strict=True)
    ]
    return (
        f'<div class="wide"><table class="bars"><tr><th>word</th><th>share of the change</th>{head}</tr>'
        f"<tr><th>whole prompt</th><td>{show.image(found.picture, 'the finished picture')}</td>{whole}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def heat(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (H, W), 0 to 1, as colours over the picture in grey; RGBA uint8 (H, W, 4)."""
    grey = (picture[..., :3].mean(-1) * (picture[..., 3] / 255) + 255 * (1 - picture[..., 3] / 255))[..., None]
    level = np.clip(values, 0, 1)
    colors = cv2.applyColorMap((255 * level).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    share = np.clip(1.5 * level, 0, 1)[..., None]
    mixed = (1 - share) * (0.4 * grey + 150) + share * colors
    return np.concatenate([mixed.clip(0, 255), np.full_like(grey, 255)], axis=-1).astype(np.uint8)


def schedule_plot(evaluations: Sequence[Evaluation], scales: Sequence[float]) -> str:
    """sigma at every step, its denoiser, and its guidance scale where that is not 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    plot = Figure(figsize=(7, 3.2), layout="constrained")
    axes = plot.subplots()
    sigmas = [one.sigma for one in evaluations]
    labels = [
        f"{one.denoiser}, {one.size} px" + (f", guidance scale {scale:g}" if scale != 1 else "")
        for one, scale in zip(evaluations, scales, strict=True)
    ]
    axes.plot(range(1, len(sigmas) + 1), sigmas, color="gray", linewidth=1)
    for label in dict.fromkeys(labels):
        points = [(k, sigma) for k, (sigma, own) in enumerate(zip(sigmas, labels, strict=True), 1) if own == label]
        axes.scatter(*zip(*points, strict=True), label=label, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step", ylabel="sigma (standard deviation of the noise)", yscale="log")
    axes.legend()
    return f'<img class="plot" src="{plot_uri(plot)}" alt="sigma falls from {sigmas[0]:.3g} to {sigmas[-1]:.3g}">'


def denoiser_table(pipeline: PokeDiffPipeline) -> str:
    """The denoisers of a checkpoint, in the order of the cascade."""
    rows = []
    for name, denoiser in pipeline.cascade.items():
        config = denoiser.config
        below = "all" if config.below is None else f"below {config.below:g}"
        scale = "not guided" if config.guidance_scale is None else f"{config.guidance_scale:g}"
        number = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
        cells = (f"{config.image_size} px", below, str(config.steps), scale, f"{number:.1f} M" if number else "")
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = (
        "<tr><th>denoiser</th><th>size</th><th>sigma</th><th>steps</th><th>guidance scale</th><th>parameters</th></tr>"
    )
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
