"""Preferences: pairs of a checkpoint's own drawings, of which its scorer rates one higher."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tiny import tiny_config, tiny_stage

from pokediff.config import DiffusionConfig, DistillConfig, PreferenceConfig, Sampling
from pokediff.errors import PokediffError
from pokediff.model.diffusion import cosine_timestep, make_noise_schedule
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.scorer import Scorer, feature_count
from pokediff.training.build import prepare
from pokediff.training.loop import drawing_seconds, opening_seconds
from pokediff.training.objectives import Batch, Pairs, denoising
from pokediff.training.preference import Preference, draw_pairs, used_timesteps, with_pairs
from pokediff.training.stages import start, train

SCHEDULE = make_noise_schedule(DiffusionConfig())
STEPS = range(500, 1000)
PROMPTS = ["a red creature", "a blue creature", "a green creature", "a yellow creature"]


@pytest.fixture(scope="module")
def judged(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with a scorer that likes some maps of its base, and others not."""
    pipeline = PokeDiffPipeline.from_pretrained(tiny_checkpoint)
    scorer = Scorer(feature_count(pipeline.base.config.widths))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scorer.linear.weight.copy_(torch.randn(scorer.linear.weight.shape, generator=generator))
    pipeline.register_modules(scorer=scorer)
    folder = tmp_path_factory.mktemp("judged") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(judged) -> PokeDiffPipeline:
    return PokeDiffPipeline.from_pretrained(judged)


def preference_stage(pipe: PokeDiffPipeline, folder, **changes):
    """A stage that trains the base of a checkpoint on with its own pairs."""
    config = pipe.base.config
    model = {key: config[key] for key in ("widths", "blocks", "attention", "embedding_dim", "patch", "norm_free")}
    model |= {key: config[key] for key in ("guidance_scale", "sigma_data", "gate", "steps")}
    stage = tiny_stage(preference=PreferenceConfig(str(folder), pairs=16, best_of=4))
    return replace(stage, image_size=32, model=replace(stage.model, **model), **changes)


def random_pairs(number: int, timesteps: torch.Tensor | None = None) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    better, worse = (torch.rand(number, 4, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    return Pairs(better, worse, torch.randn(number, 6, generator=generator), timesteps)


def test_the_loss_is_how_much_more_the_error_has_fallen_for_the_worse_drawing():
    """By errors of x0 that are known: the denoiser returns a shifted copy of either picture."""
    pairs = random_pairs(3, torch.tensor([600, 700, 800]))
    batch = Batch(pairs.better, torch.randn(3, 4, 8, 8), torch.tensor([600, 700, 800]), pairs.text, pairs=pairs)
    both = torch.cat([pairs.better, pairs.worse])

    class Shifted(torch.nn.Module):
        def __init__(self, better: float, worse: float) -> None:
            super().__init__()
            self.by = torch.tensor([better] * 3 + [worse] * 3).view(-1, 1, 1, 1)

        def forward(self, x, *_):
            return both + self.by if len(x) == 6 else batch.x0

    weight = 1 / (1 - SCHEDULE.alphas_cumprod[pairs.timesteps])  # of the error of x0: that of v
    for better, worse in ((0.1, 0.3), (0.3, 0.1), (0.2, 0.2)):
        objective = Preference(denoising(SCHEDULE), SCHEDULE, Shifted(0.2, 0.2), STEPS, beta=50.0)
        risen = weight * ((better**2 - 0.04) - (worse**2 - 0.04))
        expected = (1 + (50.0 * risen).exp()).log() / 50.0
        torch.testing.assert_close(objective(Shifted(better, worse), batch), expected)
    with torch.no_grad():  # validation
        assert objective(Shifted(0.1, 0.1), batch).tolist() == [0.0] * 3


def test_a_pair_is_the_best_and_the_worst_of_several_drawings(pipe):
    text = pipe.encode_prompt(PROMPTS)
    pairs = draw_pairs(pipe, text, 4)
    for row in range(len(PROMPTS)):
        seeds = [row + 1_000_000 * k for k in range(4)]
        x0 = pipe.base_x0(text[row].expand(4, -1), seeds, Sampling(size=32))
        ratings = pipe.scorer(pipe.base, x0, text[row].expand(4, -1))
        for picture, seed in ((pairs.better, seeds[ratings.argmax()]), (pairs.worse, seeds[ratings.argmin()])):
            *_, last = pipe.denoise(text[row : row + 1], [seed], Sampling(size=32))
            torch.testing.assert_close(picture[row], last.x0[0], rtol=0, atol=1e-4)
    assert torch.equal(pairs.text, text)


def test_without_a_scorer_there_are_no_pairs(tiny_pipe):
    with pytest.raises(PokediffError, match="has no scorer"):
        draw_pairs(tiny_pipe, tiny_pipe.encode_prompt(PROMPTS), 4)


def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_processes():
    pairs = random_pairs(16)

    def batch(number: int) -> Batch:
        return Batch(
            torch.zeros(number, 4, 8, 8), torch.zeros(number, 4, 8, 8), torch.zeros(number), torch.zeros(number)
        )

    whole = with_pairs(batch(8), pairs, STEPS, 1, 7, 0, 1).pairs
    halves = [with_pairs(batch(4), pairs, STEPS, 1, 7, rank, 2).pairs for rank in range(2)]
    for name in ("better", "worse", "text", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    assert ((whole.timesteps >= 500) & (whole.timesteps < 1000)).all()
    mirrored = 0
    for better, worse, text in zip(whole.better, whole.worse, whole.text, strict=True):
        row = int((pairs.text == text).all(1).nonzero())
        is_mirrored = not torch.equal(better, pairs.better[row])
        expected = [x[row].flip(-1) if is_mirrored else x[row] for x in (pairs.better, pairs.worse)]
        assert torch.equal(better, expected[0])
        assert torch.equal(worse, expected[1])
        mirrored += is_mirrored
    assert 0 < mirrored < 8
    other = with_pairs(batch(8), pairs, STEPS, 1, 8, 0, 1).pairs
    assert not torch.equal(other.text, whole.text)


def test_pairs_are_compared_at_the_noise_at_which_the_base_draws(tiny_pipe):
    base, below = tiny_pipe.base.config, tiny_pipe.cascade["refiner-32"].below
    steps = used_timesteps(tiny_pipe, "base-32")
    assert steps == range(math.floor(cosine_timestep(below, 1000, *base.noise_range)), 1000)
    assert used_timesteps(tiny_pipe, "refiner-32").start == 0
    drawn = [each.timestep for each in tiny_pipe.evaluations(Sampling(size=32)) if each.denoiser == "base-32"]
    assert min(drawn) >= steps.start


@pytest.mark.slow
def test_drawings_after_the_training_are_rated_higher(data, judged, pipe, tmp_path):
    text, seeds = pipe.encode_prompt(PROMPTS * 8), list(range(5000, 5032))

    def rating(base) -> float:
        drawn = PokeDiffPipeline.from_pretrained(judged)
        drawn.base.load_state_dict(base.state_dict())
        return pipe.scorer(pipe.base, drawn.base_x0(text, seeds, Sampling(size=32)), text).mean().item()

    stage = preference_stage(pipe, judged, max_steps=30, learning_rate=1e-3, ema_decay=0.8)
    trained = train(tiny_config(data, tmp_path / "run", {"base-32": stage}, base=str(judged)))
    assert 0 <= json.loads((trained / "log.jsonl").read_text().splitlines()[0])["preference_agreement"] <= 1
    after = PokeDiffPipeline.from_pretrained(trained)
    assert list(after.cascade) == list(pipe.cascade)
    assert rating(after.base) > rating(pipe.base)


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_same_denoiser(data, judged, pipe, tmp_path):
    stages = {"base-32": preference_stage(pipe, judged, max_steps=2, checkpoint_every=1)}
    runs = [tiny_config(data, tmp_path / name, stages, base=str(judged)) for name in ("whole", "stopped")]
    whole, stopped = train(runs[0]), train(replace(runs[1], max_minutes=1e-9))
    train(runs[1], resume="auto")
    file = "cascade/base-32/diffusion_pytorch_model.safetensors"
    assert (whole / file).read_bytes() == (stopped / file).read_bytes()


def test_the_time_for_the_pairs_is_told(data, judged, pipe, tmp_path):
    """Of each of 16 captions four drawings up to where the base hands over, and two whole ones."""
    stage = preference_stage(pipe, judged)
    run = start(tiny_config(data, tmp_path / "run", {"base-32": stage}, base=str(judged)), tmp_path / "run")
    prepared, small = prepare(run, "base-32"), Sampling(size=32)
    whole, begun = (drawing_seconds(prepared, prepared.pipeline, small, 1.0, only) for only in (None, "base-32"))
    assert 0 < begun < whole
    assert opening_seconds(run, prepared, 1.0) == pytest.approx(16 * (4 * begun + 2 * whole))


def test_impossible_preferences_are_refused(data, judged, pipe, tmp_path):
    with pytest.raises(PokediffError, match="at least 2"):
        PreferenceConfig("folder", best_of=1)
    with pytest.raises(PokediffError, match="not implemented for students"):
        preference_stage(pipe, judged, distill=DistillConfig(), fast=True)
    stages = {"base-16": preference_stage(pipe, judged)}
    with pytest.raises(PokediffError, match="has no base-16"):
        train(tiny_config(data, tmp_path / "out", stages))


def test_weights_go_a_part_of_the_way(judged, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    interpolate = importlib.import_module("interpolate_weights")
    here, there = (shutil.copytree(judged, tmp_path / name) for name in ("here", "there"))
    file = f"cascade/base-32/{interpolate.WEIGHTS}"
    before = load_file(here / file)
    interpolate.save_file({key: 3 * value for key, value in before.items()}, there / file, {"format": "pt"})
    interpolate.main([str(here), str(there), "base-32", "--share", "0.25"])
    after = load_file(here / file)
    assert {value.dtype for value in after.values()} == {torch.float16}
    for key, value in before.items():
        torch.testing.assert_close(after[key].float(), 1.5 * value.float(), rtol=1e-3, atol=1e-6)
    PokeDiffPipeline.from_pretrained(here)
