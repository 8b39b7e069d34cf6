"""The report: whole, on a tiny random cascade and drawn data; recognition, silhouettes and the second judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import COLORS, ROOT, draw_creature, write_data

from pokediff.config import DiffusionConfig, EvaluateConfig, Sampling
from pokediff.data.dataset import load_pictures
from pokediff.data.images import encode_png, unpremultiply
from pokediff.data.records import Record, write_records
from pokediff.errors import PokediffError
from pokediff.evaluation import classifiers, recognition
from pokediff.evaluation.evaluate import FEWEST_DRAWN, evaluate, show
from pokediff.evaluation.features import CachedFeatures
from pokediff.evaluation.generators import Generated, denoisers_used, read_generated
from pokediff.evaluation.prompts import held_out_captions
from pokediff.evaluation.reference import Reference, check_disjoint
from pokediff.evaluation.report import GENERATED, PAIRS, REAL, Report, compare
from pokediff.model.diffusion import denoising_loss, make_noise_schedule, schedule_sigmas
from pokediff.model.pipeline import PokeDiffPipeline

THINGS = ("cat", "fish", "bird", "snake", "ghost", "dragon")
FEW = {  # a judge trained for a second, losses of few pictures, and few prompts of a kind
    "pokediff.evaluation.classifiers.STEPS": 20,
    "pokediff.evaluation.model_measures.PICTURES": 40,
    "pokediff.evaluation.prompts.TYPES": ("fire", "water"),
    "pokediff.evaluation.prompts.SEEDS_PER_PAIR": 1,
    "pokediff.evaluation.prompts.PROMPTS_REPEATED": 4,
    "pokediff.evaluation.recognition.SEEDS_PER_ANIMAL": 4,
}
RNG = np.random.default_rng(0)


def draw_thing(index: int, source: int, size: int = 32) -> np.ndarray:
    """Thing number `index` as source number `source` draws it: a polygon of its own in a colour of the source."""
    rgba = np.zeros((size, size, 4), np.uint8)
    angles = np.linspace(0, 2 * np.pi, index + 3, endpoint=False)
    reach = size * (0.3 + 0.02 * (source % 3))
    points = size / 2 + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    color = tuple(int(v) for v in np.random.default_rng(source).integers(60, 256, 3))
    cv2.fillPoly(rgba, [points.round().astype(np.int32)], (*color, 255))
    return rgba


def write_things(folder, sources: int = 6):
    """THINGS by every source, all in the training split."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index, name in enumerate(THINGS):
        for source in range(sources):
            file = f"images/{name}-{source}.png"
            (folder / file).write_bytes(encode_png(draw_thing(index, source)))
            kind = "animal" if index < 4 else "monster"
            fields = dict(name=name, kind=kind, style="emoji-flat", source=f"font{source}", family=f"emoji:{name}")
            records.append(Record(file, split="train", **fields))
    (folder / "rare.png").write_bytes(encode_png(draw_thing(0, 0)))
    records.append(Record("rare.png", name="okapi", kind="animal", style="emoji-flat", source="font0", split="train"))
    write_records(folder, records)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(name, value)
        yield


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    return write_things(tmp_path_factory.mktemp("things") / "data")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_checkpoint, features, things):
    """(config, folder of the report) of a tiny model on drawn data, with a quickly trained judge."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = write_data(folder / "data", number=320, spotted=True)
    config = EvaluateConfig(
        checkpoint=str(tiny_checkpoint),
        data=(str(data),),
        out=str(folder / "report"),
        number=24,
        styles=("artwork", "sprite"),
        features=(features,),
        concepts=(str(things),),
        batch_size=64,
        sampling=Sampling(size=64, num_inference_steps=2, precision="fp32", exact=True),
    )
    return config, evaluate(config)


# ------------------------------------------------------------------------------------------------------ the report


def figures_of(out) -> dict[str, dict]:
    return {figure["name"]: figure for figure in json.loads((out / "report.json").read_text())["figures"]}


@pytest.mark.slow
def test_a_report_is_complete(evaluated):
    _, out = evaluated
    report = json.loads((out / "report.json").read_text())
    by_name = {figure["name"]: figure for figure in report["figures"]}
    assert len(by_name) == len(report["figures"])
    for figure in report["figures"]:
        assert figure["n"] or figure["value"] is None
        assert figure["value"] is not None or "not measured" in figure["note"]
        if figure["low"] is not None:
            assert figure["low"] <= figure["value"] <= figure["high"]
    kid = by_name["kernel distance (KID, unbiased) x 1000"]
    assert kid["real"] < kid["value"] < 1.5 * kid["worthless"]
    c2st = by_name["accuracy of a two-sample classifier (C2ST)"]
    assert c2st["real"] < 0.75 < 0.9 < c2st["value"] <= 1  # a random network is no artist
    for name in ("copies in pixels", "the nearest concept is that of the prompt", "other animal, same seed"):
        assert 0 <= by_name[name]["value"] < 1
        assert by_name[name]["real"] is not None
    assert by_name["it sees the style of the caption"]["worthless"] == 0.5
    assert [row["style"] for row in report["tables"]["styles"]] == ["artwork", "sprite"]


def test_the_steps_that_are_guided_are_counted(tiny_pipe):
    def guided(**options: object) -> list[int]:
        return [row["guided"] for row in denoisers_used(tiny_pipe, Sampling(size=64, **options)).values()]

    steps = [step for step in tiny_pipe.evaluations(Sampling(size=64)) if step.denoiser == "base-32"]
    above = sum(step.sigma > 10 for step in steps)
    assert guided() == [len(steps), 0, 0]
    assert guided(guidance_interval=(10.0, 1000.0)) == [above, 0, 0] != guided()
    assert guided(guidance_scale=1.0) == [0, 0, 0]


@pytest.mark.slow
def test_a_report_names_what_drew(evaluated):
    _, out = evaluated
    report = json.loads((out / "report.json").read_text())
    settings, by_name = report["settings"], figures_of(out)
    assert settings["n_real"] >= 24
    assert settings["size"] == 64
    assert settings["sampling"]["guidance_scale"] == 1.5  # the checkpoint's own
    denoisers = settings["system"]["denoisers"]
    assert {name: row["size"] for name, row in denoisers.items()} == {
        "base-32": 32,
        "refiner-32": 32,
        "upscaler-64": 64,
    }
    assert by_name["evaluations of base-32"]["value"] == 2 * denoisers["base-32"]["evaluations"]  # guided: two a step
    assert by_name["evaluations of upscaler-64"]["value"] == denoisers["upscaler-64"]["evaluations"]
    assert list(report["curves"]["loss"]) == ["32", "64"]
    assert max(report["curves"]["loss"]["64"]["sigma"]) < 2 < max(report["curves"]["loss"]["32"]["sigma"])
    assert "Denoisers base-32 (32 px, " in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 8
    assert page.index(f"<h2>{PAIRS}") < page.index("<table>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_real_pictures_stand_above_those_drawn_for_their_captions(data, tmp_path):
    pictures = load_pictures(data, 16)
    reference = Reference(pictures, None, pictures.split("test"), pictures.split("train"))
    texts = held_out_captions(reference.real.captions, 12)
    drawn = np.zeros((12, 16, 16, 4), np.uint8)
    drawn[...] = np.arange(1, 13)[:, None, None, None]
    report = Report({})
    show(report, Generated(drawn, tuple(texts)), reference, tmp_path)
    assert list(report.pictures) == [PAIRS]
    _, both, columns = report.pictures[PAIRS]
    numbers = [int(picture.max()) - 1 for picture in both[columns:] if picture.any()]
    assert len(numbers) == len(set(texts[:8])) >= 2  # the first caption of eight pictures, some alike
    for number, above in zip(numbers, both, strict=False):
        captions = [
            several
            for several, real in zip(reference.real.captions, reference.pixels, strict=True)
            if (real == above).all()
        ]
        assert texts[number] in captions[0]
    report = Report({})
    show(report, Generated(drawn, ("something else",) * 12), reference, tmp_path)
    assert list(report.pictures) == [GENERATED, REAL]


@pytest.mark.slow
def test_losses_are_those_of_the_denoisers_that_draw(evaluated):
    """One noise level of the upscaler, by hand."""
    config, out = evaluated
    curve = json.loads((out / "report.json").read_text())["curves"]["loss"]["64"]
    pipeline = PokeDiffPipeline.from_pretrained(config.checkpoint)
    held_out = load_pictures(config.data, 64).split("test")
    level = int((schedule_sigmas(pipeline.scheduler) - curve["sigma"][4]).abs().argmin())
    x0 = torch.from_numpy(held_out.pixels[:]).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level))
    text = pipeline.encode_prompt([several[0] for several in held_out.captions])
    small = torch.nn.functional.avg_pool2d(x0, 2)
    steps = torch.full((len(x0),), level)
    with torch.inference_mode():
        upscaler = pipeline.cascade["upscaler-64"]
        loss = denoising_loss(make_noise_schedule(DiffusionConfig()), upscaler, x0, noise, steps, text, None, small)
    assert curve["held-out"][4]["value"] == pytest.approx(float(loss.mean()), rel=1e-4)


@pytest.mark.slow
def test_a_second_run_draws_and_extracts_nothing_and_adds_what_was_counted_by_eye(evaluated, monkeypatch):
    from pokediff.evaluation.survey import QUESTIONNAIRES, collect, make_survey

    config, out = evaluated
    before = figures_of(out)
    survey = make_survey([out / "animals"], out / "survey", number=10, repeats=0, questions="count").parent
    key = json.loads((survey / "key.json").read_text())
    rows = [{"id": i, **dict.fromkeys(QUESTIONNAIRES["count"].criteria, int(i < 4))} for i in range(10)]
    (survey / "a.json").write_text(json.dumps({"survey": key["survey"], "rater": "ann", "ratings": rows}))
    collect([survey / "a.json"], survey)
    monkeypatch.setattr("pokediff.model.pipeline.PokeDiffPipeline.generate", None)
    monkeypatch.setattr("pokediff.evaluation.features.FeatureNet.__call__", None)
    evaluate(config)
    after = figures_of(out)
    memory = "peak memory, MB"
    assert {k: v for k, v in after.items() if k != memory} == {k: v for k, v in before.items() if k != memory}
    table = json.loads((out / "report.json").read_text())["tables"]["counted by eye"]
    assert table[0]["animals"].startswith("0.40 [")
    assert "Counted by eye" in (out / "report.md").read_text()


@pytest.mark.slow
def test_other_settings_draw_again(evaluated, tmp_path):
    """Also: any object with `generate` is measured, at the size that is given."""
    config, _ = evaluated
    calls = []

    class Blobs:
        def generate(self, prompts, seeds, sampling=None):
            calls.append(len(prompts))
            shape = (sampling.size, sampling.size, 4)
            return np.stack([np.random.default_rng(seed).integers(0, 256, shape, np.uint8) for seed in seeds])

    def run(steps: int):
        from dataclasses import replace

        sampling = Sampling(size=16, num_inference_steps=steps)
        changed = replace(config, checkpoint="blobs", out=str(tmp_path), features=(), concepts=(), sampling=sampling)
        return evaluate(changed, Blobs())

    out = run(2)
    first = sum(calls)
    assert json.loads((out / "report.json").read_text())["settings"]["size"] == 16
    assert "denoising loss" not in (out / "report.md").read_text()
    run(2)
    assert sum(calls) == first
    run(3)
    assert sum(calls) == 2 * first


@pytest.mark.slow
def test_a_folder_of_copies_is_found(evaluated, tmp_path):
    config, _ = evaluated
    pictures = load_pictures(config.data, 16).split("train").spread(20)
    rows = []
    for index, picture in enumerate(pictures.pixels):
        (tmp_path / f"{index}.png").write_bytes(encode_png(unpremultiply(picture)))
        rows.append({"file_name": f"{index}.png", "text": pictures.captions[index][0]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = evaluate(
        EvaluateConfig(
            images=str(tmp_path), data=config.data, styles=config.styles, out=str(tmp_path / "r"), features=("none",)
        )
    )
    assert "--features none" in figures_of(out)["all of it"]["note"]
    found = {name: figure["value"] for name, figure in figures_of(out).items()}
    assert found["distance to the nearest training picture"] < 0.01
    assert found["nearer to a training picture than 99 % of real held-out ones"] > 0.5


@pytest.mark.slow
def test_folders_that_cannot_be_measured_say_so(evaluated, tmp_path):
    config, _ = evaluated
    with pytest.raises(PokediffError, match=r"sample\.json or metadata\.jsonl"):
        read_generated(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(PokediffError, match="not JSON"):
        read_generated(tmp_path)
    for side in (8, 9):
        (tmp_path / f"{side}.png").write_bytes(encode_png(np.zeros((side, side, 4), np.uint8)))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "8.png"}\n{"file_name": "9.png"}')
    with pytest.raises(PokediffError, match="squares of one size"):
        read_generated(tmp_path)
    with pytest.raises(PokediffError, match="of none"):
        evaluate(
            EvaluateConfig(images=config.out + "/pictures", data=config.data, styles=("none",), features=("none",))
        )


@pytest.mark.slow
def test_a_missing_part_is_an_error_before_the_first_drawing(evaluated, tmp_path, monkeypatch):
    config, _ = evaluated
    config = replace(config, out=str(tmp_path / "r"))
    monkeypatch.setattr(PokeDiffPipeline, "generate", None)
    for changes, words in (
        ({"features": ("magic",)}, "unknown kind"),
        ({"features": ("mobilenet_v2:none.safetensors",)}, "none.safetensors not found"),
        ({"lpips": "squeeze:none.safetensors"}, "none.safetensors not found"),
        ({"out": config.data[0]}, "lies in the data"),
    ):
        with pytest.raises(PokediffError, match=words):
            evaluate(replace(config, **changes))
    monkeypatch.setattr("pokediff.evaluation.evaluate.find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(PokediffError, match="needs jinja2: pip install"):
        evaluate(config)
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_as_few_pictures_as_can_be_measured_and_one_fewer(evaluated, tmp_path, features):
    config, out = evaluated
    config = replace(config, checkpoint=None, images=str(tmp_path / "d"), out=str(tmp_path / "r"), features=(features,))
    (tmp_path / "d").mkdir()
    rows = ["\ufeff"]
    for index, path in enumerate(sorted((out / "pictures").glob("*.png"))[:FEWEST_DRAWN]):
        shutil.copy(path, tmp_path / "d" / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "prompt": "a red creature"}))
        (tmp_path / "d" / "metadata.jsonl").write_text("\n\n".join(rows), encoding="utf-8")
        if index + 1 == FEWEST_DRAWN - 1:
            with pytest.raises(PokediffError, match=f"lists {index + 1} pictures; an evaluation needs at least"):
                evaluate(config)
    shutil.copytree(out / "cache", tmp_path / "r" / "cache")  # the real pictures' features
    kid = figures_of(evaluate(config))["kernel distance (KID, unbiased) x 1000"]
    assert kid["low"] <= kid["value"] <= kid["high"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "x"}', "names None and not a picture"),
        ('{"file_name": "../x.png"}', "and not a picture in this folder"),
        ('{"file_name": "x.png"}', "x.png: not a picture"),
        ("[1]", ":1: a row must be a JSON object"),
    ],
)
def test_a_row_without_a_picture_is_named(tmp_path, row, words):
    (tmp_path / "x.png").write_text("?")
    (tmp_path / "metadata.jsonl").write_text(row)
    with pytest.raises(PokediffError, match=words):
        read_generated(tmp_path)


def test_a_cut_cache_is_made_again(tmp_path):
    calls = []
    net = Mock(side_effect=lambda rgba, background: calls.append(1) or np.ones((2, 3), np.float32))
    net.name = "n"
    rgba = np.zeros((2, 4, 4, 4), np.uint8)
    for cut in (None, 0, 9, 40):
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:cut])
        np.testing.assert_array_equal(CachedFeatures(net, "white", tmp_path)(rgba), np.ones((2, 3)))
    assert len(calls) == 4


@pytest.mark.slow
def test_training_pictures_in_the_reference_are_refused(evaluated):
    config, _ = evaluated
    pictures = load_pictures(config.data, 16)
    training = pictures.split("train")
    check_disjoint(pictures.split("test"), training)
    with pytest.raises(PokediffError, match="of the reference are in the training split"):
        check_disjoint(pictures, training)
    reference = Reference(pictures, None, pictures.split("test"), training)
    for first, second in reference.halves:
        assert not set(reference.families[first]) & set(reference.families[second])
        assert len(first) + len(second) == len(reference.real)


@pytest.mark.slow
def test_reports_are_compared_only_when_they_may_be(evaluated, tmp_path):
    _, out = evaluated
    page = compare([out, out], tmp_path / "c")
    assert page.read_text().count("<th>report</th>") >= 2
    data = json.loads((out / "report.json").read_text())
    for name, change in (("other", {"background": "black"}), ("old", {})):
        (tmp_path / name).mkdir()
        figures = data["figures"] if change else [{"name": "x", "floor": 1}]
        changed = data | {"settings": data["settings"] | change, "figures": figures}
        (tmp_path / name / "report.json").write_text(json.dumps(changed))
    with pytest.raises(PokediffError, match="background is"):
        compare([out, tmp_path / "other"], tmp_path / "c")
    with pytest.raises(PokediffError, match="older version"):
        compare([out, tmp_path / "old"], tmp_path / "c")
    with pytest.raises(PokediffError, match=r"no report\.json"):
        compare([tmp_path], tmp_path / "c")


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(evaluated, tmp_path):
    config, out = evaluated
    report = str(tmp_path / "r")
    script = (
        "from pkgutil import resolve_name\n"
        "from pokediff.config import EvaluateConfig, Sampling\n"
        "from pokediff.evaluation.evaluate import evaluate\n"
        f"for name, value in {FEW!r}.items():\n"
        "    module, _, constant = name.rpartition('.')\n"
        "    setattr(resolve_name(module), constant, value)\n"
        f"evaluate(EvaluateConfig(checkpoint={config.checkpoint!r}, data={config.data!r}, out={report!r}, "
        f"number=24, styles={config.styles!r}, features=(), batch_size=5, sampling={config.sampling!r}))"
    )
    (tmp_path / "run.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    paths = sorted((out / "pictures").glob("*.png"))
    assert len(paths) == 24
    for path in paths:
        assert (tmp_path / "r" / "pictures" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "r" / "report.json").read_text())["settings"]["processes"] == 2


# ------------------------------------------------------------------------------------ recognition and silhouettes


def test_concepts_are_what_several_sources_draw(things):
    concepts = recognition.find_concepts(load_pictures(things, 32))
    assert concepts.names == tuple(sorted(THINGS))  # no okapi: one source draws it
    assert len(concepts.pictures) == 36
    texts, of = concepts.prompts()
    assert texts[0] == "flat emoji of a bird"
    assert len(texts) == len(THINGS) * recognition.SEEDS_PER_CONCEPT
    assert [concepts.names[i] in text for i, text in zip(of, texts, strict=True)] == [True] * len(texts)
    assert recognition.find_concepts(load_pictures(things, 32).where(lambda r: r.source != "font0")).names
    few = load_pictures(things, 32).where(lambda r: r.source in ("font0", "font1"))
    assert recognition.find_concepts(few) is None


def test_real_pictures_are_recognised_against_the_other_sources(things):
    """By silhouettes as features; a source whose pictures are all alike is not recognised by its own style."""
    concepts = recognition.find_concepts(load_pictures(things, 32))
    features = (concepts.pictures.straight()[..., 3] > 0).reshape(36, -1).astype(float)
    ranks = recognition.real_ranks(features, concepts)
    assert len(ranks) == 36
    assert (ranks == 0).mean() > 0.9
    chance = recognition.real_ranks(RNG.normal(size=(36, 50)), concepts)
    assert (chance == 0).mean() < 0.5


def test_ranks_count_the_nearer_centroids():
    centres = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [np.nan] * 3])
    found = recognition.ranks(
        np.array([[0.9, 0.2, 0.1], [0.9, 0.2, 0.1], [0.9, 0.2, 0.1]]), np.array([0, 1, 2]), centres
    )
    assert found.tolist() == [0, 1, 2]
    of, sources = np.array([0, 0, 0, 1]), np.array(["a", "a", "b", "a"])
    means = recognition.centroids(np.array([[0.0], [2], [5], [7]]), of, sources, 3)
    assert means[:2, 0].tolist() == [3, 7]  # the mean of a's mean, 1, and b's, 5
    assert np.isnan(means[2, 0])


def test_silhouettes_tell_the_word_from_the_seed():
    a, b = np.zeros((2, 4, 4), bool)
    a[:, :2], b[:, 1:3] = True, True
    assert recognition.overlap(a, b) == pytest.approx(1 / 3)
    assert recognition.overlap(a & False, b & False) == 1
    seeds, animals = 5, len(recognition.ANIMALS)

    def pictures(mask_of) -> np.ndarray:
        rgba = np.zeros((animals * seeds, 16, 16, 4), np.uint8)
        for animal in range(animals):
            for seed in range(seeds):
                rgba[animal * seeds + seed, ..., 3] = 255 * mask_of(animal, seed)
        return rgba

    def block(number: int) -> np.ndarray:
        mask = np.zeros((16, 16), bool)
        mask[number : number + 4] = True
        return mask

    words, noises = recognition.silhouette_overlaps(pictures(lambda animal, seed: block(animal)))
    assert (words.shape, noises.shape) == ((seeds,), (animals,))
    assert noises == pytest.approx(np.ones(animals))
    assert words.mean() < 0.4
    words, noises = recognition.silhouette_overlaps(pictures(lambda animal, seed: block(2 * seed)))
    assert words == pytest.approx(np.ones(seeds))
    assert noises.mean() < 0.4


# --------------------------------------------------------------------------------------------------- the second judge


def judged_pictures(number: int, first: int) -> tuple[np.ndarray, list[Record]]:
    pixels, records = [], []
    for index in range(first, first + number):
        shape, style = ("round", "square")[index % 2], ("artwork", "clip-art")[index // 2 % 2]
        picture = draw_creature(list(COLORS.values())[index % 3], shape, 16, seed=index)
        if style == "clip-art":
            picture[picture[..., 3] == 0] = (90, 90, 90, 255)
        pixels.append(picture)
        records.append(Record(f"{index}.png", style=style, kind=shape))
    return np.stack(pixels), records


@pytest.mark.slow
def test_the_judge_knows_styles_and_kinds_of_pictures_that_it_has_not_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(classifiers, "STEPS", 200)
    judge = classifiers.Judge(*judged_pictures(240, 0))
    assert judge.classes == {"style": ["clip art", "official artwork"], "kind": ["round", "square"]}
    pixels, records = judged_pictures(80, 1000)
    said = judge(pixels)
    for name, label in classifiers.LABELS.items():
        assert np.mean([label(record) == text for record, text in zip(records, said[name], strict=True)]) > 0.9
    trained = classifiers.Judge(*judged_pictures(240, 0), cache=tmp_path)(pixels)
    monkeypatch.setattr(classifiers.Judge, "_train", None)
    again = classifiers.Judge(*judged_pictures(240, 0), cache=tmp_path)(pixels)  # from its file
    assert (again["kind"] == trained["kind"]).all()
    assert (trained["kind"] == said["kind"]).all()
    with pytest.raises(ValueError, match="no two styles or kinds"):
        classifiers.Judge(*judged_pictures(16, 0))
