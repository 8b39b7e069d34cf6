"""The page: five tabs of controls, and what each of them asks the studio for."""

from __future__ import annotations

import functools
import inspect
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from PIL import Image

from pokediff.config import SampleConfig
from pokediff.data.captions import SHAPES, STYLES
from pokediff.data.colors import COLOR_ANCHORS
from pokediff.data.images import fit_square, unpremultiply
from pokediff.data.records import read_text
from pokediff.demo import show
from pokediff.demo.studio import LIMITS, Studio, new_seed
from pokediff.drawing.pixelart import finish, read_palette
from pokediff.drawing.sample import Frame, make_jobs
from pokediff.errors import PokediffError
from pokediff.model.pipeline import SAMPLERS

EXAMPLES = (
    "official artwork of a blue water turtle creature",
    "pixel sprite of a red fire dragon",
    "cel-shaded render of a green grass four-legged creature",
    "official artwork of a yellow electric mouse",
    "a purple ghost with one eye",
    "pixel sprite of a pink round fairy creature",
)
CHIPS = {
    "Style": tuple(dict.fromkeys(STYLES[name] for name in ("artwork", "home", "dream-world", "sprite-gen5"))),
    "Colour": tuple(COLOR_ANCHORS),
    "Type": (
        *("fire", "water", "grass", "electric", "ice", "rock", "ground", "bug", "flying"),
        *("ghost", "dragon", "dark", "steel", "fairy", "poison", "psychic", "fighting", "normal"),
    ),
    "Body": tuple(dict.fromkeys(names[0] for names in SHAPES.values())),
}
SKIP = gr.skip()
MAX_LAYERS, MAX_CANVASES = 4, 32
PACE = 0.06  # seconds between two frames of the film at least: faster than that nobody sees it emerge
# All that draws waits in one queue, four requests at a time take turns; what needs no network does not wait.
TURNS = dict(concurrency_id="network", concurrency_limit=4)
NETWORK: dict[str, Any] = dict(**TURNS, api_visibility="private", show_progress="full")
# Without the queue: a browser may lose the answer of a stream that opens and ends within a few milliseconds.
AT_ONCE: dict[str, Any] = dict(queue=False, api_visibility="private", show_progress="hidden")
OWN = "the model's own"
GO_ON, REPAINT = "Go on from all of it", "Draw anew what is painted over"
TITLE = "pokediff: creatures out of noise"


def told(error: Exception) -> str:
    """What the page says of an error. One that nobody foresaw is printed whole, to the server's log."""
    if isinstance(error, PokediffError):
        return str(error)
    traceback.print_exception(error)
    return "Something went wrong on the server. What it was stands in its log."


def spoken(handler: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """A handler whose errors are sentences on the page."""

    @functools.wraps(handler)
    def wrapped(*args: Any) -> Iterator[Any]:
        try:
            if inspect.isgeneratorfunction(handler):
                yield from handler(*args)
            else:
                yield handler(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(told(error), title="That did not work", print_exception=False) from None

    return wrapped


def reader(handler: Callable[[str], Any]) -> Callable[[str], tuple[Any, str]]:
    """A handler of an uploaded file, for AT_ONCE: its result and "", or nothing and a sentence for the page, since
    errors of what goes past the queue are not shown there.
    """

    @functools.wraps(handler)
    def wrapped(path: str) -> tuple[Any, str]:
        try:
            return handler(path), ""
        except Exception as error:
            return SKIP, f"**{told(error)}**"

    return wrapped


def make_page(studio: Studio, reports: Path, runs: Path) -> gr.Blocks:
    """The whole page. `reports` and `runs` are the folders whose reports and training runs the last tab shows."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# pokediff\nType what you want to see, and watch it emerge from noise.")
        with gr.Tab("Draw"):
            draw_tab(studio)
        with gr.Tab("Batch"):
            batch_tab(studio)
        with gr.Tab("Play"):
            play_tab(studio)
        with gr.Tab("Inside"):
            inside_tab(studio)
        with gr.Tab("Measures"):
            measures_tab(page, reports, runs)
        gr.api(sprite_api(studio), api_name="sprite", **TURNS)
    return page


# --------------------------------------------------------------------------------------------------------- controls


def prompt_box(label: str = "Prompt", value: str = EXAMPLES[0], **more: Any) -> gr.Textbox:
    return gr.Textbox(
        value, label=label, info="What to draw: a style, colours, a type, a body, an animal.",
        max_length=LIMITS.prompt, lines=1, max_lines=4, **more,
    )  # fmt: skip


def seed_box() -> gr.Number:
    return gr.Number(
        7, label="Seed", precision=0, minimum=0, maximum=LIMITS.seed,
        info="The same prompt, settings and seed give the same picture.",
    )  # fmt: skip


def steps_slider(studio: Studio) -> gr.Slider:
    value, _ = studio.suited(next(iter(studio.checkpoints)))
    return gr.Slider(1, LIMITS.steps, value, step=1, label="Steps", info="More are slower; from 12 on little changes.")


def guidance_slider(studio: Studio) -> gr.Slider:
    _, value = studio.suited(next(iter(studio.checkpoints)))
    return gr.Slider(
        1, LIMITS.guidance, value, step=0.1, label="Guidance",
        info="How much the prompt counts. 1 is off; much smooths and narrows.",
    )  # fmt: skip


def sampler_choice() -> gr.Dropdown:
    return gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler", info="How the way from noise is walked.")


def checkpoint_choice(studio: Studio, steps: gr.Slider | None = None, guidance: gr.Slider | None = None) -> gr.Dropdown:
    """Which model draws; chosen, it sets steps and guidance to what suits it."""
    names = list(studio.checkpoints)
    choice = gr.Dropdown(names, value=names[0], label="Model", info="The checkpoint.", visible=len(names) > 1)
    if steps is not None and guidance is not None:
        choice.change(spoken(studio.suited), choice, [steps, guidance], **AT_ONCE)
    return choice


def download(words: str) -> gr.File:
    return gr.File(label=f"Take home: {words}", file_count="multiple", interactive=False, visible=False)


def offered(paths: Sequence[Path]) -> Any:
    """An update that shows these files."""
    return gr.File([str(path) for path in paths], visible=True)


def paced(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames, at least PACE apart: others draw meanwhile."""
    shown = 0.0
    for frame in frames:
        time.sleep(max(0.0, shown + PACE - time.monotonic()))
        shown = time.monotonic()
        yield frame


def film_and_files(studio: Studio, config: SampleConfig) -> Iterator[tuple[Any, Any]]:
    """Updates of a film and its downloads, while it is drawn."""
    frames = []
    for frame in paced(studio.draw(config)):
        frames.append(frame)
        yield show.film([frame], config.prompt[0]), SKIP
    yield SKIP, offered(studio.write(config, frames))


# ------------------------------------------------------------------------------------------------------------- draw


def draw_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column(scale=5):
            prompt = prompt_box(elem_id="prompt")
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            gr.Examples([[example] for example in EXAMPLES], prompt, label="Try one of these")
            for group, words in CHIPS.items():
                with gr.Accordion(f"{group} words", open=group == "Style"), gr.Row(elem_classes="chips"):
                    for word in words:
                        chip = gr.Button(word, size="sm", min_width=60)
                        script = f"(p) => window.pokediff.toggle(p, {json.dumps(word)}, {json.dumps(words)})"
                        chip.click(None, prompt, prompt, js=script, **AT_ONCE)
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(
                    label="Negative prompt",
                    info="What guidance moves away from; empty is usual.",
                    max_length=LIMITS.prompt,
                )
                number = gr.Slider(
                    1, LIMITS.pictures, 1, step=1, label="Pictures", info="Drawn together, seed by seed."
                )
                with gr.Row():
                    seed = seed_box()
                    dice = gr.Button("🎲 Roll the dice", elem_id="dice")
                fresh = gr.Checkbox(
                    True, label="A new seed for every drawing", info="Off: the seed above is used again."
                )
                steps, guidance, sampler = steps_slider(studio), guidance_slider(studio), sampler_choice()
                with gr.Row():
                    low = gr.Number(0, label="Guide from sigma", info="Guidance acts only above this noise.", minimum=0)
                    high = gr.Number(100, label="to sigma", info="and below this. 0 to 100 is always.", minimum=0)
                size = gr.Slider(1, LIMITS.enlarge, 8, step=1, label="Enlarge", info="Files: every pixel so many wide.")
                clear = gr.Checkbox(True, label="Transparent background", info="Off: the colour below lies behind it.")
                color = gr.ColorPicker(
                    "#ffffff", label="Background", info="Used when the background is not transparent."
                )
                checkpoint = checkpoint_choice(studio, steps, guidance)
        with gr.Column(scale=6):
            film = gr.HTML(show.empty("Your creature appears here."), elem_id="film")
            status = gr.Markdown("Ready.", elem_id="status")
            scrub = gr.Slider(
                0, 1, 1, step=1, label="Step", info="Drag to see how it emerged.", interactive=True, elem_id="scrub"
            )
            replay = gr.Button("▶ Watch again", size="sm", elem_id="replay")
            files = download("PNG, GIF, MP4, and the settings for sample.py --from-json")
            near = gr.HTML(elem_id="near")

    as_they_are = dict(  # by their names in SampleConfig
        checkpoint=checkpoint,
        negative_prompt=negative,
        num_images=number,
        num_steps=steps,
        guidance_scale=guidance,
        enlarge=size,
    )

    @spoken
    def draw(given: dict[Any, Any]) -> Iterator[tuple[Any, ...]]:
        interval = (given[low] or 0, 100 if given[high] is None else given[high])
        config = studio.settings(
            **{name: given[control] for name, control in as_they_are.items()},
            prompt=(given[prompt],),
            sampler=None if given[sampler] == OWN else given[sampler],
            seed=new_seed() if given[fresh] else given[seed],
            guidance_interval=None if interval == (0, 100) else interval,
            background=None if given[clear] else given[color],
        )
        frames: list[Frame] = []
        total = studio.frames(config)
        for frame in paced(studio.draw(config)):
            frames.append(frame)
            words = f"Step {len(frames)} of {total}, noise {frame.sigma:.2g}."
            yield show.film([frame], config.prompt[0]), words, SKIP, SKIP, SKIP, config.seed
        done = f"Done: seed {config.seed}, {config.num_steps} steps, guidance {config.guidance_scale:g}."
        kept = show.thinned(frames)
        last = gr.Slider(maximum=len(kept) - 1, value=len(kept) - 1)
        yield show.film(kept, config.prompt[0]), done, last, SKIP, SKIP, SKIP
        yield SKIP, SKIP, SKIP, offered(studio.write(config, frames)), SKIP, SKIP
        yield SKIP, SKIP, SKIP, SKIP, show.neighbours(frames[-1].x0, studio.neighbours(frames[-1].x0)), SKIP

    inputs = {prompt, sampler, seed, fresh, low, high, clear, color, *as_they_are.values()}
    outputs = [film, status, scrub, files, near, seed]
    drawing = gr.on([go.click, prompt.submit], draw, inputs, outputs, show_progress_on=film, **NETWORK)
    stop.click(lambda: "Stopped.", None, status, cancels=[drawing], **AT_ONCE)
    dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {LIMITS.seed})", **AT_ONCE)
    dice.click(lambda: False, None, fresh, **AT_ONCE)
    replay.click(None, None, None, js="() => window.pokediff.play()", **AT_ONCE)
    scrub.change(None, scrub, None, js="(step) => window.pokediff.show(step)", **AT_ONCE)


# ------------------------------------------------------------------------------------------------------------ batch


def batch_tab(studio: Studio) -> None:
    prompts = gr.Textbox(
        "\n".join(EXAMPLES[:4]), label="Prompts", lines=6, elem_id="prompts",
        info=f"One a line, at most {LIMITS.prompts}; lines that begin with # are left out.",
    )  # fmt: skip
    upload = gr.UploadButton("Read prompts from a text file", file_types=[".txt"], file_count="single")
    with gr.Row():
        variations = gr.Slider(1, 8, 2, step=1, label="Pictures of each", info="Seed, seed + 1, and so on.")
        seed, steps, guidance = seed_box(), steps_slider(studio), guidance_slider(studio)
        checkpoint = checkpoint_choice(studio, steps, guidance)
    with gr.Row():
        go = gr.Button("Draw them all", variant="primary", elem_id="draw-all")
        stop = gr.Button("Stop", variant="stop")
    status = gr.Markdown("Ready.", elem_id="batch-status")
    bundle = download("one ZIP with the pictures, a labelled sheet and the settings")
    sheet = gr.HTML(show.empty("The pictures appear here, batch by batch."), elem_id="sheet")

    @reader
    def read(path: str) -> str:
        if Path(path).stat().st_size > 100_000:
            raise PokediffError("A file of prompts has at most 100 kB.")
        try:
            return read_text(Path(path))
        except PokediffError:  # it names a path of the server
            raise PokediffError("This file cannot be used: not UTF-8 text.") from None

    @spoken
    def draw(text: str, each: int, start: int, number: int, scale: float, name: str) -> Iterator[tuple[Any, ...]]:
        lines = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
        config = studio.settings(
            name, prompt=lines, num_images=each, seed=start, num_steps=number, guidance_scale=scale, enlarge=8
        )
        total = len(make_jobs(config.prompt, config))
        yield f"0 of {total} pictures.", SKIP, SKIP
        for part in studio.draw_all(config):
            if part is None:
                yield SKIP, SKIP, SKIP
                continue
            jobs, drawn = part
            labels = [f"{job.prompt} · seed {job.seed}" for job in jobs]
            words = f"{len(jobs)} of {total} pictures." + (" Done." if len(jobs) == total else "")
            yield words, show.labelled(drawn, labels), offered([studio.write_zip(config, jobs, drawn)])

    inputs = [prompts, variations, seed, steps, guidance, checkpoint]
    drawing = go.click(draw, inputs, [status, sheet, bundle], show_progress_on=sheet, **NETWORK)
    stop.click(lambda: "Stopped; what is done stays.", None, status, cancels=[drawing], **AT_ONCE)
    upload.upload(read, upload, [prompts, status], **AT_ONCE)


# ------------------------------------------------------------------------------------------------------------- play


def play_tab(studio: Studio) -> None:
    with gr.Tab("From a picture"):
        picture_tab(studio)
    with gr.Tab("Between two prompts"):
        between_tab(studio)
    with gr.Tab("Relatives"):
        relatives_tab(studio)
    with gr.Tab("Few colours"):
        palette_tab(studio)


def picture_tab(studio: Studio) -> None:
    gr.Markdown(
        "Upload a picture or sketch one, then let the model go on from it, or paint over what it shall draw anew."
    )
    with gr.Row():
        with gr.Column():
            upload = gr.UploadButton("Upload a picture", file_count="single", elem_id="upload")
            said = gr.Markdown()
            canvas = sketch_pad(
                label="Sketch, or paint over", sources=(), layers=False, transforms=(), height=340,
                canvas_size=(256, 256), brush=gr.Brush(default_size=14, colors=["#3b82f6", "#ef4444", "#22c55e"]),
                elem_id="canvas",
            )  # fmt: skip
        with gr.Column():
            prompt = prompt_box(value=EXAMPLES[0])
            way = gr.Radio(
                [GO_ON, REPAINT], value=GO_ON, label="What to do",
                info="Strokes are part of the picture in the first, a mask in the second.",
            )  # fmt: skip
            strength = gr.Slider(
                0.05, 1, 0.6, step=0.05, label="Strength", info="How much is drawn anew when it goes on from all of it."
            )
            number = gr.Slider(1, 8, 4, step=1, label="Pictures", info="Seed, seed + 1, and so on.")
            seed, checkpoint = seed_box(), checkpoint_choice(studio)
            go = gr.Button("Draw from it", variant="primary", elem_id="draw-from")
    result = gr.HTML(elem_id="from-result")
    files = download("PNG, GIF, MP4, settings, and the picture it began with")

    @reader
    def take(path: str) -> dict[str, Any]:
        return {"background": studio.read_upload(path), "layers": [], "composite": None}

    @spoken
    def draw(
        value: Any, words: str, what: str, far: float, count: int, start: int, name: str
    ) -> Iterator[tuple[Any, ...]]:
        picture, mask = editor_parts(value, what == REPAINT)
        image, cover = studio.keep_input(picture, mask)
        config = studio.settings(
            name, prompt=(words,), num_images=count, seed=start, strength=far, image=str(image),
            mask=str(cover) if cover else None, enlarge=8,
        )  # fmt: skip
        yield from film_and_files(studio, config)

    upload.upload(take, upload, [canvas, said], **AT_ONCE)
    inputs = [canvas, prompt, way, strength, number, seed, checkpoint]
    go.click(draw, inputs, [result, files], show_progress_on=result, **NETWORK)


def editor_parts(value: Any, repaint: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture of an image editor, straight RGBA, and, to repaint it, where strokes lie, (H, W) bool.

    Raises PokediffError for an empty canvas, and for nothing painted over.
    """
    if value and "refused" in value:
        raise PokediffError(value["refused"])
    parts = [] if not value else [part for part in (value["background"], *value["layers"]) if part is not None]
    if not any(part[..., 3].any() for part in parts):
        raise PokediffError("Upload a picture or draw one first.")
    if not repaint:
        whole = Image.fromarray(parts[0])
        for part in parts[1:]:
            whole = Image.alpha_composite(whole, Image.fromarray(part).resize(whole.size))
        return np.asarray(whole), None
    background = value["background"]
    if background is None or not background[..., 3].any():
        raise PokediffError("Upload a picture first: there is nothing under the strokes.")
    strokes = [Image.fromarray(layer[..., 3]).resize(background.shape[1::-1]) for layer in value["layers"]]
    mask = np.any([np.asarray(stroke) > 0 for stroke in strokes], axis=0) if strokes else np.zeros(1, bool)
    if not mask.any():
        raise PokediffError("Paint over what shall be drawn anew first.")
    return background, mask


def between_tab(studio: Studio) -> None:
    with gr.Row():
        one, two = prompt_box("From"), prompt_box("To", EXAMPLES[1])
    with gr.Row():
        count = gr.Slider(4, LIMITS.way, 16, step=1, label="Pictures on the way", info="More make it smoother.")
        seed, checkpoint = seed_box(), checkpoint_choice(studio)
    go = gr.Button("Walk", variant="primary", elem_id="walk")
    result = gr.HTML(elem_id="walk-result")
    files = download("the way as GIF, and a ZIP of all pictures with the settings")

    @spoken
    def walk(first: str, second: str, number: int, start: int, name: str) -> Iterator[tuple[Any, ...]]:
        if not first.strip() or not second.strip():
            raise PokediffError("Write both prompts.")
        config = studio.settings(name, prompt=(first, second), seed=start, interpolate=number, enlarge=8)
        for part in studio.draw_all(config):
            if part is None:
                yield SKIP, SKIP
                continue
            jobs, drawn = part
            yield show.labelled(drawn, [f"{job.share:.0%}" for job in jobs]), SKIP
        bundle = studio.write_zip(config, jobs, drawn)
        animation = bundle.with_name("interpolation.gif")
        yield (
            show.animation(animation) + show.labelled(drawn, [f"{job.share:.0%}" for job in jobs]),
            offered([animation, bundle]),
        )

    go.click(walk, [one, two, count, seed, checkpoint], [result, files], show_progress_on=result, **NETWORK)


def relatives_tab(studio: Studio) -> None:
    prompt = prompt_box()
    with gr.Row():
        far = gr.Slider(
            0.05, 1, 0.3, step=0.05, label="How far", info="From the picture of this seed; 1 is another picture."
        )
        number = gr.Slider(2, 12, 6, step=1, label="Pictures", info="The first is the one they are relatives of.")
        seed, checkpoint = seed_box(), checkpoint_choice(studio)
    go = gr.Button("Draw relatives", variant="primary", elem_id="relatives")
    result = gr.HTML(elem_id="relatives-result")
    files = download("PNG, GIF, MP4, settings")

    @spoken
    def draw(words: str, distance: float, count: int, start: int, name: str) -> Iterator[tuple[Any, ...]]:
        config = studio.settings(name, prompt=(words,), num_images=count, seed=start, variation=distance, enlarge=8)
        yield from film_and_files(studio, config)

    go.click(draw, [prompt, far, number, seed, checkpoint], [result, files], show_progress_on=result, **NETWORK)


def palette_tab(studio: Studio) -> None:
    gr.Markdown("Reduce a picture to few colours: your own upload, or a prompt and seed drawn for it.")
    with gr.Row():
        upload = gr.File(label="Picture (optional)", file_count="single", height=120)
        given = gr.File(
            label="Palette, .gpl or .hex (optional)", file_count="single", file_types=[".gpl", ".hex"], height=120
        )
    prompt = prompt_box(value="pixel sprite of a red fire dragon")
    with gr.Row():
        colors = gr.Slider(2, 64, 12, step=1, label="Colours", info="Used when no palette is uploaded.")
        hard = gr.Checkbox(True, label="Hard edges", info="Every pixel either there or transparent.")
        seed, checkpoint = seed_box(), checkpoint_choice(studio)
    go = gr.Button("Reduce", variant="primary", elem_id="reduce")
    result = gr.HTML(elem_id="reduce-result")
    files = download("PNG")

    @spoken
    def reduce(
        picture: str | None, palette: str | None, words: str, number: int, hardly: bool, start: int, name: str
    ) -> Iterator[tuple[Any, ...]]:
        config = studio.settings(
            name, prompt=(words if words.strip() or not picture else "a picture",), seed=start, enlarge=8
        )
        if picture:
            before = unpremultiply(fit_square(studio.read_upload(picture), 64))
        else:
            for frame in studio.draw(config):
                before = frame.x0[0]
                yield SKIP, SKIP
        try:
            colors = read_palette(palette or str(int(number)))
        except PokediffError as error:  # it names the path, which says nothing to who sent the file
            raise PokediffError(str(error).replace(str(palette), "file")) from None
        after = finish(before, colors, hardly, clean=False)
        used = len(np.unique(after[after[..., 3] > 0][:, :3], axis=0))
        yield show.before_and_after(before, after, used), SKIP
        written = studio.write(config, [Frame(before[None], after[None], 0.0)])
        yield SKIP, offered([path for path in written if path.name == "0000.png"])

    inputs = [upload, given, prompt, colors, hard, seed, checkpoint]
    go.click(reduce, inputs, [result, files], show_progress_on=result, **NETWORK)


# ----------------------------------------------------------------------------------------------------------- inside


def inside_tab(studio: Studio) -> None:
    prompt = prompt_box()
    with gr.Row():
        seed, steps, guidance = seed_box(), steps_slider(studio), guidance_slider(studio)
        checkpoint = checkpoint_choice(studio, steps, guidance)
    with gr.Accordion("Which word drew what"):
        gr.Markdown(
            "The prompt is drawn, then each word is left out: where the picture that the network has in mind changes, "
            "that word counts. The text reaches this network as one vector, so there are no attention maps to show."
        )
        ask = gr.Button("Leave every word out", variant="primary", elem_id="words")
        found = gr.HTML(elem_id="words-result")
    with gr.Accordion("The noise, step by step", open=False):
        with gr.Row():
            sampler = sampler_choice()
            low = gr.Number(0, label="Guide from sigma", info="Guidance acts only above this noise.", minimum=0)
            high = gr.Number(100, label="to sigma", info="and below this.", minimum=0)
        look = gr.Button("Show the schedule", elem_id="schedule")
        plot = gr.HTML(elem_id="schedule-result")
    with gr.Accordion("Samplers and steps side by side", open=False):
        samplers = gr.CheckboxGroup(
            list(SAMPLERS), value=["dpmpp_2m", "unipc", "ddim"], label="Samplers", info="All begin with the same noise."
        )
        numbers = gr.Textbox("4, 8, 20", label="Steps", info="Numbers between commas.")
        compare = gr.Button("Draw them", variant="primary", elem_id="compare")
        compared = gr.HTML(elem_id="compare-result")

    @spoken
    def words(text: str, start: int, number: int, scale: float, name: str) -> Iterator[Any]:
        config = studio.settings(name, prompt=(text,), seed=start, num_steps=number, guidance_scale=scale)
        for found in studio.influence(config):
            yield SKIP if found is None else show.influence(found)

    @spoken
    def schedule(
        text: str, start: int, number: int, scale: float, name: str, kind: str, lowest: float, highest: float
    ) -> str:
        sampler = None if kind == OWN else kind
        config = studio.settings(name, prompt=(text,), num_steps=number, guidance_scale=scale, sampler=sampler)
        return show.schedule(*studio.schedule(config), lowest or 0, 100 if highest is None else highest)

    @spoken
    def side_by_side(
        text: str, start: int, scale: float, name: str, kinds: Sequence[str], listed: str
    ) -> Iterator[Any]:
        config = studio.settings(name, prompt=(text,), seed=start, guidance_scale=scale)
        parts = [part.strip() for part in listed.split(",") if part.strip()]
        if not all(part.isdecimal() and len(part) < 5 for part in parts):
            raise PokediffError("Steps are whole numbers between commas, for example 4, 8, 20.")
        done = []
        for one in studio.compare(config, kinds, [int(part) for part in parts]):
            if one is not None:
                done.append(one)
            yield SKIP if one is None else show.compared(done)

    common = [prompt, seed, steps, guidance, checkpoint]
    ask.click(words, common, found, **NETWORK)
    look.click(schedule, [*common, sampler, low, high], plot, **NETWORK)
    compare.click(
        side_by_side,
        [prompt, seed, guidance, checkpoint, samplers, numbers],
        compared,
        **NETWORK,
    )


# --------------------------------------------------------------------------------------------------------- measures


def measures_tab(page: gr.Blocks, reports: Path, runs: Path) -> None:
    def found(folder: Path, file: str) -> list[str]:
        return sorted(path.parent.name for path in folder.glob(f"*/{file}"))

    gr.Markdown(f"Reports of `pokediff evaluate` in {reports}, and training runs in {runs}, on this machine.")
    again = gr.Button("Look again", elem_id="look-again")
    choice = gr.CheckboxGroup(
        found(reports, "report.json"),
        label="Reports",
        info="Several stand side by side.",
        value=found(reports, "report.json")[:1],
    )
    table = gr.HTML(elem_id="report")
    run = gr.Dropdown(
        found(runs, "log.jsonl"), label="Training run", info="Its curves and latest previews.", value=None
    )
    curves = gr.HTML(elem_id="run")

    @spoken
    def show_reports(names: Sequence[str]) -> str:
        known = [name for name in found(reports, "report.json") if name in names]
        return (
            show.reports([reports / name for name in known]) if known else show.empty("No report chosen, or none here.")
        )

    @spoken
    def show_run(name: str | None) -> str:
        if name not in found(runs, "log.jsonl"):
            return show.empty("No training run chosen, or none here.")
        lines = (runs / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return show.run(runs / name, [json.loads(line) for line in lines if line.endswith("}")])

    @spoken
    def look() -> tuple[Any, Any]:
        return gr.CheckboxGroup(choices=found(reports, "report.json")), gr.Dropdown(choices=found(runs, "log.jsonl"))

    light: dict[str, Any] = dict(api_visibility="private", queue=False)
    gr.on([choice.change, again.click, page.load], show_reports, choice, table, **light)
    gr.on([run.change, again.click], show_run, run, curves, **light)
    again.click(look, None, [choice, run], **light)


# ----------------------------------------------------------------------------------------------------------- canvas


def sketch_pad(**options: Any) -> gr.ImageEditor:
    """An image editor whose pictures pass the gate of uploads: decoded by us, bounded, not many at a time.

    Its value is {"background": straight RGBA or None, "layers": [...]}, or {"refused": a sentence}. Not a subclass: for
    one Gradio would write a stub beside this file.
    """
    editor = gr.ImageEditor(type="numpy", **options)
    accept = editor.accept_blobs

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        """What the browser sends before a request, kept until that comes; of those that never come, the oldest go."""
        index = data.data["index"]
        if index and index != "null" and int(index) >= MAX_LAYERS:
            raise gr.Error("Too many layers.", print_exception=False)
        while len(editor.blob_storage) >= MAX_CANVASES:
            editor.blob_storage.pop(next(iter(editor.blob_storage)))
        accept(data)

    def preprocess(payload: Any) -> dict[str, Any] | None:
        held = payload if payload is None or payload.id is None else editor.blob_storage.pop(payload.id, None)
        if held is None:
            return None
        layers = [layer for layer in held.layers or [] if layer]
        if len(layers) > MAX_LAYERS:
            return {"refused": "Too many layers."}
        try:
            background = decoded(held.background) if held.background else None
            return {"background": background, "layers": [decoded(layer) for layer in layers]}
        except PokediffError as error:
            return {"refused": str(error)}

    def decoded(part: Any) -> np.ndarray:
        return Studio.decode(part) if isinstance(part, bytes) else Studio.decode(Path(part.path).read_bytes())

    editor.accept_blobs, editor.preprocess = accept_blobs, preprocess  # type: ignore[assignment, method-assign]
    return editor


# -------------------------------------------------------------------------------------------------------------- API


def sprite_api(studio: Studio) -> Callable[..., Iterator[dict[str, Any]]]:
    """The one public function behind the page, see docs/demo.md."""

    @spoken
    def sprite(
        prompt: str,
        seed: int = 0,
        negative_prompt: str = "",
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        checkpoint: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Draw one picture. Now and then, and at last for the finished one, {"step": k, "of": n, "png": a transparent
        picture in base64, "settings": what draws it}.
        """
        config = studio.settings(
            checkpoint, prompt=(prompt,), seed=seed, negative_prompt=negative_prompt, num_steps=num_steps,
            guidance_scale=guidance_scale, sampler=sampler,
        )  # fmt: skip
        settings: dict[str, Any] = {"prompt": prompt, "seed": config.seed, "checkpoint": studio.name_of(config)}
        for name in ("negative_prompt", "num_steps", "guidance_scale", "sampler"):
            settings[name] = getattr(config, name)
        shown, total = time.monotonic(), studio.frames(config)
        for step, frame in enumerate(studio.draw(config), 1):
            if step == total or time.monotonic() > shown + PACE:
                png = show.uri(frame.x0[0]).partition(",")[2]
                yield {"step": step, "of": total, "png": png, "settings": settings}
                shown = time.monotonic()

    return sprite
