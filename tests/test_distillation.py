from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BASE, REFINER, tiny_config, tiny_stage, with_stage

from pokediff.config import DiffusionConfig, DistillConfig, Sampling
from pokediff.errors import PokediffError
from pokediff.model.diffusion import make_noise_schedule
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.distillation import Distillation, distillation_recipe, trailing
from pokediff.training.objectives import Batch
from pokediff.training.stages import train

SCHEDULE = make_noise_schedule(DiffusionConfig())
STUDENT = tiny_stage(
    model=replace(BASE, steps=2, guidance_scale=1.0), distill=DistillConfig("base-16", 2, 2.0), fast=True, max_steps=4
)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A cascade of a base and a refiner below sigma 1."""
    stages = {"base-16": tiny_stage(), "refiner-16": REFINER}
    return train(tiny_config(data, tmp_path_factory.mktemp("run") / "teacher", stages))


def distillation(folder, steps: int, teacher_steps: int, scale: float) -> Distillation:
    cascade = PokeDiffPipeline.from_pretrained(folder).cascade
    made = Distillation(DistillConfig("base-16", teacher_steps, scale), cascade, steps, 16, SCHEDULE)
    made.half = False
    return made


def batch(x0: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> Batch:
    return Batch(x0, torch.randn_like(x0), timesteps, text)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16, 20])
def test_the_steps_are_spaced_as_the_sampler_spaces_them(steps):
    sampler = DDIMScheduler(timestep_spacing="trailing")
    sampler.set_timesteps(steps)
    assert trailing(1000, steps).tolist() == sampler.timesteps.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_step_with_the_target_ends_where_the_teacher_ends(teacher, scale):
    """diffusers' DDIM in eight steps and two steps with the targets pass the same places; the refiner takes part."""
    pipeline = PokeDiffPipeline.from_pretrained(teacher)
    prompts = ["a red creature", "a blue creature"]
    options = dict(sampler="ddim", num_inference_steps=8, guidance_scale=scale, precision="fp32")
    states = list(pipeline.denoise(prompts, [1, 2], **options))
    assert {step.denoiser for step in states[:-1]} == {"base-16", "refiner-16"}
    made = distillation(teacher, 2, 4, scale)
    text = pipeline.encode_prompt(prompts)
    for first, last in ((0, 4), (4, 8)):
        index, x = torch.full((2,), first), states[first].x
        target = made.target(x, index, batch(x, index, text))
        alpha, std = made._at(index)
        next_alpha, next_std = made._at(index + 4)
        landed = next_alpha * target + next_std * (x - alpha * target) / std
        torch.testing.assert_close(landed, states[last].x, rtol=1e-3, atol=2e-3)


def test_a_student_that_agrees_with_its_teacher_has_no_loss(teacher):
    """A teacher that always predicts the same x0: its several steps are one."""
    made = distillation(teacher, 4, 2, 1.0)
    x0 = torch.full((6, 4, 16, 16), 0.3)
    made.teacher_x0 = lambda z, *_: torch.full_like(z, 0.3)
    timesteps = torch.tensor([0, 249, 250, 500, 751, 999])
    loss = made(lambda noisy, *_: torch.full_like(noisy, 0.3), batch(x0, timesteps, torch.zeros(6, 384)))
    torch.testing.assert_close(loss, torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_student_is_one_more_stage_and_draws_with_fast(data, teacher, tmp_path):
    config = tiny_config(data, tmp_path / "student", {"base-16-fast": STUDENT}, base=str(teacher))
    out = train(config)
    pipeline = PokeDiffPipeline.from_pretrained(out)
    assert list(pipeline.cascade) == ["base-16", "refiner-16", "base-16-fast"]
    steps = list(pipeline.denoise(["a cat"], [0], fast=True))
    assert [step.denoiser for step in steps] == ["base-16-fast", "refiner-16", None]
    resolved = pipeline.resolved(Sampling(fast=True))
    assert (resolved.guidance_scale, resolved.sampler) == (1.0, "ddim")  # as it was taught
    slow = [step.denoiser for step in pipeline.denoise(["a cat"], [0])]
    assert "base-16-fast" not in slow
    assert len(list(pipeline.denoise(["a cat"], [0], fast=True, num_inference_steps=5))) == 6
    before = pipeline.cascade["base-16-fast"].stem.weight
    train(with_stage(config, "base-16-fast", max_steps=6), resume="auto")
    assert not torch.equal(PokeDiffPipeline.from_pretrained(out).cascade["base-16-fast"].stem.weight, before)


@pytest.mark.slow
def test_a_resumed_student_learns_from_the_same_teacher(data, tmp_path):
    """The teacher is a stage of the same run: after a stop it is read from the checkpoint, in half precision."""
    stages = {"base-16": tiny_stage(max_steps=1), "base-16-fast": replace(STUDENT, max_steps=2)}
    runs = [tiny_config(data, tmp_path / name, stages) for name in ("whole", "stopped")]
    whole = train(runs[0])
    stopped = train(replace(runs[1], max_minutes=1e-9))
    assert not (stopped / "cascade" / "base-16-fast").exists()
    train(runs[1], resume="auto")
    file = "cascade/base-16-fast/diffusion_pytorch_model.safetensors"
    assert (whole / file).read_bytes() == (stopped / file).read_bytes()


def test_what_the_refiner_does_is_not_learned(teacher):
    made = distillation(teacher, 4, 4, 1.0)
    assert made.steps == 2
    seen = []
    made.target = lambda noisy, first, _: seen.extend(first.tolist()) or torch.zeros_like(noisy)
    x0 = torch.zeros(1000, 4, 16, 16)
    made(lambda z, *_: torch.zeros_like(z), batch(x0, torch.arange(1000), torch.zeros(1000, 384)))
    assert set(seen) == {0, 4}
    text = torch.zeros(1, 384)
    for position, name in ((15, "refiner-16"), (0, "base-16")):  # the last of the sixteen steps, and the first
        index = torch.tensor([position])
        expected = made.cascade[name](x0[:1], made.timesteps[index], text).clamp(-1, 1)
        predicted = made.teacher_x0(x0[:1], index, batch(x0[:1], index, text))
        torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (replace(STUDENT, distill=DistillConfig("base-64", 2, 2.0)), "base-64 is not in the cascade"),
        (replace(STUDENT, image_size=32), "base-16 does not draw 32 px"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(data, teacher, tmp_path, stage, words):
    with pytest.raises(PokediffError, match=words):
        train(tiny_config(data, tmp_path / "out", {"base-16-fast": stage}, base=str(teacher)))


def test_impossible_students_are_refused(data, tmp_path):
    with pytest.raises(PokediffError, match="at least 2"):
        DistillConfig("base-16", 1)
    with pytest.raises(PokediffError, match="more teacher steps"):
        stage = replace(STUDENT, model=replace(BASE, steps=501))
        tiny_config(data, tmp_path, {"base-16-fast": stage})


def test_the_recipe_adds_a_fast_base_to_a_checkpoint(data, teacher, tmp_path):
    config = distillation_recipe(teacher, 2, (str(data),))
    assert config.base == str(teacher)
    (name, stage) = next(iter(config.stages.items()))
    assert (name, stage.model.steps, stage.fast, stage.model.guidance_scale) == ("base-16-fast", 2, True, 1.0)
    assert (stage.distill.teacher, stage.distill.teacher_steps_per_step, stage.distill.guidance_scale) == (
        "base-16",
        8,
        1.5,
    )
    assert stage.model.widths == BASE.widths
