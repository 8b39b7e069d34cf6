from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from diffusers import DDIMScheduler

from pokediff.config import DiffusionConfig, DistillConfig, ModelConfig, RefineConfig, SampleConfig
from pokediff.drawing.sample import sample
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.distillation import Distillation, recipe, trailing
from pokediff.training.loop import make_noise_schedule, train


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    return train(tiny_config(data, tmp_path_factory.mktemp("run") / "teacher"))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16, 20])
def test_the_steps_are_spaced_as_the_sampler_spaces_them(steps):
    sampler = DDIMScheduler(timestep_spacing="trailing")
    sampler.set_timesteps(steps)
    assert trailing(1000, steps).tolist() == sampler.timesteps.tolist()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_step_with_the_target_ends_where_the_teacher_ends(data, teacher, scale):
    """Walk with diffusers' DDIM in eight steps; with the targets two steps must pass the same places."""
    pipeline = PokeDiffPipeline.from_pretrained(teacher)
    options = dict(sampler="ddim", num_steps=8, guidance_scale=scale, precision="fp32")
    prompts = ["a red creature", "a blue creature"]
    states = [step.x for step in pipeline.denoise(prompts, [1, 2], **options)]
    schedule = make_noise_schedule(tiny_config(data, teacher))
    config = DistillConfig(teacher=str(teacher), steps=2, substeps=4, guidance_scale=scale)
    distillation = Distillation(config, schedule, torch.device("cpu"))
    distillation.half = False
    text = pipeline.encode_prompt(prompts)
    for first, last in ((0, 4), (4, 8)):
        index = torch.full((2,), first)
        target = distillation.target(states[first], index, text, None)
        alpha, std = distillation._at(index)
        next_alpha, next_std = distillation._at(index + 4)
        landed = next_alpha * target + next_std * (states[first] - alpha * target) / std
        torch.testing.assert_close(landed, states[last], rtol=1e-3, atol=2e-3)


def test_a_student_that_already_goes_there_has_no_loss(data, teacher):
    """Of a teacher whose answer never changes, the several steps are one."""
    schedule = make_noise_schedule(tiny_config(data, teacher))
    distillation = Distillation(DistillConfig(str(teacher), 4, 2, 1.0), schedule, torch.device("cpu"))
    x0 = torch.full((6, 4, 16, 16), 0.3)
    distillation.predict = lambda z, *_: torch.full_like(z, 0.3)

    def student(noisy, timestep, *_):  # the v that means 0.3
        alpha = schedule.alphas_cumprod[timestep].sqrt()[:, None, None, None]
        return (alpha * noisy - 0.3) / (1 - alpha**2).sqrt()

    timesteps = torch.tensor([0, 249, 250, 500, 751, 999])
    loss = distillation(student, x0, torch.randn_like(x0), timesteps, None)
    torch.testing.assert_close(loss, torch.zeros(6), rtol=0, atol=1e-5)


def test_a_student_is_taught_saved_and_draws_in_its_few_steps(data, teacher, tmp_path):
    config = tiny_config(data, tmp_path / "student", distill=DistillConfig(str(teacher), 2, 2, 2.0), max_steps=4)
    out = train(config)
    index = json.loads((out / "model_index.json").read_text())
    assert (index["num_steps"], index["guidance_scale"], index["scheduler"][1]) == (2, 1.0, "DDIMScheduler")
    drawn = sample(SampleConfig(prompt=("a red creature",), checkpoint=str(out), out=str(tmp_path / "drawn")))
    settings = json.loads((drawn / "sample.json").read_text())["settings"]
    assert (settings["num_steps"], settings["guidance_scale"], settings["sampler"]) == (2, 1.0, "ddim")
    pipeline = PokeDiffPipeline.from_pretrained(out)
    assert len(list(pipeline.denoise(["a cat"], [0]))) == 3
    assert len(list(pipeline.denoise(["a cat"], [0], num_steps=5))) == 6
    resumed = train(replace(config, max_steps=6), resume="auto")
    weights = PokeDiffPipeline.from_pretrained(resumed).unet.stem.weight
    assert not torch.equal(weights, pipeline.unet.stem.weight)


def test_impossible_students_are_refused(data, tmp_path):
    for changes in (dict(steps=0), dict(substeps=1), dict(steps=500, substeps=4)):
        with pytest.raises(PokediffError, match="distill"):
            tiny_config(data, tmp_path, distill=DistillConfig(**changes))


def test_the_verb_needs_a_teacher_and_a_number(data, teacher, tmp_path):
    common = [sys.executable, "-m", "pokediff", "distill", "--checkpoint", str(teacher), "--data", str(data)]
    small = ["--out", str(tmp_path / "out"), "--max-steps", "2", "--batch-size", "4", "--warmup-steps", "1"]
    done = subprocess.run([*common, *small, "--steps", "2"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    student = PokeDiffPipeline.from_pretrained(tmp_path / "out")
    assert student.config.num_steps == 2
    refused = subprocess.run([*common, *small, "--steps", "12"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode != 0
    assert "choose at most 8" in refused.stderr
    again = recipe(tmp_path / "out", 1, str(data))
    assert (again.distill.substeps, again.distill.guidance_scale) == (2, 1.0)


def test_a_teacher_of_another_schedule_or_size_is_refused(data, teacher, tmp_path):
    config = tiny_config(data, tmp_path, distill=DistillConfig(str(teacher), 2, 2))
    with pytest.raises(PokediffError, match="noise schedule"):
        train(replace(config, diffusion=replace(config.diffusion, noise_shift=2.0)))
    with pytest.raises(PokediffError, match="other sizes"):
        train(replace(config, out=str(tmp_path / "b"), dataset=replace(config.dataset, image_size=32)))


def test_the_teachers_refiner_is_kept_and_what_it_draws_is_not_learned(data, teacher, tmp_path):
    model = ModelConfig(widths=(32,), attention=(False,), blocks=(1,), embedding_dim=64, plain=True, sigma_data=0.3)
    rest = dict(diffusion=DiffusionConfig(prediction_type="sample"), refine=RefineConfig(str(teacher), below=1.0))
    refined = train(tiny_config(data, tmp_path / "refined", model=model, **rest))
    student = train(
        replace(recipe(refined, 4, str(data)), out=str(tmp_path / "student"), max_steps=2, precision="fp32")
    )
    pipeline, before = PokeDiffPipeline.from_pretrained(student), PokeDiffPipeline.from_pretrained(refined)
    assert (pipeline.config.num_steps, pipeline.config.guidance_scale, pipeline.config.refine_below) == (4, 1.0, 1.0)
    for name, weight in pipeline.refiner.state_dict().items():
        torch.testing.assert_close(weight, before.refiner.state_dict()[name], rtol=0, atol=0)

    schedule = make_noise_schedule(tiny_config(data, teacher))
    distillation = Distillation(DistillConfig(str(refined), 4, 4, 1.0), schedule, torch.device("cpu"))
    assert distillation.asked == sum(sigma >= 1 for sigma in pipeline.sigmas()) == 2
    seen = []
    distillation.target = lambda noisy, first, *_: seen.extend(first.tolist()) or torch.zeros_like(noisy)
    x0, text = torch.zeros(1000, 4, 16, 16), pipeline.unet.null_text.expand(1000, -1)
    distillation(lambda z, *_: torch.zeros_like(z), x0, torch.randn_like(x0), torch.arange(1000), text)
    assert set(seen) == {0, 4}
    distillation.half = False
    below, above = torch.tensor([15]), torch.tensor([0])  # the last of the sixteen steps, and the first
    for index, network in ((below, before.refiner), (above, before.unet)):
        expected = network(x0[:1], distillation.timesteps[index], text[:1])
        if network is before.unet:
            expected = -distillation._at(index)[1] * expected  # v, of a picture of zeros
        predicted = distillation.predict(x0[:1], index, text[:1], None)
        torch.testing.assert_close(predicted, expected.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    distillation.teacher.register_modules(refiner=before.unet)  # a refiner may predict v, too
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    alpha, std = distillation._at(below)
    expected = (alpha * z - std * before.unet(z, distillation.timesteps[below], text[:1])).clamp(-1, 1)
    torch.testing.assert_close(distillation.predict(z, below, text[:1], None), expected, rtol=1e-3, atol=1e-4)
