"""Losses of the baselines: of a drawn picture against the real one of the same text, and against a discriminator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from pokediff.baselines.networks import Discriminator
from pokediff.config import BaselineConfig
from pokediff.errors import PokediffError, first_line
from pokediff.evaluation.features import IMAGENET, read_weights
from pokediff.training.perceptual import frozen_lpips, on_plain_color

VGG_LAYERS = (3, 8, 17, 26, 35)  # the last ReLU before each pooling
Features = Callable[[torch.Tensor], list[torch.Tensor]]


class PictureLosses:
    """The weighted losses of `config.losses` that compare a picture with the real one, by name.

    Raises PokediffError when the network of `perceptual` or `lpips` cannot be loaded.
    """

    def __init__(self, config: BaselineConfig) -> None:
        self.weights = {name: weight for name, weight in config.losses.items() if name != "adversarial"}
        self.networks: dict[str, nn.Module] = {}
        features: Features | None = None
        for name, file in (("lpips", config.lpips), ("perceptual", config.features)):
            if name in self.weights and file is None:
                option = {"lpips": "lpips", "perceptual": "features"}[name]
                raise PokediffError(f"losses.{name} needs a network: --{option} squeeze:FILE.safetensors")
        if "lpips" in self.weights:
            self.networks["lpips"] = frozen_lpips(str(config.lpips), torch.device("cpu"))
        if "perceptual" in self.weights:
            features, network = load_layers(str(config.features))
            self.networks["perceptual"] = network
        self.kinds: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "l1": F.l1_loss,
            "bce": lambda x, y: F.binary_cross_entropy((x + 1) / 2, (y + 1) / 2),
            "edges": lambda x, y: F.l1_loss(sobel(x), sobel(y)),
            "lpips": lambda x, y: self.networks["lpips"](on_white(x), on_white(y)).mean(),
            "perceptual": lambda x, y: feature_distance(features, x, y),  # type: ignore[arg-type]
        }

    def __call__(self, drawn: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of pictures (N, C, S, S) in [-1, 1]; each a scalar."""
        for network in self.networks.values():
            network.to(drawn.device)
        with torch.autocast(drawn.device.type, enabled=False):  # cross-entropy and gradients need float32
            return {name: weight * self.kinds[name](drawn.float(), real) for name, weight in self.weights.items()}


def sobel(x: torch.Tensor) -> torch.Tensor:
    """(N, C, S, S) to its horizontal and vertical gradients, (N, 2C, S, S); the border is repeated."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    kernels = torch.stack([across, across.T])[:, None].repeat(x.shape[1], 1, 1, 1)  # (2C, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernels, groups=x.shape[1])


def on_white(x: torch.Tensor) -> torch.Tensor:
    """(N, C, S, S) in [-1, 1] as RGB on white, at least 128 px: below that these networks see little."""
    return on_plain_color(x, torch.ones(len(x), 3, 1, 1, device=x.device))


def feature_distance(features: Features, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean L1 distance of the activations of every layer (Johnson et al., "Perceptual Losses", 2016)."""
    with torch.no_grad():
        wanted = features(on_white(y))
    return torch.stack([F.l1_loss(a, b) for a, b in zip(features(on_white(x)), wanted, strict=True)]).mean()


def load_layers(name: str) -> tuple[Features, nn.Module]:
    """`vgg19:FILE.safetensors`, with torchvision's names, or `squeeze:FILE.safetensors`; frozen. Returns a function
    from RGB (N, 3, S, S) in [-1, 1] to the activations of several layers, and its network.
    """
    kind, _, details = name.partition(":")
    if kind == "squeeze":
        lpips = frozen_lpips(name, torch.device("cpu"))
        return lambda x: list(lpips.net(lpips.scaling_layer(x))), lpips
    if kind != "vgg19":
        raise PokediffError(f"features {name!r}: give vgg19:FILE.safetensors or squeeze:FILE.safetensors")
    try:
        from torchvision.models import vgg19
    except ImportError:
        raise PokediffError('features vgg19: torchvision is not installed: pip install "pokediff[eval]"') from None
    tensors, _ = read_weights("features vgg19", details)
    with torch.device("meta"):  # without the numbers of a new network, 120 M of them in layers that are not used
        body = vgg19().features[: VGG_LAYERS[-1] + 1].requires_grad_(False).eval()
    body = body.to_empty(device="cpu")
    try:
        body.load_state_dict({key: tensors[f"features.{key}"] for key in body.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise PokediffError(f"features vgg19: {details} does not fit: {first_line(error)}") from None
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)

    def activations(x: torch.Tensor) -> list[torch.Tensor]:
        h, found = ((x + 1) / 2 - mean.to(x)) / std.to(x), []
        for index, layer in enumerate(body):
            h = F.relu(h) if isinstance(layer, nn.ReLU) else layer(h)  # torchvision's ReLU would overwrite its input
            if index in VGG_LAYERS:
                found.append(h)
        return found

    return activations, body


# -------------------------------------------------------------------------------------------------------- adversarial


def real_or_not(logits: torch.Tensor, real: bool, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross-entropy of logits (N,), over the pictures `counted` (N,) if given."""
    loss = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)), reduction="none")
    if counted is None:
        return loss.mean()
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def wrong_texts(text: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The text vectors (N, D) of other pictures of the batch, and which of their ids (N, L) differ, (N,) bool."""
    return text.roll(1, dims=0), (ids.roll(1, dims=0) != ids).any(dim=1)


def discriminator_loss(
    judge: Discriminator,
    real: torch.Tensor,
    drawn: torch.Tensor,
    text: torch.Tensor | None,
    ids: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """The loss of a discriminator on pictures (N, C, S, S) and texts (N, D), as `config.discriminator` says: "picture"
    or "text", or "pairs", AttnGAN's mean over five terms with the wrong texts of GAN-CLS (Reed et al. 2016).
    """
    is_real, is_drawn = judge.features(real), judge.features(drawn)
    if kind != "pairs" or text is None:
        return (real_or_not(judge(is_real, text), True) + real_or_not(judge(is_drawn, text), False)) / 2
    wrong, differ = wrong_texts(text, ids)
    terms = [
        real_or_not(judge(is_real), True),
        real_or_not(judge(is_real, text), True),
        real_or_not(judge(is_real, wrong), False, differ),
        real_or_not(judge(is_drawn), False),
        real_or_not(judge(is_drawn, text), False),
    ]
    return torch.stack(terms).mean()


def generator_loss(judge: Discriminator, drawn: torch.Tensor, text: torch.Tensor | None, kind: str) -> torch.Tensor:
    """The loss of the generator against a discriminator: its pictures should be taken for real, with their texts."""
    features = judge.features(drawn)
    loss = real_or_not(judge(features, text), True)
    return (loss + real_or_not(judge(features), True)) / 2 if kind == "pairs" else loss
