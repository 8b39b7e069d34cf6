from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pokediff.config import DiffusionConfig, PerceptualConfig
from pokediff.errors import PokediffError
from pokediff.model.diffusion import make_noise_schedule
from pokediff.training.objectives import Batch, PerceptualLoss, denoising


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory) -> PerceptualLoss:
    """LPIPS with an untrained SqueezeNet, for half of a batch."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_file(squeezenet1_1().state_dict(), file)
    return PerceptualLoss(PerceptualConfig(f"squeeze:{file}", weight=0.2), torch.device("cpu"))


def pictures(number: int = 4) -> torch.Tensor:
    """Discs in model space, premultiplied: transparent around (N, 4, 32, 32)."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    alpha = ((x**2 + y**2).sqrt() < 11).float()
    color = torch.rand(number, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    return 2 * torch.cat([color * alpha, alpha.expand(number, 1, -1, -1)], dim=1) - 1


def test_it_is_zero_for_equal_pictures_and_grows_with_their_difference(perceptual):
    x0 = pictures()
    assert perceptual(x0, x0).tolist() == pytest.approx([0] * 4, abs=1e-6)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    little, much = (perceptual((x0 + amount * noise).clamp(-1, 1), x0)[:2].mean() for amount in (0.05, 0.3))
    assert 0 < little < much


def test_the_share_of_a_batch_and_gradients(perceptual):
    x0 = pictures()
    predicted = (0.9 * x0).requires_grad_()
    loss = perceptual(predicted, x0)
    assert (loss[:2] > 0).all()
    assert loss[2:].tolist() == [0, 0]
    loss.sum().backward()
    assert predicted.grad[:2].abs().sum() > 0
    assert predicted.grad[:, 3].abs().sum() > 0  # alpha counts
    assert predicted.grad[2:].abs().sum() == 0


def test_it_is_part_of_the_training_loss_and_not_of_the_validation_loss(perceptual):
    schedule = make_noise_schedule(DiffusionConfig())
    x0 = pictures()
    batch = Batch(x0, torch.randn_like(x0), torch.tensor([10, 200, 500, 900]), torch.zeros(4, 8))

    def denoiser(noisy: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        return 0.5 * noisy

    plain, with_lpips = denoising(schedule), denoising(schedule, perceptual)
    torch.manual_seed(0)
    assert (with_lpips(denoiser, batch)[:2] > plain(denoiser, batch)[:2]).all()
    with torch.inference_mode():
        torch.testing.assert_close(with_lpips(denoiser, batch), plain(denoiser, batch))


def test_a_network_that_is_not_there_is_one_line():
    with pytest.raises(PokediffError, match="does not exist"):
        PerceptualLoss(PerceptualConfig("squeeze:none.safetensors"), torch.device("cpu"))
