from __future__ import annotations

import base64
import html
import json
import re
import subprocess

import numpy as np
import pytest
from conftest import COLORS, draw_creature, write_data

from pokediff.data.dataset import load_pictures
from pokediff.data.images import encode_png, enlarge, read_image
from pokediff.errors import PokediffError
from pokediff.evaluation.survey import (
    EXAMPLES,
    QUESTIONNAIRES,
    collect,
    inattention,
    krippendorff_alpha,
    make_survey,
    rows_of,
    system_names,
    table_of,
)

RATING, COUNT, LIKENESS = (QUESTIONNAIRES[name] for name in ("rating", "count", "likeness"))


@pytest.fixture
def folders(tmp_path):
    """Pictures of two systems."""
    for number, (name, color) in enumerate((("ours", "red"), ("theirs", "blue"))):
        (tmp_path / name).mkdir()
        rows = []
        for index in range(8):
            picture = draw_creature(COLORS[color], "round", 32, seed=100 * number + index)
            picture[index, 0] = (index, number, 0, 255)  # no two alike
            (tmp_path / name / f"{index}.png").write_bytes(encode_png(picture))
            rows.append({"file_name": f"{index}.png", "text": f"a {color} <creature> & {index}"})
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [tmp_path / "ours", tmp_path / "theirs"]


@pytest.fixture
def made(folders, tmp_path):
    """A survey of both, 6 pictures, 2 of them twice."""
    return make_survey(folders, tmp_path / "survey", number=6, repeats=2).parent


@pytest.fixture
def counted(folders, tmp_path):
    return make_survey(folders, tmp_path / "count", number=6, repeats=2, questions="count").parent


@pytest.fixture
def liked(folders, tmp_path):
    """A survey of likeness to drawn training pictures."""
    examples = [write_data(tmp_path / "known", 40)]
    options = dict(number=6, repeats=2, questions="likeness", examples=examples)
    return make_survey(folders, tmp_path / "likeness", **options).parent


def answers(made, name: str, rate, form=RATING) -> None:
    key = json.loads((made / "key.json").read_text())
    order = [*range(6), 0, 1]
    rows = [{"id": i, **{c: rate(key["systems"][i], place) for c in form.criteria}} for place, i in enumerate(order)]
    (made / f"{name}.json").write_text(json.dumps({"survey": key["survey"], "rater": name, "ratings": rows}))


def test_the_page_is_blind_whole_and_offline(made):
    page = (made / "survey.html").read_text()
    key = json.loads((made / "key.json").read_text())
    assert sorted(key["systems"]) == ["ours"] * 3 + ["theirs"] * 3
    assert "ours" not in page
    assert "theirs" not in page
    assert not re.search(r"https?://", page)
    order = json.loads(re.search(r"order = (\[.*?\])", page)[1])
    assert len(order) == 8
    assert set(order) == set(range(6))


def test_what_raters_answered_is_counted(made):
    answers(made, "ann", lambda system, place: 5 if system == "ours" else 1)
    answers(made, "bob", lambda system, place: 4 if system == "ours" else 2)
    answers(made, "sleeper", lambda system, place: 0 if place < 6 else 5)
    result = collect([made / "ann.json", made / "bob.json", made / "sleeper.json"], made)
    assert result["careless"] == ["sleeper (sleeper.json)"]
    found = result["criteria"]["prompt"]
    assert found["ours"] == {"mean": 4.5, "spread": pytest.approx(0.548, abs=1e-3), "n": 6}
    assert found["theirs"]["mean"] == 1.5
    assert 0.7 < found["agreement"] < 1
    assert "| 4.50 ± 0.55 (6) | 1.50 ± 0.55 (6) |" in table_of(result)


def test_faces_and_limbs_are_counted(counted):
    """Yes or no, blind; the share of yes has the interval of a share of the pictures, however many raters there are."""
    page = (counted / "survey.html").read_text()
    assert "ours" not in page
    assert '["no", "yes"]' in page
    for name in ("ann", "bob"):
        answers(counted, name, lambda system, place: int(system == "ours"), COUNT)
    answers(counted, "sleeper", lambda system, place: int(place < 6), COUNT)
    result = collect([counted / f"{name}.json" for name in ("ann", "bob", "sleeper")], counted)
    assert result["careless"] == ["sleeper (sleeper.json)"]
    found = result["criteria"]["face"]
    assert (found["ours"]["mean"], found["theirs"]["mean"]) == (1, 0)
    assert found["ours"]["low"] == pytest.approx(0.4385, abs=1e-3)  # Wilson's interval of 3 of 3
    assert found["agreement"] == 1
    assert json.loads((counted / "result.json").read_text()) == result
    row = rows_of(result)[0]
    assert row["ours"] == "1.00 [0.44, 1.00] (6)"
    assert row["criterion"] in table_of(result)


def test_likeness_begins_with_training_pictures(liked, made, folders, tmp_path):
    page = (liked / "survey.html").read_text()
    known = load_pictures(tmp_path / "known", 32).split("train").spread(EXAMPLES).straight()
    found = re.findall(r'alt="an example" src="data:image/png;base64,(.+?)"', page)
    assert len(found) == 24
    for data, picture in zip(found, known, strict=True):
        np.testing.assert_array_equal(read_image(base64.b64decode(data)), enlarge(picture, 8))
    assert not re.search(r"https?://|ours|theirs", page)
    answers(liked, "ann", lambda system, place: 5 if system == "ours" else 1, LIKENESS)
    table = table_of(collect([liked / "ann.json"], liked))
    assert "| It looks like the example pictures | 5.00 ± 0.00 (3) | 1.00 ± 0.00 (3) |" in table
    assert list(json.loads(re.search(r"criteria = (\{.*?\})", page)[1])) == list(LIKENESS.criteria)
    assert "Begin rating" not in (made / "survey.html").read_text()
    with pytest.raises(PokediffError, match="another survey"):  # of the same pictures
        collect([liked / "ann.json"], make_survey(folders, tmp_path / "s", number=6, repeats=2).parent)
    with pytest.raises(PokediffError, match="--questions likeness needs --examples"):
        make_survey(folders, tmp_path / "s", questions="likeness")


def test_systems_with_the_same_prompts_show_the_same_ones(folders, tmp_path):
    out = make_survey([folders[0], folders[0].parent / "theirs"], tmp_path / "s", number=6, repeats=0).parent
    page = (out / "survey.html").read_text()
    shown = sorted(re.findall(r"creature.{0,30}?(\d)\"", page))
    assert len(shown) == 6
    assert shown == sorted(2 * shown[::2])
    new, old = tmp_path / "new" / "animals", tmp_path / "old" / "animals"
    assert system_names([new, old]) == ["new", "old"]
    with pytest.raises(PokediffError, match="different names"):
        system_names([new, new])


def test_another_survey_s_answers_are_refused(made):
    (made / "x.json").write_text('{"survey": "other", "ratings": []}')
    with pytest.raises(PokediffError, match="another survey"):
        collect([made / "x.json"], made)
    (made / "y.json").write_text("oops")
    with pytest.raises(PokediffError, match="not JSON"):
        collect([made / "y.json"], made)


def test_agreement_is_the_textbook_s():
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: interval alpha 0.849.
    o = np.nan
    table = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, o, o, o],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, o, 3],
            [o, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, o],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, o],
        ]
    )
    assert krippendorff_alpha(table) == pytest.approx(0.849, abs=5e-4)
    assert krippendorff_alpha(np.ones((2, 3))) is None
    noise = np.random.default_rng(0).integers(0, 6, (4, 2000)).astype(float)
    assert krippendorff_alpha(noise) == pytest.approx(0, abs=0.03)


def test_inattention_is_the_difference_of_two_looks():
    rows = [{"id": 0, **dict.fromkeys(RATING.criteria, 1)}, {"id": 0, **dict.fromkeys(RATING.criteria, 4)}]
    assert inattention(rows, RATING) == 3
    assert inattention(rows[:1], RATING) == 0


def driven(chromium: str, made, script: str) -> dict:
    """What a script in the page leaves as text between RESULT and END."""
    page = (made / "survey.html").read_text().replace("</body>", f"<script>{script}</script></body>")
    (made / "driven.html").write_text(page)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={made / 'profile'}"]
    dom = subprocess.run(
        [*command, "--dump-dom", (made / "driven.html").as_uri()], capture_output=True, text=True, timeout=600
    ).stdout
    return json.loads(html.unescape(re.search(r"RESULT(.*)END", dom)[1]))


@pytest.mark.slow
def test_a_rater_goes_through_it_in_a_browser(chromium, made):
    # What a rater does, then the answers in place of the page.
    script = """
      document.getElementById("rater").value = "Eve"; document.getElementById("go").click();
      let seen = []; for (let step = 0; step < 8; step++) {
        if (!document.getElementById("next").disabled) throw "went on without an answer";
        seen.push(document.getElementById("prompt").textContent);
        for (const name in criteria) document.querySelector(`input[name=${name}][value="3"]`).click();
        if (step === 2) { document.getElementById("back").click(); document.getElementById("next").click() }
        document.getElementById("next").click() }
      const thanks = !document.getElementById("end").hidden;
      document.body.textContent = "RESULT" + JSON.stringify({ thanks, seen, answer: JSON.parse(result()) }) + "END";"""
    found = driven(chromium, made, script)
    assert found["thanks"]
    assert all(re.fullmatch(r"a (red|blue) <creature> & \d", prompt) for prompt in found["seen"])
    assert len(found["answer"]["ratings"]) == 8
    assert all(row[name] == 3 for row in found["answer"]["ratings"] for name in RATING.criteria)
    (made / "eve.json").write_text(json.dumps(found["answer"]))
    assert collect([made / "eve.json"], made)["criteria"]["beauty"]["ours"] == {"mean": 3.0, "spread": 0.0, "n": 3}


@pytest.mark.slow
def test_a_rater_sees_the_examples_first_and_again(chromium, liked):
    script = """
      const screen = () => [...document.querySelectorAll("body > div")].filter(one => !one.hidden).map(one => one.id);
      const click = id => { document.getElementById(id).click(); return [screen(), $("rate").textContent] };
      const before = screen(), seen = [click("go"), click("rate")];
      document.querySelector('input[name=likeness][value="4"]').click();
      seen.push(click("again"), click("rate"));
      const kept = document.querySelector("input[name=likeness]:checked").value;
      document.body.textContent = "RESULT" + JSON.stringify({ before, seen, kept }) + "END";"""
    found = driven(chromium, liked, script)
    assert found["before"] == ["start"]
    first, later = "Begin rating", "Continue rating"
    assert found["seen"] == [[["examples"], first], [["ask"], first], [["examples"], later], [["ask"], later]]
    assert found["kept"] == "4"
