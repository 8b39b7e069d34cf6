"""Under the tabs: the history, and what to do with the picture that is chosen there."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from pokediff.baselines.interface import DrawsAtOnce
from pokediff.data.images import enlarge, read_image
from pokediff.demo.controls import AT_ONCE, DEFAULT_SAMPLER, SKIP, Controls, sampling_updates, updates
from pokediff.demo.downloads import Downloads, name_of
from pokediff.demo.history import History, Past
from pokediff.demo.studio import Studio
from pokediff.errors import PokediffError

GONE = "This picture is no longer kept; choose another one."
CANVAS_SIDE = 256  # px; smaller pictures are enlarged on the canvas, so that there is room for strokes
NEEDS_STEPS = ("img2img", "Interpolation", "Variations", "Inside")  # tabs in which baselines do not draw
DRAWN_BY_DRAW = ("Batch", "Inside")  # tabs whose pictures Draw draws, too


def history_panel(
    page: gr.Blocks,
    tabs: gr.Tabs,
    history: History,
    studio: Studio,
    downloads: Downloads,
    boxes: Mapping[str, Controls],
) -> None:
    """The strip of pictures; for the chosen one a button for each tab of `boxes`, which holds their inputs."""
    with gr.Column(elem_id="history"):
        history.strip.render()
        with gr.Column(visible=False, elem_id="chosen") as actions:
            words = gr.HTML(elem_id="past-words")
            with gr.Row(elem_id="send"):
                again = gr.Button("Reuse settings", size="sm", variant="primary", min_width=60, elem_id="reuse")
                buttons = {tab: gr.Button(f"→ {tab}", size="sm", min_width=60) for tab in boxes if tab != "Draw"}

    def choose(request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        session = str(request.session_hash)
        past = history.choose(session, event.key)
        words = "" if past is None else f"Drawn by {past.tab}: {past.words}"
        return history.html(session), gr.Column(visible=past is not None), escape(words)

    def sender(tab: str) -> Any:
        def handle(request: gr.Request) -> tuple[Any, ...]:
            return send(history.chosen(str(request.session_hash)), studio, downloads, boxes, tab)

        return handle

    def forget(request: gr.Request) -> None:
        history.forget(str(request.session_hash))

    history.strip.click(choose, None, [history.strip, actions, words], **AT_ONCE)
    outputs = [component for controls in boxes.values() for component in controls.values()]
    for tab, button in (("", again), *buttons.items()):
        target = list(boxes[tab].values()) if tab else outputs
        button.click(sender(tab), None, [tabs, words, *target], **AT_ONCE)
        button.click(None, None, None, js="() => window.scrollTo({top: 0})", **AT_ONCE)
    page.unload(forget)


def send(
    past: Past | None, studio: Studio, downloads: Downloads, boxes: Mapping[str, Controls], tab: str
) -> tuple[Any, ...]:
    """Open a tab with a picture and its settings in the boxes; for "" the one that drew it, as it was.
    Updates of the tabs, of the words about the picture, and of the boxes: of that tab, or of all.
    """
    wanted = [tab] if tab else list(boxes)
    nothing = [SKIP for name in wanted for _ in boxes[name]]
    if past is None:
        return SKIP, GONE, *nothing
    target = tab or ("Draw" if past.tab in DRAWN_BY_DRAW else past.tab)
    try:
        values = past_values(past, target, again=not tab) | sampling_values(studio, past, target)
        values |= past_pictures(downloads, past, target) if tab else past_inputs(past)
    except PokediffError as error:  # of a checkpoint that cannot be loaded
        return SKIP, f"<strong>{escape(str(error))}</strong>", *nothing
    filled = [one for name in wanted for one in updates(list(boxes[name]), values if name == target else {})]
    return gr.Tabs(selected=target), SKIP, *filled


def past_values(past: Past, target: str, again: bool) -> dict[str, Any]:
    """Prompt and seed of a picture, by the names of boxes; all boxes of the tab that drew it `again`."""
    prompt = past.job.nearest_prompt
    here = {"prompt": prompt, "first": prompt, "seed": past.seed, "random": False}
    if target in ("Draw", "img2img"):
        here["num_images_per_prompt"] = 1  # the picture was one of several, with a seed of its own
    if not again or target != past.tab:
        return {"raw": False, **here}
    if past.job.to is not None:  # seed and prompts are those of the whole drawing
        here = {"seed": past.job.seed}
    return {**past.boxes, **here}


def sampling_values(studio: Studio, past: Past, target: str) -> dict[str, Any]:
    """The model and its settings, by the names of boxes; nothing where the model cannot draw."""
    name, own = studio.name_of(past.config), past.config.sampling
    low, high = own.guidance_interval or (0, 100)
    default = own.sampler == studio.resolved(name).sampler
    values = {
        "checkpoint": name,
        "negative_prompt": own.negative_prompt,
        "sampler": DEFAULT_SAMPLER if default else own.sampler,
        "low": low,
        "high": high,
        "best_of": gr.Slider(value=1, visible=studio.can_choose(name)),  # the seed is that of the picture
        **sampling_updates(studio, name, own),
    }
    baseline = isinstance(studio.pipeline(name), DrawsAtOnce)
    return dict.fromkeys(values, SKIP) if baseline and target in NEEDS_STEPS else values


def past_pictures(downloads: Downloads, past: Past, target: str) -> dict[str, Any]:
    """The picture itself, where a tab starts from one."""
    if target == "img2img":
        picture = past.picture
        return {"canvas": on_canvas(enlarge(picture, max(1, CANVAS_SIDE // len(picture)))), "mode": "img2img"}
    if target == "Palette":
        return {"upload": str(downloads.write_picture(past.picture, name_of(past.job)))}
    return {}


def past_inputs(past: Past) -> dict[str, Any]:
    """The pictures and files that a picture was drawn from, as far as they are still there."""
    found: dict[str, Any] = {
        name: path if path and Path(path).is_file() else None
        for name, path in past.boxes.items()
        if name in ("upload", "file")
    }
    image, mask = (Path(path) if path else None for path in (past.config.image, past.config.mask))
    if image and image.is_file():
        picture, strokes = read_image(image.read_bytes()), None
        if mask and mask.is_file():
            grey = read_image(mask.read_bytes())[..., :1]
            strokes = np.concatenate([np.full_like(grey, 0).repeat(3, -1), grey], axis=-1)
        found["canvas"] = on_canvas(picture, strokes)
    return found


def on_canvas(picture: np.ndarray, strokes: np.ndarray | None = None) -> dict[str, Any]:
    """The value of a sketch pad: straight RGBA uint8 (H, W, 4), and strokes over it."""
    return {"background": picture, "layers": [] if strokes is None else [strokes], "composite": None}
