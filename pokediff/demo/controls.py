"""What the tabs share: inputs, event handlers whose errors are sentences, and streams of frames."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pokediff.config import SampleConfig, Sampling
from pokediff.demo import show
from pokediff.demo.downloads import Downloads
from pokediff.demo.studio import LIMITS, Studio
from pokediff.drawing.sample import Frame
from pokediff.errors import PokediffError
from pokediff.model.samplers import SAMPLERS

EXAMPLES = (
    "official artwork of a blue water turtle creature",
    "pixel sprite of a red fire dragon",
    "cel-shaded render of a green grass four-legged creature",
    "official artwork of a yellow electric mouse",
    "a purple ghost with one eye",
    "pixel sprite of a pink round fairy creature",
)
DEFAULT_SAMPLER = "default"
SKIP = gr.skip()
MIN_INTERVAL_S = 0.06  # between two frames on the page; faster is not visible
# Requests that draw share one queue, of which four run in turns; all others bypass it.
TURNS: dict[str, Any] = dict(concurrency_id="denoisers", concurrency_limit=4)
QUEUED: dict[str, Any] = dict(**TURNS, api_visibility="private", show_progress="full")
# Without the queue: a browser may lose the answer of a stream that opens and ends within a few milliseconds.
AT_ONCE: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
Controls = dict[str, Any]  # components by the argument names of their handler


# --------------------------------------------------------------------------------------------------------- handlers


def sentence(error: Exception) -> str:
    """The message that the page shows for an error. An unexpected error is printed in full to the server's log."""
    if isinstance(error, PokediffError):
        return str(error)
    traceback.print_exception(error)
    return "Something went wrong. See the server log."


def streamed(handler: Callable[..., Iterator[Any]], *given: Any, names: Sequence[str] = ()) -> Callable[..., Any]:
    """An event handler for Gradio: a generator of the items of `handler(*given, *values)`, where `values` are those
    that the page sends; with `names`, the last of them are passed by name. Errors become sentences on the page.
    """

    def handle(*values: Any) -> Iterator[Any]:
        unnamed = len(values) - len(names)
        try:
            yield from handler(*given, *values[:unnamed], **dict(zip(names, values[unnamed:], strict=True)))
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(sentence(error), title="Error", print_exception=False) from None

    return handle


def uploaded(handler: Callable[[str], Any]) -> Callable[[str], tuple[Any, str]]:
    """An event handler for an uploaded file, used with AT_ONCE: its result and "", or no change and a sentence, since
    the page does not show errors of events that bypass the queue.
    """

    def handle(path: str) -> tuple[Any, str]:
        try:
            return handler(path), ""
        except Exception as error:
            return SKIP, f"**{sentence(error)}**"

    return handle


def on_click(
    button: gr.Button,
    handler: Callable[..., Iterator[Any]],
    given: Sequence[Any],
    controls: Controls,
    outputs: Any,
    **options: Any,
) -> Any:
    """Queue `handler(*given, name=value, ...)` when the button is clicked, with the values of `controls`."""
    handle = streamed(handler, *given, names=tuple(controls))
    return button.click(handle, list(controls.values()), outputs, **{**QUEUED, **options})


def updates(names: Sequence[str], changed: Mapping[str, Any]) -> tuple[Any, ...]:
    """The outputs `names` of a handler; those that are not in `changed` stay as they are."""
    return tuple(changed.get(name, SKIP) for name in names)


# ----------------------------------------------------------------------------------------------------------- inputs


def prompt_box(label: str = "Prompt", value: str = EXAMPLES[0], **options: Any) -> gr.Textbox:
    return gr.Textbox(
        value, label=label, info="Style, colours, type, body, animal; all are optional.",
        max_length=LIMITS.prompt, lines=1, max_lines=4, **options,
    )  # fmt: skip


def seed_box() -> gr.Number:
    return gr.Number(
        7, label="Seed", precision=0, minimum=0, maximum=LIMITS.seed,
        info="The same prompt, settings and seed give the same picture.",
    )  # fmt: skip


def sampler_choice() -> gr.Dropdown:
    return gr.Dropdown(
        [DEFAULT_SAMPLER, *SAMPLERS], value=DEFAULT_SAMPLER, label="Sampler", info="A diffusers scheduler."
    )


def sampler_of(choice: str) -> str | None:
    return None if choice == DEFAULT_SAMPLER else choice


def interval_boxes() -> Controls:
    """The guidance interval: two noise levels."""
    with gr.Row():
        low = gr.Number(0, label="Guidance from sigma", minimum=0, info="Guidance interval: smallest sigma.")
        high = gr.Number(100, label="Guidance to sigma", minimum=0, info="Largest sigma; 0 to 100: always guided.")
    return {"low": low, "high": high}


def interval_of(low: float | None, high: float | None) -> tuple[float, float] | None:
    """The guidance interval of two boxes; None for all noise levels."""
    interval = (low or 0.0, 100.0 if high is None else high)
    return None if interval == (0, 100) else interval


def sampling_controls(studio: Studio) -> Controls:
    """Model, size, fast, steps and guidance scale, by their names in `Studio.settings`.

    Choices that the checkpoint does not have are hidden. A new model or `fast` sets its default steps and guidance
    scale.
    """
    names, pipeline = list(studio.checkpoints), studio.pipeline(studio.first)
    own = studio.resolved()
    with gr.Row():
        checkpoint = gr.Dropdown(names, value=names[0], label="Model", info="The checkpoint.", visible=len(names) > 1)
        size = gr.Radio(
            _size_choices(pipeline.sizes), value=own.size, label="Size", visible=len(pipeline.sizes) > 1,
            info="A seed gives the same creature at every size.",
        )  # fmt: skip
        fast = gr.Checkbox(False, label="Fast", info="Few-step denoisers, slightly worse.", visible=pipeline.has_fast)
    with gr.Row():
        steps = gr.Slider(
            int(_has_steps(own)), LIMITS.steps, own.num_inference_steps or 0, step=1, label="Steps",
            visible=_has_steps(own),
            info="At the smallest size; an upscaler adds its own.",
        )  # fmt: skip
        guidance = gr.Slider(
            1, LIMITS.guidance, _guidance_of(own), step=0.1, label="Guidance scale",
            visible=own.guidance_scale is not None,
            info="Classifier-free guidance; 1: off. High values reduce diversity.",
        )  # fmt: skip
    checkpoint.change(streamed(_choose, studio), checkpoint, [size, fast, steps, guidance], **AT_ONCE)
    fast.input(streamed(_suit, studio), [checkpoint, size, fast], [steps, guidance], **AT_ONCE)
    return {
        "checkpoint": checkpoint,
        "size": size,
        "fast": fast,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }


def _choose(studio: Studio, checkpoint: str) -> Iterator[tuple[Any, ...]]:
    pipeline, own = studio.pipeline(checkpoint), studio.resolved(checkpoint)
    size = gr.Radio(_size_choices(pipeline.sizes), value=own.size, visible=len(pipeline.sizes) > 1)
    fast = gr.Checkbox(False, visible=pipeline.has_fast)
    shown = _has_steps(own)
    steps = gr.Slider(minimum=int(shown), value=own.num_inference_steps or 0, visible=shown)
    yield size, fast, steps, gr.Slider(value=_guidance_of(own), visible=own.guidance_scale is not None)


def _suit(studio: Studio, checkpoint: str, size: int, fast: bool) -> Iterator[tuple[Any, ...]]:
    own = studio.resolved(checkpoint, size=size, fast=fast)
    yield own.num_inference_steps, _guidance_of(own)


def _size_choices(sizes: Sequence[int]) -> list[tuple[str, int]]:
    return [(f"{size} px", size) for size in sizes]


def _has_steps(own: Sampling) -> bool:
    """Not of a baseline that draws at once: its sliders are hidden, and its number of steps is 0."""
    return own.num_inference_steps is not None


def _guidance_of(sampling: Any) -> float:
    return 1.0 if sampling.guidance_scale is None else sampling.guidance_scale


# ---------------------------------------------------------------------------------------------------------- outputs


def download(contents: str) -> gr.File:
    return gr.File(label=f"Download: {contents}", file_count="multiple", interactive=False, visible=False)


def offered(paths: Sequence[Path]) -> Any:
    """An update of a `download` that shows these files."""
    return gr.File([str(path) for path in paths], visible=True)


def paced(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames, at least MIN_INTERVAL_S apart; other requests are drawn meanwhile."""
    shown = 0.0
    for frame in frames:
        time.sleep(max(0.0, shown + MIN_INTERVAL_S - time.monotonic()))
        shown = time.monotonic()
        yield frame


def film_and_files(studio: Studio, downloads: Downloads, config: SampleConfig) -> Iterator[tuple[Any, Any]]:
    """Updates of a film and of its download while the pictures are drawn."""
    frames = []
    for frame in paced(studio.draw(config)):
        frames.append(frame)
        yield show.film([frame], config.prompt[0]), SKIP
    yield SKIP, offered(downloads.write(studio.pipeline_of(config), config, frames))
