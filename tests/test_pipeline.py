from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from pokediff.config import DiffusionConfig, TrainConfig
from pokediff.errors import PokediffError
from pokediff.model.denoiser import Unet
from pokediff.model.pipeline import SAMPLERS, PokeDiffPipeline, Step, slerp
from pokediff.model.text import load_text_encoder
from pokediff.training.loop import make_noise_schedule

MEAN, STD = 0.2, 0.2


def schedule(kind: str = "v_prediction") -> DPMSolverMultistepScheduler:
    config = TrainConfig(diffusion=DiffusionConfig(prediction_type=kind))
    return DPMSolverMultistepScheduler.from_config(make_noise_schedule(config).config)


class GaussianUnet(Unet):
    """The exact network for pictures whose pixels are independent N(MEAN, STD^2)."""

    def forward(self, x, timestep, text=None, augment=None):
        a = schedule().alphas_cumprod[int(timestep)].double()
        x = x.double()
        # posterior mean of x0 given x = sqrt(a) x0 + sqrt(1-a) noise
        x0 = MEAN + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (x - a.sqrt() * MEAN)
        output = {
            "v_prediction": (a.sqrt() * x - x0) / (1 - a).sqrt(),
            "epsilon": (x - a.sqrt() * x0) / (1 - a).sqrt(),
            "sample": x0,
        }[self.kind]
        return output.float()


def gaussian(kind: str = "v_prediction") -> PokeDiffPipeline:
    unet = GaussianUnet(image_size=16, widths=(32,), attention=(False,), blocks=(1,))
    unet.kind = kind
    return PokeDiffPipeline(unet, schedule(kind))


def random_pipeline() -> PokeDiffPipeline:
    """A network of random weights with the built-in encoder."""
    torch.manual_seed(1)
    unet = Unet(image_size=16, widths=(32, 64), attention=(False, True), blocks=(1, 1), embedding_dim=64).eval()
    for parameter in unet.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    encoder = load_text_encoder("builtin")
    unet.null_text.copy_(encoder([""]).pooled[0])
    return PokeDiffPipeline(unet, schedule(), encoder.model, encoder.tokenizer)


@pytest.fixture(scope="module")
def pipe() -> PokeDiffPipeline:
    return random_pipeline()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_recovers_a_gaussian(sampler):
    stochastic = sampler in ("ddpm", "euler_a")  # first order in noise too: they need more steps
    *_, last = gaussian().denoise(
        [""] * 16, range(16), num_steps=200 if stochastic else 60, sampler=sampler, guidance_scale=1
    )
    assert last.x0.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert last.x0.std().item() == pytest.approx(STD, rel=0.07)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_other_prediction_types_give_the_same_pictures(kind):
    *_, expected = gaussian().denoise(["", ""], [3, 4], num_steps=15, guidance_scale=1)
    *_, last = gaussian(kind).denoise(["", ""], [3, 4], num_steps=15, guidance_scale=1)
    torch.testing.assert_close(last.x0, expected.x0, rtol=0, atol=2e-3)


def test_steps_go_from_noise_to_picture():
    steps = list(gaussian().denoise([""], [0], num_steps=20, guidance_scale=1))
    assert [step.index for step in steps] == list(range(21))
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == 0
    assert isinstance(steps[0], Step)
    assert steps[0].x.std().item() == pytest.approx(1, abs=0.1)
    assert steps[0].x0.std().item() < 0.01  # from pure noise only the mean can be told
    torch.testing.assert_close(steps[-1].x.clamp(-1, 1), steps[-1].x0)


@pytest.mark.parametrize("sampler", ["heun", "euler", "euler_a", "ddpm"])
def test_the_noisy_picture_is_shown_at_unit_scale_by_every_sampler(sampler):
    for step in gaussian().denoise([""], [0], num_steps=10, sampler=sampler, guidance_scale=1):
        assert step.x.abs().max() < 6


def test_sigma_is_the_schedule_s():
    pipe = gaussian()
    alphas = pipe.scheduler.alphas_cumprod.double()
    for step in list(pipe.denoise([""], [0], num_steps=8, guidance_scale=1))[:-1]:
        a = alphas[int(step.timestep)]
        assert step.sigma == pytest.approx(((1 - a) / a).sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_picture_in_any_batch(pipe, sampler, precision):
    prompts, seeds = ["a red dragon", "a blue turtle", "", "a cat", "a dog"], [5, 6, 7, 8, 2**40]
    options = dict(num_steps=6, sampler=sampler, precision=precision)
    together = pipe.generate(prompts, seeds, batch_size=5, **options)
    pairs = pipe.generate(prompts, seeds, batch_size=2, **options)
    alone = np.concatenate([pipe.generate([p], [s], **options) for p, s in zip(prompts, seeds, strict=True)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, pairs)
    assert (together[0] != together[1]).any()


def test_prompt_guidance_and_negative_prompt_count(pipe):
    def draw(**options):
        return pipe.generate(["a red dragon"], [0], num_steps=4, **options)

    plain = draw(guidance_scale=1)
    assert (plain != pipe.generate(["a blue turtle"], [0], num_steps=4, guidance_scale=1)).any()
    assert (plain != draw(guidance_scale=4)).any()
    assert (draw(guidance_scale=4) != draw(guidance_scale=4, negative_prompt="a blue turtle")).any()
    np.testing.assert_array_equal(plain, draw(guidance_scale=4, guidance_interval=(1e6, 1e7)))  # an interval never met


def test_guidance_one_asks_the_network_once_and_otherwise_twice(pipe, monkeypatch):
    sizes = []
    forward = Unet.forward
    monkeypatch.setattr(Unet, "forward", lambda self, x, *args: sizes.append(len(x)) or forward(self, x, *args))
    list(pipe.denoise(["a", "b"], [0, 1], num_steps=3, precision="bf16", guidance_scale=1))
    assert sizes == [2, 2, 2]
    sizes.clear()
    list(pipe.denoise(["a", "b"], [0, 1], num_steps=3, precision="bf16", guidance_scale=2))
    assert sizes == [4, 4, 4]


def test_autograd_stays_on_for_the_caller(pipe):
    for _ in pipe.denoise([""], [0], num_steps=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = pipe.generate(["a red dragon"], [1], num_steps=3)
    loaded = PokeDiffPipeline.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.generate(["a red dragon"], [1], num_steps=3), expected)


def test_another_diffusers_scheduler_can_be_put_in(pipe):
    other = random_pipeline()
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config)
    np.testing.assert_array_equal(
        other.generate(["a cat"], [0], num_steps=5), pipe.generate(["a cat"], [0], num_steps=5, sampler="ddim")
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("LCMScheduler", {}),
    ],
)
def test_a_scheduler_that_draws_noise_keeps_to_the_seed(kind, changes):
    import diffusers

    pipe = random_pipeline()
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **changes)
    together = pipe.generate(["a cat", "a dog"], [3, 4], num_steps=4)
    np.testing.assert_array_equal(pipe.generate(["a dog"], [4], num_steps=4), together[1:])


def test_library_use(pipe):
    images = pipe("a red dragon", num_images=2, seed=3, num_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert images[0].mode == "RGBA"
    again = pipe("a red dragon", seed=4, num_steps=2).images[0]
    assert again.tobytes() == images[1].tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "magic"}, "unknown sampler"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 5000}, "num_steps"),
        ({"seeds": [1, 2]}, "as many seeds"),
    ],
)
def test_bad_options_are_named(pipe, options, words):
    values = {"prompts": ["a"], "seeds": [0], **options}
    with pytest.raises(PokediffError, match=words):
        list(pipe.denoise(**values))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(PokediffError, match="no checkpoint"):
        PokeDiffPipeline.from_pretrained(tmp_path)
    with pytest.raises(PokediffError, match="no checkpoint"):
        PokeDiffPipeline.from_pretrained("checkpoints/misspelt")


def test_a_checkpoint_that_is_broken_or_not_ours_is_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(tmp_path)


def test_a_hub_out_of_reach_is_one_quick_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PokediffError, match=r"checkpoint someone/creatures: .* cannot be reached"):
        PokeDiffPipeline.from_pretrained("someone/creatures")


def test_push_to_hub_sends_a_whole_pipeline(pipe, tmp_path, monkeypatch):
    """The hub itself is out of reach: what would be sent is looked at on the way."""
    from types import SimpleNamespace

    from diffusers.utils import hub_utils

    sent: list[str] = []

    def upload(*_args, folder_path, **_options):
        sent.extend(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file())

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setattr(
        hub_utils, "load_or_create_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None)
    )
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card, **_: card)
    pipe.push_to_hub("someone/creatures")
    assert {
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    } <= set(sent)
    assert any(name.startswith("text_encoder/") and name.endswith(".safetensors") for name in sent)


# ----------------------------------------------------------------------------- from a picture, in a part, in between


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
def test_steps_begin_where_the_strength_says(sampler):
    image = np.full((16, 16, 4), 153, np.uint8)  # 0.2 in model space: the mean
    steps = list(
        gaussian().denoise([""], [0], image=image, strength=0.5, num_steps=20, sampler=sampler, guidance_scale=1)
    )
    assert steps[0].sigma < 5
    assert len(steps) - 1 == (20 if sampler == "heun" else 10) - (sampler == "heun")
    alpha = 1 / (1 + steps[0].sigma ** 2) ** 0.5
    assert steps[0].x.mean().item() == pytest.approx(alpha * MEAN, abs=0.1)
    assert steps[0].x.std().item() == pytest.approx(alpha * steps[0].sigma, rel=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_what_the_mask_leaves(pipe, sampler):
    image, mask = checkers(), np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    drawn = pipe.generate(["a cat", "a dog"], [1, 2], image=image, mask=mask, num_steps=8, sampler=sampler)
    np.testing.assert_array_equal(drawn[:, ~mask], np.stack([image, image])[:, ~mask])
    assert (drawn[0][mask] != image[mask]).any()
    assert (drawn[0] != drawn[1]).any()


def test_one_image_and_mask_for_each_picture_in_any_batch(pipe):
    images = np.stack([checkers(), checkers()[::-1].copy(), checkers()])
    masks = np.zeros((3, 16, 16), bool)
    masks[0, :8], masks[1, 8:], masks[2, :, :8] = True, True, True
    together = pipe.generate(["a", "b", "c"], [1, 2, 3], image=images, mask=masks, strength=0.7, num_steps=6)
    pairs = pipe.generate(["a", "b", "c"], [1, 2, 3], image=images, mask=masks, strength=0.7, num_steps=6, batch_size=2)
    np.testing.assert_array_equal(together, pairs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": np.ones((16, 16), bool)}, "needs an image"),
        ({"image": np.zeros((8, 8, 4), np.uint8)}, "image: "),
        ({"image": checkers(), "mask": np.ones((8, 8), bool)}, "mask: "),
        ({"image": checkers(), "strength": 0.0}, "strength"),
        ({"image": checkers(), "strength": 1.5}, "strength"),
    ],
)
def test_what_cannot_be_begun_with_is_said(pipe, options, words):
    with pytest.raises(PokediffError, match=words):
        pipe.generate(["a"], [1], **options)


def test_between_two_noises_there_is_noise():
    torch.manual_seed(0)
    start, end = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    for share in (0.25, 0.5, 0.75):
        assert slerp(start, end, share).std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(slerp(start, end, 0.0), start)
    torch.testing.assert_close(slerp(start, end, 1.0), end, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slerp(start, start, 0.3), start)


def test_vectors_and_noise_can_stand_for_prompts_and_seeds(pipe):
    prompts, seeds = ["a cat", "a dog"], [4, 5]
    expected = pipe.generate(prompts, seeds, num_steps=6)
    _, noise = pipe.make_noise(seeds)
    given = pipe.generate(pipe.encode_prompt(prompts), [0, 0], noise=noise, num_steps=6)
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_a_network_that_predicts_x0(sampler):
    options = dict(num_steps=15, guidance_scale=1, sampler=sampler)
    *_, expected = gaussian().denoise(["", ""], [3, 4], **options)
    *_, last = gaussian("sample").denoise(["", ""], [3, 4], **options)
    torch.testing.assert_close(last.x0, expected.x0, rtol=0, atol=2e-3)
