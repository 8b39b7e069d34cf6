"""A survey of human raters: an offline page that shows pictures blind and shuffled, and statistics of the answers.

    pokediff survey --images outputs/a outputs/b --out survey/        # survey/survey.html and survey/key.json
    pokediff survey --out survey/ --collect answers/*.json            # survey/result.json

Three questionnaires: "rating" and "likeness", four criteria from 0 to 5 for several people, and "count", yes or no, for
counting faces and limbs. Training pictures may be shown first; "likeness" compares with them. The page holds numbers
only; key.json, which raters do not receive, lists the system of each picture. Some pictures are shown twice, to detect
inattentive raters.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pokediff.data.dataset import load_pictures
from pokediff.data.images import encode_png, enlarge
from pokediff.errors import PokediffError
from pokediff.evaluation.distances import share_estimate
from pokediff.evaluation.generators import read_generated
from pokediff.evaluation.report import to_json
from pokediff.files import own_folder, read_json, require_file, write_whole

Questions = Literal["rating", "count", "likeness"]
RESULT, KEY = "result.json", "key.json"
SHOWN_SIDE = 256  # px
EXAMPLES = 24  # training pictures before the rating
SAMPLE = 256  # pictures that are loaded to choose them from


@dataclass(frozen=True)
class Questionnaire:
    criteria: dict[str, str]
    best: int  # answers go from 0 to this; 1: no or yes
    careless: float  # largest mean difference between two answers for one picture; above it a rater is inattentive


QUESTIONNAIRES: dict[Questions, Questionnaire] = {
    "rating": Questionnaire(
        {
            "creature": "It looks like one whole creature",
            "prompt": "It matches the description",
            "beauty": "It is well drawn",
            "novelty": "It is new to me: I know no similar creature",
        },
        best=5,
        careless=1.5,
    ),
    "count": Questionnaire(
        {
            "face": "It has a face: eyes, and a mouth or snout",
            "limbs": "Its limbs can be counted (yes if it is a thing without limbs)",
            "torn": "It is torn: patches, holes, loose pieces",
            "recognised": "It can be recognised without the description",
        },
        best=1,
        careless=0.4,
    ),
    "likeness": Questionnaire(
        {
            "clearness": "It is clear: no blur",
            "prompt": "It matches the description",
            "likeness": "It looks like the example pictures",
            "artefacts": "It has no artefacts",
        },
        best=5,
        careless=1.5,
    ),
}


def make_survey(
    folders: Sequence[Path],
    out: Path,
    number: int = 50,
    repeats: int = 5,
    seed: int = 0,
    questions: Questions = "rating",
    examples: Sequence[Path] = (),
) -> Path:
    """Write OUT/survey.html and OUT/key.json: `number` pictures, equally many of each system, `repeats` of them twice.

    Folders with the same prompts show the same ones. `examples` are data sets whose training pictures are shown first.
    Raises PokediffError when a folder has no pictures with prompts, two have the same name, or examples are missing.
    """
    names = system_names(folders)
    if questions == "likeness" and not examples:
        raise PokediffError("--questions likeness needs --examples: the data set that the pictures should look like")
    rng = np.random.default_rng(seed)
    share = -(-number // len(folders))
    systems = [read_generated(folder) for folder in folders]
    items: list[dict[str, Any]] = []
    for name, generated in zip(names, systems, strict=True):
        order = np.random.default_rng(seed).permutation(len(generated.pixels))
        for index in order[:share]:
            items.append({"system": name, "prompt": generated.prompts[index], "png": _png(generated.pixels[index])})
    items = [items[i] for i in rng.permutation(len(items))][:number]
    shown = list(range(len(items)))
    for again in rng.permutation(len(items))[:repeats]:
        later = rng.integers(shown.index(again) + 1, len(shown) + 1)  # after the first time
        shown.insert(int(later), int(again))
    pictures = [
        {"id": index, "prompt": item["prompt"], "png": base64.b64encode(item["png"]).decode()}
        for index, item in enumerate(items)
    ]
    first = example_pictures(examples, max(one.pixels.shape[1] for one in systems)) if examples else []
    identity = hashlib.sha256(questions.encode() + b"".join(item["png"] for item in items)).hexdigest()[:16]
    key = {"survey": identity, "questions": questions, "systems": [item["system"] for item in items]}
    with own_folder(out, KEY):
        write_whole(out / KEY, json.dumps(key, indent=1) + "\n")
        write_whole(out / "survey.html", page(identity, pictures, shown, QUESTIONNAIRES[questions], first))
    return out / "survey.html"


def example_pictures(folders: Sequence[Path], size: int) -> list[str]:
    """At most EXAMPLES training pictures of data sets, spread evenly, at `size` px, at most SHOWN_SIDE: PNG as base64.

    Raises PokediffError when they have none.
    """
    pictures = load_pictures(folders, min(size, SHOWN_SIDE), limit=SAMPLE).split("train").spread(EXAMPLES)
    if not len(pictures):
        raise PokediffError(f"--examples {' '.join(map(str, folders))}: no training pictures")
    return [base64.b64encode(_png(picture)).decode() for picture in pictures.straight()]


def _png(picture: np.ndarray) -> bytes:
    """A picture (S, S, 4) as PNG, enlarged by a whole factor to about SHOWN_SIDE."""
    return encode_png(enlarge(picture, max(1, SHOWN_SIDE // picture.shape[0])))


def system_names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: "new" and "old" of new/animals and old/animals."""
    paths = [folder.resolve() for folder in folders]
    for names in ([path.name for path in paths], [path.parent.name for path in paths]):
        if names and len(set(names)) == len(names):
            return names
    raise PokediffError("give one or several folders of pictures with --images, with different names")


def collect(answers: Sequence[Path], out: Path) -> dict[str, Any]:
    """Mean, spread, n and agreement for each criterion and system, from raters' files and OUT/key.json; for counts,
    also the share of yes with its interval. Written to OUT/result.json.

    Inattentive raters are excluded and listed. Raises PokediffError for files of another survey.
    """
    key = _json(out / KEY)
    questions = key.get("questions", "rating")
    form = QUESTIONNAIRES[questions]
    ratings: dict[str, dict[str, dict[int, float]]] = {name: {} for name in form.criteria}  # criterion, rater, picture
    careless = []
    for path in answers:
        answer = _json(path)
        if answer.get("survey") != key["survey"]:
            raise PokediffError(f"{path} answers another survey than {out / KEY}")
        rater = f"{answer.get('rater') or 'somebody'} ({path.name})"
        rows = answer["ratings"]
        if inattention(rows, form) > form.careless:
            careless.append(rater)
            continue
        for name in form.criteria:
            ratings[name][rater] = {}
            for row in rows:
                ratings[name][rater].setdefault(row["id"], row[name])  # the first of two answers counts
    systems = np.array(key["systems"])
    result: dict[str, Any] = {"questions": questions, "raters": len(answers) - len(careless), "careless": careless}
    result["criteria"] = {}
    for name, by_rater in ratings.items():
        table = np.full((len(by_rater), len(systems)), np.nan)
        for number, mine in enumerate(by_rater.values()):
            table[number, list(mine)] = list(mine.values())
        result["criteria"][name] = {
            "agreement": krippendorff_alpha(table),
            **{str(system): _summary(table[:, systems == system], form) for system in np.unique(systems)},
        }
    write_whole(out / RESULT, to_json(result))
    return result


def _summary(table: np.ndarray, form: Questionnaire) -> dict[str, float | int | None]:
    """Of the answers (raters, pictures) for one system, NaN where there is none."""
    values = table[~np.isnan(table)]
    if len(values) == 0:
        return {"mean": None, "spread": None, "n": 0}
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    summary: dict[str, float | int | None] = {"mean": float(values.mean()), "spread": spread, "n": len(values)}
    if form.best == 1:  # raters see the same pictures, so the interval is that of the pictures
        seen = table[:, ~np.isnan(table).all(0)]
        interval = share_estimate(np.nanmean(seen, axis=0))
        summary |= {"low": interval.low, "high": interval.high}
    return summary


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The results as table rows of a report: a row per criterion, a column per system."""
    form = QUESTIONNAIRES[result["questions"]]
    rows = []
    for name, found in result["criteria"].items():
        cells = {system: _cell(values) for system, values in found.items() if system != "agreement"}
        rows.append({"criterion": form.criteria[name], **cells, "raters": result["raters"]})
    return rows


def inattention(rows: Sequence[dict[str, Any]], form: Questionnaire) -> float:
    """Mean difference between the two answers for pictures shown twice; 0 when none was."""
    seen: dict[int, dict[str, Any]] = {}
    differences = []
    for row in rows:
        if row["id"] in seen:
            differences += [abs(row[name] - seen[row["id"]][name]) for name in form.criteria]
        seen.setdefault(row["id"], row)
    return float(np.mean(differences)) if differences else 0.0


def krippendorff_alpha(table: np.ndarray) -> float | None:
    """Agreement of raters (R, N), NaN where not rated: 1 perfect, 0 chance (Krippendorff 2011, interval distance).

    None where it is not defined: no picture rated by two, or all ratings equal.
    """
    columns = [column[~np.isnan(column)] for column in table.T]
    columns = [column for column in columns if len(column) > 1]
    if not columns:
        return None

    def spread(values: np.ndarray) -> float:
        return 2 * len(values) * float(((values - values.mean()) ** 2).sum())  # the squared differences of all pairs

    everything = np.concatenate(columns)
    observed = sum(spread(column) / (len(column) - 1) for column in columns) / len(everything)
    expected = spread(everything) / (len(everything) * (len(everything) - 1))
    return None if expected == 0 else 1 - observed / expected


def table_of(result: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    form = QUESTIONNAIRES[result["questions"]]
    systems = [name for name in next(iter(result["criteria"].values())) if name != "agreement"]
    lines = ["| | " + " | ".join(systems) + " | agreement |", "|" + " --- |" * (len(systems) + 2)]
    for name, found in result["criteria"].items():
        cells = [_cell(found[system]) for system in systems]
        alpha = found["agreement"]
        lines.append(f"| {form.criteria[name]} | {' | '.join(cells)} | {'–' if alpha is None else f'{alpha:.2f}'} |")
    scale = "share of yes [95 % interval]" if form.best == 1 else f"0 to {form.best}: mean ± standard deviation"
    lines += ["", f"{result['raters']} raters, {scale} (n); Krippendorff's alpha."]
    if result["careless"]:
        lines.append(
            f"Excluded as inattentive (different answers for the same picture): {', '.join(result['careless'])}."
        )
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "–"
    if "low" in found:
        return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}] ({found['n']})"
    spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
    return f"{found['mean']:.2f}{spread} ({found['n']})"


def _json(path: Path) -> Any:
    require_file(path)
    return read_json(path)


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Creatures</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 17px/1.5 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem; color: #222 }
body > div { max-width: 34rem; margin: auto } img { image-rendering: pixelated; background: #fff }
img { width: 256px; height: 256px } #picture { display: block; margin: 1rem auto }
#examples { max-width: 66rem } #examples div { display: flex; flex-wrap: wrap; gap: .5rem }
@media (max-width: 36rem) { #examples img { width: 128px; height: 128px } }
#prompt { text-align: center; font-style: italic } .row { margin: .6rem 0 } .row span { display: block }
label { display: inline-block; min-width: 2.6rem; padding: .4rem 0; text-align: center; cursor: pointer }
button, input { font: inherit; padding: .4rem .8rem } button:disabled { opacity: .4 } #bar { color: #666 }
</style></head><body><div id="start"><h1>Creatures</h1>
<p>{{ pictures|length }} small pictures, drawn by programs. Say of each {% if best == 1 %}whether the sentences are true
of it.{% else %}from 0 (not at all) to {{ best }} (very much) how true the sentences are of it.{% endif %} There is no
right answer. You may close the page and continue later; at the end it saves a file for you to send back.</p>
<p><input id="rater" placeholder="your name, if you like"> <button id="go">Begin</button></p></div>
{% if examples %}<div id="examples" hidden><h1>Examples</h1>
<p>The programs learnt from pictures like these. Look at them before you rate; you can return to them at any time.</p>
<div>{% for png in examples %}<img alt="an example" src="data:image/png;base64,{{ png }}">{% endfor %}</div>
<p><button id="rate">Begin rating</button></p></div>{% endif %}
<div id="ask" hidden><p id="bar"></p><img id="picture" alt="the picture to rate"><p id="prompt"></p>
<div id="rows"></div>
<p><button id="back">Back</button> <button id="next">Next</button>
{% if examples %}<button id="again">Examples</button>{% endif %}</p></div>
<div id="end" hidden><h1>Thank you</h1><p><button id="save">Save my answers</button></p></div>
<script>
const survey = {{ identity|tojson }}, pictures = {{ pictures|tojson }}, order = {{ order|tojson }};
const criteria = {{ criteria|tojson }}, best = {{ best|tojson }}, $ = id => document.getElementById(id);
let state = { rater: "", at: 0, ratings: [] };
try { state = JSON.parse(localStorage.getItem(survey)) || state } catch {}
const keep = () => { try { localStorage.setItem(survey, JSON.stringify(state)) } catch {} };
const show = id => document.querySelectorAll("body > div").forEach(screen => screen.hidden = screen.id !== id);
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
      const word = best === 1 ? ["no", "yes"][value] : value;
      box.checked = known[name] === value; label.append(box, " " + word); row.append(label) }
    return row }));
  $("next").disabled = !complete(answer());
}
$("rows").onchange = () => { state.ratings[state.at] = answer(); keep(); $("next").disabled = !complete(answer()) };
$("next").onclick = () => { state.ratings[state.at] = answer(); state.at++; draw() };
$("back").onclick = () => { state.at--; draw() };
$("go").onclick = () => { state.rater = $("rater").value; if ($("examples")) show("examples"); else draw() };
if ($("examples")) { $("rate").onclick = draw;
  $("again").onclick = () => { $("rate").textContent = "Continue rating"; show("examples") } }
$("picture").onload = () => $("picture").style.imageRendering = $("picture").naturalWidth > 256 ? "auto" : "";
const result = () => JSON.stringify({ survey, rater: state.rater, ratings: state.ratings });
$("save").onclick = () => { const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([result()], { type: "application/json" }));
  link.download = `answers-${survey}-${(state.rater || "me").replace(/[^a-z0-9]+/gi, "-")}.json`; link.click() };
if (state.ratings.length) draw();
</script></body></html>
"""


def page(
    identity: str,
    pictures: Sequence[dict[str, Any]],
    order: Sequence[int],
    form: Questionnaire,
    examples: Sequence[str] = (),
) -> str:
    """The survey as one self-contained file."""
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # not sort_keys: the criteria stay in their order
    values = dict(identity=identity, pictures=pictures, order=order, examples=examples)
    return environment.from_string(PAGE).render(**values, criteria=form.criteria, best=form.best)
