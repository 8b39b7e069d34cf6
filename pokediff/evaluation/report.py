"""One report in three forms: report.json for programs, report.md for a repository, report.html to read offline."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pokediff.data.images import composite, encode_png, enlarge, grid
from pokediff.errors import PokediffError
from pokediff.evaluation.distances import Estimate
from pokediff.files import own_folder, read_json, write_whole

SHOWN_SIDE = 64  # px of a picture on the page
PAIRS, GENERATED, REAL = "Real pictures above generated ones", "Generated pictures", "Real held-out pictures"
TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # of the axis of sigma
INTRODUCTION = (
    "Beside each figure: its 95 % interval in brackets, the figure of real pictures (real) and that of a trivial "
    "baseline (worthless: noise, chance, one picture repeated), where there is one. "
    "docs/evaluation.md explains the figures and their limits."
)


@dataclass(frozen=True)
class Figure:
    """One row of the report. `value` None is "not measured", and the note says why."""

    section: str
    name: str
    value: float | None
    n: str
    low: float | None = None
    high: float | None = None
    real: float | None = None  # the value of real pictures
    worthless: float | None = None  # the value of a trivial baseline: noise, chance, one picture repeated
    note: str = ""


@dataclass
class Report:
    """The results of an evaluation; `pictures` are in report.html only."""

    settings: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: dict[str, tuple[str, np.ndarray, int]] = field(default_factory=dict)  # title: (words, (N,H,W,4), columns)

    def add(
        self,
        section: str,
        name: str,
        estimate: Estimate | float | None,
        n: int | str,
        *,
        real: float | None = None,
        worthless: float | None = None,
        note: str = "",
    ) -> None:
        """Add a row; n is the number of pictures, or a text such as "500 generated, 127 real"."""
        value, low, high = (estimate, None, None) if not isinstance(estimate, Estimate) else vars(estimate).values()
        self.figures.append(Figure(section, name, value, str(n), low, high, real, worthless, note))

    def skip(self, section: str, name: str, reason: str) -> None:
        """Add a row with the reason why this was not measured."""
        self.figures.append(Figure(section, name, None, "", note=f"not measured: {reason}"))


def write_report(out: Path, report: Report) -> None:
    """Write report.json, report.md and report.html into OUT."""
    data = json.loads(
        to_json(vars(report) | {"figures": [asdict(figure) for figure in report.figures], "pictures": None})
    )
    del data["pictures"]
    write_whole(out / "report.json", to_json(data))
    write_whole(out / "report.md", markdown(out.name, data))
    write_whole(out / "report.html", html(out.name, data, report.pictures))


def to_json(data: object) -> str:
    """JSON text that browsers parse: NaN and infinity become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [finite(part) for part in value]
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a folder. Raises PokediffError when there is none, or it is of another version."""
    path = folder / "report.json"
    if not path.is_file():
        raise PokediffError(f"{folder} holds no report.json: make one with pokediff evaluate --out {folder}")
    data = read_json(path)
    if not isinstance(data, dict) or any("real" not in figure for figure in data.get("figures", [{}])):
        raise PokediffError(f"{path} was written by an older version: run pokediff evaluate --out {folder} again")
    return data


# ---------------------------------------------------------------------------------------------------------- words


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def shown(figure: dict[str, Any]) -> str:
    """A value with its interval."""
    if figure["value"] is None:
        return "not measured"
    if figure["low"] is None:
        return number(figure["value"])
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def about(settings: dict[str, Any]) -> list[str]:
    """Sentences about generator, reference and settings."""
    system = settings["system"]
    name = system.get("checkpoint") or system.get("images")
    styles = ", ".join(settings["styles"]) or "all styles"
    lines = [
        f"{name}: {settings['n_generated']} generated pictures of {settings['size']} px against {settings['n_real']} "
        f"real ones ({styles}; {settings['split']} split, families that are not in the training split); copies are "
        f"searched among {settings['n_training']} training pictures of all styles.",
        f"Background {settings['background']} on both sides; bicubic resizing with antialiasing to the network.",
    ]
    if denoisers := system.get("denoisers"):
        sampling = settings["sampling"]
        used = ", ".join(f"{name} ({row['size']} px, {row['evaluations']} steps)" for name, row in denoisers.items())
        factor = max(row.get("high_noise_guidance", 1.0) for row in denoisers.values())
        scale = f"guidance scale {sampling['guidance_scale']}" + (f" ({factor:g} times above sigma 10)" * (factor > 1))
        best = f"; each the best of {sampling['best_of']} by the scorer" if (sampling.get("best_of") or 1) > 1 else ""
        lines.append(
            f"Denoisers {used}; sampler {sampling['sampler']}, {scale}, seeds from 0{best}; "
            f"weights sha256 {str(system['weights_sha256'])[:16]}, data sha256 {settings['data_sha256'][:16]}."
        )
    return lines


def markdown(title: str, data: dict[str, Any]) -> str:
    """The report without its pictures."""
    lines = [f"# {title}", "", *about(data["settings"]), "", INTRODUCTION]
    for section in dict.fromkeys(figure["section"] for figure in data["figures"]):
        lines += [
            "",
            f"## {section}",
            "",
            "| | value | real | worthless | n | note |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {f['name']} | {shown(f)} | {number(f['real'])} | {number(f['worthless'])} | {f['n']} | {f['note']} |"
            for f in data["figures"]
            if f["section"] == section
        ]
    for name, rows in data["tables"].items():
        if rows:
            lines += [
                "",
                f"## {name.capitalize()}",
                "",
                "| " + " | ".join(rows[0]) + " |",
                "|" + " --- |" * len(rows[0]),
            ]
            lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------ page

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem } th, td { text-align: left; vertical-align: top;
padding: .35rem .6rem; border-bottom: 1px solid #eee } td.v { white-space: nowrap; font-variant-numeric: tabular-nums }
td.note { color: #666 } .scroll { overflow-x: auto } img { max-width: 100%; image-rendering: pixelated }
img.plot { image-rendering: auto; max-width: 34rem }
</style></head><body><h1>{{ title }}</h1>
{% for line in about %}<p>{{ line }}</p>{% endfor %}<p>{{ introduction }}</p>
{% for title, words, source in shown_first %}<h2>{{ title }}</h2><p>{{ words }}</p>
<div class="scroll"><img alt="{{ title }}" src="{{ source }}"></div>{% endfor %}
{% for section, figures in sections %}<h2>{{ section }}</h2><div class="scroll"><table>
<tr><th></th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}
<th>real</th><th>worthless</th><th>n</th><th></th></tr>
{% for row in figures %}<tr><td>{{ row.name }}</td>
{% for value in row.cells %}<td class="v">{{ value }}</td>{% endfor %}
<td class="v">{{ row.real }}</td><td class="v">{{ row.worthless }}</td><td>{{ row.n }}</td>
<td class="note">{{ row.note }}</td></tr>{% endfor %}</table></div>
{% for name, source in plots if name == section %}
<p><img class="plot" alt="{{ name }}" src="{{ source }}"></p>{% endfor %}
{% endfor %}
{% for title, words, source in shown_last %}<h2>{{ title }}</h2><p>{{ words }}</p>
<div class="scroll"><img alt="{{ title }}" src="{{ source }}"></div>{% endfor %}
{% for name, rows in tables if rows %}<h2>{{ name }}</h2><div class="scroll"><table>
<tr>{% for key in rows[0] %}<th>{{ key }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% endfor %}</body></html>
"""


def html(title: str, data: dict[str, Any], pictures: dict[str, tuple[str, np.ndarray, int]]) -> str:
    """One self-contained file: pictures and plots are inside it."""
    images = [(name, words, sheet_uri(rgba, columns)) for name, (words, rgba, columns) in pictures.items()]
    first = [image for image in images if image[0] in (PAIRS, GENERATED, REAL)]
    return _page(
        title=title,
        about=about(data["settings"]),
        columns=["value"],
        sections=side_by_side([data]),
        plots=plots(data["curves"]),
        shown_first=first,
        shown_last=[image for image in images if image not in first],
        tables=data["tables"].items(),
    )


def _page(**values: Any) -> str:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(PAGE).render(introduction=INTRODUCTION, **values)


def side_by_side(reports: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of reports side by side; real, worthless, n and note are those of the first report that has the row."""
    keys = dict.fromkeys((figure["section"], figure["name"]) for data in reports for figure in data["figures"])
    found = [{(f["section"], f["name"]): f for f in data["figures"]} for data in reports]
    rows: dict[str, list[dict[str, Any]]] = {}
    for section, name in keys:
        mine = [figures.get((section, name)) for figures in found]
        sample = next(figure for figure in mine if figure)
        rows.setdefault(section, []).append(
            {
                "name": name,
                "cells": [shown(figure) if figure else "–" for figure in mine],
                "real": number(sample["real"]),
                "worthless": number(sample["worthless"]),
                "n": sample["n"],
                "note": sample["note"],
            }
        )
    return list(rows.items())


def sheet_uri(rgba: np.ndarray, columns: int) -> str:
    """Pictures (N, S, S, 4) as one PNG inside the page, on white."""
    sheet = enlarge(grid(rgba, columns), max(1, SHOWN_SIDE // rgba.shape[1]))
    return _uri(encode_png(composite_rgba(sheet)))


def composite_rgba(rgba: np.ndarray) -> np.ndarray:
    rgb = composite(rgba)
    return np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1)


def plots(curves: dict[str, Any]) -> list[tuple[str, str]]:
    """(section, image) of each curve."""
    from matplotlib.figure import Figure as Plot

    made = []
    for size, curve in curves.get("loss", {}).items():
        plot = Plot(figsize=(6, 3.6), layout="constrained")
        axes = plot.subplots()
        for name in ("held-out", "training"):
            low, value, high = ([row[key] for row in curve[name]] for key in ("low", "value", "high"))
            axes.plot(curve["sigma"], value, marker="o", label=name)
            axes.fill_between(curve["sigma"], low, high, alpha=0.2)
        axes.set(xscale="log", xlabel="noise level sigma", ylabel="denoising loss", title=f"{size} px")
        axes.set_xticks(TICKS, map(str, TICKS))
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.8 * curve["sigma"][0], 1.25 * curve["sigma"][-1])
        axes.legend()
        made.append(("Loss by noise level", plot_uri(plot)))
    if "copies" in curves:
        plot = Plot(figsize=(6, 3.6), layout="constrained")
        axes = plot.subplots()
        for name in ("generated", "real"):
            values = curves["copies"][name]
            axes.plot(values, np.linspace(0, 1, len(values)), label=name if name == "generated" else "real held-out")
        axes.axvline(1 / 3, color="gray", linestyle=":", label="copy")
        axes.set(xlabel="distance to the nearest over distance to the next family", xlim=(0, 1))
        axes.set(ylabel="share of pictures")
        axes.legend()
        made.append(("Does it copy?", plot_uri(plot)))
    return made


def plot_uri(plot: Any) -> str:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=120)
    return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# ------------------------------------------------------------------------------------------------------ comparison


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write OUT/comparison.md and comparison.html, several reports side by side. Returns the page.

    Raises PokediffError when they cannot be compared: other data, split, size, background or numbers of pictures.
    """
    reports = [read_report(folder) for folder in folders]
    for key in ("data_sha256", "split", "styles", "size", "background", "n_real", "n_generated"):
        values = {json.dumps(report["settings"][key]) for report in reports}
        if len(values) > 1:
            raise PokediffError(f"these reports cannot be compared: {key} is {' and '.join(sorted(values))}")
    names = [folder.name for folder in folders]
    sections = side_by_side(reports)
    lines = ["# Comparison", "", *(line for report in reports for line in about(report["settings"])[:1]), ""]
    for section, rows in sections:
        lines += [f"## {section}", "", "| | " + " | ".join(names) + " | real |", "|" + " --- |" * (len(names) + 2)]
        lines += ["| " + " | ".join([row["name"], *row["cells"], row["real"]]) + " |" for row in rows] + [""]
    page = _page(
        title="Comparison",
        about=[line for report in reports for line in about(report["settings"])],
        columns=names,
        sections=sections,
        plots=[],
        shown_first=[],
        shown_last=[],
        tables=[],
    )
    with own_folder(out, "comparison.md"):
        write_whole(out / "comparison.md", "\n".join(lines))
        write_whole(out / "comparison.html", page)
    return out / "comparison.html"
