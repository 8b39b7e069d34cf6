"""Draw: one prompt, and how the picture emerges from noise, step by step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from pokediff.config import SampleConfig
from pokediff.data.captions import SHAPES, STYLES
from pokediff.data.colors import COLOR_ANCHORS
from pokediff.data.vocabulary import read_words
from pokediff.demo import show
from pokediff.demo.controls import (
    AT_ONCE,
    EXAMPLES,
    QUEUED,
    Controls,
    download,
    interval_boxes,
    interval_of,
    offered,
    paced,
    prompt_box,
    sampler_choice,
    sampler_of,
    sampling_controls,
    seed_box,
    streamed,
    updates,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.studio import LIMITS, Studio
from pokediff.drawing.sample import Frame
from pokediff.model.pipeline import Evaluation

MOST_CHIPS = 24  # of a group
WORDS = {  # for a checkpoint without words.json
    "styles": tuple(dict.fromkeys(STYLES[name] for name in ("artwork", "home", "dream-world", "sprite-gen5"))),
    "colours": tuple(COLOR_ANCHORS),
    "types": (
        *("fire", "water", "grass", "electric", "ice", "rock", "ground", "bug", "flying"),
        *("ghost", "dragon", "dark", "steel", "fairy", "poison", "psychic", "fighting", "normal"),
    ),
    "bodies": tuple(dict.fromkeys(names[0] for names in SHAPES.values())),
}
OUTPUTS = ("film", "status", "scrub", "files", "near", "seed")


def draw_tab(studio: Studio, downloads: Downloads) -> None:
    with gr.Row():
        with gr.Column(scale=5):
            prompt = prompt_box(elem_id="prompt")
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            gr.Examples([[example] for example in EXAMPLES], prompt, label="Examples")
            chips = word_buttons(studio, prompt)
            inputs = {"prompt": prompt, **settings_controls(studio)}
        with gr.Column(scale=6):
            film = gr.HTML(show.empty("The picture appears here."), elem_id="film")
            status = gr.Markdown("Ready.", elem_id="status")
            scrub = gr.Slider(
                1, 2, 2, step=1, label="Step", info="Drag to see every step.", interactive=True, elem_id="scrub"
            )
            replay = gr.Button("▶ Replay", size="sm", elem_id="replay")
            files = download("pictures, animation, and the settings for sample.py --from-json")
            near = gr.HTML(elem_id="near")
    handle = streamed(draw, studio, downloads, names=tuple(inputs))
    outputs = [film, status, scrub, files, near, inputs["seed"]]
    drawing = gr.on([go.click, prompt.submit], handle, list(inputs.values()), outputs, show_progress_on=film, **QUEUED)
    show_chips = partial(_visible, tuple(chips))
    inputs["checkpoint"].change(show_chips, inputs["checkpoint"], list(chips.values()), **AT_ONCE)
    stop.click(lambda: "Stopped.", None, status, cancels=[drawing], **AT_ONCE)
    replay.click(None, None, None, js="() => window.pokediff.play()", **AT_ONCE)
    scrub.change(None, scrub, None, js="(step) => window.pokediff.show(step - 1)", **AT_ONCE)


def word_buttons(studio: Studio, prompt: gr.Textbox) -> dict[str, gr.Column]:
    """Buttons that put the words of a checkpoint into the prompt and take them out, in the browser; a column for each
    checkpoint, of which that of the selected one is visible.
    """
    columns = {}
    for name, folder in studio.checkpoints.items():
        known = {group: tuple(words)[:MOST_CHIPS] for group, words in read_words(folder).items()} or WORDS
        with gr.Column(visible=name == studio.first) as columns[name]:
            for group, words in known.items():
                with gr.Accordion(group.capitalize(), open=group == "styles"), gr.Row(elem_classes="chips"):
                    for word in words:
                        chip = gr.Button(word, size="sm", min_width=60)
                        script = f"(p) => window.pokediff.toggle(p, {json.dumps(word)}, {json.dumps(words)})"
                        chip.click(None, prompt, prompt, js=script, **AT_ONCE)
    return columns


def _visible(names: Sequence[str], checkpoint: str) -> list[gr.Column]:
    return [gr.Column(visible=name == checkpoint) for name in names]


def settings_controls(studio: Studio) -> Controls:
    """All settings but the prompt, by the argument names of `draw`."""
    with gr.Accordion("More settings", open=False):
        negative = gr.Textbox(
            label="Negative prompt", info="What guidance moves away from; usually empty.", max_length=LIMITS.prompt
        )
        number = gr.Slider(1, LIMITS.pictures, 1, step=1, label="Pictures", info="With seed, seed + 1, ...")
        with gr.Row():
            seed = seed_box()
            dice = gr.Button("🎲 Random seed", elem_id="dice")
        random = gr.Checkbox(True, label="A random seed for every drawing", info="Off: the seed above.")
        sampling, sampler, interval = sampling_controls(studio), sampler_choice(), interval_boxes()
        enlarge = gr.Slider(1, LIMITS.enlarge, 8, step=1, label="Enlarge", info="Scale of the downloaded pictures.")
        raw = gr.Checkbox(False, label="Raw", info="No post-processing: as the denoisers leave the picture.")
        transparent = gr.Checkbox(True, label="Transparent background", info="Off: the colour below.")
        color = gr.ColorPicker("#ffffff", label="Background colour")
    dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {LIMITS.seed})", **AT_ONCE)
    dice.click(lambda: False, None, random, **AT_ONCE)
    return {
        "negative_prompt": negative,
        "num_images_per_prompt": number,
        "seed": seed,
        "random": random,
        **sampling,
        "sampler": sampler,
        **interval,
        "enlarge": enlarge,
        "raw": raw,
        "transparent": transparent,
        "color": color,
    }


def draw(
    studio: Studio,
    downloads: Downloads,
    prompt: str,
    seed: int,
    random: bool,
    sampler: str,
    low: float | None,
    high: float | None,
    transparent: bool,
    color: str,
    **settings: Any,
) -> Iterator[tuple[Any, ...]]:
    """Updates of OUTPUTS: a frame at every step, then the whole film, the files, the nearest training pictures."""
    changed = partial(updates, OUTPUTS)
    config = studio.settings(
        **settings,
        prompt=(prompt,),
        seed=None if random else seed,
        sampler=sampler_of(sampler),
        guidance_interval=interval_of(low, high),
        background=None if transparent else color,
    )
    frames: list[Frame] = []
    words = step_words(studio.evaluations(config))
    for frame in paced(studio.draw(config)):
        frames.append(frame)
        yield changed({"film": show.film([frame], prompt), "status": words[len(frames) - 1], "seed": config.seed})
    kept = show.spread(len(frames), show.film_length(frames))
    film = show.film([frames[index] for index in kept], prompt, [words[index] for index in kept])
    scrub = gr.Slider(maximum=max(2, len(kept)), value=len(kept), visible=len(kept) > 1)
    yield changed({"film": film, "status": summary(config, studio.evaluations(config)), "scrub": scrub})
    yield changed({"files": offered(downloads.write(studio.pipeline_of(config), config, frames))})
    pictures = frames[-1].x0
    yield changed({"near": show.neighbours(pictures, studio.neighbours(pictures))})


def step_words(evaluations: Sequence[Evaluation]) -> list[str]:
    """A caption for each frame of a drawing: step, denoiser, size, sigma."""
    total = len(evaluations) + 1
    words = [
        f"Step {index} of {total}: {one.denoiser}, {one.size} px, sigma {one.sigma:.2g}."
        for index, one in enumerate(evaluations, 1)
    ]
    return [*words, f"Step {total} of {total}: the picture."]


def summary(config: SampleConfig, evaluations: Sequence[Evaluation]) -> str:
    """One sentence about a finished drawing: seed, steps, guidance scale."""
    steps = Counter(one.size for one in evaluations)
    if not steps:
        return f"Done: seed {config.seed}."
    words = " and ".join(f"{number} steps at {size} px" for size, number in steps.items())
    return f"Done: seed {config.seed}, {words}, guidance scale {config.sampling.guidance_scale or 1:g}."
