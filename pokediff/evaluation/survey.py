"""Ask people: one offline page that shows pictures blind and shuffled, and the figures of what they answered.

    pokediff survey --images outputs/a outputs/b --out survey/        # survey/survey.html and survey/key.json
    pokediff survey --out survey/ --collect answers/*.json

The page knows numbers only; which system drew what stands in key.json, which stays at home. Some pictures come twice:
whoever rates them differently each time was not looking.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pokediff.data.images import encode_png, enlarge
from pokediff.data.records import read_text, write_whole
from pokediff.errors import PokediffError

CRITERIA = {
    "creature": "It looks like one whole creature",
    "prompt": "It is what the words ask for",
    "beauty": "It is well drawn",
    "novelty": "It is new to me: I know no such creature",
}
BEST = 5  # ratings go from 0 to this
ATTENTION = 1.5  # a rater whose two ratings of one picture differ by more on average was not looking
SHOWN_SIDE = 256  # px


def make_survey(folders: Sequence[Path], out: Path, number: int = 50, repeats: int = 5, seed: int = 0) -> Path:
    """Write OUT/survey.html and OUT/key.json: `number` pictures, as many of each system, `repeats` of them twice.

    Raises PokediffError when a folder has no pictures with prompts, or two have the same name.
    """
    from pokediff.evaluation.evaluate import read_generated

    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names) or not names:
        raise PokediffError("name one or several folders of pictures with --images, each with a name of its own")
    rng = np.random.default_rng(seed)
    share = -(-number // len(folders))
    items: list[dict[str, Any]] = []
    for name, folder in zip(names, folders, strict=True):
        generated = read_generated(folder)
        for index in rng.permutation(len(generated.pixels))[:share]:
            picture = enlarge(generated.pixels[index], max(1, SHOWN_SIDE // generated.pixels.shape[1]))
            items.append({"system": name, "prompt": generated.prompts[index], "png": encode_png(picture)})
    items = [items[i] for i in rng.permutation(len(items))][:number]
    order = list(range(len(items)))
    for again in rng.permutation(len(items))[:repeats]:
        later = rng.integers(order.index(again) + 1, len(order) + 1)  # never before the first time
        order.insert(int(later), int(again))
    pictures = [
        {"id": index, "prompt": item["prompt"], "png": base64.b64encode(item["png"]).decode()}
        for index, item in enumerate(items)
    ]
    identity = hashlib.sha256(b"".join(item["png"] for item in items)).hexdigest()[:16]
    key = {"survey": identity, "systems": [item["system"] for item in items]}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "key.json", json.dumps(key, indent=1) + "\n")
    write_whole(out / "survey.html", page(identity, pictures, order))
    return out / "survey.html"


def collect(answers: Sequence[Path], out: Path) -> dict[str, Any]:
    """Mean, spread, n and agreement for each criterion and system, from raters' files and OUT/key.json.

    Raters who did not look (ATTENTION) are left out and named. Raises PokediffError for files of another survey.
    """
    key = _json(out / "key.json")
    ratings: dict[str, dict[str, dict[int, float]]] = {name: {} for name in CRITERIA}  # criterion, rater, picture
    careless = []
    for path in answers:
        answer = _json(path)
        if answer.get("survey") != key["survey"]:
            raise PokediffError(f"{path} answers another survey than {out / 'key.json'}")
        rater = f"{answer.get('rater') or 'somebody'} ({path.name})"
        rows = answer["ratings"]
        if inattention(rows) > ATTENTION:
            careless.append(rater)
            continue
        for name in CRITERIA:
            ratings[name][rater] = {}
            for row in rows:
                ratings[name][rater].setdefault(row["id"], row[name])  # the first of two looks counts
    systems = sorted(set(key["systems"]))
    result: dict[str, Any] = {"raters": len(answers) - len(careless), "careless": careless, "criteria": {}}
    for name, by_rater in ratings.items():
        table = np.full((len(by_rater), len(key["systems"])), np.nan)
        for number, mine in enumerate(by_rater.values()):
            table[number, list(mine)] = list(mine.values())
        of = {system: table[:, np.array(key["systems"]) == system] for system in systems}
        result["criteria"][name] = {
            "agreement": krippendorff_alpha(table),
            **{system: _summary(values[~np.isnan(values)]) for system, values in of.items()},
        }
    return result


def _summary(values: np.ndarray) -> dict[str, float | int | None]:
    if len(values) == 0:
        return {"mean": None, "spread": None, "n": 0}
    return {
        "mean": float(values.mean()),
        "spread": float(values.std(ddof=1)) if len(values) > 1 else None,
        "n": len(values),
    }


def inattention(rows: Sequence[dict[str, Any]]) -> float:
    """Mean difference between the two ratings of pictures shown twice; 0 when none was."""
    seen: dict[int, dict[str, Any]] = {}
    differences = []
    for row in rows:
        if row["id"] in seen:
            differences += [abs(row[name] - seen[row["id"]][name]) for name in CRITERIA]
        seen.setdefault(row["id"], row)
    return float(np.mean(differences)) if differences else 0.0


def krippendorff_alpha(table: np.ndarray) -> float | None:
    """Agreement of raters (R, N), NaN where not rated: 1 perfect, 0 chance (Krippendorff 2011, interval distance).

    None where it is not defined: nothing rated by two, or all ratings equal.
    """
    columns = [column[~np.isnan(column)] for column in table.T]
    columns = [column for column in columns if len(column) > 1]
    if not columns:
        return None

    def spread(values: np.ndarray) -> float:
        return float(((values[:, None] - values[None, :]) ** 2).sum())

    everything = np.concatenate(columns)
    observed = sum(spread(column) / (len(column) - 1) for column in columns) / len(everything)
    expected = spread(everything) / (len(everything) * (len(everything) - 1))
    return None if expected == 0 else 1 - observed / expected


def table_of(result: dict[str, Any]) -> str:
    """What `collect` found, for the terminal and for a README."""
    systems = [name for name in next(iter(result["criteria"].values())) if name != "agreement"]
    lines = ["| | " + " | ".join(systems) + " | agreement |", "|" + " --- |" * (len(systems) + 2)]
    for name, found in result["criteria"].items():
        cells = [_cell(found[system]) for system in systems]
        alpha = found["agreement"]
        lines.append(f"| {CRITERIA[name]} | {' | '.join(cells)} | {'–' if alpha is None else f'{alpha:.2f}'} |")
    lines += ["", f"{result['raters']} raters, 0 to {BEST}: mean ± standard deviation (n); Krippendorff's alpha."]
    if result["careless"]:
        lines.append(f"Left out, for rating the same picture differently: {', '.join(result['careless'])}.")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "–"
    spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
    return f"{found['mean']:.2f}{spread} ({found['n']})"


def _json(path: Path) -> Any:
    if not path.is_file():
        raise PokediffError(f"{path} not found")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise PokediffError(f"{path} is not JSON ({error.msg})") from None


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Creatures</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 17px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 1.5rem auto; padding: 0 1rem; color: #222 }
img { image-rendering: pixelated; width: 256px; height: 256px; display: block; margin: 1rem auto; background: #fff }
#prompt { text-align: center; font-style: italic } .row { margin: .6rem 0 } .row span { display: block }
label { display: inline-block; min-width: 2.6rem; padding: .4rem 0; text-align: center; cursor: pointer }
button, input { font: inherit; padding: .4rem .8rem } button:disabled { opacity: .4 } #bar { color: #666 }
</style></head><body><div id="start"><h1>Creatures</h1>
<p>{{ pictures|length }} small pictures, drawn by programs. Say of each, from 0 (not at all) to {{ best }} (very much),
what you see. There is no right answer. You may close the page and go on later; at the end it saves a file for you to
send back.</p>
<p><input id="rater" placeholder="your name, if you like"> <button id="go">Begin</button></p></div>
<div id="ask" hidden><p id="bar"></p><img id="picture" alt="the picture to rate"><p id="prompt"></p>
<div id="rows"></div>
<p><button id="back">Back</button> <button id="next">Next</button></p></div>
<div id="end" hidden><h1>Thank you</h1><p><button id="save">Save my answers</button></p></div>
<script>
const survey = {{ identity|tojson }}, pictures = {{ pictures|tojson }}, order = {{ order|tojson }};
const criteria = {{ criteria|tojson }}, best = {{ best|tojson }}, $ = id => document.getElementById(id);
let state = { rater: "", at: 0, ratings: [] };
try { state = JSON.parse(localStorage.getItem(survey)) || state } catch {}
const keep = () => { try { localStorage.setItem(survey, JSON.stringify(state)) } catch {} };
const show = id => ["start", "ask", "end"].forEach(name => $(name).hidden = name !== id);
const answer = () => { const row = { id: order[state.at] };
  for (const name in criteria) { const box = document.querySelector(`input[name=${name}]:checked`);
    if (box) row[name] = +box.value } return row };
const complete = row => Object.keys(criteria).every(name => name in row);
function draw() {
  keep(); if (state.at >= order.length) return show("end");
  show("ask"); const picture = pictures[order[state.at]], known = state.ratings[state.at] || {};
  $("bar").textContent = `${state.at + 1} of ${order.length}`; $("back").disabled = state.at === 0;
  $("picture").src = "data:image/png;base64," + picture.png; $("prompt").textContent = picture.prompt;
  $("rows").replaceChildren(...Object.entries(criteria).map(([name, words]) => {
    const row = document.createElement("div"), span = document.createElement("span"); row.className = "row";
    span.textContent = words; row.append(span);
    for (let value = 0; value <= best; value++) { const label = document.createElement("label"),
      box = document.createElement("input"); box.type = "radio"; box.name = name; box.value = value;
      box.checked = known[name] === value; label.append(box, " " + value); row.append(label) }
    return row }));
  $("next").disabled = !complete(answer());
}
$("rows").onchange = () => { state.ratings[state.at] = answer(); keep(); $("next").disabled = !complete(answer()) };
$("next").onclick = () => { state.ratings[state.at] = answer(); state.at++; draw() };
$("back").onclick = () => { state.at--; draw() };
$("go").onclick = () => { state.rater = $("rater").value; draw() };
const result = () => JSON.stringify({ survey, rater: state.rater, ratings: state.ratings });
$("save").onclick = () => { const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([result()], { type: "application/json" }));
  link.download = `answers-${survey}-${(state.rater || "me").replace(/[^a-z0-9]+/gi, "-")}.json`; link.click() };
if (state.ratings.length) draw();
</script></body></html>
"""


def page(identity: str, pictures: Sequence[dict[str, Any]], order: Sequence[int]) -> str:
    """The survey as one self-contained file."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(identity=identity, pictures=pictures, order=order, criteria=CRITERIA, best=BEST)
