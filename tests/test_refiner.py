from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_pipeline import gaussian

from pokediff.config import DatasetConfig, DiffusionConfig, ModelConfig, RefineConfig, SampleConfig
from pokediff.drawing.sample import sample, weights_sha256
from pokediff.errors import PokediffError
from pokediff.model.denoiser import Unet, cosine_sigmas
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.loop import make_noise_schedule, make_pipeline, make_unet, train, trained_timesteps

SMALL = dict(widths=(32,), attention=(False,), blocks=(1,), embedding_dim=64, patch=1)
SHAPE = ModelConfig(**SMALL, plain=True, sigma_data=0.3)


def refining(base, data, out, **changes):
    values = dict(model=SHAPE, diffusion=DiffusionConfig(prediction_type="sample"), refine=RefineConfig(str(base), 0.8))
    return tiny_config(data, out, **{**values, **changes})


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return train(tiny_config(data, tmp_path_factory.mktemp("run") / "base"))


@pytest.fixture(scope="module")
def refined(data, base, tmp_path_factory):
    return train(refining(base, data, tmp_path_factory.mktemp("run") / "refined"))


class Painter(Unet):
    """Sees the same grey everywhere, and counts how often it was asked, always about one picture."""

    def forward(self, x, timestep, text=None, augment=None):
        assert len(x) == 4  # padded in float32: guidance would ask about eight
        self.asked = [*getattr(self, "asked", []), float(timestep)]
        return torch.full_like(x, 0.5)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_refiner_is_asked_where_the_noise_is_little_and_only_there(guidance_scale):
    pipe = gaussian()  # its network predicts v; a preconditioned one beside it x0
    painter = Painter(image_size=16, widths=(32,), attention=(False,), blocks=(1,), sigma_data=0.3)
    pipe.register_modules(refiner=painter)
    pipe.register_to_config(refine_below=0.8)
    settings = dict(num_steps=20, guidance_scale=guidance_scale, precision="fp32")
    steps = list(pipe.denoise([""] * 3, [0, 1, 2], **settings))
    little = [step.timestep for step in steps[:-1] if step.sigma < 0.8]
    assert 0 < len(little) < 20
    assert painter.asked == little
    assert pipe.asked(num_steps=20) == ["unet"] * (20 - len(little)) + ["refiner"] * len(little)
    for step in steps[:-1]:
        assert (step.x0 == 0.5).all() == (step.sigma < 0.8)
    torch.testing.assert_close(steps[-1].x0, torch.full((3, 4, 16, 16), 0.5))


def test_it_learns_only_what_it_is_asked_for(data, tmp_path):
    config = refining("unused", data, tmp_path)
    last = trained_timesteps(config) - 1
    sigmas = cosine_sigmas(torch.arange(1000).double(), 1000, *config.diffusion.range)
    assert sigmas[last - 1] < 0.8 <= sigmas[last]
    assert trained_timesteps(replace(config, refine=None)) == 1000


def test_the_base_is_published_with_it_and_as_it_was(base, refined, tmp_path):
    index = json.loads((refined / "model_index.json").read_text())
    assert index["refine_below"] == 0.8
    before, after = PokeDiffPipeline.from_pretrained(base), PokeDiffPipeline.from_pretrained(refined)
    for name, weight in before.unet.state_dict().items():
        torch.testing.assert_close(after.unet.state_dict()[name], weight, rtol=0, atol=0)
    assert before.refiner is None
    assert set(after.networks) == {"unet", "refiner"}
    drawn = [pipe.generate(["a red creature"], [3]) for pipe in (before, after)]
    assert (drawn[0] != drawn[1]).any()
    out = sample(SampleConfig(prompt=("a red creature",), checkpoint=str(refined), out=str(tmp_path), seed=3))
    assert (out / "0000.png").is_file()
    assert weights_sha256(base) != weights_sha256(refined)
    assert f"| all else is of {base} |" in (refined / "README.md").read_text()


def test_the_guidance_that_suits_the_base_then_can_be_said(data, base, tmp_path):
    config = refining(base, data, tmp_path, refine=RefineConfig(str(base), 0.8, guidance_scale=3.0))
    pipe = make_pipeline(make_unet(config, 384), make_noise_schedule(config), config)
    assert pipe.config.guidance_scale == 3.0
    assert PokeDiffPipeline.from_pretrained(base).config.guidance_scale == 1.5


def test_a_picture_does_not_depend_on_its_company(refined):
    pipe = PokeDiffPipeline.from_pretrained(refined)
    prompts, seeds = ["a red creature", "a blue creature", "a cat"], [1, 2, 3]
    for precision in ("fp32", "bf16"):
        together = pipe.generate(prompts, seeds, precision=precision)
        alone = [pipe.generate([p], [s], precision=precision)[0] for p, s in zip(prompts, seeds, strict=True)]
        np.testing.assert_array_equal(together, np.stack(alone))


def test_a_killed_run_goes_on(data, base, tmp_path):
    config = refining(base, data, tmp_path / "a", max_steps=6)
    whole = train(config)
    train(replace(config, out=str(tmp_path / "b"), max_steps=3))
    resumed = train(replace(config, out=str(tmp_path / "b")), resume="auto")
    for name, weight in PokeDiffPipeline.from_pretrained(whole).refiner.state_dict().items():
        again = PokeDiffPipeline.from_pretrained(resumed).refiner.state_dict()[name]
        torch.testing.assert_close(again, weight, rtol=0, atol=0)
    with pytest.raises(PokediffError, match=r"has refine = .*choose another --out"):
        train(replace(config, refine=RefineConfig(str(base), 0.5), max_steps=8), resume="auto")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dataset=DatasetConfig(image_size=32)), "image_size: 32 here, 16 in"),
        (dict(dataset=DatasetConfig(image_size=16, channels="rgb")), "channels: 3 here, 4 in"),
        (dict(diffusion=DiffusionConfig(prediction_type="sample", noise_shift=2.0)), "another noise schedule"),
        (dict(model=replace(SHAPE, sigma_data=None)), "prediction_type: sample here, v_prediction in"),
    ],
)
def test_what_does_not_fit_the_base_is_named(data, base, tmp_path, changes, words):
    with pytest.raises(PokediffError, match=words):
        train(refining(base, data, tmp_path / "out", **changes))


def test_impossible_settings_are_refused(data, tmp_path):
    with pytest.raises(PokediffError, match=r"refine\.below"):
        refining("unused", data, tmp_path, refine=RefineConfig("unused", 0.0))
    with pytest.raises(PokediffError, match="nothing is no checkpoint"):
        train(refining(tmp_path / "nothing", data, tmp_path / "out"))
