from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_pipeline import gaussian

from pokediff.config import DatasetConfig, DiffusionConfig, ModelConfig, RefineConfig, SampleConfig
from pokediff.data.images import read_image
from pokediff.drawing.attribution import word_influence
from pokediff.drawing.sample import sample
from pokediff.errors import PokediffError
from pokediff.model.denoiser import Unet
from pokediff.model.pipeline import SAMPLERS, UPSCALER_SHARE, PokeDiffPipeline
from pokediff.training.distillation import recipe
from pokediff.training.loop import load_start, make_low_res, make_noise_schedule, make_unet, train, with_base

SMALL = dict(widths=(32,), attention=(False,), blocks=(1,), embedding_dim=64, patch=2)
SHAPE = ModelConfig(**SMALL, plain=True, sigma_data=0.3, upscale=2)


def upscaling(base, data, out, **changes):
    values = dict(
        dataset=DatasetConfig(image_size=32),
        model=SHAPE,
        diffusion=DiffusionConfig(prediction_type="sample"),
        refine=RefineConfig(str(base), below=2.0),
    )
    return tiny_config(data, out, **{**values, **changes})


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return train(tiny_config(data, tmp_path_factory.mktemp("run") / "base"))


@pytest.fixture(scope="module")
def enlarging(data, base, tmp_path_factory):
    return train(upscaling(base, data, tmp_path_factory.mktemp("run") / "upscaled"))


class Copier(Unet):
    """Sees just the small picture, larger."""

    def forward(self, x, timestep, text=None, augment=None, low_res=None):
        return low_res.repeat_interleave(2, -1).repeat_interleave(2, -2)


def copying():
    pipe = gaussian()
    size = dict(image_size=32, patch=2, widths=(32,), attention=(False,), blocks=(1,))
    pipe.register_modules(upscaler=Copier(**size, upscale=2, sigma_data=0.3))
    pipe.register_to_config(upscale_below=2.0)
    return pipe


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_what_was_drawn_is_enlarged(sampler, num_steps):
    pipe, plain = copying(), gaussian()
    steps = list(pipe.denoise([""], [3], sampler=sampler, num_steps=num_steps))
    small = [step for step in steps[:-1] if step.low_res is None]
    large = [step for step in steps[:-1] if step.low_res is not None]
    assert len(steps) == pipe.count_steps(sampler, num_steps)
    assert pipe.asked(sampler, num_steps) == ["unet"] * len(small) + ["upscaler"] * len(large)
    assert [step.sigma for step in steps[:-1]] == pytest.approx(pipe.sigmas(sampler, num_steps))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert all(step.x.shape == step.x0.shape == (1, 4, 32, 32) for step in steps)
    assert small
    assert 0 < large[0].sigma < 2  # where it begins; euler_a and ddpm go down from there too
    assert all(after.sigma <= before.sigma for before, after in pairwise(large))
    if sampler != "heun":  # which evaluates twice
        assert len(steps) - 1 == max(2, num_steps)
    *_, alone = plain.denoise(
        [""], [3], sampler=sampler, num_steps=max(1, num_steps - max(1, round(UPSCALER_SHARE * num_steps)))
    )
    expected = alone.x0.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(steps[-1].x0, expected, atol=2e-3, rtol=0)


def test_small_pictures_are_shown_with_noise_in_training(data, tmp_path):
    config = upscaling("unused", data, tmp_path)
    x0 = torch.full((4000, 4, 4, 4), 0.5)
    noisy = make_low_res(x0, config, torch.Generator().manual_seed(0), len(x0), slice(None))
    strength = (noisy - 0.5).flatten(1).std(1)
    assert noisy.shape == (4000, 4, 2, 2)
    assert strength.min() < 0.01
    assert strength.mean() == pytest.approx(0.125, rel=0.05)  # evenly up to 0.25
    half = make_low_res(x0[2000:], config, torch.Generator().manual_seed(0), len(x0), slice(2000, None))
    torch.testing.assert_close(half, noisy[2000:])  # of two processes the second sees what one alone would
    assert make_low_res(x0, replace(config, model=replace(SHAPE, upscale=1)), torch.Generator(), 1, slice(None)) is None


def test_a_folder_of_both_draws_the_larger_pictures(base, enlarging, tmp_path):
    pipe = PokeDiffPipeline.from_pretrained(enlarging)
    assert (pipe.image_size, pipe.upscale, set(pipe.networks)) == (32, 2, {"unet", "upscaler"})
    assert json.loads((enlarging / "model_index.json").read_text())["upscale_below"] == 2.0
    before = PokeDiffPipeline.from_pretrained(base).unet.state_dict()
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)
    out = sample(SampleConfig(prompt=("a red creature",), checkpoint=str(enlarging), out=str(tmp_path), num_steps=4))
    assert (out / "0000.png").is_file()


def test_the_small_picture_is_what_it_enlarges(data, base, tmp_path):
    """After two hundred steps what it sees in noise alone is the picture that it is shown, and not another."""
    trained = train(upscaling(base, data, tmp_path / "run", max_steps=200, learning_rate=3e-3))
    pipe = PokeDiffPipeline.from_pretrained(trained)
    prompts = ["a red creature", "a blue creature", "a green creature", "a yellow creature"]
    steps = list(pipe.denoise(prompts, range(4), num_steps=10))
    first = next(step for step in steps if step.low_res is not None)
    shown = first.low_res.roll(1, 0)  # of another picture than x holds
    noise = torch.randn(first.x.shape, generator=torch.Generator().manual_seed(0))
    text = pipe.encode_prompt([""] * 4)
    seen = pipe.upscaler(noise, torch.tensor(first.timestep), text, None, shown)
    distances = (torch.nn.functional.avg_pool2d(seen, 2)[:, None] - shown[None]).square().mean((2, 3, 4))
    assert (distances.argmin(1) == torch.arange(4)).all()


def test_outside_the_mask_the_picture_stays(enlarging):
    pipe = PokeDiffPipeline.from_pretrained(enlarging)
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.integers(0, 256, (32, 32, 3)), np.full((32, 32, 1), 255)], -1).astype(np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[5:20, 7:21] = True
    drawn = pipe.generate(["a red creature"], [0], image=image, mask=mask, num_steps=5)[0]
    assert np.abs(drawn[~mask].astype(int) - image[~mask]).max() <= 1
    assert np.abs(drawn[mask].astype(int) - image[mask]).mean() > 20


def test_little_strength_leaves_the_picture_nearly_as_it_is():
    """A network that copies the small picture would lose all detail; what is not noised away is still there."""
    pipe = copying()
    image = np.full((32, 32, 4), 255, np.uint8)
    image[::2, :, :3] = 0
    apart = {}
    for strength in (0.05, 1.0):
        steps = pipe.denoise([""], [0], image=image, strength=strength)
        first = next(step for step in steps if step.low_res is not None)
        pixels = (first.x * (1 + first.sigma**2) ** 0.5)[0, :3]
        apart[strength] = float(pixels[:, 1::2].mean() - pixels[:, ::2].mean())
    assert apart[0.05] > 1.5 > 0.3 > abs(apart[1.0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_picture_does_not_depend_on_its_company(enlarging, precision):
    pipe = PokeDiffPipeline.from_pretrained(enlarging)
    prompts, seeds = ["a red creature", "a blue creature", "a green creature"], [1, 2, 3]
    together = pipe.generate(prompts, seeds, num_steps=4, precision=precision)
    alone = [pipe.generate([p], [s], num_steps=4, precision=precision)[0] for p, s in zip(prompts, seeds, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_words_are_left_out_where_the_small_picture_is_drawn(base, enlarging):
    small = word_influence(PokeDiffPipeline.from_pretrained(base), "a red creature", 0, num_steps=15)
    large = word_influence(PokeDiffPipeline.from_pretrained(enlarging), "a red creature", 0, num_steps=20)
    assert large.picture.shape == (32, 32, 4)
    assert large.sigmas == small.sigmas
    np.testing.assert_allclose(large.maps[..., ::2, ::2], small.maps, atol=1e-5)
    np.testing.assert_allclose(large.maps[..., 1::2, 1::2], small.maps, atol=1e-5)


def test_a_walk_ends_at_the_pictures_of_its_prompts(enlarging, tmp_path):
    settings = dict(checkpoint=str(enlarging), num_steps=4, precision="fp32")
    two = ("a red creature", "a blue creature")
    walk = sample(SampleConfig(prompt=two, interpolate=3, out=str(tmp_path / "walk"), **settings))
    alone = sample(SampleConfig(prompt=two[1:], seed=1, out=str(tmp_path / "end"), **settings))
    ends = [read_image((folder / name).read_bytes()) for folder, name in ((walk, "0002.png"), (alone, "0000.png"))]
    assert np.abs(ends[0].astype(int) - ends[1]).max() <= 1


def test_over_a_student_it_leaves_the_steps_that_were_taught(data, base, tmp_path):
    student = PokeDiffPipeline.from_pretrained(base)
    for steps in range(1, 9):
        student.register_to_config(num_steps=steps)
        student.save_pretrained(tmp_path / "student")
        config = upscaling(tmp_path / "student", data, tmp_path / "out")
        whole = with_base(make_unet(config, student.unet.config.text_dim), make_noise_schedule(config), config)
        assert whole.asked().count("unet") == steps
        assert whole.asked().count("upscaler") >= 1


def test_it_goes_on_from_another_upscaler_and_a_student_is_not_taught_through_it(data, base, enlarging, tmp_path):
    config = upscaling(base, data, tmp_path / "run", start_from=str(enlarging))
    before = PokeDiffPipeline.from_pretrained(enlarging).upscaler
    for name, weight in load_start(str(enlarging), config).state_dict().items():
        torch.testing.assert_close(weight, before.state_dict()[name], rtol=0, atol=0)
    with pytest.raises(PokediffError, match="enlarges the pictures of another checkpoint"):
        recipe(enlarging, 4, str(data))


def test_a_killed_run_goes_on(data, base, tmp_path):
    config = upscaling(base, data, tmp_path / "a", max_steps=6)
    whole = train(config)
    train(replace(config, out=str(tmp_path / "b"), max_steps=3))
    resumed = train(replace(config, out=str(tmp_path / "b")), resume="auto")
    for name, weight in PokeDiffPipeline.from_pretrained(whole).upscaler.state_dict().items():
        again = PokeDiffPipeline.from_pretrained(resumed).upscaler.state_dict()[name]
        torch.testing.assert_close(again, weight, rtol=0, atol=0)


def test_what_does_not_fit_is_named(data, base, tmp_path):
    with pytest.raises(PokediffError, match="image_size: 64 here, 32 in"):
        train(upscaling(base, data, tmp_path / "out", dataset=DatasetConfig(image_size=64)))
    with pytest.raises(PokediffError, match=r"model\.upscale must divide the patch, 2"):
        upscaling(base, data, tmp_path, model=replace(SHAPE, upscale=3))
    with pytest.raises(PokediffError, match=r"model\.upscale needs refine\.base"):
        upscaling(base, data, tmp_path, refine=None)
