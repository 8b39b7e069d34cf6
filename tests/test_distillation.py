from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import BASE, DETAIL, REFINER, tiny_config, tiny_stage

from pokediff.config import CriticConfig, DiffusionConfig, DistillConfig, PerceptualConfig, Sampling
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.denoiser import flops_per_image
from pokediff.model.diffusion import make_noise_schedule
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import loop
from pokediff.training.build import prepare
from pokediff.training.clock import Pace
from pokediff.training.distillation import (
    GUIDANCE,
    Distillation,
    distillation_recipe,
    held_out,
    student_batch,
    student_validation,
)
from pokediff.training.objectives import Batch, Drawings
from pokediff.training.stages import start, times, train

SCHEDULE = make_noise_schedule(DiffusionConfig())
STUDENT = tiny_stage(
    model=replace(BASE, steps=4, guidance_scale=1.0), distill=DistillConfig("base-16", 16), fast=True, max_steps=4
)
SECOND = tiny_stage(model=DETAIL, distill=DistillConfig("refiner-16", 16, 3.0), fast=True, max_steps=4)
PROMPTS = ["a red creature", "a blue creature"]


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A cascade of a base and a refiner below sigma 1."""
    stages = {"base-16": tiny_stage(), "refiner-16": REFINER}
    return train(tiny_config(data, tmp_path_factory.mktemp("run") / "teacher", stages))


@pytest.fixture(scope="module")
def taught(data, teacher, tmp_path_factory):
    """Students of both, as a part of that checkpoint."""
    stages = {"base-16-fast": STUDENT, "refiner-16-fast": SECOND}
    return train(tiny_config(data, tmp_path_factory.mktemp("run") / "taught", stages, base=str(teacher)))


def drawings(number: int = 16, text_dim: int = 8) -> Drawings:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(number, 4, 16, 16, generator=generator)
    pictures = torch.rand(number, 4, 16, 16, generator=generator) * 2 - 1
    return Drawings(pictures, torch.randn(number, text_dim, generator=generator), noise)


def objective_of(folder, name: str, **changes: float) -> tuple[Distillation, PokeDiffPipeline]:
    pipeline = PokeDiffPipeline.from_pretrained(folder)
    pipeline.cascade[name].register_to_config(**changes)
    steps = pipeline.evaluations(Sampling(size=16, fast=True))
    return Distillation(name, steps, pipeline.cascade, SCHEDULE), pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("base-16-fast", {}),
        ("base-16-fast", {"guidance_scale": 3.0}),
        ("refiner-16-fast", {}),
    ],
)
def test_a_student_learns_from_what_it_meets_in_a_drawing(taught, name, changes):
    """Before each of its steps x is that of diffusers' DDIM, guided where it is while drawing."""
    objective, pipeline = objective_of(taught, name, **changes)
    states = list(pipeline.denoise(PROMPTS, [1, 2], fast=True, precision="fp32"))
    assert [step.denoiser for step in states] == ["base-16-fast"] * 2 + ["refiner-16-fast"] * 2 + [None]
    noise = pipeline.make_noise([1, 2], 16)[1][0]
    text = pipeline.encode_prompt(PROMPTS)
    for timestep, index in objective.timesteps.items():
        batch = Batch(noise, noise, torch.full((2,), timestep), text)
        x = objective.before(pipeline.cascade[name], index, batch)
        torch.testing.assert_close(x, states[index].x, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_steps_of_a_guided_denoiser_are_guided(teacher):
    """A student of the refiner alone, behind the teacher's base."""
    pipeline = PokeDiffPipeline.from_pretrained(teacher)
    cascade = Cascade({**dict(pipeline.cascade.items()), "refiner-16-fast": pipeline.cascade["refiner-16"]})
    sampling = Sampling(size=16, num_inference_steps=4, sampler="ddim", precision="fp32")
    steps = [
        replace(step, denoiser="refiner-16-fast") if step.denoiser == "refiner-16" else step
        for step in pipeline.evaluations(sampling)
    ]
    objective = Distillation("refiner-16-fast", steps, cascade, SCHEDULE)
    states = list(pipeline.denoise(PROMPTS, [1, 2], sampling))
    noise, text = pipeline.make_noise([1, 2], 16)[1][0], pipeline.encode_prompt(PROMPTS)
    for index in objective.timesteps.values():
        x = objective.before(cascade["refiner-16"], index, Batch(noise, noise, torch.zeros(2), text))
        torch.testing.assert_close(x, states[index].x, rtol=1e-3, atol=2e-3)


def test_the_loss_is_the_error_against_the_drawing(taught):
    objective, _ = objective_of(taught, "base-16-fast")
    ours = drawings(6, 384)
    for batch in student_validation(ours, list(objective.timesteps)):
        wrong = ours.pictures + 0.1
        loss = objective(lambda x, *_, wrong=wrong: wrong, batch)
        torch.testing.assert_close(loss, torch.full((6,), 0.01))
        assert objective(lambda *_: ours.pictures, batch).tolist() == [0.0] * 6


def test_further_losses_see_the_drawing_and_the_real_picture(taught):
    objective, _ = objective_of(taught, "base-16-fast")
    seen = {}

    def extra(name):
        return lambda x0, other, *rest: seen.update({name: (other, rest[-1])}) or torch.ones(len(x0))

    objective.perceptual, objective.critic = extra("perceptual"), extra("critic")
    real, learnt = torch.zeros(4, 4, 16, 16), drawings(4, 384)
    batch = replace(student_validation(learnt, [999])[0], x0=real, caption=torch.ones(4, 384))
    loss = objective(lambda *_: learnt.pictures, batch)
    assert loss.tolist() == [2.0] * 4
    assert seen["perceptual"][0] is batch.target
    shown, (asked, true) = seen["critic"]
    assert (shown is real, asked is batch.text, true is batch.caption) == (True, True, True)
    with torch.no_grad():  # validation
        assert objective(lambda *_: learnt.pictures, batch).tolist() == [0.0] * 4


def test_batches_are_drawings_with_their_noise_some_mirrored():
    ours = drawings()
    real = Batch(torch.zeros(8, 4, 16, 16), torch.zeros(8, 4, 16, 16), torch.zeros(8), torch.zeros(8, 8))
    ways, steps = set(), set()
    for step in range(4):
        batch = student_batch(real, ours, [999, 749], 3, step, 0, 1)
        steps.add(int(batch.timesteps[0]))
        assert batch.x0 is real.x0
        assert batch.texts[1] is real.text  # a critic gets the captions of the real pictures, too
        for target, noise, text in zip(batch.target, batch.noise, batch.text, strict=True):
            row = next(k for k in range(16) if torch.equal(ours.text[k], text))
            mirrored = torch.equal(target, ours.pictures[row].flip(-1))
            ways.add(mirrored)
            expected = [values.flip(-1) if mirrored else values for values in (ours.pictures[row], ours.noise[row])]
            assert torch.equal(target, expected[0])
            assert torch.equal(noise, expected[1])
        halves = [replace(real, x0=real.x0[:4]) for _ in range(2)]
        parts = [student_batch(half, ours, [999, 749], 3, step, rank, 2) for rank, half in enumerate(halves)]
        assert torch.equal(torch.cat([part.noise for part in parts]), batch.noise)
    assert ways == {False, True}
    assert steps == {999, 749}


def test_some_drawings_are_kept_for_validation():
    ours = drawings(16)
    learnt, kept = held_out(ours)
    assert (len(learnt.text), len(kept.text)) == (14, 2)
    assert torch.equal(torch.cat([kept.noise, learnt.noise]), ours.noise)
    assert len(held_out(drawings(2))[1].text) == 1


@pytest.mark.slow
def test_students_are_more_stages_and_draw_with_fast(data, teacher, taught, tmp_path, monkeypatch):
    pipeline = PokeDiffPipeline.from_pretrained(taught)
    assert list(pipeline.cascade) == ["base-16", "refiner-16", "base-16-fast", "refiner-16-fast"]
    resolved = pipeline.resolved(Sampling(fast=True))
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.sampler) == (4, 1.0, "ddim")
    slow = {step.denoiser for step in pipeline.denoise(["a cat"], [0])}
    assert slow == {"base-16", "refiner-16", None}
    assert len(list(pipeline.denoise(["a cat"], [0], fast=True, num_inference_steps=5))) == 6

    seen, draw = [], loop.make_drawings
    monkeypatch.setattr(loop, "make_drawings", lambda *a: seen.append(draw(*a)) or seen[-1])
    config = tiny_config(
        data, tmp_path / "again", {"base-16-fast": STUDENT, "refiner-16-fast": SECOND}, base=str(teacher)
    )
    train(config)
    assert torch.equal(seen[0].noise, seen[1].noise)  # by the teachers, though there is a student
    original = PokeDiffPipeline.from_pretrained(teacher)
    for drawn, scale in zip(seen, (None, 3.0), strict=True):
        *_, last = original.denoise(drawn.text, range(2, 16), Sampling(size=16, guidance_scale=scale))
        torch.testing.assert_close(drawn.pictures, last.x0, rtol=0, atol=1e-5)
    assert not torch.equal(seen[0].pictures, seen[1].pictures)
    assert torch.equal(seen[0].noise, original.make_noise(range(2, 16), 16)[1][0])


@pytest.mark.slow
def test_a_student_comes_nearer_to_what_is_drawn_than_its_teacher_in_as_few_steps(data, tiny_checkpoint, tmp_path):
    stage = distillation_recipe(tiny_checkpoint, 4, (str(data),)).stages["base-32-fast"]
    changes = dict(max_steps=60, batch_size=8, warmup_steps=2, decay_steps=40, learning_rate=2e-3, ema_decay=0.9)
    stage = replace(stage, distill=DistillConfig("base-32", 64), **changes)
    config = tiny_config(data, tmp_path / "student", {"base-32-fast": stage}, base=str(tiny_checkpoint))
    pipeline = PokeDiffPipeline.from_pretrained(train(config))
    steps = pipeline.evaluations(Sampling(size=32, fast=True))
    objective = Distillation("base-32-fast", steps, pipeline.cascade, SCHEDULE)
    seeds, text = list(range(500, 516)), pipeline.encode_prompt(PROMPTS * 8)  # not seeds that it has learnt
    *_, last = pipeline.denoise(text, seeds, size=32, precision="fp32")
    drawn = Drawings(last.x0, text, pipeline.make_noise(seeds, 32)[1][0])
    with torch.no_grad():
        errors = {
            name: sum(
                objective(pipeline.cascade[name], batch).sum().item()
                for batch in student_validation(drawn, list(objective.timesteps))
            )
            for name in ("base-32", "base-32-fast")
        }
    assert errors["base-32-fast"] < 0.7 * errors["base-32"]


@pytest.mark.slow
def test_a_resumed_student_learns_from_the_same_drawings(data, squeeze, tmp_path):
    """The teacher is a stage of the same run: after a stop it is read from the checkpoint, in half precision."""
    losses = dict(perceptual=PerceptualConfig(squeeze), critic=CriticConfig(squeeze))
    stages = {"base-16": tiny_stage(max_steps=1), "base-16-fast": replace(STUDENT, max_steps=2, **losses)}
    runs = [tiny_config(data, tmp_path / name, stages) for name in ("whole", "stopped")]
    whole = train(runs[0])
    stopped = train(replace(runs[1], max_minutes=1e-9))
    assert not (stopped / "cascade" / "base-16-fast").exists()
    train(runs[1], resume="auto")
    file = "cascade/base-16-fast/diffusion_pytorch_model.safetensors"
    assert (whole / file).read_bytes() == (stopped / file).read_bytes()


def test_the_time_for_the_drawings_is_told(data, teacher, tmp_path):
    """With steps in which its network would run once a second: 16 drawings, their base guided, one stage of two."""
    stages = {"base-16-fast": STUDENT, "refiner-16": replace(REFINER, max_steps=1)}
    run = start(tiny_config(data, tmp_path / "run", stages, base=str(teacher)), tmp_path / "run")
    student, step = prepare(run, "base-16-fast"), 3 * STUDENT.batch_size
    evaluations = Counter(each.denoiser for each in run.pipeline.evaluations(Sampling(size=16)))
    costs = {name: flops_per_image(run.pipeline.cascade[name]) for name in evaluations}
    expected = 2 * evaluations["base-16"] + evaluations["refiner-16"] * costs["refiner-16"] / costs["base-16"]
    assert loop.opening_seconds(run, student, step) == pytest.approx(16 * expected, rel=0.02)
    assert loop.opening_seconds(run, prepare(run, "refiner-16"), step) == 0
    assert times(run.config, {"base-16-fast": Pace(0.0, 2.0, 5.0)}, {"base-16-fast": None}) == {"base-16-fast": 7.0}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (replace(STUDENT, distill=DistillConfig("base-64")), "its teacher base-64 is not in the cascade"),
        (replace(STUDENT, image_size=32), "base-16 does not draw 32 px"),
        (replace(SECOND, model=replace(DETAIL, below=0.01)), "in 10 steps none is its own"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(data, teacher, tmp_path, stage, words):
    with pytest.raises(PokediffError, match=words):
        train(tiny_config(data, tmp_path / "out", {"base-16-fast": stage}, base=str(teacher)))


def test_impossible_students_are_refused():
    with pytest.raises(PokediffError, match="at least 2"):
        DistillConfig("base-16", 1)
    with pytest.raises(PokediffError, match="needs fast: true"):
        replace(STUDENT, fast=False)


def test_the_recipe_adds_a_student_of_the_base(data, teacher):
    config = distillation_recipe(teacher, 7, (str(data),))
    assert config.base == str(teacher)
    ((name, stage),) = config.stages.items()
    assert (name, stage.distill.teacher, stage.fast) == ("base-16-fast", "base-16", True)
    assert (stage.model.steps, stage.model.guidance_scale, stage.model.widths) == (7, GUIDANCE, BASE.widths)
