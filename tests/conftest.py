"""Small data that the tests draw themselves, and what they share."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["POKEDIFF_CACHE"] = ""  # no cache but in the tests of it
os.environ["no_proxy"] = "*"  # all servers of the tests are on this machine
if "PYTEST_XDIST_WORKER" in os.environ:  # one core each: more threads than cores are ten times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import save_file

from pokediff.config import DiffusionConfig
from pokediff.data.dataset import embed
from pokediff.data.images import encode_png, premultiply, to_model
from pokediff.data.records import Record, write_records
from pokediff.model.cascade import Cascade
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import cosine_sigmas, denoising_loss, make_noise_schedule, schedule_sigmas
from pokediff.model.pipeline import PokeDiffPipeline, quiet
from pokediff.model.text import load_text_encoder

quiet()
torch.set_num_threads(1)  # the models here are small; more threads only wait for each other
gc.freeze()  # what was imported stays: every collection would look through it, and training collects after each stage
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
COLORS = {"red": (220, 40, 40), "green": (50, 170, 60), "blue": (60, 90, 220), "yellow": (245, 215, 40)}
MEAN, STD = 0.2, 0.2  # of the pixels that GaussianDenoiser knows


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first, so that all processes end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    if not (SHARED / "data" / "pokemon" / "metadata.jsonl").is_file():
        pytest.skip("needs the real data in ../shared")
    return SHARED


def free_port() -> int:
    """A port that the system gives out. Another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def draw_creature(color: tuple[int, int, int], shape: str, size: int = 40, seed: int = 0) -> np.ndarray:
    """A round or square creature with two eyes, straight RGBA uint8 (size, size, 4), transparent around it."""
    rng = np.random.default_rng(seed)
    rgba = np.zeros((size, size, 4), np.uint8)
    middle = tuple(int(v) for v in size // 2 + rng.integers(-2, 3, 2))
    reach = int(size * rng.uniform(0.28, 0.38))
    paint = (*color, 255)
    if shape == "round":
        cv2.circle(rgba, middle, reach, paint, -1)
    else:
        cv2.rectangle(rgba, (middle[0] - reach, middle[1] - reach), (middle[0] + reach, middle[1] + reach), paint, -1)
    for side in (-1, 1):
        cv2.circle(rgba, (middle[0] + side * reach // 3, middle[1] - reach // 3), 2, (0, 0, 0, 255), -1)
    return rgba


def write_data(folder: Path, number: int = 80, spotted: bool = False) -> Path:
    """A data set of drawn creatures, four colours by two shapes, four a family (39 and 49 test, 46 validation); with
    spots, no two are alike.
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for index in range(number):
        color, shape = list(COLORS)[index % 4], ("round", "square")[index // 4 % 2]
        name = f"images/{index:04}.png"
        picture = draw_creature(COLORS[color], shape, seed=index)
        if spotted:
            cv2.circle(picture, (20, 26), 4, (*(int(v) for v in rng.integers(0, 256, 3)), 255), -1)
        (folder / name).write_bytes(encode_png(picture))
        style = "artwork" if index % 3 else "sprite"
        records.append(
            Record(
                name,
                name=f"Creature{index}",
                family=30 + index // 4,
                color=color,
                shape=shape,
                style=style,
                types=("water",),
            )
        )
    write_records(folder, records)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set of 80 drawn creatures, with the vectors of its captions."""
    folder = write_data(tmp_path_factory.mktemp("data") / "creatures")
    embed(folder, "builtin", report=lambda _: None)
    return folder


class GaussianDenoiser(Denoiser):
    """The exact denoiser of pictures whose pixels are independent N(MEAN, STD^2), in closed form."""

    def forward(self, x, timestep, text=None, augment=None, low_res=None):
        timesteps = torch.as_tensor(timestep).double().expand(len(x))
        sigma = cosine_sigmas(timesteps, self.config.num_train_timesteps, *self.config.noise_range)
        sigma = sigma[:, None, None, None]
        y = x.double() * (1 + sigma**2) ** 0.5  # x0 + sigma noise
        return ((STD**2 * y + sigma**2 * MEAN) / (STD**2 + sigma**2)).float()  # the posterior mean of x0


def gaussian_denoiser(**changes) -> GaussianDenoiser:
    values = dict(image_size=16, widths=(16,), attention=(False,), blocks=(1,), text_dim=8)
    return GaussianDenoiser(**{**values, **changes})


def pipeline_of(**denoisers: Denoiser) -> PokeDiffPipeline:
    """A pipeline without a text encoder, of denoisers by name (base_16 becomes base-16)."""
    schedule = DPMSolverMultistepScheduler.from_config(make_noise_schedule(DiffusionConfig()).config)
    pipe = PokeDiffPipeline(Cascade({name.replace("_", "-"): part for name, part in denoisers.items()}), schedule)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_pictures(number: int, size: int = 16) -> np.ndarray:
    """Premultiplied RGBA uint8 (N, S, S, 4) that the Gaussian denoiser has as its data."""
    pixels = np.random.default_rng(0).normal(MEAN, STD, (number, size, size, 4))
    return ((pixels + 1) / 2 * 255).round().clip(0, 255).astype(np.uint8)


def make_denoiser(seed: int = 0, **changes) -> Denoiser:
    """A small denoiser with random weights everywhere: the last layers of a new one are zero, which hides much."""
    torch.manual_seed(seed)
    values = dict(image_size=32, widths=(16, 32), attention=(False, True), blocks=(1, 1), head_dim=16, embedding_dim=32)
    denoiser = Denoiser(**{**values, **changes})
    for parameter in denoiser.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return denoiser.eval()


def fit(denoiser: Denoiser, x0: torch.Tensor, text: torch.Tensor, steps: int = 40) -> None:
    """Train on a few pictures (N, C, S, S) for as many steps."""
    schedule, config = make_noise_schedule(DiffusionConfig()), denoiser.config
    last = int((schedule_sigmas(schedule) < denoiser.below).sum())
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    low_res = F.avg_pool2d(x0, config.upscale) if config.upscale > 1 else None
    denoiser.train()
    for _ in range(steps):
        timesteps = torch.randint(last, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = denoising_loss(schedule, denoiser, x0, noise, timesteps, text, None, low_res).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    denoiser.eval()


def make_tiny_cascade(null_text: torch.Tensor, text: torch.Tensor) -> Cascade:
    """A base and a refiner of 32 px and an upscaler to 64 px, trained for a second on creatures of four colours.

    null_text (D,) and text (4, D) are the vectors of no prompt and of the four colours.
    """
    drawn = [draw_creature(rgb, shape, 64) for shape in ("round", "square") for rgb in COLORS.values()]
    large = to_model(torch.from_numpy(np.stack([premultiply(picture) for picture in drawn])), "rgba")  # (8, 4, 64, 64)
    text = text.repeat(2, 1)
    detail = dict(
        widths=(16,), attention=(False,), blocks=(1,), norm_free=True, sigma_data=0.3, gate=True, steps=2
    )  # fmt: skip
    cascade = Cascade(
        {
            "base-32": make_denoiser(1, steps=6, guidance_scale=1.5),
            "refiner-32": make_denoiser(2, patch=1, below=1.0, **detail),
            "upscaler-64": make_denoiser(3, image_size=64, patch=2, upscale=2, below=2.0, **detail),
        }
    )
    for _, denoiser in cascade.items():
        denoiser.null_text.copy_(null_text)
        fit(denoiser, large if denoiser.config.image_size == 64 else F.avg_pool2d(large, 2), text)
    return cascade


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained cascade of base-32, refiner-32 and upscaler-64 that draws in a fraction of a second."""
    encoder = load_text_encoder("builtin")
    texts = encoder(["", *(f"a {color} creature" for color in COLORS)]).pooled.clone()
    pipeline = PokeDiffPipeline(
        make_tiny_cascade(texts[0], texts[1:]),
        DPMSolverMultistepScheduler.from_config(make_noise_schedule(DiffusionConfig()).config),
        encoder.model,
        encoder.tokenizer,
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipe(tiny_checkpoint: Path) -> PokeDiffPipeline:
    """The pipeline of `tiny_checkpoint`, read-only."""
    pipe = PokeDiffPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def features(tmp_path_factory) -> str:
    """A MobileNetV2 file in the real format, with random weights."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    convolutions = [m for m in mobilenet_v2().features.modules() if isinstance(m, torch.nn.Conv2d)]
    names = ["stem", "blocks.0.0", "blocks.0.1"]
    names += [f"blocks.{block}.{layer}" for block in range(1, 17) for layer in range(3)]
    names.append("head")
    tensors = {}
    for name, convolution in zip(names, convolutions, strict=True):
        weight = convolution.weight.detach()
        tensors[f"{name}.weight"] = torch.randn_like(weight) * (2 / weight[0].numel()) ** 0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(len(weight))
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(tensors, path)
    return f"mobilenet_v2:{path}"


@pytest.fixture(scope="session")
def squeeze(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained SqueezeNet, for LPIPS and the critic."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_file(squeezenet1_1().state_dict(), file)
    return f"squeeze:{file}"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser; tests that need it skip where it is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    """Chromium, driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api")
    quiet = ["background-networking", "component-update", "sync", "quic", "gpu"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield running
        running.close()
