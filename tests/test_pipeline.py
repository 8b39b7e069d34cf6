"""Prompts and seeds to steps to pictures, img2img, inpainting, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import MEAN, gaussian_denoiser, make_denoiser, pipeline_of
from diffusers import DDIMScheduler

from pokediff.config import Sampling
from pokediff.errors import PokediffError
from pokediff.model.denoiser import Denoiser
from pokediff.model.pipeline import PokeDiffPipeline, Step
from pokediff.model.samplers import SAMPLERS
from pokediff.model.text import load_text_encoder


@pytest.fixture(scope="module")
def pipe() -> PokeDiffPipeline:
    """One denoiser of 16 px with random weights and the built-in encoder: a step takes a millisecond."""
    encoder = load_text_encoder("builtin")
    base = make_denoiser(1, image_size=16, widths=(16,), attention=(True,), blocks=(1,), steps=15, guidance_scale=1.5)
    base.null_text.copy_(encoder([""]).pooled[0])
    random = pipeline_of(base_16=base)
    random.register_modules(text_encoder=encoder.model, tokenizer=encoder.tokenizer)
    return random


@pytest.fixture(scope="module")
def gaussian() -> PokeDiffPipeline:
    return pipeline_of(base_16=gaussian_denoiser())


# ---------------------------------------------------------------------------------------------------------------- steps


def test_steps_go_from_noise_to_picture(gaussian):
    steps = list(gaussian.denoise([""], [0], num_inference_steps=20))
    assert [step.index for step in steps] == list(range(21))
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == 0
    assert isinstance(steps[0], Step)
    assert steps[0].x.std().item() == pytest.approx(1, abs=0.1)
    assert steps[0].x0.std().item() < 0.01  # in pure noise there is nothing but the mean to predict
    torch.testing.assert_close(steps[-1].x.clamp(-1, 1), steps[-1].x0)


@pytest.mark.parametrize("sampler", ["heun", "euler", "euler_a", "ddpm"])
def test_the_noisy_picture_has_unit_scale_with_every_sampler(gaussian, sampler):
    for step in gaussian.denoise([""], [0], num_inference_steps=10, sampler=sampler):
        assert step.x.abs().max() < 6


def test_sigma_is_the_schedule_s(gaussian):
    alphas = gaussian.scheduler.alphas_cumprod.double()
    for step in list(gaussian.denoise([""], [0], num_inference_steps=8))[:-1]:
        a = alphas[int(step.timestep)]
        assert step.sigma == pytest.approx(((1 - a) / a).sqrt().item(), rel=1e-6)


def test_autograd_stays_on_for_the_caller(pipe):
    for _ in pipe.denoise([""], [0], num_inference_steps=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_defaults_are_those_of_the_checkpoint(pipe):
    resolved = pipe.resolved(Sampling())
    assert (resolved.size, resolved.num_inference_steps, resolved.guidance_scale) == (16, 15, 1.5)
    assert resolved.sampler == pipe.sampler == "dpmpp_2m"
    assert pipe.resolved(Sampling(num_inference_steps=3, guidance_scale=0.0)).guidance_scale == 0
    assert len(list(pipe.denoise([""], [0]))) == len(pipe.evaluations(Sampling())) + 1 == 16


# ------------------------------------------------------------------------------------------------- seeds and conditions


def premultiplied(pipe: PokeDiffPipeline, prompts: list[str], seeds: list[int], **options) -> torch.Tensor:
    *_, last = pipe.denoise(prompts, seeds, **options)
    return last.x0


PROMPTS, SEEDS = ["a red dragon", "", "a cat"], [5, 6, 2**40]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_gives_the_same_bits_in_any_batch(pipe, sampler, precision):
    options = dict(num_inference_steps=4, sampler=sampler, precision=precision, exact=True)
    together = pipe.generate(PROMPTS, SEEDS, **options)
    pairs = pipe.generate(PROMPTS, SEEDS, batch_size=2, **options)
    np.testing.assert_array_equal(together, pairs)
    alone = np.concatenate([pipe.generate([p], [s], **options) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    np.testing.assert_array_equal(together, alone)
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_exact_batches_agree_within_one_level(pipe, sampler):
    options = dict(num_inference_steps=4, sampler=sampler, precision="fp32")
    together = premultiplied(pipe, PROMPTS, SEEDS, **options)
    for index, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = premultiplied(pipe, [prompt], [seed], **options)
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1 / 127.5)


def test_a_cascade_draws_the_same_in_any_batch(tiny_pipe):
    prompts, seeds = ["a red creature", "a blue creature", "a green creature"], [1, 2, 3]
    together = tiny_pipe.generate(prompts, seeds, precision="fp32", exact=True)
    alone = [tiny_pipe.generate([p], [s], precision="fp32", exact=True)[0] for p, s in zip(prompts, seeds, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_one_picture_without_exact_is_one_row(pipe, monkeypatch):
    rows = []
    forward = Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda self, x, *rest: rows.append(len(x)) or forward(self, x, *rest))
    options = dict(num_inference_steps=2, precision="fp32", guidance_scale=1)
    list(pipe.denoise([""], [0], **options))
    list(pipe.denoise([""], [0], exact=True, **options))
    assert rows == [1, 1, 4, 4]


@pytest.mark.parametrize(("scale", "rows"), [(1, 2), (2, 4)])
def test_guidance_runs_the_denoiser_on_the_negative_prompts_too(pipe, monkeypatch, scale, rows):
    sizes = []
    forward = Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda self, x, *rest: sizes.append(len(x)) or forward(self, x, *rest))
    list(pipe.denoise(["a", "b"], [0, 1], num_inference_steps=3, guidance_scale=scale))
    assert sizes == [rows] * 3


def test_prompt_guidance_and_negative_prompt_count(pipe):
    def draw(prompt="a red dragon", **options):
        return pipe.generate([prompt], [0], num_inference_steps=4, precision="fp32", **options)

    plain = draw(guidance_scale=1)
    assert (plain != draw("a blue turtle", guidance_scale=1)).any()
    assert (plain != draw(guidance_scale=4)).any()
    assert (draw(guidance_scale=4) != draw(guidance_scale=4, negative_prompt="a blue turtle")).any()
    np.testing.assert_array_equal(plain, draw(guidance_scale=4, guidance_interval=(1e6, 1e7)))  # an interval never met


def test_every_picture_may_have_a_negative_prompt_of_its_own(pipe):
    options = dict(num_inference_steps=4, guidance_scale=4.0, precision="fp32", exact=True)
    prompts, seeds, negative = ["a cat", "a dog", "a cat"], [1, 2, 3], ["red", "", "a blue turtle"]
    together = pipe.generate(prompts, seeds, negative_prompts=negative, batch_size=2, **options)
    for index, text in enumerate(negative):
        alone = pipe.generate([prompts[index]], [seeds[index]], negative_prompt=text, **options)
        np.testing.assert_array_equal(alone[0], together[index])
    vectors = pipe.encode_prompt(negative)
    given = pipe.generate(prompts, seeds, negative_prompts=vectors, batch_size=2, **options)
    np.testing.assert_array_equal(given, together)


def test_vectors_and_noise_can_replace_prompts_and_seeds(pipe):
    prompts, seeds = ["a cat", "a dog"], [4, 5]
    expected = pipe.generate(prompts, seeds, num_inference_steps=6)
    _, noise = pipe.make_noise(seeds)
    given = pipe.generate(pipe.encode_prompt(prompts), [0, 0], noise=noise, num_inference_steps=6)
    np.testing.assert_array_equal(given, expected)


def test_a_prompt_that_is_no_text_is_refused_in_a_line(pipe):
    with pytest.raises(PokediffError, match="prompt 'a \ufffd cat' is not UTF-8 text"):
        pipe("a \udcff cat", seed=0)
    with pytest.raises(PokediffError, match="is not UTF-8 text"):
        pipe("a cat", seed=0, negative_prompt=["a \udcff cat"], guidance_scale=2.0)


def test_encode_prompt_takes_a_string_as_one_prompt(pipe):
    one = pipe.encode_prompt("a cat")
    assert one.shape == (1, 384)
    assert torch.equal(one[0], pipe.encode_prompt(["a dog", "a cat"])[1])
    assert torch.equal(pipe.encode_prompt("")[0], pipe.base.null_text)


def test_predict_x0_is_the_denoiser_of_the_step_without_guidance(tiny_pipe):
    text = tiny_pipe.encode_prompt(["a red creature", ""])
    steps = list(tiny_pipe.denoise(["a red creature"], [1], guidance_scale=1))
    for step in steps[:-1]:
        predicted = tiny_pipe.predict_x0(step, text)
        assert predicted.shape == (2, *step.x.shape[1:])
        torch.testing.assert_close(predicted[:1], step.x0, rtol=0, atol=0.03)  # in bf16 where the processor has it
    with pytest.raises(ValueError, match="no denoiser"):
        tiny_pipe.predict_x0(steps[-1], text)


def test_another_diffusers_scheduler_can_be_put_in(pipe):
    expected = pipe.generate(["a cat"], [0], num_inference_steps=5, sampler="ddim")
    own = pipe.scheduler
    try:
        pipe.scheduler = DDIMScheduler.from_config(own.config)
        np.testing.assert_array_equal(pipe.generate(["a cat"], [0], num_inference_steps=5), expected)
    finally:
        pipe.scheduler = own


def test_generate_reports_every_step_of_every_batch(pipe):
    seen: list[Step] = []
    pipe.generate(["a", "b", "c"], [0, 1, 2], batch_size=2, num_inference_steps=3, on_step=seen.append)
    assert [(step.index, len(step.x)) for step in seen] == [(i, 2) for i in range(4)] + [(i, 1) for i in range(4)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "magic"}, "unknown sampler 'magic'; samplers: ddpm"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 5000}, "num_inference_steps must be 1 to 1000"),
        ({"size": 48}, "size 48: this checkpoint draws 16 px"),
        ({"fast": True}, "no few-step denoisers"),
        ({"colour": "red"}, "unknown option colour; options: size"),
        ({"seeds": [1, 2]}, "1 prompts need 1 seeds, not 2"),
        ({"negative_prompts": ["a", "b"]}, "1 pictures need 1 prompts, not 2"),
    ],
)
def test_bad_options_are_named(pipe, options, words):
    values = {"prompts": ["a"], "seeds": [0], **options}
    with pytest.raises(PokediffError, match=words):
        list(pipe.denoise(**values))


# ---------------------------------------------------------------------------------------------- img2img and inpainting


def checkers() -> np.ndarray:
    """An opaque picture of 4-pixel squares, premultiplied RGBA (16, 16, 4)."""
    y, x = np.mgrid[:16, :16] // 4
    picture = np.full((16, 16, 4), 255, np.uint8)
    picture[..., 0] = np.where((x + y) % 2, 250, 10)
    return picture


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_weaker_the_nearer_to_the_image(pipe, sampler):
    image = checkers()
    far = [
        np.abs(pipe.generate(["a cat"], [3], image=image, strength=s, sampler=sampler).astype(int) - image).mean()
        for s in (0.1, 0.4, 1.0)
    ]
    assert far[0] < far[1] < far[2]
    assert far[0] < 20


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_start_where_the_strength_says(gaussian, sampler):
    image = np.full((16, 16, 4), 153, np.uint8)  # 0.2 in model space: the mean
    options = dict(num_inference_steps=20, sampler=sampler)
    steps = list(gaussian.denoise([""], [0], image=image, strength=0.5, **options))
    assert steps[0].sigma < 5
    assert len(steps) - 1 == (19 if sampler == "heun" else 10)  # heun evaluates twice, but for the last step
    assert len(steps) - 1 == len(gaussian.evaluations(Sampling(**options), strength=0.5))
    alpha = 1 / (1 + steps[0].sigma ** 2) ** 0.5
    assert steps[0].x.mean().item() == pytest.approx(alpha * MEAN, abs=0.1)
    assert steps[0].x.std().item() == pytest.approx(alpha * steps[0].sigma, rel=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_what_the_mask_leaves(pipe, sampler):
    image, mask = checkers(), np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    options = dict(num_inference_steps=8, sampler=sampler)
    drawn = pipe.generate(["a cat", "a dog"], [1, 2], image=image, mask=mask, **options)
    np.testing.assert_array_equal(drawn[:, ~mask], np.stack([image, image])[:, ~mask])
    assert (drawn[0][mask] != image[mask]).any()
    assert (drawn[0] != drawn[1]).any()


def test_one_image_and_mask_for_each_picture_in_any_batch(pipe):
    images = np.stack([checkers(), checkers()[::-1].copy(), checkers()])
    masks = np.zeros((3, 16, 16), bool)
    masks[0, :8], masks[1, 8:], masks[2, :, :8] = True, True, True
    options = dict(image=images, mask=masks, strength=0.7, num_inference_steps=6, precision="fp32", exact=True)
    together = pipe.generate(["a", "b", "c"], [1, 2, 3], **options)
    pairs = pipe.generate(["a", "b", "c"], [1, 2, 3], batch_size=2, **options)
    np.testing.assert_array_equal(together, pairs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": np.ones((16, 16), bool)}, "a mask needs an image"),
        ({"image": np.zeros((8, 8, 4), np.uint8)}, r"image: \(8, 8, 4\), not \(\.\.\., 16, 16, 4\)"),
        ({"image": checkers(), "mask": np.ones((8, 8), bool)}, "mask: "),
        ({"image": checkers(), "strength": 0.0}, "strength must be above 0"),
        ({"image": checkers(), "strength": 1.5}, "strength must be above 0"),
    ],
)
def test_a_bad_image_is_named(pipe, options, words):
    with pytest.raises(PokediffError, match=words):
        pipe.generate(["a"], [1], **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_other_channels_are_opaque(channels):
    pipe = pipeline_of(base=gaussian_denoiser(in_channels=channels))
    drawn = pipe.generate([""], [0], num_inference_steps=4)
    assert drawn.shape == (1, 16, 16, 4)
    assert (drawn[..., 3] == 255).all()
    kept = pipe.generate([""], [0], image=checkers(), mask=np.zeros((16, 16), bool), num_inference_steps=4)[0]
    expected = checkers() @ [0.299, 0.587, 0.114, 0] if channels == 1 else checkers()[..., 0]
    assert np.abs(kept[..., 0] - expected).max() <= 1
