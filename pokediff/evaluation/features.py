"""Feature networks: pictures to the vectors that distances are measured in.

FEATURES is the table of kinds; a network is named `kind:details`. One way for both sides of every comparison: straight
RGBA on one background, then bicubic with antialiasing to the side the network wants (Parmar et al., "On Aliased
Resizing", 2022). Inception alone resizes for itself, as the literature's does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pokediff.data.images import composite
from pokediff.errors import PokediffError
from pokediff.model.text import cached_or_downloaded

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class FeatureNet:
    """`extract` takes RGB in [0, 1], float32 (N, 3, H, W), and gives (N, D)."""

    name: str
    note: str  # what its numbers may be compared with
    extract: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def __call__(self, rgba: np.ndarray, background: str = "white", batch_size: int = 32) -> np.ndarray:
        """Straight RGBA uint8 (N, H, W, 4), on `background`, to float32 (N, D)."""
        parts = []
        for start in range(0, len(rgba), batch_size):
            rgb = np.stack([composite(picture, background) for picture in rgba[start : start + batch_size]])
            parts.append(self.extract(torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255).float())
        return torch.cat(parts).numpy()


def resized(rgb: torch.Tensor, side: int, normalise: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1] to (N, 3, side, side), standardised."""
    x = F.interpolate(rgb, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalise)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def inception(_details: str) -> FeatureNet:
    """torch-fidelity's port of the Inception network that published FID and KID use (2048 features)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise PokediffError("features inception: torch-fidelity is not installed: pip install pokediff[eval]") from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    except OSError as error:
        raise PokediffError(f"features inception: its weights cannot be downloaded ({error}); {OTHERWISE}") from None
    note = "as in the literature, but at this n and size only comparable with figures of the same protocol"
    return FeatureNet("inception", note, lambda rgb: network((rgb * 255).round().to(torch.uint8))[0])


def dinov2(details: str) -> FeatureNet:
    """`dinov2`, or `dinov2:REPOSITORY or FOLDER`: the class token of DINOv2 (Stein et al. 2023)."""
    from transformers import Dinov2Model

    name = details or "facebook/dinov2-base"
    network = cached_or_downloaded(
        lambda local: Dinov2Model.from_pretrained(name, local_files_only=local), f"features dinov2:{name}", OTHERWISE
    ).eval()
    return FeatureNet(
        f"dinov2:{name}",
        "comparable with other figures in the same DINOv2",
        lambda rgb: network(pixel_values=resized(rgb, 224, IMAGENET)).last_hidden_state[:, 0],
    )


def clip(details: str) -> FeatureNet:
    """`clip:REPOSITORY or FOLDER`: the image vector of a CLIP."""
    from transformers import CLIPVisionModelWithProjection

    name = details or "openai/clip-vit-base-patch32"
    network = cached_or_downloaded(
        lambda local: CLIPVisionModelWithProjection.from_pretrained(name, local_files_only=local),
        f"features clip:{name}",
        OTHERWISE,
    ).eval()
    side = network.config.image_size
    return FeatureNet(
        f"clip:{name}",
        "flatters a model that was conditioned by the same CLIP",
        lambda rgb: network(pixel_values=resized(rgb, side, CLIP)).image_embeds,
    )


@torch.inference_mode()
def clip_similarity(name: str, rgba: np.ndarray, prompts: Sequence[str], background: str = "white") -> np.ndarray:
    """(N, M) cosines of N pictures, straight RGBA, with the M different prompts among `prompts`, in their order.

    `name` is a CLIP of transformers, a repository or a folder. Raises PokediffError when it cannot be loaded.
    """
    from transformers import CLIPModel, CLIPTokenizer

    def load(local: bool) -> tuple[CLIPModel, CLIPTokenizer]:
        model = CLIPModel.from_pretrained(name, local_files_only=local).eval()
        return model, CLIPTokenizer.from_pretrained(name, local_files_only=local)

    model, tokenizer = cached_or_downloaded(load, f"CLIP {name}", "choose another one")
    side = model.config.vision_config.image_size
    net = FeatureNet(name, "", lambda rgb: model.vision_model(resized(rgb, side, CLIP)).pooler_output)
    images = model.visual_projection(torch.from_numpy(net(rgba, background)))
    texts = []
    for prompt in dict.fromkeys(prompts):
        tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        texts.append(model.text_projection(model.text_model(**tokens).pooler_output))
    return (F.normalize(images, dim=1) @ F.normalize(torch.cat(texts), dim=1).T).numpy()


def mobilenet_v2(details: str) -> FeatureNet:
    """`mobilenet_v2:FILE.safetensors`: 1280 pooled features of an ImageNet MobileNetV2 (Sandler et al. 2018).

    The file holds the convolutions with batch norm folded in, named in the order of the network: `stem`, `blocks.I.J`,
    `head`.
    """
    from safetensors.torch import load_file
    from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

    path = Path(details)
    if not path.is_file():
        raise PokediffError(f"features mobilenet_v2: {path} does not exist")
    tensors = load_file(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    names = sorted({key.rpartition(".")[0] for key in tensors}, key=_place)
    network = torchvision_mobilenet_v2()
    convolutions = [module for module in network.features.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in network.features.modules() if isinstance(module, nn.BatchNorm2d)]
    try:
        for name, convolution, norm in zip(names, convolutions, norms, strict=True):
            convolution.load_state_dict({"weight": tensors[f"{name}.weight"].float()})
            # The folded bias goes into a norm that does nothing else.
            only_bias = {
                "bias": tensors[f"{name}.bias"].float(),
                "running_var": torch.full_like(norm.weight, 1 - norm.eps),
            }
            norm.load_state_dict({**norm.state_dict(), **only_bias})
    except (ValueError, RuntimeError, KeyError) as error:
        raise PokediffError(f"features mobilenet_v2: {path} does not fit: {str(error).splitlines()[0]}") from None
    body = network.features.eval().to(memory_format=torch.channels_last)
    return FeatureNet(
        f"mobilenet_v2:{path.name}, sha256 {sha256[:16]}",
        "no published figure uses this network: its numbers compare only among themselves",
        lambda rgb: body(resized(rgb, 224, IMAGENET)).mean((2, 3)),
    )


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), version 0.1, SqueezeNet, from `squeeze:FILE.safetensors`.

    The file holds `net.features.*` of SqueezeNet 1.1, `lin.I` (weights of channels, seven depths), `shift`, `scale`.
    """

    DEPTHS = (2, 5, 8, 10, 11, 12, 13)  # layers of SqueezeNet after which features are compared

    def __init__(self, name: str) -> None:
        """Raises PokediffError when the file is not there or does not fit."""
        from safetensors.torch import load_file
        from torchvision.models import squeezenet1_1

        kind, _, details = name.partition(":")
        if kind != "squeeze" or not Path(details).is_file():
            raise PokediffError(f"lpips {name!r}: give squeeze:FILE.safetensors, a file that is there")
        tensors = {key: value.float() for key, value in load_file(details).items()}
        body = {key.removeprefix("net.features."): value for key, value in tensors.items() if key.startswith("net.")}
        self.network = squeezenet1_1().features.eval()
        try:
            self.network.load_state_dict(body)
            self.weights = [tensors[f"lin.{depth}"].view(1, -1, 1, 1) for depth in range(len(self.DEPTHS))]
            self.shift, self.scale = tensors["shift"], tensors["scale"]
        except (RuntimeError, KeyError) as error:
            raise PokediffError(f"lpips {name}: the file does not fit: {str(error).splitlines()[0]}") from None

    @torch.inference_mode()
    def __call__(self, x: np.ndarray, y: np.ndarray, background: str = "white", side: int = 64) -> np.ndarray:
        """(N,) distances of straight RGBA uint8 (N, H, W, 4), on `background`, at `side` px (it sees nothing in 32)."""
        total = torch.zeros(len(x))
        depths = zip(self._depths(x, background, side), self._depths(y, background, side), self.weights, strict=True)
        for a, b, weight in depths:
            total += ((a - b) ** 2 * weight).sum(1).mean((1, 2))
        return total.numpy()

    def _depths(self, rgba: np.ndarray, background: str, side: int) -> Iterator[torch.Tensor]:
        rgb = torch.from_numpy(np.stack([composite(picture, background) for picture in rgba]))
        x = F.interpolate(rgb.permute(0, 3, 1, 2).float() / 255, size=(side, side), mode="bicubic", antialias=True)
        x = (2 * x.clamp(0, 1) - 1 - self.shift) / self.scale
        for depth, layer in enumerate(self.network, 1):
            x = layer(x)
            if depth in self.DEPTHS:
                yield x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def _place(name: str) -> tuple[int, ...]:
    """Where a layer stands in the network: stem, blocks.0.0, blocks.0.1 ... head."""
    return {"stem": (-1,), "head": (10**6,)}.get(name) or tuple(int(part) for part in name.split(".")[1:])


OTHERWISE = "choose other features, such as mobilenet_v2:FILE.safetensors"
FEATURES: dict[str, Callable[[str], FeatureNet]] = {
    "inception": inception,
    "dinov2": dinov2,
    "clip": clip,
    "mobilenet_v2": mobilenet_v2,
}


def load_features(name: str) -> FeatureNet:
    """A feature network by its name. Raises PokediffError, in one line, when it cannot be loaded."""
    kind, _, details = name.partition(":")
    if kind not in FEATURES:
        raise PokediffError(f"features {name!r}: unknown kind, there are {', '.join(FEATURES)}")
    return FEATURES[kind](details)
