from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pokediff.config import DiffusionConfig, TrainConfig
from pokediff.model.denoiser import ChannelNorm, Unet, attend, cosine_sigmas, cosine_timestep, sinusoidal
from pokediff.training.loop import make_noise_schedule


def small(**changes) -> Unet:
    torch.manual_seed(0)
    values = dict(image_size=32, widths=(32, 64), attention=(False, True), blocks=(1, 1), embedding_dim=64, text_dim=16)
    unet = Unet(**{**values, **changes})
    for parameter in unet.parameters():  # the last layers start at zero, which would hide everything
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return unet.eval()


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 4), (64, 3), (128, 4)])
def test_shapes(size, channels):
    unet = small(image_size=size, in_channels=channels)
    x = torch.randn(2, channels, size, size)
    assert unet(x, torch.tensor([0, 999]), torch.randn(2, 16), torch.zeros(2, 3)).shape == x.shape


def test_an_untrained_network_predicts_zero():
    unet = Unet(image_size=32, widths=(32, 64), attention=(False, True), text_dim=16)
    assert unet(torch.randn(2, 4, 32, 32), 500.0, torch.randn(2, 16)).abs().max() == 0


def test_every_input_counts():
    unet = small()
    x, text = torch.randn(1, 4, 32, 32), F.normalize(torch.randn(1, 16), dim=1)
    base = unet(x, 500.0, text)
    for other in (
        unet(x + 0.1, 500.0, text),
        unet(x, 400.0, text),
        unet(x, 500.0, -text),
        unet(x, 500.0, text, torch.tensor([[1.0, 0, 0]])),
    ):
        assert (other - base).abs().max() > 1e-4


def test_no_text_is_the_null_text_and_no_augmentation_is_zero():
    unet = small()
    unet.null_text.copy_(F.normalize(torch.randn(16), dim=0))
    x = torch.randn(2, 4, 32, 32)
    expected = unet(x, 10.0, unet.null_text.expand(2, -1), torch.zeros(2, 3))
    torch.testing.assert_close(unet(x, 10.0), expected)


def test_pictures_of_a_batch_do_not_touch_each_other():
    unet = small()
    x, text = torch.randn(3, 4, 32, 32), torch.randn(3, 16)
    together = unet(x, torch.tensor([1, 500, 999]), text)
    for index, timestep in enumerate((1.0, 500.0, 999.0)):
        alone = unet(x[index : index + 1], timestep, text[index : index + 1])
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    unet = small()
    unet.null_text.fill_(0.25)
    unet.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = Unet.from_pretrained(tmp_path)
    x = torch.randn(1, 4, 32, 32)
    torch.testing.assert_close(loaded(x, 3.0), unet(x, 3.0), rtol=0, atol=0)


def test_attention_is_the_library_s():
    query, key, value = torch.randn(3, 2, 4, 16, 8).unbind(0)
    torch.testing.assert_close(attend(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_timestep_embedding_against_its_definition():
    embedding = sinusoidal(torch.tensor([7.0]), 4)
    expected = torch.tensor([7.0, 0.07])
    torch.testing.assert_close(embedding, torch.cat([expected.cos(), expected.sin()])[None])


def test_a_patch_of_half_the_size_begins_one_level_higher():
    unet = small(image_size=64, patch=2, widths=(16, 32, 64), attention=(False, False, True), blocks=(1, 1, 1))
    assert unet.stem.in_channels == 4 * 2**2
    assert unet(torch.randn(2, 4, 64, 64), 500.0).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("widths", [(32,), (32, 64)])
def test_a_plain_first_level_has_no_norms_and_adds_its_skips(widths):
    levels = len(widths)
    unet = small(widths=widths, attention=(False,) * levels, blocks=(2,) * levels, plain=True, sigma_data=0.25)
    norms = [name for name, part in unet.named_modules() if isinstance(part, ChannelNorm)]
    assert bool(norms) == (levels > 1)
    assert all(name.startswith(("down.1", "up.0")) for name in norms)
    assert unet.up[-1][0].conv1.in_channels == 32
    x = torch.randn(2, 4, 32, 32)
    assert unet(x, 300.0).shape == x.shape
    seen = []
    for block in unet.up[-1]:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in unet.down[0]:
        block.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    without = unet(x, 300.0)  # with every skip zero, and what comes from below alone
    assert torch.equal(seen[0], torch.zeros_like(seen[0])) == (levels == 1)
    assert torch.isfinite(without).all()


def test_starting_from_a_network_of_smaller_pictures_takes_all_levels_below_the_first():
    other, unet = small(), small(image_size=64, patch=2, widths=(16, 32, 64), attention=(0, 0, 1), blocks=(1, 1, 1))
    untouched = unet.stem.weight.clone()
    assert unet.start_from(other) > 0.9 * sum(p.numel() for p in other.parameters())
    torch.testing.assert_close(unet.down[1][0].conv1.weight, other.down[0][0].conv1.weight)
    torch.testing.assert_close(unet.down[2][0].conv1.weight, other.down[1][0].conv1.weight)
    torch.testing.assert_close(unet.up[0][0].conv1.weight, other.up[0][0].conv1.weight)
    torch.testing.assert_close(unet.up[1][0].conv1.weight, other.up[1][0].conv1.weight)
    torch.testing.assert_close(unet.downsample[1].weight, other.downsample[0].weight)
    torch.testing.assert_close(unet.stem.weight, untouched)
    twin = small()
    with torch.no_grad():
        twin.stem.weight.zero_()
    twin.start_from(other)
    x = torch.randn(1, 4, 32, 32)
    torch.testing.assert_close(twin(x, 300.0), other(x, 300.0))


def preconditioned(noise_range: tuple[float, float, float] = (0.006, 100.0, 2.0)) -> Unet:
    return Unet(image_size=32, widths=(32,), attention=(False,), blocks=(1,), sigma_data=0.25, noise_range=noise_range)


def paint(unet: Unet, color: float, share: float) -> None:
    """Let it say everywhere: `color`, and how sure it is, a logit."""
    with torch.no_grad():
        patches = unet.painted.bias.view(5, -1)
        patches[:4], patches[4] = color, share


def test_what_is_carried_by_an_untrained_preconditioned_network_is_the_best_linear_guess():
    s, noise_range = 0.25, (0.006, 100.0, 2.0)
    unet = preconditioned(noise_range)
    paint(unet, 0.7, -30)
    timesteps = torch.tensor([0, 100, 500, 999])
    sigma = cosine_sigmas(timesteps.double(), 1000, *noise_range).float()[:, None, None, None]
    torch.manual_seed(0)
    x0, noise = s * torch.randn(4, 4, 32, 32), torch.randn(4, 4, 32, 32)
    guess = unet((x0 + sigma * noise) / (1 + sigma**2) ** 0.5, timesteps)
    torch.testing.assert_close(guess, s**2 / (s**2 + sigma**2) * (x0 + sigma * noise), rtol=1e-3, atol=1e-5)
    expected = (s**2 * sigma**2 / (s**2 + sigma**2)).flatten()  # the error that is left (Wiener)
    torch.testing.assert_close(((guess - x0) ** 2).mean(dim=(1, 2, 3)), expected, rtol=0.1, atol=0)


def test_what_is_painted_holds_nothing_of_the_noise():
    unet = preconditioned()
    paint(unet, 0.7, 30)
    torch.testing.assert_close(unet(torch.randn(2, 4, 32, 32), 300.0), torch.full((2, 4, 32, 32), 0.7))
    paint(unet, 0.7, 0)
    x = torch.randn(1, 4, 32, 32)
    half = unet(x, 300.0)
    paint(unet, 0.7, -30)
    torch.testing.assert_close(half, (unet(x, 300.0) + 0.7) / 2)


def test_the_schedule_of_network_and_scheduler_is_one():
    sigmas = cosine_sigmas(torch.arange(1000).double(), 1000, 0.006, 100.0, 2.0)
    assert sigmas[0].item() == pytest.approx(0.006)
    assert sigmas[-1].item() == pytest.approx(100.0)
    for timestep in (0, 123, 999):
        assert cosine_timestep(sigmas[timestep].item(), 1000, 0.006, 100.0, 2.0) == pytest.approx(timestep, abs=1e-6)
    config = TrainConfig(diffusion=DiffusionConfig(noise_shift=2.0))
    alphas = make_noise_schedule(config).alphas_cumprod.double()
    torch.testing.assert_close(((1 - alphas) / alphas).sqrt(), sigmas, rtol=1e-3, atol=0)
