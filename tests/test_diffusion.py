from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from conftest import MEAN, STD, gaussian_denoiser, gaussian_pictures, make_denoiser, pipeline_of
from diffusers import DDIMScheduler, DDPMScheduler, schedulers

from pokediff.config import DiffusionConfig
from pokediff.errors import PokediffError
from pokediff.model.diffusion import (
    cosine_sigmas,
    cosine_timestep,
    denoising_loss,
    make_noise_schedule,
    same_noise,
    schedule_sigmas,
)
from pokediff.model.samplers import SAMPLERS, SCHEDULERS, slerp, to_v

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # torch and numpy within diffusers

# ------------------------------------------------------------------------------------------------ schedule and loss


def test_the_schedule_is_that_of_denoiser_and_scheduler():
    sigmas = cosine_sigmas(torch.arange(1000).double(), 1000, 0.006, 100.0, 2.0)
    assert sigmas[0].item() == pytest.approx(0.006)
    assert sigmas[-1].item() == pytest.approx(100.0)
    for timestep in (0, 123, 999):
        assert cosine_timestep(sigmas[timestep].item(), 1000, 0.006, 100.0, 2.0) == pytest.approx(timestep, abs=1e-6)
    schedule = make_noise_schedule(DiffusionConfig(noise_shift=2.0))
    torch.testing.assert_close(schedule_sigmas(schedule), sigmas, rtol=1e-3, atol=0)


def test_same_noise_compares_every_timestep():
    schedule = make_noise_schedule(DiffusionConfig())
    assert same_noise(schedule, DDIMScheduler.from_config(schedule.config))
    assert not same_noise(schedule, make_noise_schedule(DiffusionConfig(noise_shift=2.0)))
    assert not same_noise(schedule, make_noise_schedule(DiffusionConfig(num_train_timesteps=500)))


def test_the_weighted_error_of_x0_is_the_error_of_v():
    """With diffusers' own v of the noisy pictures (`get_velocity`) as the reference."""
    schedule, denoiser = make_noise_schedule(DiffusionConfig()), make_denoiser(text_dim=8)
    x0, noise = torch.randn(6, 4, 32, 32).clamp(-1, 1), torch.randn(6, 4, 32, 32)
    timesteps, text = torch.tensor([0, 1, 50, 400, 900, 999]), torch.randn(6, 8)
    with torch.no_grad():
        loss = denoising_loss(schedule, denoiser, x0, noise, timesteps, text)
        x = schedule.add_noise(x0, noise, timesteps)
        predicted = denoiser(x, timesteps, text)
    sigmas = schedule_sigmas(schedule)[timesteps].tolist()
    v = torch.stack([to_v(*rows) for rows in zip(predicted.double(), x.double(), sigmas, strict=True)])
    wanted = schedule.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(loss.double(), (v - wanted).square().mean((1, 2, 3)), rtol=2e-3, atol=1e-6)


def test_the_loss_of_the_exact_denoiser_is_the_least():
    """In closed form: the posterior variance of x0 times 1 + 1 / sigma^2; any other constant prediction has more."""
    schedule, exact = make_noise_schedule(DiffusionConfig()), gaussian_denoiser()
    torch.manual_seed(0)
    x0, noise = MEAN + STD * torch.randn(64, 4, 16, 16), torch.randn(64, 4, 16, 16)
    for timestep in (100, 500, 900):
        timesteps = torch.full((64,), timestep)
        sigma = schedule_sigmas(schedule)[timestep].item()
        expected = STD**2 * sigma**2 / (STD**2 + sigma**2) * (1 + sigma**-2)
        loss = denoising_loss(schedule, exact, x0, noise, timesteps).mean().item()
        assert loss == pytest.approx(expected, rel=0.03)
        mean_only = denoising_loss(schedule, lambda x, _: torch.full_like(x, MEAN), x0, noise, timesteps).mean()
        assert loss < mean_only.item()


def test_noise_between_two_noises_keeps_its_strength():
    torch.manual_seed(0)
    start, end = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    for share in (0.25, 0.5, 0.75):
        assert slerp(start, end, share).std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(slerp(start, end, 0.0), start)
    torch.testing.assert_close(slerp(start, end, 1.0), end, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slerp(start, start, 0.3), start)


# ---------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_recovers_a_gaussian(sampler):
    stochastic = sampler in ("ddpm", "euler_a")  # of first order in noise too: they need more steps
    steps = 200 if stochastic else 60
    *_, last = pipeline_of(base=gaussian_denoiser()).denoise(
        [""] * 16, range(16), num_inference_steps=steps, sampler=sampler
    )
    assert last.x0.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert last.x0.std().item() == pytest.approx(STD, rel=0.07)


def test_a_drawing_equals_diffusers_own_loop():
    """The same noise through diffusers' DDIM and DDPM in the form of their documentation, with v as prediction."""
    pipe, denoiser = pipeline_of(base=gaussian_denoiser()), gaussian_denoiser()
    for name, kind in (("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)):
        *_, last = pipe.denoise([""] * 3, [5, 6, 7], num_inference_steps=12, sampler=name)
        scheduler = kind.from_config(make_noise_schedule(DiffusionConfig()).config)
        scheduler.set_timesteps(12)
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
        x = torch.stack([torch.randn(4, 16, 16, generator=generator) for generator in generators])
        for timestep in scheduler.timesteps:
            a = scheduler.alphas_cumprod[timestep].double()
            x0 = denoiser(x, timestep).clamp(-1, 1)
            v = ((a.sqrt() * x - x0) / (1 - a).sqrt()).float()
            x = scheduler.step(v, timestep, x, generator=generators).prev_sample
        torch.testing.assert_close(last.x0, x.clamp(-1, 1), rtol=0, atol=1e-4)


ALL = sorted(
    name
    for name in dir(schedulers)
    if name.endswith("Scheduler") and not name.startswith("Flax") and isinstance(getattr(schedulers, name), type)
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_scheduler_of_diffusers_draws_a_gaussian_or_is_refused(name):
    pipe = pipeline_of(base=gaussian_denoiser())
    try:
        pipe.scheduler = getattr(schedulers, name).from_config(pipe.scheduler.config)
    except (TypeError, ImportError):
        assert name not in SCHEDULERS  # diffusers cannot make it from a noise schedule
        return
    image = gaussian_pictures(16)
    options = dict(num_inference_steps=50)
    if name not in SCHEDULERS:
        with pytest.raises(PokediffError, match=rf"^{name} cannot draw with this model; schedulers: DDIM.*$"):
            pipe.generate([""], [0], **options)
        return
    for start in ({}, {"image": image, "strength": 0.5}):  # from pure noise, and from the middle
        *_, last = pipe.denoise([""] * 16, range(16), **options, **start)
        assert last.x0.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert last.x0.std().item() == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))  # that of LMS needs scipy
def test_with_every_scheduler_the_seed_decides(name):
    """Those that add noise at every step take it from the picture's own generator."""
    pipe = pipeline_of(base=gaussian_denoiser())
    changes = {"algorithm_type": "sde-dpmsolver++"} if name == "DPMSolverMultistepScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    together = pipe.generate(["", ""], [3, 4], num_inference_steps=4)
    np.testing.assert_array_equal(pipe.generate([""], [4], num_inference_steps=4), together[1:])


def test_too_many_steps_for_a_scheduler_is_one_line():
    pipe = pipeline_of(base=gaussian_denoiser())
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(PokediffError, match=r"^TCDScheduler: 200 steps cannot be used .*$"):
        pipe.generate([""], [0], num_inference_steps=200)
