"""What the tabs share: inputs, event handlers whose errors are sentences, and streams of frames."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from pokediff.config import SampleConfig, Sampling
from pokediff.demo import show
from pokediff.demo.downloads import Downloads
from pokediff.demo.history import History
from pokediff.demo.studio import LIMITS, Studio
from pokediff.drawing.atlas import FILES
from pokediff.drawing.jobs import make_jobs
from pokediff.drawing.sample import Frame
from pokediff.errors import PokediffError, printable
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
MODEL_INFO = "The checkpoint."
BEGUN = "Drawing ..."
SKIP = gr.skip()
MIN_INTERVAL_S = 0.06  # between two frames on the page; faster is not visible
# Requests that draw share one queue, of which four run in turns; all others bypass it.
TURNS: dict[str, Any] = dict(concurrency_id="denoisers", concurrency_limit=4)
QUEUED: dict[str, Any] = dict(**TURNS, api_visibility="private", show_progress="full")
# Without the queue: a browser may lose the answer of a stream that opens and ends within a few milliseconds.
AT_ONCE: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
Controls = dict[str, Any]  # components by the argument names of their handler
Keep = Callable[..., None]  # of config, jobs and finished pictures: puts them into the visitor's history


# --------------------------------------------------------------------------------------------------------- handlers


def sentence(error: Exception) -> str:
    """The message that the page shows for an error. An unexpected error is printed in full to the server's log."""
    if isinstance(error, PokediffError):
        return printable(str(error))
    traceback.print_exception(error)
    return "Something went wrong. See the server log."


@contextmanager
def in_sentences() -> Iterator[None]:
    """Errors become sentences on the page."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(sentence(error), title="Error", print_exception=False) from None


def streamed(handler: Callable[..., Iterator[Any]], *given: Any, names: Sequence[str] = ()) -> Callable[..., Any]:
    """An event handler for Gradio: a generator of the items of `handler(*given, *values)`, where `values` are those
    that the page sends; with `names`, the last of them are passed by name. Errors become sentences on the page.
    """

    def handle(*values: Any) -> Iterator[Any]:
        unnamed = len(values) - len(names)
        with in_sentences():
            yield from handler(*given, *values[:unnamed], **dict(zip(names, values[unnamed:], strict=True)))

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


def on_draw(
    history: History,
    tab: str,
    buttons: tuple[gr.Button, gr.Button],
    handler: Callable[..., Iterator[tuple[Any, ...]]],
    given: Sequence[Any],
    controls: Controls,
    outputs: Sequence[Any],
    prompt: gr.Textbox | None = None,
) -> None:
    """Queue `handler(*given, keep, name=value, ...)` when the first button is clicked, or Enter pressed in `prompt`;
    the second one stops it. `keep(config, jobs, pictures)` puts finished pictures into the history of the visitor.

    The outputs begin with a status and what shows the pictures, which is scrolled to.
    """
    (go, stop), (status, shown, *_) = buttons, outputs

    def handle(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        session, boxes = str(request.session_hash), dict(zip(controls, values, strict=True))
        keep, seen = partial(history.add, session, tab, boxes), history.drawn(session)
        with in_sentences():
            for item in handler(*given, keep, **boxes):
                new = history.drawn(session)
                yield (*item, SKIP if new == seen else history.html(session))
                seen = new

    triggers = [go.click, *([prompt.submit] if prompt else [])]
    options = {**QUEUED, "show_progress_on": shown}
    drawing = gr.on(triggers, handle, list(controls.values()), [*outputs, history.strip], **options)
    reveal = f"() => window.pokediff.reveal({shown.elem_id!r})"
    gr.on(triggers, None, None, None, js=reveal, **AT_ONCE)
    stop.click(lambda: "Stopped.", None, status, cancels=[drawing], **AT_ONCE)


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


def model_controls(studio: Studio) -> Controls:
    """Model, size and fast, by their names in `Studio.settings`. What the checkpoint does not have is hidden."""
    names, pipeline = list(studio.checkpoints), studio.pipeline(studio.first)
    with gr.Row():
        checkpoint = gr.Dropdown(
            names, value=names[0], label="Model", info=MODEL_INFO, visible=len(names) > 1, min_width=140
        )
        size = gr.Radio(
            _size_choices(pipeline.sizes), value=studio.resolved().size, label="Size", min_width=220, scale=2,
            visible=len(pipeline.sizes) > 1, info="A seed gives the same creature at every size.",
        )  # fmt: skip
        fast = gr.Checkbox(
            False, label="Fast", info="Few-step denoisers, slightly worse.", visible=pipeline.has_fast, min_width=140
        )
    return {"checkpoint": checkpoint, "size": size, "fast": fast}


def step_controls(studio: Studio, model: Controls) -> Controls:
    """Steps and guidance scale, by their names in `Studio.settings`: a new model or `fast` sets its defaults."""
    own = studio.resolved()
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
    checkpoint, size, fast = model.values()
    # Not `change`: a picture from the history brings its own size and steps along with the model.
    checkpoint.input(streamed(_choose, studio), checkpoint, [checkpoint, size, fast, steps, guidance], **AT_ONCE)
    fast.input(streamed(_suit, studio), [checkpoint, size, fast], [steps, guidance], **AT_ONCE)
    return {"num_inference_steps": steps, "guidance_scale": guidance}


def best_of_slider(studio: Studio, model: Controls, default: int) -> gr.Slider:
    """Of how many drawings each picture is the best; hidden for a checkpoint that cannot choose."""

    def shown(checkpoint: str) -> dict[str, Any]:
        able = studio.can_choose(checkpoint)
        return dict(value=default if able else 1, visible=able)

    slider = gr.Slider(
        1, LIMITS.best_of, step=1, label="Best of", **shown(studio.first),
        info="Drawings of each picture, of which the scorer chooses one; 1: the seed as it is.",
    )  # fmt: skip
    model["checkpoint"].input(lambda name: gr.Slider(**shown(name)), model["checkpoint"], slider, **AT_ONCE)
    return slider


def sampling_updates(studio: Studio, checkpoint: str, own: Sampling) -> dict[str, Any]:
    """Updates of size, fast, steps and guidance scale for settings of a checkpoint."""
    pipeline, shown = studio.pipeline(checkpoint), _has_steps(own)
    return {
        "size": gr.Radio(_size_choices(pipeline.sizes), value=own.size, visible=len(pipeline.sizes) > 1),
        "fast": gr.Checkbox(own.fast, visible=pipeline.has_fast),
        "num_inference_steps": gr.Slider(minimum=int(shown), value=own.num_inference_steps or 0, visible=shown),
        "guidance_scale": gr.Slider(value=_guidance_of(own), visible=own.guidance_scale is not None),
    }


def _choose(studio: Studio, checkpoint: str) -> Iterator[tuple[Any, ...]]:
    try:
        changed = sampling_updates(studio, checkpoint, studio.resolved(checkpoint))
        yield gr.Dropdown(info=MODEL_INFO), *changed.values()
    except Exception as error:  # the page does not show errors of events that bypass the queue
        yield gr.Dropdown(info=sentence(error)), *([SKIP] * 4)


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


def go_and_stop(words: str, elem_id: str) -> tuple[gr.Button, gr.Button]:
    """Buttons that begin and stop a drawing."""
    with gr.Row():
        go = gr.Button(words, variant="primary", elem_id=elem_id, min_width=100)
        return go, gr.Button("Stop", variant="stop", elem_id=f"{elem_id}-stop", min_width=80)


def results(elem_id: str) -> list[Any]:
    """Status, pictures and downloads."""
    with gr.Column(elem_classes="result"):
        status = gr.Markdown("Ready.", elem_id=f"{elem_id}-status")
        shown = gr.HTML(show.empty("The pictures appear here."), elem_id=f"{elem_id}-result")
        return [status, shown, download()]


def download() -> gr.File:
    return gr.File(label="Download", file_count="multiple", interactive=False, visible=False, elem_classes="files")


def offered(paths: Sequence[Path] = ()) -> Any:
    """An update of a `download` that shows these files; without any it is hidden, as when a drawing begins."""
    return gr.File([str(path) for path in paths] or None, visible=bool(paths))


def sheet_choice() -> gr.CheckboxGroup:
    return gr.CheckboxGroup(
        list(FILES), label="Sprite sheet for", info="With one, pictures are downloaded at their own size."
    )


def paced(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames, at least MIN_INTERVAL_S apart; other requests are drawn meanwhile."""
    shown = 0.0
    for frame in frames:
        time.sleep(max(0.0, shown + MIN_INTERVAL_S - time.monotonic()))
        shown = time.monotonic()
        yield frame


def film_and_files(
    studio: Studio, downloads: Downloads, keep: Keep, config: SampleConfig
) -> Iterator[tuple[Any, Any, Any]]:
    """Updates of the status, of a film and of its download while the pictures are drawn."""
    yield BEGUN, show.empty(""), offered()
    evaluations, frames = studio.evaluations(config), []
    words = show.step_words(evaluations)
    for frame in paced(studio.draw(config)):
        frames.append(frame)
        yield words[len(frames) - 1], show.film([frame], config.prompt[0]), SKIP
    keep(config, make_jobs(config.prompt, config), frames[-1].x0)
    files = downloads.write(studio.pipeline_of(config), config, frames)
    yield show.summary(config, evaluations), SKIP, offered(files)
