"""Draw: one prompt, and how the picture emerges from noise, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from pokediff.data.captions import SHAPES, STYLES
from pokediff.data.colors import COLOR_ANCHORS
from pokediff.data.vocabulary import read_words
from pokediff.demo import show
from pokediff.demo.controls import (
    AT_ONCE,
    BEGUN,
    EXAMPLES,
    Controls,
    Keep,
    best_of_slider,
    download,
    go_and_stop,
    interval_boxes,
    interval_of,
    model_controls,
    offered,
    on_draw,
    paced,
    prompt_box,
    sampler_choice,
    sampler_of,
    seed_box,
    sheet_choice,
    step_controls,
    updates,
)
from pokediff.demo.downloads import Downloads
from pokediff.demo.history import History
from pokediff.demo.studio import LIMITS, Studio
from pokediff.drawing.jobs import Job
from pokediff.drawing.sample import BEST_OF, Frame

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
OUTPUTS = ("status", "film", "player", "scrub", "files", "near", "seed")


def draw_tab(studio: Studio, downloads: Downloads, history: History) -> Controls:
    """On a phone the picture follows the buttons, and all other inputs follow the picture."""
    with gr.Row(elem_id="draw-tab"):
        with gr.Column(elem_classes="ask"):
            prompt = prompt_box(elem_id="prompt")
            buttons = go_and_stop("Draw", "draw")
        with gr.Column(elem_classes="result"):
            status = gr.Markdown("Ready.", elem_id="status")
            film = gr.HTML(show.empty("The picture appears here."), elem_id="film")
            with gr.Column(visible=False) as player:
                scrub = gr.Slider(
                    1, 2, 2, step=1, label="Step", info="Drag to see every step.", interactive=True, elem_id="scrub"
                )
                replay = gr.Button("▶ Replay", size="sm", elem_id="replay")
            files = download()
            near = gr.HTML(elem_id="near")
        with gr.Column(elem_classes="more"):
            model = model_controls(studio)
            gr.Examples([[example] for example in EXAMPLES], prompt, label="Examples")
            chips = word_buttons(studio, prompt)
            inputs = {"prompt": prompt, **model, **settings_controls(studio, model)}
    outputs = [status, film, player, scrub, files, near, inputs["seed"]]
    on_draw(history, "Draw", buttons, draw, [studio, downloads], inputs, outputs, prompt)
    show_chips = partial(_visible, tuple(chips))
    model["checkpoint"].change(show_chips, model["checkpoint"], list(chips.values()), **AT_ONCE)
    replay.click(None, None, None, js="() => window.pokediff.play()", **AT_ONCE)
    scrub.change(None, scrub, None, js="(step) => window.pokediff.show(step - 1)", **AT_ONCE)
    return inputs


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


def settings_controls(studio: Studio, model: Controls) -> Controls:
    """All settings but prompt and model, by the argument names of `draw`."""
    with gr.Accordion("More settings", open=False):
        negative = gr.Textbox(
            label="Negative prompt", info="What guidance moves away from; usually empty.", max_length=LIMITS.prompt
        )
        with gr.Row():
            number = gr.Slider(1, LIMITS.pictures, 1, step=1, label="Pictures", info="With seed, seed + 1, ...")
            best_of = best_of_slider(studio, model, BEST_OF)
        with gr.Row():
            seed = seed_box()
            dice = gr.Button("🎲 Random seed", elem_id="dice")
        random = gr.Checkbox(True, label="A random seed for every drawing", info="Off: the seed above.")
        steps, sampler, interval = step_controls(studio, model), sampler_choice(), interval_boxes()
        enlarge = gr.Slider(1, LIMITS.enlarge, 8, step=1, label="Enlarge", info="Scale of the downloaded pictures.")
        raw = gr.Checkbox(False, label="Raw", info="No post-processing: as the denoisers leave the picture.")
        transparent = gr.Checkbox(True, label="Transparent background", info="Off: the colour below.")
        color = gr.ColorPicker("#ffffff", label="Background colour")
        sheet = sheet_choice()
    dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {LIMITS.seed})", **AT_ONCE)
    dice.click(lambda: False, None, random, **AT_ONCE)
    return {
        "negative_prompt": negative,
        "num_images_per_prompt": number,
        "best_of": best_of,
        "seed": seed,
        "random": random,
        **steps,
        "sampler": sampler,
        **interval,
        "enlarge": enlarge,
        "raw": raw,
        "transparent": transparent,
        "color": color,
        "sheet": sheet,
    }


def draw(
    studio: Studio,
    downloads: Downloads,
    keep: Keep,
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
    # What belongs to the drawing before goes, so that it is not there when this one is stopped.
    fresh = {"film": show.empty(""), "player": gr.Column(visible=False), "files": offered(), "near": ""}
    yield changed({"status": BEGUN, "seed": config.seed, **fresh})
    jobs: list[Job] = []
    for job in studio.chosen(config):
        jobs.append(job)
        if config.sampling.chooses:
            yield changed({"status": f"Chose the best seed of {len(jobs)} of {config.num_images_per_prompt} pictures."})
    frames: list[Frame] = []
    words = show.step_words(studio.evaluations(config))
    for frame in paced(studio.draw(config, jobs)):
        frames.append(frame)
        yield changed({"status": words[len(frames) - 1], "film": show.film([frame], prompt)})
    kept = show.spread(len(frames), show.film_length(frames))
    captions = [words[index] for index in kept] if len(kept) > 1 else ()
    film = show.film([frames[index] for index in kept], prompt, captions)
    scrub = gr.Slider(maximum=max(2, len(kept)), value=len(kept))
    pictures = frames[-1].x0
    keep(config, jobs, pictures)
    done = {"status": show.summary(config, studio.evaluations(config)), "film": film, "scrub": scrub}
    yield changed({**done, "player": gr.Column(visible=len(kept) > 1)})
    yield changed({"files": offered(downloads.write(studio.pipeline_of(config), config, frames, jobs))})
    yield changed({"near": show.neighbours(pictures, studio.neighbours(pictures))})
