"""Reports: the figures of `pokediff evaluate`, and the curves of training runs, on this machine."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from pokediff.demo import show
from pokediff.demo.controls import AT_ONCE, sentence, streamed
from pokediff.evaluation import report


def reports_tab(page: gr.Blocks, reports: Path, runs: Path) -> None:
    gr.Markdown(f"Reports of `pokediff evaluate` in {reports}, and training runs in {runs}, on this machine.")
    reload = gr.Button("Reload", elem_id="reload")
    names = found(reports, "report.json")
    choice = gr.CheckboxGroup(names, label="Reports", info="Several are shown side by side.", value=names[:1])
    table = gr.HTML(elem_id="report")
    run = gr.Dropdown(
        found(runs, "log.jsonl"),
        label="Training run",
        info="Its curves and latest previews; in pairs, a real picture above the drawn one.",
        value=None,
    )
    curves = gr.HTML(elem_id="run")
    gr.on([choice.change, reload.click, page.load], streamed(show_reports, reports), choice, table, **AT_ONCE)
    gr.on([run.change, reload.click], streamed(show_run, runs), run, curves, **AT_ONCE)
    reload.click(streamed(look_up, reports, runs), None, [choice, run], **AT_ONCE)


def found(folder: Path, file: str) -> list[str]:
    """The names of the folders in `folder` that hold `file`."""
    return sorted(path.parent.name for path in folder.glob(f"*/{file}"))


def look_up(reports: Path, runs: Path) -> Iterator[tuple[Any, Any]]:
    """Updates of the two lists."""
    yield gr.CheckboxGroup(choices=found(reports, "report.json")), gr.Dropdown(choices=found(runs, "log.jsonl"))


def show_reports(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """An update of the table; `names` come from the browser, so only those that are found count."""
    known = [name for name in found(folder, "report.json") if name in names]
    yield html_of(reports_table, [folder / name for name in known]) if known else show.empty("Choose a report.")


def show_run(folder: Path, name: str | None) -> Iterator[str]:
    """An update of the curves."""
    if name not in found(folder, "log.jsonl"):
        yield show.empty("Choose a training run.")
        return
    yield html_of(run_curves, folder / name)


def html_of(make: Callable[[Any], str], given: Any) -> str:
    """`make(given)`, or why that fails: the page does not show errors of events that bypass the queue."""
    try:
        return make(given)
    except Exception as error:
        return show.empty(sentence(error))


def reports_table(folders: Sequence[Path]) -> str:
    """The figures of several reports side by side, and their plots."""
    reports = [report.read_report(folder) for folder in folders]
    settings = [
        {key: data["settings"].get(key) for key in ("data_sha256", "split", "styles", "size")} for data in reports
    ]
    lines = [f"<p>{escape(report.about(data['settings'])[0])}</p>" for data in reports]
    if any(other != settings[0] for other in settings):
        lines.append("<p><strong>Measured on other data or at another size: do not compare the figures.</strong></p>")
    for section, rows in report.side_by_side(reports):
        head = "".join(f"<th>{escape(folder.name)}</th>" for folder in folders)
        body = "".join(
            f"<tr><th>{escape(row['name'])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row['cells'])}"
            f"<td>{escape(row['real'])}</td><td>{escape(row['worthless'])}</td><td>{escape(row['note'])}</td></tr>"
            for row in rows
        )
        lines.append(
            f'<h3>{escape(section)}</h3><div class="wide"><table>'
            f"<tr><th></th>{head}<th>real pictures</th><th>worthless ones</th><th></th></tr>{body}</table></div>"
        )
    for folder, data in zip(folders, reports, strict=True):
        for section, plot in report.plots(data["curves"]):
            lines.append(figure(plot, f"{folder.name}: {section}"))
    return "".join(lines)


def run_curves(folder: Path) -> str:
    """The curves of a training run, and the latest preview of each stage."""
    from matplotlib.figure import Figure

    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may still be written
    plot = Figure(figsize=(7, 3.6), layout="constrained")
    axes, last = plot.subplots(), dict[str, int]()
    for stage in dict.fromkeys(row.get("stage", "") for row in rows):
        mine = [row for row in rows if row.get("stage", "") == stage]
        last[stage] = max(row["step"] for row in mine)
        for name in ("loss", "validation_loss", "kernel_distance"):
            points = [(row["step"], row[name]) for row in mine if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{stage} {name.replace('_', ' ')}", linewidth=1)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    steps = ", ".join(f"{stage} {step:,} steps" for stage, step in last.items())
    lines = [f"<p>{escape(folder.name)}: {escape(steps)}</p>", figure(report.plot_uri(plot), "loss by step")]
    files = sorted((folder / "previews").glob("*.png"), key=lambda path: path.stem)
    latest = {re.sub(r"\d+(?=(-pairs)?$)", "", path.stem): path for path in files}
    for path in latest.values():  # of each stage: prompts, and pairs
        data = base64.b64encode(path.read_bytes()).decode()
        lines.append(figure(f"data:image/png;base64,{data}", f"previews, {path.stem}"))
    return "".join(lines)


def figure(source: str, caption: str) -> str:
    words = escape(caption)
    return f'<figure><img class="plot" src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
