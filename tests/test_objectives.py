from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from pokediff.config import CriticConfig, DiffusionConfig, ModelConfig, PerceptualConfig, StageConfig, TrainConfig
from pokediff.data import dataset
from pokediff.data.images import from_model, premultiply
from pokediff.errors import PokediffError
from pokediff.model.diffusion import make_noise_schedule
from pokediff.model.interface import enlarge
from pokediff.training.objectives import Batch, Drawings, denoising, training_batch
from pokediff.training.perceptual import AdversarialLoss, PerceptualLoss, on_plain_color
from pokediff.training.runs import load_moments, moments


@pytest.fixture(scope="module")
def perceptual(squeeze) -> PerceptualLoss:
    """LPIPS for half of a batch."""
    return PerceptualLoss(PerceptualConfig(squeeze, weight=0.2), torch.device("cpu"))


def make_critic(squeeze: str, **changes) -> AdversarialLoss:
    return AdversarialLoss(CriticConfig(squeeze, **changes), Accelerator(cpu=True), text_dim=8)


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

    plain, with_lpips = denoising(schedule), denoising(schedule, [perceptual])
    torch.manual_seed(0)
    assert (with_lpips(denoiser, batch)[:2] > plain(denoiser, batch)[:2]).all()
    with torch.inference_mode():
        torch.testing.assert_close(with_lpips(denoiser, batch), plain(denoiser, batch))


def test_a_network_that_is_not_there_is_one_line():
    with pytest.raises(PokediffError, match="not found"):
        PerceptualLoss(PerceptualConfig("squeeze:none.safetensors"), torch.device("cpu"))


def blurred(x0: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x0, 5, 1, 2)


@pytest.mark.slow
def test_a_critic_learns_to_tell_blurred_pictures_and_its_gradient_makes_them_likelier(squeeze):
    critic = make_critic(squeeze, share=1.0, learning_rate=1e-3)
    x0 = pictures(8)
    for step in range(40):
        torch.manual_seed(step)
        predicted = blurred(x0).requires_grad_()
        error = (predicted - x0).square().mean(dim=(1, 2, 3))
        value = critic(predicted, x0, error)
    assert critic.critic.margin > 0.02  # the network is untrained
    assert value.tolist() == [0] * 8  # a gradient, not a loss
    (direction,) = torch.autograd.grad(value.sum(), predicted)
    before, after = predicted.detach(), predicted.detach() - 0.02 * direction / direction.abs().max()
    assert score(critic, after) > score(critic, before)


def score(critic: AdversarialLoss, shown: torch.Tensor) -> float:
    """The critic's mean score of pictures on grey."""
    with torch.no_grad():
        return float(critic.critic(critic.scale(on_plain_color(shown, torch.full((len(shown), 3, 1, 1), 0.5)))).mean())


def of_color(red: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Red and blue discs, and their captions."""
    x0, is_red = pictures(len(red)), torch.tensor(red)[:, None, None, None]
    color = torch.where(is_red, torch.tensor([1.0, -1, -1])[:, None, None], torch.tensor([-1.0, -1, 1])[:, None, None])
    inside = x0[:, 3:] > 0
    x0 = torch.cat([torch.where(inside, color, -1.0), x0[:, 3:]], dim=1)
    return x0, F.one_hot(torch.tensor(red).long(), 8).float()


@pytest.mark.slow
def test_a_critic_of_captions_asks_for_what_was_asked_for(squeeze):
    critic = make_critic(squeeze, share=1.0, learning_rate=1e-2, captions=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        torch.manual_seed(step)
        (real, true), (drawn, asked) = (of_color((torch.rand(8, generator=generator) < 0.5).tolist()) for _ in range(2))
        predicted = blurred(drawn).requires_grad_()
        critic(predicted, real, (predicted - real).square().mean(dim=(1, 2, 3)), None, (asked, true))
    assert critic.margins["critic_caption_margin"] > 0.1

    def pull(is_red: bool) -> float:
        """How much redder than bluer the critic wants a purple picture, asked for as one of them."""
        torch.manual_seed(0)
        purple, text = sum(of_color([red] * 8)[0] for red in (True, False)) / 2, of_color([is_red] * 8)[1]
        predicted = purple.requires_grad_()
        value = critic(predicted, purple.detach(), predicted.square().mean(dim=(1, 2, 3)), None, (text, text))
        (wanted,) = torch.autograd.grad(-value.sum(), predicted)
        red, _, blue, _ = wanted.mean(dim=(0, 2, 3)).tolist()
        return red - blue

    assert pull(True) > pull(False)


def test_a_critic_without_captions_is_the_one_that_it_was(squeeze):
    plain, of_captions = make_critic(squeeze), make_critic(squeeze, captions=True)
    assert "caption_margin" not in plain.critic.state_dict()
    assert plain.margins.keys() == {"critic_margin"}
    for name, value in plain.critic.state_dict().items():
        torch.testing.assert_close(of_captions.critic.state_dict()[name], value, rtol=0, atol=0)


def test_the_critic_s_gradient_has_its_share_of_the_other_s(squeeze):
    critic = make_critic(squeeze, weight=0.5, share=1.0)
    critic.critic.updates.fill_(10_000)
    x0 = pictures()
    predicted = blurred(x0).requires_grad_()
    error = (predicted - x0).square().mean(dim=(1, 2, 3))
    (others,) = torch.autograd.grad(error.sum(), predicted, retain_graph=True)
    (own,) = torch.autograd.grad(critic(predicted, x0, error).sum(), predicted)
    assert float(own.norm() / others.norm()) == pytest.approx(0.5, rel=1e-3)


def test_a_resumed_critic_goes_on_as_if_it_had_not_stopped(squeeze):
    def steps(critic: AdversarialLoss, numbers: range) -> None:
        for step in numbers:
            torch.manual_seed(step)
            x0 = pictures()
            predicted = blurred(x0).requires_grad_()
            critic(predicted, x0, (predicted - x0).square().mean(dim=(1, 2, 3)))

    whole, first, second = (make_critic(squeeze) for _ in range(3))
    steps(whole, range(4))
    steps(first, range(2))
    second.critic.load_state_dict(first.critic.state_dict())
    load_moments(second.optimizer, moments(first.optimizer))
    steps(second, range(2, 4))
    for ours, theirs in (
        (whole.critic.state_dict(), second.critic.state_dict()),
        (moments(whole.optimizer), moments(second.optimizer)),
    ):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ upscalers of one step


def upscaler_batch(drawn_at: int | None, rank: int = 0, world: int = 1, drawings: Drawings | None = None) -> Batch:
    """The part of one of `world` processes of a batch of eight 32 px pictures, of an upscaler by two."""
    model = ModelConfig(patch=2, widths=(16,), blocks=(1,), attention=(False,), upscale=2, below=2.0, steps=1)
    stage = StageConfig(image_size=32, model=model, low_res_noise=0.1)
    config = TrainConfig(stages={"upscaler-32": stage}, seed=3)
    part = slice(8 * rank // world, 8 * (rank + 1) // world)
    pixels = torch.from_numpy(premultiply(from_model(pictures(8))))[part]
    given = dataset.Batch(pixels, torch.zeros(len(pixels), 8), torch.zeros(len(pixels), 3))
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=world, process_index=rank)
    return training_batch(given, config, stage, accelerator, 5, drawn_at, drawings)


def test_an_upscaler_of_one_step_is_trained_on_what_it_meets_in_a_drawing():
    batch, plain = upscaler_batch(499), upscaler_batch(None)
    assert plain.start is None
    drawn = torch.tensor([True, True, True, False] * 2)
    assert (batch.timesteps == 499).tolist() == drawn.tolist()
    torch.testing.assert_close(batch.start[drawn], enlarge(batch.low_res, 32)[drawn])
    torch.testing.assert_close(batch.start[~drawn], batch.x0[~drawn])
    assert (batch.timesteps[~drawn] == plain.timesteps[~drawn]).all()

    seen, still = [], replace(batch, noise=torch.zeros_like(batch.noise))
    denoising(make_noise_schedule(DiffusionConfig()))(lambda x, *_: seen.append(x) or x, still)
    small = F.avg_pool2d(seen[0], 2)
    torch.testing.assert_close(enlarge(small, 32)[drawn], seen[0][drawn])  # nothing of the large picture shines through
    assert (enlarge(small, 32)[~drawn] - seen[0][~drawn]).abs().max() > 0.1


def test_batches_of_an_upscaler_of_one_step_do_not_depend_on_the_number_of_processes():
    whole, halves = upscaler_batch(499), [upscaler_batch(499, rank, 2) for rank in range(2)]
    for name in ("start", "timesteps", "low_res"):
        parts = torch.cat([getattr(half, name) for half in halves])
        torch.testing.assert_close(parts, getattr(whole, name), rtol=0, atol=0)


@pytest.fixture
def drawings() -> Drawings:
    generator = torch.Generator().manual_seed(4)
    return Drawings(torch.rand(5, 4, 16, 16, generator=generator), torch.randn(5, 8, generator=generator))


def test_a_part_of_a_batch_are_drawings_without_a_large_picture(drawings):
    batch, plain = upscaler_batch(499, drawings=drawings), upscaler_batch(499)
    assert batch.unpaired.tolist() == [True] * 2 + [False] * 6
    for row in range(2):
        which = [torch.equal(batch.low_res[row], picture) for picture in drawings.pictures].index(True)
        assert torch.equal(batch.text[row], drawings.text[which])
    torch.testing.assert_close(batch.start[:2], enlarge(batch.low_res[:2], 32))
    assert (batch.timesteps[:2] == 499).all()
    for name in ("x0", "noise"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    asked, true = batch.texts  # what a critic that reads captions gets
    assert asked is batch.text
    assert torch.equal(true, plain.text)
    assert not torch.equal(asked[:2], true[:2])
    for name in ("text", "start", "low_res", "timesteps", "augment"):
        assert torch.equal(getattr(batch, name)[2:], getattr(plain, name)[2:])


def test_the_error_of_a_drawing_is_that_of_the_small_picture_alone(drawings, perceptual):
    batch = upscaler_batch(499, drawings=drawings)
    details = torch.tensor([[0.3, -0.3], [-0.3, 0.3]]).repeat(16, 16)  # they average to nothing
    objective = denoising(make_noise_schedule(DiffusionConfig()), [perceptual])
    loss = objective(lambda *_: (enlarge(batch.low_res, 32) + details).requires_grad_(), batch)
    assert loss[:2].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert (loss[2:] > 0.1).all()


@pytest.mark.parametrize(("upscale", "steps"), [(1, 1), (2, 5)])
def test_drawings_are_for_upscalers_of_one_step(upscale, steps):
    model = ModelConfig(upscale=upscale, steps=steps, below=2.0)
    with pytest.raises(PokediffError, match=r"critic\.drawings needs an upscaler of one step"):
        StageConfig(model=model, critic=CriticConfig("squeeze:FILE", drawings=4))
