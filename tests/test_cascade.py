"""Which denoiser is used where, what an upscaler makes of a picture, and a cascade on disk."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLORS, fit, gaussian_denoiser, make_denoiser, pipeline_of

from pokediff.config import Sampling
from pokediff.data.images import to_model
from pokediff.errors import PokediffError
from pokediff.model.cascade import HIGH_NOISE, Cascade, guidance_at, guided, in_fours
from pokediff.model.checkpoint import INDEX, write_part_index
from pokediff.model.denoiser import Denoiser
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.samplers import SAMPLERS

SHAPE = dict(widths=(8,), attention=(False,), blocks=(1,), embedding_dim=8, text_dim=8)


def denoiser(size: int, below: float | None = None, **changes) -> Denoiser:
    return make_denoiser(image_size=size, below=below, **{**SHAPE, **changes})


class Constant(Denoiser):
    """Predicts the same grey everywhere, and counts its calls."""

    def forward(self, x, timestep, text=None, augment=None, low_res=None):
        self.calls = [*getattr(self, "calls", []), (float(torch.as_tensor(timestep).flatten()[0]), len(x))]
        return torch.full_like(x, 0.5)


class Copier(Denoiser):
    """Predicts the small picture, enlarged."""

    def forward(self, x, timestep, text=None, augment=None, low_res=None):
        return low_res.repeat_interleave(2, -1).repeat_interleave(2, -2)


def copying() -> PokeDiffPipeline:
    copier = Copier(image_size=32, patch=2, upscale=2, below=2.0, steps=4, **SHAPE)
    return pipeline_of(base_16=gaussian_denoiser(), upscaler_32=copier)


# ----------------------------------------------------------------------------------------------------- which one where


@pytest.fixture(scope="module")
def large() -> Cascade:
    """Seven denoisers: two sizes with refiners, a fast base, and an upscaler by four beside the one by two."""
    return Cascade(
        {
            "base-16": denoiser(16),
            "refiner-16": denoiser(16, 1.0),
            "refiner-16-late": denoiser(16, 0.02),
            "base-16-fast": denoiser(16, fast=True, steps=4),
            "upscaler-32": denoiser(32, 2.0, upscale=2, patch=2),
            "refiner-32": denoiser(32, 0.3, upscale=2, patch=2),
            "upscaler-64": denoiser(64, 4.0, upscale=4, patch=4),
        }
    )


@pytest.mark.parametrize(
    ("size", "sigma", "fast", "name"),
    [
        (16, 50.0, False, "base-16"),
        (16, 1.0, False, "base-16"),
        (16, 0.99, False, "refiner-16"),
        (16, 0.01, False, "refiner-16-late"),
        (16, 50.0, True, "base-16-fast"),
        (16, 0.5, True, "refiner-16"),
        (32, 1.9, False, "upscaler-32"),
        (32, 0.2, False, "refiner-32"),
        (32, 0.2, True, "refiner-32"),
        (64, 3.9, False, "upscaler-64"),
    ],
)
def test_the_denoiser_trained_on_the_least_noise_is_used(large, size, sigma, fast, name):
    assert large.expert(size, sigma, fast) == name


def test_a_cascade_knows_its_sizes_and_legs(large):
    assert large.sizes == (16, 32, 64)
    assert large.default_size == 64
    assert [large.legs(size) for size in large.sizes] == [(16,), (16, 32), (16, 64)]
    assert large.has_fast
    assert large.leading(16).config.steps == 15
    assert large.leading(16, fast=True).config.steps == 4
    assert large.leading(32).below == 2.0
    small = Cascade({"base-16": denoiser(16), "upscaler-32": denoiser(32, 2.0, upscale=2, patch=2)})
    assert small.default_size == 32
    assert not small.has_fast


def test_a_cascade_of_few_step_denoisers_alone_needs_no_word_for_them():
    parts = {"base-16-fast": denoiser(16, fast=True, steps=4), "refiner-16-fast": denoiser(16, 1.0, fast=True)}
    pipe = pipeline_of(**{name.replace("-", "_"): part for name, part in parts.items()})
    assert pipe.resolved(Sampling()).sampler == "ddim"
    for fast in (False, True):
        names = [step.denoiser for step in pipe.evaluations(Sampling(size=16, fast=fast))]
        assert names == ["base-16-fast"] * 2 + ["refiner-16-fast"] * 2


def test_what_a_cascade_cannot_do_is_refused(large):
    with pytest.raises(PokediffError, match="size 48: this checkpoint draws 16, 32, 64 px"):
        large.legs(48)
    with pytest.raises(PokediffError, match="no denoiser of 32 px for sigma 3"):
        large.expert(32, 3.0)
    with pytest.raises(PokediffError, match="no few-step denoisers"):
        Cascade({"base-16": denoiser(16)}).leading(16, fast=True)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("fast", [False, True])
def test_any_number_of_denoisers_draws(large, size, fast):
    """Every step is done by the denoiser that the plan names, at its own size, with less noise than the one before."""
    pipe = pipeline_of(**{name.replace("-", "_"): part for name, part in large.items()})
    sampling = Sampling(size=size, fast=fast)
    steps = list(pipe.denoise(["", ""], [1, 2], sampling))
    plan = pipe.evaluations(sampling)
    assert [(s.x.shape[-1], s.timestep, s.sigma, s.denoiser) for s in steps[:-1]] == [
        (e.size, e.timestep, e.sigma, e.denoiser) for e in plan
    ]
    assert [step.index for step in steps] == list(range(len(plan) + 1))
    assert steps[-1].x0.shape == (2, 4, size, size)
    assert (steps[-1].denoiser, steps[-1].sigma) == (None, 0.0)
    used = list(dict.fromkeys(e.denoiser for e in plan))
    expected = ["base-16-fast", "refiner-16"] if fast else ["base-16", "refiner-16"]
    assert used == expected + {16: [], 32: ["upscaler-32", "refiner-32"], 64: ["upscaler-64"]}[size]
    assert sum(e.size == 16 for e in plan) == (4 if fast else 15)
    for leg in large.legs(size):
        sigmas = [e.sigma for e in plan if e.size == leg]
        assert sigmas == sorted(sigmas, reverse=True)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_refiner_is_used_below_its_sigma_and_without_guidance(guidance_scale):
    refiner = Constant(image_size=16, below=0.8, **SHAPE)
    pipe = pipeline_of(base=gaussian_denoiser(guidance_scale=1.5), refiner=refiner)
    sampling = Sampling(num_inference_steps=20, guidance_scale=guidance_scale, precision="fp32")
    steps = list(pipe.denoise([""] * 3, [0, 1, 2], sampling))
    little = [(step.timestep, 3) for step in steps[:-1] if step.sigma < 0.8]
    assert 0 < len(little) < 20
    assert refiner.calls == little
    for step in steps[:-1]:
        assert (step.x0 == 0.5).all() == (step.sigma < 0.8) == (step.denoiser == "refiner")
    torch.testing.assert_close(steps[-1].x0, torch.full((3, 4, 16, 16), 0.5))


def test_guidance_moves_x0_away_from_the_negative_and_runs_the_denoiser_once_or_twice():
    part = denoiser(16)
    x, text, negative = torch.randn(2, 4, 16, 16), torch.randn(2, 8), torch.randn(2, 8)
    timestep = torch.tensor(300.0)
    with torch.no_grad():
        wanted, unwanted = part(x, timestep, text), part(x, timestep, negative)
        for scale in (1.0, 3.0):
            expected = unwanted + scale * (wanted - unwanted)
            torch.testing.assert_close(guided(part, scale, x, timestep, text, negative), expected, rtol=0, atol=1e-5)
    counter = Constant(image_size=16, **SHAPE)
    guided(counter, 1.0, x, timestep, text, negative)
    guided(counter, 2.0, x, timestep, text, negative)
    assert counter.calls == [(300.0, 2), (300.0, 4)]


def test_guidance_is_stronger_where_shapes_are_decided():
    part = denoiser(16, guidance_scale=2.0, high_noise_guidance=4.0)
    assert [guidance_at(part, sigma) for sigma in (0.1, HIGH_NOISE, 10.1, 90)] == [2, 2, 5, 5]
    assert [guidance_at(part, 50, scale) for scale in (1.0, 1.5, 0.0)] == [1, 3, 0]
    assert guidance_at(denoiser(16, guidance_scale=2.0), 50) == 2
    assert [guidance_at(part, sigma, 3.0, (1, 20)) for sigma in (0.9, 1, 20, 21)] == [1, 3, 9, 1]
    assert [guidance_at(part, sigma, 3.0, (10, 100)) for sigma in (100.0000186, 100.1)] == [9, 1]  # as schedulers round
    assert guidance_at(denoiser(16, below=1.0, high_noise_guidance=4.0), 0.5, 3.0) == 1  # never guided


def test_guidance_scales_of_single_rows():
    part = denoiser(16)
    x, text, negative = torch.randn(2, 4, 16, 16), torch.randn(2, 8), torch.randn(2, 8)
    timestep = torch.tensor(300.0)
    with torch.no_grad():
        both = guided(part, torch.tensor([1.0, 5.0])[:, None, None, None], x, timestep, text, negative)
        for row, scale in enumerate((1.0, 5.0)):
            alone = guided(part, scale, x, timestep, text, negative)[row]
            torch.testing.assert_close(both[row], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [1, 3, 4, 9])
def test_in_fours_the_network_always_gets_four_rows(number):
    counter = Constant(image_size=16, **SHAPE)
    given = [torch.arange(number * 16.0).view(number, 16), torch.arange(number)]
    out = in_fours(lambda x, y: counter(x, 0.0) * 0 + x + y[:, None], given)
    torch.testing.assert_close(out, given[0] + given[1][:, None])
    assert all(rows == 4 for _, rows in counter.calls)


# ------------------------------------------------------------------------------------------------------------ upscaling


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_the_small_picture_is_drawn_and_then_enlarged(sampler, steps):
    pipe, alone = copying(), pipeline_of(base=gaussian_denoiser())
    sampling = Sampling(sampler=sampler, num_inference_steps=steps)
    done = list(pipe.denoise([""], [3], sampling))
    small = [step for step in done[:-1] if step.denoiser == "base-16"]
    large = [step for step in done[:-1] if step.denoiser == "upscaler-32"]
    assert small
    assert all(step.x.shape == step.x0.shape == (1, 4, 16, 16) and step.low_res is None for step in small)
    assert all(step.x.shape == step.x0.shape == (1, 4, 32, 32) for step in large)
    assert 0 < large[0].sigma < 2  # where its training starts; every sampler goes down from there
    assert all(after.sigma <= before.sigma for before, after in pairwise(large))
    if sampler != "heun":  # which evaluates twice a step
        assert (len(small), len(large)) == (steps, 4)
    *_, last = alone.denoise([""], [3], sampling)
    for step in large:
        torch.testing.assert_close(step.low_res, last.x0, atol=1e-5, rtol=0)
    # diffusers' DDIM ends at timestep 0, with sigma 0.006, when its steps do not divide the schedule
    enlarged = last.x0.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(done[-1].x0, enlarged, atol=0.03 if sampler == "ddim" else 2e-3, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_seed_gives_the_same_creature_at_every_size(tiny_pipe, precision):
    """The 64 px picture enlarges exactly the 32 px picture of its seed."""
    options = dict(num_inference_steps=4, precision=precision)
    *_, small = tiny_pipe.denoise(["a red creature"], [5], size=32, **options)
    first = next(s for s in tiny_pipe.denoise(["a red creature"], [5], size=64, **options) if s.low_res is not None)
    assert torch.equal(first.low_res, small.x0)


@pytest.mark.slow
def test_a_trained_upscaler_enlarges_the_picture_that_it_is_given(tiny_pipe):
    """In pure noise it sees the small picture that it is given, not the one that the noisy picture held."""
    colors = torch.tensor([[*rgb, 255] for rgb in COLORS.values()], dtype=torch.uint8)
    x0 = to_model(colors[:, None, None].expand(4, 64, 64, 4).contiguous(), "rgba")
    upscaler = make_denoiser(3, image_size=64, patch=4, upscale=2, below=2.0, **{**SHAPE, "widths": (32,)})
    fit(upscaler, x0, torch.zeros(4, 8), steps=200)
    shown = F.avg_pool2d(x0, 2).roll(1, 0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = upscaler(noise, torch.tensor(650.0), torch.zeros(4, 8), None, shown)
    distances = (F.avg_pool2d(seen, 2)[:, None] - shown[None]).square().mean((2, 3, 4))
    assert (distances.argmin(1) == torch.arange(4)).all()


def test_outside_the_mask_the_picture_stays_at_every_size(tiny_pipe):
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.integers(0, 256, (64, 64, 3)), np.full((64, 64, 1), 255)], -1).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[5:40, 7:41] = True
    drawn = tiny_pipe.generate(["a red creature"], [0], image=image, mask=mask)[0]
    assert np.abs(drawn[~mask].astype(int) - image[~mask]).max() <= 1
    assert np.abs(drawn[mask].astype(int) - image[mask]).mean() > 20


def test_a_small_strength_keeps_detail_that_the_small_picture_cannot_hold():
    """This upscaler copies the small picture; detail of the image survives only where little noise is added."""
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


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.6, 1.0])
def test_an_upscaler_takes_its_steps_over_the_noise_that_the_strength_asks_for(steps, strength):
    pipe = copying()
    pipe.cascade["upscaler-32"].register_to_config(steps=steps)
    noise = [e.timestep for e in pipe.evaluations(Sampling(size=32), strength) if e.size == 32]
    assert len(noise) == steps
    assert noise[0] < 1000 * strength
    if strength < 0.5:
        assert noise[0] > 600 * strength


# -------------------------------------------------------------------------------------------------------------- on disk


def weights(cascade: Cascade) -> dict[str, torch.Tensor]:
    return cascade.state_dict()


def test_saved_and_loaded_in_order(large, tmp_path):
    large.save_pretrained(tmp_path)
    loaded = Cascade.from_pretrained(tmp_path)
    assert list(loaded) == list(large)
    assert [part.config.fast for _, part in loaded.items()] == [part.config.fast for _, part in large.items()]
    assert all(torch.equal(value, weights(large)[name]) for name, value in weights(loaded).items())


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden", ""])
def test_a_list_that_names_a_folder_outside_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"denoisers": [name]}))
    with pytest.raises(PokediffError, match="not a valid denoiser name"):
        Cascade.from_pretrained(tmp_path)


def test_a_part_is_put_into_its_base(tiny_checkpoint, tiny_pipe, tmp_path):
    """A folder with one denoiser of the same name and a new one: loading it gives the whole, which is saved whole."""
    other = make_denoiser(7, image_size=64, patch=2, upscale=2, below=2.0, steps=3)
    late = make_denoiser(8, image_size=64, patch=2, upscale=2, below=1.0)
    part = tmp_path / "part"
    Cascade({"upscaler-64": other, "refiner-64": late}).save_pretrained(part / "cascade")
    write_part_index(part, "../link")
    (tmp_path / "link").symlink_to(tiny_checkpoint)
    assert json.loads((part / INDEX).read_text())["base"] == "../link"
    assert sorted(path.name for path in part.rglob("*.safetensors")) == ["diffusion_pytorch_model.safetensors"] * 2

    loaded = PokeDiffPipeline.from_pretrained(part)
    assert list(loaded.cascade) == ["base-32", "refiner-32", "upscaler-64", "refiner-64"]
    for name, value in weights(loaded.cascade["upscaler-64"]).items():
        assert torch.equal(value, other.state_dict()[name])
    for name, value in weights(loaded.cascade["base-32"]).items():
        assert torch.equal(value, tiny_pipe.cascade["base-32"].state_dict()[name])
    used = {e.denoiser for e in loaded.evaluations(Sampling(num_inference_steps=20))}
    assert used == set(loaded.cascade)

    loaded.save_pretrained(tmp_path / "whole")
    whole = PokeDiffPipeline.from_pretrained(tmp_path / "whole")
    assert list(whole.cascade) == list(loaded.cascade)
    assert (tmp_path / "whole" / "text_encoder" / "model.safetensors").is_file()
    options = dict(num_inference_steps=2, precision="fp32", exact=True)
    np.testing.assert_array_equal(
        whole.generate(["a red creature"], [1], **options), loaded.generate(["a red creature"], [1], **options)
    )


def test_a_part_whose_base_is_missing_or_itself_is_refused(tmp_path):
    for base, words in ((".", "cannot be loaded"), ("../nothing", "no checkpoint")):
        write_part_index(tmp_path, base)
        with pytest.raises(PokediffError, match=words):
            PokeDiffPipeline.from_pretrained(tmp_path)


def test_the_noise_of_a_base_does_not_depend_on_the_sizes_that_follow(tiny_pipe):
    generators, small = tiny_pipe.make_noise([1, 2], 32)
    _, both = tiny_pipe.make_noise([1, 2], 64)
    assert [len(generators), len(small), len(both)] == [2, 1, 2]
    assert torch.equal(small[0], both[0])
    assert both[1].shape == (2, 4, 64, 64)
    assert both[1].std().item() == pytest.approx(1, abs=0.05)
    assert abs(torch.corrcoef(torch.stack([both[1][0, :, ::2, ::2].flatten(), both[0][0].flatten()]))[0, 1]) < 0.1
    assert math.isclose(float(both[1][0].mean()), 0, abs_tol=0.05)
