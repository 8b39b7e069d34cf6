"""What several tabs show: the film of a drawing and its captions, pictures, neighbours; style and script of the page.
Text that people typed is escaped.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from pokediff.config import SampleConfig
from pokediff.data.images import encode_png, enlarge, grid
from pokediff.demo.neighbours import Neighbour
from pokediff.drawing.sheets import Frame
from pokediff.model.pipeline import Evaluation

MAX_FRAMES, MAX_FILM_PIXELS = 41, 1_000_000
VERDICTS = {
    "new": "new: not closer to a training picture than 99 of 100 unseen real pictures are",
    "close": "close: closer to a training picture than 99 of 100 unseen real pictures are",
    "copy": "copy: three times closer to this training picture than to any other evolution family",
}

CSS = """
.film, .pictures { display: flex; flex-wrap: wrap; gap: 12px; position: relative; }
.film figure, .pictures figure { margin: 0; flex: 1 1 130px; min-width: 0; }
.film figure { max-width: min(400px, 50% - 6px); } .pictures figure { max-width: 170px; }
.film figcaption, .pictures figcaption { font-size: 13px; overflow-wrap: anywhere; padding-top: 4px; }
.film.last figure:not(:last-child), .film .inset { display: none; }
.film figure:only-child figcaption { display: none; }
.film.last figcaption { visibility: hidden; } /* it keeps its place, so that the slider does */
.step { font-size: 13px; margin: 6px 0 0; font-variant-numeric: tabular-nums; }
.frame, .pictures img { width: 100%; image-rendering: pixelated; border-radius: 8px;
  background-color: #fff; background-image: conic-gradient(#e6e6e6 25%, #fff 0 50%, #e6e6e6 0 75%, #fff 0);
  background-size: 16px 16px; overflow: hidden; }
.strip { width: 100%; height: 100%; background-repeat: no-repeat; image-rendering: pixelated;
  background-size: 100% calc(100% * var(--frames)); background-position: 0 calc(100% * var(--at, 1)); }
.empty { display: grid; place-items: center; min-height: 220px; border: 1px dashed currentColor; border-radius: 8px;
  opacity: .7; padding: 16px; text-align: center; }
.bars { border-collapse: collapse; width: 100%; } .bars td, .bars th { padding: 3px 6px; text-align: left; }
.bars img { width: 72px; image-rendering: pixelated; border-radius: 4px; display: block; }
.bar { height: 12px; background: var(--color-accent, #7c3aed); border-radius: 3px; min-width: 2px; }
.verdict-copy { color: #b91c1c; font-weight: 700; } .dark .verdict-copy { color: #f87171; }
.verdict-close { color: #92400e; font-weight: 700; } .dark .verdict-close { color: #fbbf24; }
.wide { overflow-x: auto; } .wide table { border-collapse: collapse; font-size: 14px; }
.wide td, .wide th { border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: 4px 8px;
  text-align: left; vertical-align: top; }
.plot { max-width: 100%; background: #fff; border-radius: 8px; }
.result .empty { min-height: 270px; }
.result [id$=result], #film { scroll-margin: 90px 0 96px; } /* with the status above, over the history below */
.result .pictures { max-height: 70vh; overflow-y: auto; } /* so that the downloads are never far below */
.files { max-height: 500px; overflow-y: auto; }
.files .filename { display: table-cell !important; max-width: none !important; width: 100%; font-size: 0; }
.files td { padding: 6px !important; } .files .label-clear-button { display: none; }
.files .filename span { display: inline !important; font-size: 14px; white-space: normal; overflow-wrap: anywhere; }
.gradio-container { overflow: clip !important; } /* hidden, as Gradio has it, nothing in it would be sticky */
#draw-tab { display: grid; grid-template: "ask result" auto "more result" 1fr / 5fr 6fr; align-items: start; }
#draw-tab > .ask { grid-area: ask; } #draw-tab > .result { grid-area: result; } #draw-tab > .more { grid-area: more; }
#draw-tab > * { min-width: 0 !important; }
#history { position: sticky; bottom: 0; z-index: 60; gap: 4px; padding: 6px 0; margin-top: 8px;
  background: var(--body-background-fill); border-top: 1px solid var(--border-color-primary); }
#history:not(:has(.past)) { display: none; }
#history .html-container, #history .block { padding: 0; overflow: visible; }
.history { display: flex; gap: 6px; align-items: center; overflow-x: auto; padding: 3px; }
.history span { flex: none; font-size: 13px; padding-right: 6px; }
.past { flex: none; width: 52px; height: 52px; padding: 0; margin: 0 !important; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: #fff; }
.past img { width: 100%; height: 100%; object-fit: contain; border-radius: 6px; }
.past[aria-pressed=true], .past:focus-visible { outline: 2px solid var(--color-accent); }
#chosen { flex-flow: row wrap; align-items: center; gap: 4px 16px; }
#past-words { flex: 0 1 auto; width: auto; min-width: 0; padding: 0 3px; font-size: 13px; overflow-wrap: anywhere; }
#send { flex: 0 1 auto; width: auto; max-width: 100%; gap: 6px; flex-wrap: nowrap; overflow-x: auto; padding: 3px; }
#send button { flex: none; width: auto; }
@media (max-width: 767px) {
  .tab-container button { padding: 0 8px !important; }
  #draw-tab { grid-template: "ask" auto "result" auto "more" auto / 100%; }
  .film figure { flex-basis: 100%; max-width: 400px; }
  .film figure:not(:last-child) { position: absolute; top: 6px; right: 6px; width: 32%; z-index: 1; }
  .film figure:not(:last-child) figcaption { display: none; }
  .film figure:not(:last-child) .frame { border: 2px solid #fff; box-shadow: 0 1px 6px #0008; }
  .film .inset { display: inline; }
  .result .empty { min-height: 80vw; }
}
"""

# window.pokediff of the page; `--at` runs from 0, the noise, to 1, the pictures.
SCRIPT = """
window.pokediff = {
  show(step) {
    const film = document.querySelector('#film .film');
    for (const strip of film?.querySelectorAll('.strip') ?? []) {
      const frames = Number(strip.style.getPropertyValue('--frames'));
      strip.style.setProperty('--at', frames > 1 ? Math.min(step, frames - 1) / (frames - 1) : 1);
      film.classList.toggle('last', step >= frames - 1);
    }
    const caption = document.querySelector('#film .step');
    if (caption) caption.textContent = JSON.parse(caption.dataset.captions)[step] ?? caption.textContent;
  },
  reveal(id) { document.getElementById(id)?.scrollIntoView({block: 'nearest'}); },
  play() {
    const strip = document.querySelector('#film .strip');
    const frames = strip ? Number(strip.style.getPropertyValue('--frames')) : 0;
    clearInterval(this.timer);
    let step = 0;
    this.timer = setInterval(() => {
      if (!(step < frames)) return clearInterval(this.timer);
      this.show(step++);
    }, 80);
  },
  toggle(prompt, word, group) {
    const has = (text, part) => new RegExp('(^|[^\\\\w-])' + part + '($|[^\\\\w-])', 'i').test(text);
    const without = (text, part) => text.replace(new RegExp('(^|[^\\\\w-])' + part + '($|[^\\\\w-])', 'i'), '$1$2')
      .replace(/\\s+/g, ' ').replace(/^[\\s,]+|[\\s,]+$/g, '').replace(/,\\s*,/g, ',');
    if (has(prompt, word)) return without(prompt, word);
    for (const other of group) if (has(prompt, other))
      return prompt.replace(new RegExp('(^|[^\\\\w-])' + other + '($|[^\\\\w-])', 'i'), '$1' + word + '$2');
    return prompt.trim() ? prompt.trim() + ', ' + word : word;
  },
};
"""


def uri(rgba: np.ndarray) -> str:
    """Straight RGBA or RGB uint8 (H, W, C) as a PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(encode_png(rgba)).decode()


def image(rgba: np.ndarray, description: str) -> str:
    return f'<img src="{uri(rgba)}" alt="{escape(description)}">'


def empty(words: str) -> str:
    return f'<div class="empty">{escape(words)}</div>'


def film_length(frames: Sequence[Frame]) -> int:
    """Number of frames that a film shows, limited so that a film of many pictures stays below some megabytes."""
    pixels = frames[-1].x0[..., 0].size
    return min(len(frames), MAX_FRAMES, max(8, MAX_FILM_PIXELS // pixels))


def spread(total: int, number: int) -> list[int]:
    """`number` of the indices 0 to total - 1, evenly spread from first to last."""
    return np.linspace(0, total - 1, number).round().astype(int).tolist()


def film(frames: Sequence[Frame], prompt: str, captions: Sequence[str] = ()) -> str:
    """The noisy pictures x beside the predicted clean ones x0, on a phone in their corner; the finished pictures, at
    the last step, alone. Several frames lie one above another in one image, all as large as the largest;
    `pokediff.show` shows one of them with its caption.
    """
    side = max(frame.x0.shape[1] for frame in frames)
    clean = 'x0: the predicted clean picture<span class="inset">; corner: x</span>'
    panels, parts = [("x", "x: the noisy picture"), ("x0", clean)], []
    for name, words in panels if frames[0].sigma > 0 else panels[1:]:
        native = [getattr(frame, name) for frame in frames]  # (B, S, S, 4), S that of the denoiser
        sheets = [grid(enlarge(values, side // values.shape[1]), gap=1) for values in native]
        height, width = sheets[0].shape[:2]
        style = f"--frames:{len(frames)};background-image:url({uri(np.concatenate(sheets))})"
        strip = f'<div class="strip" role="img" aria-label="{escape(prompt)}, {name}" style="{style}"></div>'
        frame = f'<div class="frame" style="aspect-ratio:{width}/{height}">{strip}</div>'
        parts.append(f"<figure>{frame}<figcaption>{words}</figcaption></figure>")
    step = ""
    if captions:
        step = f'<p class="step" data-captions="{escape(json.dumps(list(captions)))}">{escape(captions[-1])}</p>'
    last = " last" if frames[-1].sigma == 0 else ""
    return f'<div class="film{last}">{"".join(parts)}</div>{step}'


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
    own = config.sampling
    words = " and ".join(f"{number} step{'s' * (number > 1)} at {size} px" for size, number in steps.items())
    best = f", the best of {own.best_of}" if own.chooses else ""
    return f"Done: seed {config.seed}{best}, {words}, guidance scale {own.guidance_scale or 1:g}."


def pictures(shown: Sequence[tuple[np.ndarray, str]]) -> str:
    """Pictures, each above its caption."""
    figures = (f"<figure>{image(p, words)}<figcaption>{escape(words)}</figcaption></figure>" for p, words in shown)
    return f'<div class="pictures">{"".join(figures)}</div>'


def neighbours(drawn: np.ndarray, found: Sequence[Neighbour] | str) -> str:
    """Every drawing beside its nearest training picture, with a verdict."""
    if isinstance(found, str):
        return f"<p>{escape(found)}</p>"
    rows = [
        f"<tr><td>{image(picture, 'drawn')}</td><td>{image(near.picture, 'nearest training picture')}</td>"
        f'<td><span class="verdict-{near.verdict}">{near.verdict}</span>, distance {near.distance:.3f}<br>'
        f"{escape(near.record.name or near.record.file_name)}</td></tr>"
        for picture, near in zip(drawn, found, strict=True)
    ]
    legend = "".join(f"<li>{escape(words)}</li>" for words in VERDICTS.values())
    return (
        '<table class="bars"><tr><th>drawn</th><th>nearest training picture</th><th>verdict</th></tr>'
        f"{''.join(rows)}</table><ul>{legend}</ul>"
    )


def animation(path: Path) -> str:
    """A GIF inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="pictures"><figure><img src="data:image/gif;base64,{data}" alt="animation"></figure></div>'


def labelled(drawn: np.ndarray, labels: Sequence[str]) -> str:
    return pictures(list(zip(drawn, labels, strict=True)))


def colors_of(picture: np.ndarray) -> int:
    """The number of colours of a picture, straight RGBA (H, W, 4), where it is visible."""
    return len(np.unique(picture[picture[..., 3] > 0][:, :3], axis=0))


def before_and_after(before: np.ndarray, after: np.ndarray) -> str:
    """Two pictures of one size, and the number of colours of the second."""
    factor, words = max(1, 128 // before.shape[0]), f"after: {colors_of(after)} colours"
    return pictures([(enlarge(before, factor), "before"), (enlarge(after, factor), words)])
