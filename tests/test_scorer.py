"""best_of: of several drawings the one for which a linear regression of the base's maps expects the highest rating."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_denoiser
from PIL import Image
from safetensors.torch import load_file, save_file

from pokediff.config import SampleConfig, Sampling
from pokediff.data.images import read_image
from pokediff.demo.studio import Studio
from pokediff.drawing.sample import BEST_OF, resolved, sample
from pokediff.drawing.sheets import weights_sha256
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.scorer import feature_count, map_statistics
from pokediff.progress import ProgressBar

PROMPTS, SEEDS = ["a red creature", "a blue creature", "a green creature"], [5, 6, 2**63 - 1]
QUICK = dict(num_inference_steps=3, exact=True)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def train_scorer():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("train_scorer")
    sys.path.remove(str(ROOT / "scripts"))


def redness(pipeline: PokeDiffPipeline, prompts: list[str], seeds: list[int]) -> np.ndarray:
    """(N,) what the ratings of these tests are about."""
    *_, last = pipeline.denoise(prompts, seeds, size=32)
    return (last.x0[:, 0] - last.x0[:, 1:3].mean(1)).mean((1, 2)).numpy()


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tiny_pipe, train_scorer, tmp_path_factory):
    """The tiny checkpoint, with a scorer that the script trains for somebody who likes red drawings."""
    place = tmp_path_factory.mktemp("scored")
    shutil.copytree(tiny_checkpoint, place / "tiny")
    prompts, seeds = [PROMPTS[k % 3] for k in range(48)], list(range(48))
    red = redness(tiny_pipe, prompts, seeds)
    ratings = np.digitize(red, np.quantile(red, [0.3, 0.7]))
    rows = zip(prompts, seeds, ratings, strict=True)
    text = "prompt,seed,rating\n" + "".join(f"{prompt},{seed},{rating}\n" for prompt, seed, rating in rows)
    (place / "ratings.csv").write_text(text)
    train_scorer.main([f"--checkpoint={place / 'tiny'}", f"--ratings={place / 'ratings.csv'}"])
    return place / "tiny"


@pytest.fixture(scope="module")
def pipe(folder) -> PokeDiffPipeline:
    loaded = PokeDiffPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_statistics_are_those_of_the_maps():
    denoiser = make_denoiser(widths=(16, 32, 48), attention=(False, False, True), blocks=(1, 2, 1))
    x0, text = torch.randn(3, 4, 32, 32).clamp(-1, 1), torch.randn(3, 384)
    features = map_statistics(denoiser, x0, text, 100.0)
    assert features.shape == (3, feature_count((16, 32, 48)))
    torch.testing.assert_close(map_statistics(denoiser, x0[1:2], text[1:2], 100.0), features[1:2])
    assert not any(module._forward_hooks for module in denoiser.modules())
    mean, deviation, most = features[:, :96].split(32, dim=1)  # of the second level, on the way down
    assert (deviation > 0).all()
    assert (most >= mean).all()


def test_features_are_of_the_drawings_that_were_rated(pipe, tiny_pipe, train_scorer):
    """In the maps of the base that is to choose, also where another one drew them."""
    base = copy.deepcopy(tiny_pipe.base)
    with torch.no_grad():
        base.out.weight.mul_(0.5)
    other = tiny_pipe.with_components(cascade=tiny_pipe.cascade.updated(Cascade({"base-32": base})))
    rated = [train_scorer.Rated(PROMPTS[0], seed, 1.0, 2.0) for seed in range(4)]
    features = train_scorer.drawn_features(pipe, other, rated, 300.0)
    text = other.encode_prompt(PROMPTS[:1] * 4)
    x0 = other.base_x0(text, [0, 1, 2, 3], Sampling(guidance_scale=2.0))
    np.testing.assert_allclose(features, map_statistics(pipe.base, x0, text, 300.0).numpy(), atol=1e-5)
    assert not np.allclose(features, train_scorer.drawn_features(pipe, pipe, rated, 300.0), atol=1e-2)


def test_it_expects_the_ratings_of_drawings_that_nobody_rated(pipe, train_scorer):
    prompts, seeds = PROMPTS * 8, list(range(1000, 1024))
    *_, last = pipe.denoise(prompts, seeds, size=32)
    expected = pipe.scorer(pipe.base, last.x0, pipe.encode_prompt(prompts)).numpy()
    assert np.corrcoef(expected, redness(pipe, prompts, seeds))[0, 1] > 0.7
    assert 0 < expected.mean() < 2


def test_the_regression_is_of_the_features_as_they_are(train_scorer):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 300)) * np.repeat([50, 1, 0.02], 100) + 10
    values = 3 + 2 * (features[:, 0] - 10) / 50 + (features[:, 200] - 10) / 0.02
    regression = train_scorer.RidgeRegression(features[:100], values[:100])
    assert np.corrcoef(regression(features[100:]), values[100:])[0, 1] > 0.3  # of 300 features two count
    assert regression(features[:100]).mean() == pytest.approx(values[:100].mean())
    assert regression(features[:100]).std() < values[:100].std() / 5  # the penalty


def test_drawings_of_a_prompt_are_compared_with_each_other(train_scorer):
    """What a prompt's drawings have in common does not count, and no prompt is in its own regression."""
    rng = np.random.default_rng(0)
    prompts = [f"prompt {k // 6}" for k in range(120)] + ["one of its kind"] * 3 + ["another"]
    groups = train_scorer.grouped(prompts)
    assert len(set(groups[:120])) == 20
    assert set(groups[120:]) == {0}
    features, easy = rng.normal(size=(124, 10)), rng.normal(size=21)[np.minimum(np.arange(124) // 6, 20)]
    features[:, 0] += 3 * easy
    ratings = 5 * easy + features[:, 1]  # of what the first feature shows, and within a prompt the second
    some, differences = train_scorer.centred(features, groups), train_scorer.centred(ratings, groups)
    np.testing.assert_allclose([differences[groups == group].mean() for group in set(groups)], 0, atol=1e-9)
    train_scorer.PENALTY, before = 10.0, train_scorer.PENALTY
    try:
        predicted = train_scorer.held_out_predictions(some, differences, prompts, rng)
    finally:
        train_scorer.PENALTY = before
    assert np.corrcoef(predicted[:120], differences[:120])[0, 1] > 0.9
    best = train_scorer.best_of_four(ratings[:120], predicted[:120], groups[:120], rng)
    assert best > ratings[:120].mean() + 0.7  # of four normal values the highest is 1.03 on average


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,seed\na cat,1\n", "ratings.csv:1: the header must have a column rating"),
        ("prompt,seed,rating\na cat,1,2\na cat,one,2\n", "ratings.csv:3: seed must be a whole number"),
        ("prompt,seed,rating\na cat,1,\n", "ratings.csv:2: .* rating and guidance_scale numbers"),
        ("prompt,seed,rating,guidance_scale\na cat,1,2,much\n", "ratings.csv:2: .* rating and guidance_scale numbers"),
        ("prompt,seed,rating\na cat,1,2\n", "has 1 ratings, at least 8"),
    ],
)
def test_a_table_without_ratings_is_refused(train_scorer, tmp_path, text, words):
    (tmp_path / "ratings.csv").write_text(text)
    with pytest.raises(PokediffError, match=words):
        train_scorer.read_ratings(tmp_path / "ratings.csv")


@pytest.mark.parametrize("others", [{}, {"guidance_scale": 9.0, "negative_prompt": "a yellow creature"}])
def test_the_drawing_with_the_highest_score_is_chosen(pipe, others):
    options = {**QUICK, **others}
    chosen = pipe.best_seeds(PROMPTS, SEEDS, best_of=4, **options)
    tried = np.array([[(seed + 1_000_000 * k) % 2**63 for k in range(4)] for seed in SEEDS])
    scores = np.zeros(tried.shape)
    for row, prompt in enumerate(PROMPTS):
        text = pipe.encode_prompt(prompt)
        for column, seed in enumerate(tried[row].tolist()):
            begun = [step.x0 for step in pipe.denoise(text, [seed], size=32, **options) if step.denoiser == "base-32"]
            scores[row, column] = pipe.scorer(pipe.base, begun[-1], text)
    assert chosen == tried[np.arange(3), scores.argmax(1)].tolist()
    assert len({int(column) for column in scores.argmax(1)}) > 1  # not always the first one
    assert pipe.best_seeds(PROMPTS, SEEDS, best_of=4, batch_size=5, **options) == chosen
    assert pipe.best_seeds(PROMPTS[1:], SEEDS[1:], best_of=4, **options) == chosen[1:]


def test_the_base_is_drawn_to_the_step_where_the_next_denoiser_takes_over(pipe):
    seen = []
    x0 = pipe.base_x0(PROMPTS, SEEDS, Sampling(size=64, **QUICK), on_step=seen.append)
    steps = list(pipe.denoise(PROMPTS, SEEDS, size=32, **QUICK))
    number = pipe.base_steps(Sampling(size=64, **QUICK))
    assert [step.denoiser for step in steps[: number + 1]] == ["base-32"] * number + ["refiner-32"]
    assert [step.sigma for step in seen] == [step.sigma for step in steps[:number]]
    torch.testing.assert_close(x0, steps[number - 1].x0, rtol=0, atol=0)


def test_the_best_of_one_is_that_one(pipe, tiny_pipe):
    assert pipe.best_seeds(PROMPTS, SEEDS) == tiny_pipe.best_seeds(PROMPTS, SEEDS) == SEEDS


def test_a_compiled_base_is_not_called(pipe, monkeypatch):
    """Compiled code does not see the hooks that read the maps."""

    def compiled(*_: object) -> None:
        raise AssertionError("the compiled denoiser was called")

    monkeypatch.setattr(pipe.base, "_compiled_call_impl", compiled)
    assert pipe.scorer(pipe.base, torch.zeros(1, 4, 32, 32), pipe.encode_prompt("a cat")).shape == (1,)


def test_it_chooses_in_half_precision(folder):
    half = PokeDiffPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.scorer.dtype == torch.bfloat16
    chosen = half.best_seeds(PROMPTS, SEEDS, best_of=3, num_inference_steps=3)
    assert all((one - first) % 1_000_000 == 0 for one, first in zip(chosen[:2], SEEDS, strict=False))


@pytest.mark.parametrize("size", [32, 64])
def test_it_is_drawn_at_every_size_and_again_by_its_seed(pipe, size):
    chosen = pipe.best_seeds(PROMPTS, SEEDS, best_of=3, **QUICK)
    drawn = pipe.generate(PROMPTS, SEEDS, size=size, best_of=3, **QUICK)
    np.testing.assert_array_equal(drawn, pipe.generate(PROMPTS, chosen, size=size, **QUICK))
    np.testing.assert_array_equal(
        drawn,
        np.concatenate(
            [pipe.generate([p], [s], size=size, best_of=3, **QUICK) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        ),
    )


def test_the_call_returns_the_seeds_that_were_chosen(pipe):
    called = pipe(PROMPTS, seed=3, best_of=3, size=32, output_type="np", **QUICK)
    assert called.seeds == pipe.best_seeds(PROMPTS, [3, 4, 5], best_of=3, **QUICK)
    again = pipe(PROMPTS[:1], seed=called.seeds[0], size=32, output_type="np", **QUICK)
    np.testing.assert_array_equal(again.images[0], called.images[0])
    by_generator = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), best_of=2, size=32, **QUICK)
    assert by_generator.seeds == pipe.best_seeds(
        PROMPTS[:1], [torch.Generator().manual_seed(1)], best_of=2, negative_prompts=[""], **QUICK
    )


def test_sample_draws_the_chosen_one_and_its_bar_counts_the_others(folder, pipe, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr("pokediff.drawing.sample.ProgressBar", lambda **o: bars.append(ProgressBar(**o)) or bars[-1])
    config = SampleConfig(
        prompt=(PROMPTS[0],), seed=4, checkpoint=str(folder), out=str(tmp_path / "out"), num_images_per_prompt=2,
        batch_size=2, raw=True, sampling=Sampling(best_of=3, size=32, **QUICK),
    )  # fmt: skip
    out = sample(config)
    steps = len(pipe.evaluations(Sampling(size=32, **QUICK)))
    assert bars[0].n == bars[0].total == steps + 1 + 3 * pipe.base_steps(Sampling(**QUICK))
    facts = json.loads((out / "sample.json").read_text())
    assert facts["settings"]["sampling"]["best_of"] == 3
    drawn = pipe.generate([PROMPTS[0]] * 2, [4, 5], size=32, best_of=3, **QUICK)
    for index in range(2):
        np.testing.assert_array_equal(read_image((out / f"{index:04}.png").read_bytes()), drawn[index])
    best = pipe.best_seeds([PROMPTS[0]] * 2, [4, 5], best_of=3, **QUICK)
    assert [row["seed"] for row in facts["pictures"]] == best != [4, 5]
    with Image.open(out / "large" / "0001.png") as picture:
        assert picture.text == {"prompt": PROMPTS[0], "seed": str(best[1])}
    (out / "0000.png").unlink()  # as if it had been interrupted
    again = json.loads((sample(config) / "sample.json").read_text())
    assert again["pictures"] == facts["pictures"]


def test_sample_chooses_by_itself_where_it_can_and_a_program_where_it_is_told(pipe, tiny_pipe):
    """Not where noise or a picture is given, or speed is asked for."""
    plain = SampleConfig(prompt=("a cat",))
    assert resolved(plain, pipe).sampling.best_of == BEST_OF == 8
    assert resolved(plain, tiny_pipe).sampling.best_of == 1
    for others in (dict(image="a.png"), dict(variation=0.2), dict(interpolate=3), dict(sampling=Sampling(best_of=1))):
        assert resolved(replace(plain, **others), pipe).sampling.best_of == 1
    assert resolved(replace(plain, sampling=Sampling(best_of=3)), pipe).sampling.best_of == 3
    assert pipe.resolved(Sampling()).best_of == 1
    fast = Cascade({**dict(pipe.cascade.items()), "fast": make_denoiser(steps=2, fast=True)})
    for wanted, number in ((False, BEST_OF), (True, 1)):
        config = replace(plain, sampling=Sampling(fast=wanted))
        assert resolved(config, pipe.with_components(cascade=fast)).sampling.best_of == number


def test_the_demo_draws_the_chosen_ones_and_says_their_seeds(folder, pipe, tiny_checkpoint):
    studio = Studio([folder, tiny_checkpoint])
    assert [studio.can_choose(name) for name in studio.checkpoints] == [True, False]
    config = studio.settings(prompt=(PROMPTS[0],), num_images_per_prompt=2, seed=4, best_of=3, size=32, raw=True,
                             **QUICK)  # fmt: skip
    best = pipe.best_seeds([PROMPTS[0]] * 2, [4, 5], best_of=3, **QUICK)
    *_, last = studio.draw(config)
    np.testing.assert_array_equal(last.x0, pipe.generate([PROMPTS[0]] * 2, best, size=32, **QUICK))
    *waiting, (jobs, pictures) = studio.draw_all(config)
    assert set(waiting) == {None}
    assert [job.seed for job in jobs] == best != [4, 5]
    np.testing.assert_array_equal(pictures, last.x0)
    with pytest.raises(PokediffError, match="drawings of a picture"):
        studio.settings(prompt=(PROMPTS[0],), best_of=100)


def test_another_scorer_is_another_drawing(folder, tmp_path):
    """But only where it chooses."""
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "scorer" / WEIGHTS
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    assert weights_sha256(tmp_path / "other") == weights_sha256(folder)
    assert weights_sha256(tmp_path / "other", with_scorer=True) != weights_sha256(folder, with_scorer=True)


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_checkpoint_without_one_says_so(tiny_pipe):
    with pytest.raises(PokediffError, match="best_of: this checkpoint has no scorer"):
        tiny_pipe("a cat", best_of=2)


def test_it_chooses_noise_so_none_can_be_given(pipe):
    _, noise = pipe.make_noise([1], 32)
    for given in ({"noise": noise}, {"image": np.zeros((32, 32, 4), np.uint8)}):
        with pytest.raises(PokediffError, match="leave out image and noise"):
            next(pipe.denoise(PROMPTS[:1], [1], size=32, best_of=2, **given))
    with pytest.raises(PokediffError, match="best_of"):
        SampleConfig(prompt=("a",), variation=0.2, sampling=Sampling(best_of=2))
    with pytest.raises(PokediffError, match="best_of"):
        Sampling(best_of=0)


def test_another_base_loses_the_scorer(pipe):
    assert pipe.with_components(scheduler=pipe.scheduler).scorer is pipe.scorer
    upscaler = Cascade({**dict(pipe.cascade.items()), "upscaler-64": make_denoiser(image_size=64, patch=2, upscale=2)})
    assert pipe.with_components(cascade=upscaler).scorer is pipe.scorer
    assert pipe.with_components(cascade=Cascade({"base-32": make_denoiser()})).scorer is None


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = PokeDiffPipeline.from_pretrained(tmp_path)
    assert again.best_seeds(PROMPTS, SEEDS, best_of=4, **QUICK) == pipe.best_seeds(PROMPTS, SEEDS, best_of=4, **QUICK)


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"features": 10**9}, {}, "features is 1000000000"),
        ({"features": "many"}, {}, "features is many"),
        ({"timestep": -1}, {}, "timestep must be 0"),
        ({"features": 12}, {"linear.weight": torch.zeros(1, 12)}, "it knows 12 features, but the base has"),
        ({}, {"linear.bias": torch.tensor([float("nan")])}, "not finite"),
        ({}, {"other": torch.zeros(1)}, "other is no tensor"),
    ],
)
def test_a_scorer_that_does_not_fit_is_refused(folder, tmp_path, config, tensors, words):
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "scorer"
    path.joinpath("config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **config}))
    save_file({**load_file(path / WEIGHTS), **tensors}, path / WEIGHTS)
    with pytest.raises(PokediffError, match=words):
        PokeDiffPipeline.from_pretrained(tmp_path / "other")
