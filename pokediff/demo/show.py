"""What the page shows, as HTML: the film of a drawing, neighbours, heat maps, tables. Text from people is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pokediff.data.images import encode_png, enlarge, grid
from pokediff.demo.studio import Compared, Neighbour
from pokediff.drawing.attribution import Influence
from pokediff.drawing.sample import Frame
from pokediff.evaluation import report

MAX_FRAMES, MAX_FILM_PIXELS = 41, 1_000_000
VERDICTS = {
    "new": "new: no training picture comes as near as the nearest one per cent of unseen real pictures do",
    "close": "close: only one in a hundred unseen real pictures comes so near to a training picture",
    "copy": "copy: three times nearer to this training picture than to any other family",
}

CSS = """
.film, .pictures { display: flex; flex-wrap: wrap; gap: 12px; }
.film figure, .pictures figure { margin: 0; flex: 1 1 130px; min-width: 0; }
.film figure { max-width: 400px; } .pictures figure { max-width: 170px; }
.film figcaption, .pictures figcaption { font-size: 13px; overflow-wrap: anywhere; padding-top: 4px; }
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
"""

# Seen by the page's scripts as window.pokediff; `at` runs from 0, the noise, to 1, the pictures.
SCRIPT = """
window.pokediff = {
  show(step) {
    for (const strip of document.querySelectorAll('#film .strip')) {
      const frames = Number(strip.style.getPropertyValue('--frames'));
      strip.style.setProperty('--at', frames > 1 ? Math.min(step, frames - 1) / (frames - 1) : 1);
    }
  },
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


def thinned(frames: Sequence[Frame]) -> list[Frame]:
    """Frames evenly spread from first to last, so few that a film of many pictures does not weigh tens of megabytes."""
    pixels = frames[-1].x0[..., 0].size
    number = min(len(frames), MAX_FRAMES, max(8, MAX_FILM_PIXELS // pixels))
    return [frames[index] for index in np.linspace(0, len(frames) - 1, number).round().astype(int)]


def film(frames: Sequence[Frame], prompt: str) -> str:
    """The noisy pictures x beside the clean ones x0 that the network sees in them; several frames lie one above another
    in one image, of which `pokediff.show` lets one be seen.
    """
    parts = []
    for name, words in (("x", "x: the noisy picture"), ("x0", "x0: what the network sees in it")):
        sheets = [grid(getattr(frame, name), gap=1) for frame in frames]
        height, width = sheets[0].shape[:2]
        style = f"--frames:{len(frames)};background-image:url({uri(np.concatenate(sheets))})"
        strip = f'<div class="strip" role="img" aria-label="{escape(prompt)}, {name}" style="{style}"></div>'
        frame = f'<div class="frame" style="aspect-ratio:{width}/{height}">{strip}</div>'
        parts.append(f"<figure>{frame}<figcaption>{words}</figcaption></figure>")
    return f'<div class="film">{"".join(parts)}</div>'


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


def influence(found: Influence) -> str:
    """A row for each word: a bar, and where the prediction changes without it, at every noise level."""
    highest = np.maximum(found.maps.max(axis=(0, 2, 3)), 1e-9)  # (L,): words are compared at one level
    total = found.shares.mean(axis=1)
    head = "".join(f"<th>noise {sigma:.2g}</th>" for sigma in found.sigmas)
    seen = "".join(f"<td>{image(picture, 'what the network sees')}</td>" for picture in found.x0)
    rows = [
        f'<tr><th>{escape(word)}</th><td style="min-width:110px">{share:.0%}'
        f'<div class="bar" style="width:{100 * share / total.max():.0f}%"></div></td>'
        + "".join(
            f"<td>{image(heat(picture, values / most), f'where {word} counts')}</td>"
            for picture, values, most in zip(found.x0, maps, highest, strict=True)
        )
        + "</tr>"
        for word, share, maps in zip(found.words, total, found.maps, strict=True)
    ]
    return (
        f'<div class="wide"><table class="bars"><tr><th>word</th><th>share of the change</th>{head}</tr>'
        f"<tr><th>whole prompt</th><td>{image(found.picture, 'the finished picture')}</td>{seen}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def heat(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (H, W), 0 to 1, as colours over the picture in grey; (H, W, 4) uint8."""
    grey = (picture[..., :3].mean(-1) * (picture[..., 3] / 255) + 255 * (1 - picture[..., 3] / 255))[..., None]
    level = np.clip(values, 0, 1)
    colors = cv2.applyColorMap((255 * level).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    share = np.clip(1.5 * level, 0, 1)[..., None]
    mixed = (1 - share) * (0.4 * grey + 150) + share * colors
    return np.concatenate([mixed.clip(0, 255), np.full_like(grey, 255)], axis=-1).astype(np.uint8)


def animation(path: Path) -> str:
    """A GIF inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="pictures"><figure><img src="data:image/gif;base64,{data}" alt="animation"></figure></div>'


def compared(found: Sequence[Compared]) -> str:
    return pictures([(one.picture, f"{one.sampler}, {one.steps} steps, {one.seconds:.2f} s") for one in found])


def labelled(drawn: np.ndarray, labels: Sequence[str]) -> str:
    return pictures(list(zip(drawn, labels, strict=True)))


def before_and_after(before: np.ndarray, after: np.ndarray, colors: int) -> str:
    factor = max(1, 128 // before.shape[0])
    return pictures([(enlarge(before, factor), "before"), (enlarge(after, factor), f"after: {colors} colours")])


# --------------------------------------------------------------------------------------------------------- measures


def reports(folders: Sequence[Path]) -> str:
    """The figures of several reports side by side, and their plots."""
    found = [report.read_report(folder) for folder in folders]
    settings = [{key: data["settings"][key] for key in ("data_sha256", "split", "styles", "size")} for data in found]
    lines = [f"<p>{escape(report.about(data['settings'])[0])}</p>" for data in found]
    if any(other != settings[0] for other in settings):
        lines.append(
            "<p><strong>They were not measured on the same data or size: do not compare the figures.</strong></p>"
        )
    for section, rows in report.side_by_side(found):
        head = "".join(f"<th>{escape(folder.name)}</th>" for folder in folders)
        body = "".join(
            f"<tr><th>{escape(row['name'])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row['cells'])}"
            f"<td>{escape(row['floor'])}</td><td>{escape(row['note'])}</td></tr>"
            for row in rows
        )
        lines.append(
            f'<h3>{escape(section)}</h3><div class="wide"><table>'
            f"<tr><th></th>{head}<th>real pictures</th><th></th></tr>{body}</table></div>"
        )
    for folder, data in zip(folders, found, strict=True):
        for section, plot in report.plots(data["curves"]):
            words = escape(f"{folder.name}: {section}")
            lines.append(
                f'<figure><img class="plot" src="{plot}" alt="{words}"><figcaption>{words}</figcaption></figure>'
            )
    return "".join(lines)


def run(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The curves of a training run, and its latest preview."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(7, 3.6), layout="constrained")
    axes = plot.subplots()
    for name in ("loss", "validation_loss", "kernel_distance"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    last = max((row["step"] for row in rows), default=0)
    lines = [f"<p>{escape(folder.name)}: {last:,} steps</p>"]
    lines.append(f'<img class="plot" src="{report.plot_uri(plot)}" alt="loss by step">')
    for preview in sorted((folder / "previews").glob("*.png"))[-1:]:
        data = base64.b64encode(preview.read_bytes()).decode()
        lines.append(f"<p>Previews after {int(preview.stem.split('-')[-1]):,} steps</p>")
        lines.append(f'<img class="plot" src="data:image/png;base64,{data}" alt="previews">')
    return "".join(lines)


def schedule(sigmas: Sequence[float], asked: Sequence[str], low: float, high: float) -> str:
    """The noise at every step, which network is asked there, and where guidance acts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    plot = Figure(figsize=(7, 3.2), layout="constrained")
    axes = plot.subplots()
    kinds = [
        name if name != "unet" else "guided" if low <= sigma <= high else "not guided"
        for sigma, name in zip(sigmas, asked, strict=True)
    ]
    axes.plot(range(len(sigmas)), sigmas, color="gray", linewidth=1)
    colors = {"guided": "#7c3aed", "not guided": "#bbbbbb", "refiner": "#0d9488", "upscaler": "#ea580c"}
    for wanted, color in colors.items():
        points = [(k, sigma) for k, (sigma, kind) in enumerate(zip(sigmas, kinds, strict=True)) if kind == wanted]
        if points:
            axes.scatter(*zip(*points, strict=True), label=wanted, color=color, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="evaluation of the network", ylabel="sigma, noise to picture", yscale="log")
    axes.legend()
    return f'<img class="plot" src="{report.plot_uri(plot)}" alt="sigma goes from {sigmas[0]:.3g} to {sigmas[-1]:.3g}">'
