from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_denoiser

from pokediff.model.denoiser import ChannelNorm, Denoiser, attend, flops_per_image
from pokediff.model.diffusion import cosine_sigmas


def small(**changes) -> Denoiser:
    return make_denoiser(**{"text_dim": 16, **changes})


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 4), (64, 3), (128, 4)])
def test_shapes(size, channels):
    denoiser = small(image_size=size, in_channels=channels)
    x = torch.randn(2, channels, size, size)
    assert denoiser(x, torch.tensor([0, 999]), torch.randn(2, 16), torch.zeros(2, 3)).shape == x.shape


def test_an_untrained_denoiser_of_v_predicts_v_zero():
    denoiser = Denoiser(image_size=32, widths=(32, 64), attention=(False, True), blocks=(1, 1), text_dim=16)
    x = torch.randn(2, 4, 32, 32)
    sigma = cosine_sigmas(torch.tensor(500.0), 1000, *denoiser.config.noise_range)
    torch.testing.assert_close(denoiser(x, 500.0, torch.randn(2, 16)), x / (1 + sigma**2) ** 0.5)


@pytest.mark.parametrize("timestep", [0.0, 3.5, 250.0, 999.0])
def test_with_sigma_data_1_the_network_predicts_minus_v(timestep):
    """x0 = alpha x - std v (Salimans & Ho 2022), v the negative of what the last layer gives."""
    denoiser, outputs = small(), []
    denoiser.out.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    x = torch.randn(2, 4, 32, 32)
    x0 = denoiser(x, timestep, torch.randn(2, 16))
    v = -F.pixel_shuffle(outputs[0], denoiser.patch).double()
    sigma = cosine_sigmas(torch.tensor(timestep).double(), 1000, *denoiser.config.noise_range)
    alpha, std = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(x0.double(), alpha * x.double() - std * v, rtol=0, atol=2e-6)


def test_every_input_counts():
    denoiser = small()
    x, text = torch.randn(1, 4, 32, 32), F.normalize(torch.randn(1, 16), dim=1)
    base = denoiser(x, 500.0, text)
    for other in (
        denoiser(x + 0.1, 500.0, text),
        denoiser(x, 400.0, text),
        denoiser(x, 500.0, -text),
        denoiser(x, 500.0, text, torch.tensor([[1.0, 0, 0]])),
    ):
        assert (other - base).abs().max() > 1e-4


def test_an_upscaler_uses_the_small_picture_and_needs_it():
    denoiser = small(patch=2, upscale=2)
    x, low_res = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 16, 16)
    assert (denoiser(x, 500.0, low_res=low_res) - denoiser(x, 500.0, low_res=-low_res)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="low_res"):
        denoiser(x, 500.0)


def test_no_text_is_the_null_text_and_no_augmentation_is_zero():
    denoiser = small()
    denoiser.null_text.copy_(F.normalize(torch.randn(16), dim=0))
    x = torch.randn(2, 4, 32, 32)
    expected = denoiser(x, 10.0, denoiser.null_text.expand(2, -1), torch.zeros(2, 3))
    torch.testing.assert_close(denoiser(x, 10.0), expected)


def test_pictures_of_a_batch_are_independent():
    denoiser = small()
    x, text = torch.randn(3, 4, 32, 32), torch.randn(3, 16)
    together = denoiser(x, torch.tensor([1, 500, 999]), text)
    for index, timestep in enumerate((1.0, 500.0, 999.0)):
        alone = denoiser(x[index : index + 1], timestep, text[index : index + 1])
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    denoiser = small(below=0.7, steps=3, fast=True)
    denoiser.null_text.fill_(0.25)
    denoiser.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = Denoiser.from_pretrained(tmp_path)
    assert all(torch.equal(weight, denoiser.state_dict()[name]) for name, weight in loaded.state_dict().items())
    x = torch.randn(1, 4, 32, 32)
    torch.testing.assert_close(loaded(x, 3.0), denoiser(x, 3.0), rtol=0, atol=1e-6)
    assert (loaded.below, loaded.config.steps, loaded.config.fast) == (0.7, 3, True)
    assert small().below == math.inf


def test_attention_equals_the_library_s():
    query, key, value = torch.randn(3, 2, 4, 16, 8).unbind(0)
    torch.testing.assert_close(attend(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_a_patch_of_half_the_size_starts_one_level_higher():
    denoiser = small(image_size=64, patch=2, widths=(16, 32, 64), attention=(False, False, True), blocks=(1, 1, 1))
    assert denoiser.stem.in_channels == 4 * 2**2
    assert denoiser(torch.randn(2, 4, 64, 64), 500.0).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("widths", [(32,), (32, 64)])
def test_a_norm_free_first_level_adds_its_skips(widths):
    levels = len(widths)
    shape = dict(widths=widths, attention=(False,) * levels, blocks=(2,) * levels)
    denoiser = small(**shape, norm_free=True, sigma_data=0.25, gate=True)
    norms = [name for name, part in denoiser.named_modules() if isinstance(part, ChannelNorm)]
    assert bool(norms) == (levels > 1)
    assert all(name.startswith(("down.1", "up.0")) for name in norms)
    assert denoiser.up[-1][0].conv1.in_channels == 32
    x = torch.randn(2, 4, 32, 32)
    assert denoiser(x, 300.0).shape == x.shape
    seen = []
    for block in denoiser.up[-1]:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in denoiser.down[0]:
        block.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    without = denoiser(x, 300.0)  # with every skip zero, only what comes from below is left
    assert torch.equal(seen[0], torch.zeros_like(seen[0])) == (levels == 1)
    assert torch.isfinite(without).all()


def test_starting_from_a_denoiser_of_smaller_pictures_copies_all_levels_below_the_first():
    shape = dict(widths=(32, 64), head_dim=32, embedding_dim=64)
    other = small(**shape)
    denoiser = small(**{**shape, "widths": (16, 32, 64)}, image_size=64, patch=2, attention=(0, 0, 1), blocks=(1, 1, 1))
    untouched = denoiser.stem.weight.clone()
    assert denoiser.start_from(other) > 0.9 * sum(p.numel() for p in other.parameters())
    torch.testing.assert_close(denoiser.down[1][0].conv1.weight, other.down[0][0].conv1.weight)
    torch.testing.assert_close(denoiser.down[2][0].conv1.weight, other.down[1][0].conv1.weight)
    torch.testing.assert_close(denoiser.up[0][0].conv1.weight, other.up[0][0].conv1.weight)
    torch.testing.assert_close(denoiser.up[1][0].conv1.weight, other.up[1][0].conv1.weight)
    torch.testing.assert_close(denoiser.downsample[1].weight, other.downsample[0].weight)
    torch.testing.assert_close(denoiser.stem.weight, untouched)
    twin = small(**shape)
    with torch.no_grad():
        twin.stem.weight.zero_()
    twin.start_from(other)
    x = torch.randn(1, 4, 32, 32)
    torch.testing.assert_close(twin(x, 300.0), other(x, 300.0))


def test_starting_from_a_refiner_and_a_base_copies_each_level_to_that_of_the_same_maps():
    shape = dict(head_dim=32, embedding_dim=64, norm_free=True, gate=True)
    base = small(widths=(32, 64), head_dim=32, embedding_dim=64)  # maps of 16 and 8
    refiner = small(widths=(32,), attention=(0,), blocks=(2,), patch=1, **shape)  # maps of 32
    denoiser = small(widths=(32, 32, 64), attention=(0, 0, 1), blocks=(2, 1, 1), patch=1, **shape)
    denoiser.start_from(refiner)
    denoiser.start_from(base)
    torch.testing.assert_close(denoiser.stem.weight, refiner.stem.weight)
    torch.testing.assert_close(denoiser.down[0][1].conv1.weight, refiner.down[0][1].conv1.weight)
    torch.testing.assert_close(denoiser.up[2][1].conv1.weight, refiner.up[0][1].conv1.weight)
    torch.testing.assert_close(denoiser.down[2][0].conv1.weight, base.down[1][0].conv1.weight)
    torch.testing.assert_close(denoiser.up[0][0].conv1.weight, base.up[0][0].conv1.weight)
    torch.testing.assert_close(denoiser.downsample[1].weight, base.downsample[0].weight)
    torch.testing.assert_close(denoiser.upsample[0].weight, base.upsample[0].weight)
    torch.testing.assert_close(denoiser.time_mlp[0].weight, base.time_mlp[0].weight)


def preconditioned(noise_range: tuple[float, float, float] = (0.006, 100.0, 2.0)) -> Denoiser:
    shape = dict(image_size=32, widths=(32,), attention=(False,), blocks=(1,))
    return Denoiser(**shape, sigma_data=0.25, gate=True, noise_range=noise_range)


def set_x0_head(denoiser: Denoiser, color: float, gate: float) -> None:
    """Let the second head predict `color` everywhere, with this logit of the gate."""
    with torch.no_grad():
        patches = denoiser.x0_head.bias.view(5, -1)
        patches[:4], patches[4] = color, gate


def test_an_untrained_preconditioned_denoiser_is_the_best_linear_one():
    s, noise_range = 0.25, (0.006, 100.0, 2.0)
    denoiser = preconditioned(noise_range)
    set_x0_head(denoiser, 0.7, -30)
    timesteps = torch.tensor([0, 100, 500, 999])
    sigma = cosine_sigmas(timesteps.double(), 1000, *noise_range).float()[:, None, None, None]
    torch.manual_seed(0)
    x0, noise = s * torch.randn(4, 4, 32, 32), torch.randn(4, 4, 32, 32)
    guess = denoiser((x0 + sigma * noise) / (1 + sigma**2) ** 0.5, timesteps)
    torch.testing.assert_close(guess, s**2 / (s**2 + sigma**2) * (x0 + sigma * noise), rtol=1e-3, atol=1e-5)
    expected = (s**2 * sigma**2 / (s**2 + sigma**2)).flatten()  # the error that is left (Wiener)
    torch.testing.assert_close(((guess - x0) ** 2).mean(dim=(1, 2, 3)), expected, rtol=0.1, atol=0)


def test_the_gate_mixes_in_an_x0_without_the_noise():
    denoiser = preconditioned()
    set_x0_head(denoiser, 0.7, 30)
    torch.testing.assert_close(denoiser(torch.randn(2, 4, 32, 32), 300.0), torch.full((2, 4, 32, 32), 0.7))
    set_x0_head(denoiser, 0.7, 0)
    x = torch.randn(1, 4, 32, 32)
    half = denoiser(x, 300.0)
    set_x0_head(denoiser, 0.7, -30)
    torch.testing.assert_close(half, (denoiser(x, 300.0) + 0.7) / 2)


def test_flops_are_counted_for_every_kind():
    base, upscaler = small(), small(image_size=64, patch=4, upscale=2)
    assert flops_per_image(base) == pytest.approx(flops_per_image(small()))
    assert flops_per_image(upscaler) > flops_per_image(base) > 1e6
