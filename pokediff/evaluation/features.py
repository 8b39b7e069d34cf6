"""Feature networks: pictures to vectors.

FEATURES is the table of kinds; a network is named `kind:details`. Both sides of a comparison are prepared alike:
straight RGBA on one background, then bicubic resizing with antialiasing to the size of the network (Parmar et al., "On
Aliased Resizing", 2022). Inception alone resizes by itself, as in the literature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pokediff.data.images import composite
from pokediff.errors import PokediffError, first_line
from pokediff.files import require_file, write_whole
from pokediff.model.text import cached_or_downloaded

T = TypeVar("T")
BATCH = 32  # pictures
EPS = 1e-5  # of torchvision's batch norms
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class FeatureNet:
    """`extract` takes RGB in [0, 1], float32 (N, 3, H, W), and gives (N, D)."""

    name: str
    note: str  # on the comparability of its figures
    extract: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device | str = "cpu"

    @torch.inference_mode()
    def __call__(self, rgba: np.ndarray, background: str = "white") -> np.ndarray:
        """Straight RGBA uint8 (N, H, W, 4), on `background`, to float32 (N, D)."""
        parts = []
        for start in range(0, len(rgba), BATCH):
            rgb = torch.from_numpy(composite(rgba[start : start + BATCH], background)).to(self.device)
            parts.append(self.extract(rgb.permute(0, 3, 1, 2).float() / 255).float().cpu())
        return torch.cat(parts).numpy()


class CachedFeatures:
    """A feature network whose vectors are kept in a folder, in files named by a hash of all they depend on."""

    def __init__(self, net: FeatureNet, background: str, folder: Path) -> None:
        self.net, self.background, self.folder = net, background, folder
        self.name, self.note = net.name, net.note

    def __call__(self, rgba: np.ndarray) -> np.ndarray:
        """Straight RGBA uint8 (N, H, W, 4) to float32 (N, D)."""
        from safetensors.numpy import load_file

        path = self._file(rgba)
        if (known := stored(path, load_file)) is not None:
            return known["features"]
        return self._keep(path, self.net(rgba, self.background))

    def share(self, *several: np.ndarray) -> None:
        """Compute the features of all pictures by all processes, batches in turn. Each calls it, with the same ones."""
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        if state.num_processes == 1:
            return
        files = [(rgba, self._file(rgba)) for rgba in several]
        state.wait_for_everyone()
        todo = [(rgba, path) for rgba, path in files if not path.is_file()]
        state.wait_for_everyone()  # all processes must see the same cache
        for rgba, path in todo:
            starts = range(state.process_index * BATCH, len(rgba), state.num_processes * BATCH)
            parts = gather_object([(start, self.net(rgba[start : start + BATCH], self.background)) for start in starts])
            if state.is_main_process:
                self._keep(path, np.concatenate([features for _, features in sorted(parts, key=lambda it: it[0])]))

    def _file(self, rgba: np.ndarray) -> Path:
        digest = hashlib.sha256(f"{self.name} {self.background} {rgba.shape}".encode() + rgba.tobytes())
        return self.folder / f"{digest.hexdigest()[:24]}.safetensors"

    def _keep(self, path: Path, features: np.ndarray) -> np.ndarray:
        from safetensors.numpy import save

        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"features": features}))
        return features


def resized(rgb: torch.Tensor, side: int, normalise: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1] to (N, 3, side, side), standardised."""
    x = F.interpolate(rgb, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values, device=rgb.device).view(1, 3, 1, 1) for values in normalise)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def inception(_details: str, device: torch.device) -> FeatureNet:
    """torch-fidelity's port of the Inception network that published FID and KID use (2048 features)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise PokediffError(
            f'features inception: torch-fidelity is not installed: pip install "pokediff[eval]", or {OTHERWISE}'
        ) from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval().to(device)
    except OSError as error:
        raise PokediffError(f"features inception: its weights cannot be downloaded ({error}); {OTHERWISE}") from None
    note = "as in the literature, but at this n and size only comparable with figures of the same protocol"
    return FeatureNet("inception", note, lambda rgb: network((rgb * 255).round().to(torch.uint8))[0], device)


def dinov2(details: str, device: torch.device) -> FeatureNet:
    """`dinov2`, or `dinov2:REPOSITORY or FOLDER`: the class token of DINOv2 (Stein et al. 2023)."""
    from transformers import Dinov2Model

    name = details or "facebook/dinov2-base"
    network = cached_or_downloaded(
        lambda local: Dinov2Model.from_pretrained(name, local_files_only=local), f"features dinov2:{name}", OTHERWISE
    )
    network = network.eval().to(device)
    return FeatureNet(
        f"dinov2:{name}",
        "comparable with other figures in the same DINOv2",
        lambda rgb: network(pixel_values=resized(rgb, 224, IMAGENET)).last_hidden_state[:, 0],
        device,
    )


def clip(details: str, device: torch.device) -> FeatureNet:
    """`clip:REPOSITORY or FOLDER`: the image vector of a CLIP."""
    from transformers import CLIPVisionModelWithProjection

    name = details or "openai/clip-vit-base-patch32"
    network = cached_or_downloaded(
        lambda local: CLIPVisionModelWithProjection.from_pretrained(name, local_files_only=local),
        f"features clip:{name}",
        OTHERWISE,
    )
    network = network.eval().to(device)
    side = network.config.image_size
    return FeatureNet(
        f"clip:{name}",
        "flatters a model that was conditioned by the same CLIP",
        lambda rgb: network(pixel_values=resized(rgb, side, CLIP)).image_embeds,
        device,
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


def mobilenet_v2(details: str, device: torch.device) -> FeatureNet:
    """`mobilenet_v2:FILE.safetensors`: 1280 pooled features of an ImageNet MobileNetV2 (Sandler et al. 2018).

    FILE holds torchvision's own state dict (`features.0.0.weight` ...), or the convolutions alone with batch norm
    folded in, named in the order of the network: `stem`, `blocks.I.J`, `head`.
    """
    from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

    tensors, sha256 = read_weights("features mobilenet_v2", details)
    body = torchvision_mobilenet_v2().features
    try:
        if "stem.weight" in tensors:
            tensors = _unfolded(tensors, body)
        _load_part(body, tensors, "features.")
    except (ValueError, RuntimeError, KeyError) as error:
        raise PokediffError(f"features mobilenet_v2: {details} does not fit: {first_line(error)}") from None
    body = body.eval().to(device, memory_format=torch.channels_last)
    return FeatureNet(
        f"mobilenet_v2:{Path(details).name}, sha256 {sha256[:16]}",
        "no published figure uses this network: its numbers compare only among themselves",
        lambda rgb: body(resized(rgb, 224, IMAGENET)).mean((2, 3)),
        device,
    )


def _unfolded(tensors: dict[str, torch.Tensor], body: nn.Module) -> dict[str, torch.Tensor]:
    """torchvision's state of the same network: the folded biases go into batch norms that do nothing else."""
    names = sorted(
        {key.rpartition(".")[0] for key in tensors},
        key=lambda name: (name != "stem", name == "head", [int(part) for part in name.split(".")[1:]]),
    )
    state = {f"features.{key}": value for key, value in body.state_dict().items()}
    layers = [name for name, layer in body.named_modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    for name, convolution, norm in zip(names, layers[::2], layers[1::2], strict=True):
        state[f"features.{convolution}.weight"] = tensors[f"{name}.weight"]
        state[f"features.{norm}.bias"] = tensors[f"{name}.bias"]
        state[f"features.{norm}.running_var"] = torch.full_like(tensors[f"{name}.bias"], 1 - EPS)
    return state


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), version 0.1 with SqueezeNet, by torchmetrics.

    `squeeze:FILE.safetensors` holds torchvision's SqueezeNet 1.1 (`features.*`; `net.features.*` is read, too);
    torchmetrics brings the weights of the channels.
    """

    def __init__(self, name: str) -> None:
        """Raises PokediffError when the file is not there or does not fit, or torchmetrics is not installed."""
        kind, _, details = name.partition(":")
        if kind != "squeeze":
            raise PokediffError(f"lpips {name!r}: give squeeze:FILE.safetensors")
        tensors, _ = read_weights("lpips squeeze", details)
        try:
            from torchmetrics.functional.image.lpips import _LPIPS
        except ImportError:
            raise PokediffError('lpips: torchmetrics is not installed: pip install "pokediff[eval]"') from None
        self.network = _LPIPS(net="squeeze", pnet_rand=True)
        slices = self.network.get_submodule("net.slices")
        body = nn.Sequential(*(layer for part in slices.children() for layer in part.children()))
        try:
            _load_part(body, {key.removeprefix("net."): value for key, value in tensors.items()}, "features.")
        except (RuntimeError, KeyError) as error:
            raise PokediffError(f"lpips squeeze: {details} does not fit: {first_line(error)}") from None

    @torch.inference_mode()
    def __call__(self, x: np.ndarray, y: np.ndarray, background: str = "white", side: int = 64) -> np.ndarray:
        """(N,) distances of straight RGBA uint8 (N, H, W, 4), on `background`, at `side` px (it sees nothing in 32)."""
        return self.network(_at_side(x, background, side), _at_side(y, background, side)).flatten().numpy()


def _at_side(rgba: np.ndarray, background: str, side: int) -> torch.Tensor:
    """(N, 3, side, side) in [-1, 1]."""
    rgb = torch.from_numpy(composite(rgba, background)).permute(0, 3, 1, 2).float() / 255
    return 2 * F.interpolate(rgb, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1) - 1


def read_weights(what: str, file: str) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a safetensors file as float32, and its sha256. Raises PokediffError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(file)
    require_file(path, f"{what}:")
    data = path.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise PokediffError(f"{what}: {path} is no safetensors file ({first_line(error)})") from None
    floats = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    return floats, hashlib.sha256(data).hexdigest()


def stored(path: Path, load: Callable[[Path], T]) -> T | None:
    """What a cache keeps in a safetensors file; None without a whole file: it is made again."""
    from safetensors import SafetensorError

    try:
        return load(path)
    except (OSError, SafetensorError):
        return None


def _load_part(network: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Load the tensors under `prefix`. Raises RuntimeError with one line when one is missing or of another shape."""
    part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if missing := network.state_dict().keys() - part.keys():
        raise RuntimeError(f"it has no {prefix}{min(missing)}")
    try:
        network.load_state_dict(part)
    except RuntimeError as error:
        raise RuntimeError(str(error).strip().splitlines()[-1].strip()) from None


OTHERWISE = "choose other features, such as mobilenet_v2:FILE.safetensors, or --features none"
FEATURES: dict[str, Callable[[str, torch.device], FeatureNet]] = {
    "inception": inception,
    "dinov2": dinov2,
    "clip": clip,
    "mobilenet_v2": mobilenet_v2,
}


def load_features(name: str, device: torch.device | str = "cpu") -> FeatureNet:
    """A feature network by its name. Raises PokediffError, in one line, when it cannot be loaded."""
    kind, _, details = name.partition(":")
    if kind not in FEATURES:
        raise PokediffError(f"features {name!r}: unknown kind; kinds: {', '.join(FEATURES)}")
    return FEATURES[kind](details, torch.device(device))
