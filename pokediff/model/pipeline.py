"""PokeDiffPipeline: prompt to steps to pictures.

    pipe = PokeDiffPipeline.from_pretrained("checkpoints/pokediff-32")
    pipe("a blue water turtle", seed=7).images[0].save("turtle.png")

`denoise()` is a generator of steps; progress bars, GIFs, previews and live views are all consumers of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import SafetensorError

from pokediff.config import DEFAULT_GUIDANCE, DEFAULT_STEPS
from pokediff.data.images import CHANNELS, Channels, from_model, to_model
from pokediff.errors import PokediffError, first_line
from pokediff.model.denoiser import Unet
from pokediff.model.text import ClipTextEncoder, TextEncoder, cached_or_downloaded, load_text_encoder

UPSCALER_SHARE = 0.25  # of the evaluations, where there is an upscaler
Settings = TypeVar("Settings", bound=Any)
# name: a diffusers scheduler and what is changed of its configuration. A new sampler is a new line.
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
}


@dataclass(frozen=True)
class Step:
    """One evaluation of a network, or the end (sigma 0, x = x0 = the pictures). Tensors are (B, C, H, W), of the final
    size also while smaller pictures are drawn, to be enlarged: each of their pixels is then a square.
    """

    index: int  # 0, 1, 2 ...
    timestep: float  # 999 (noise) ... 0
    sigma: float  # standard deviation of the noise relative to the picture's unit scale
    x: torch.Tensor  # the noisy picture, unit variance
    x0: torch.Tensor  # the clean picture as predicted from it, in [-1, 1]
    low_res: torch.Tensor | None = None  # (B, C, H/f, W/f): the pictures that are being enlarged, if they are


@dataclass
class PokeDiffPipelineOutput(BaseOutput):
    images: list[Image.Image]  # RGBA


class PokeDiffPipeline(DiffusionPipeline):
    """A text-conditional pixel-space diffusion model.

    `unet` and `scheduler` belong to each other by the scheduler's noise schedule and prediction type; any diffusers
    scheduler made `from_config` of this one may take its place. `text_encoder` and `tokenizer` are there when the
    encoder lives in the checkpoint ("builtin"); otherwise `text_encoder_name` is loaded when it is first needed.
    `num_steps` and `guidance_scale` are what the network is at its best with; a distilled one wants few and none.
    A `refiner`, if there is one, takes the place of `unet` where sigma is below `refine_below`: what is left to do
    there is local, and a small network trained for nothing else does it better (eDiff-I, Balaji et al. 2022).
    An `upscaler` draws the finished pictures once more, larger, from noise of `upscale_below` on, with the small ones
    before its eyes (Ho et al., "Cascaded Diffusion Models", 2022). Only `unet` is guided: the others find the prompt's
    wish in what they are given.
    """

    model_cpu_offload_seq = "text_encoder->unet->refiner->upscaler"
    # what model_index.json holds beside the parts
    settings = ("text_encoder_name", "num_steps", "guidance_scale", "refine_below", "upscale_below")
    _optional_components = ["text_encoder", "tokenizer", "refiner", "upscaler"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        unet: Unet,
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_name: str = "builtin",
        num_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE,
        refiner: Unet | None = None,
        refine_below: float = 0.0,
        upscaler: Unet | None = None,
        upscale_below: float = 0.0,
    ) -> None:
        super().__init__()
        if upscaler is not None and upscale_below <= 0:
            raise PokediffError("an upscaler needs upscale_below, the sigma below which it was trained")
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            refiner=refiner,
            upscaler=upscaler,
        )
        self.register_to_config(
            text_encoder_name=text_encoder_name,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            refine_below=refine_below,
            upscale_below=upscale_below,
        )
        self._encode: TextEncoder | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PokeDiffPipeline:
        """A folder written by training, or a hub repository. Weights are made float32 unless dtype says otherwise.

        Raises PokediffError when there is no such folder, or it is no pipeline of ours.
        """
        name, path = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32
        load = super().from_pretrained
        if (path / "model_index.json").is_file():
            try:
                return load(name, **kwargs)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                raise PokediffError(f"{path} cannot be loaded: {first_line(error)}") from error
        found = sorted(index.parent.as_posix() for index in Path("checkpoints").glob("*/model_index.json"))
        here = f"here are: {', '.join(found) or 'none'}"
        if path.is_dir() or path.parent.is_dir() or name.count("/") != 1:
            raise PokediffError(f"{path} is no checkpoint (no model_index.json); {here}")
        return cached_or_downloaded(
            lambda local: load(name, **{**kwargs, "local_files_only": local}), f"checkpoint {name}", here
        )

    @property
    def channels(self) -> Channels:
        """One of rgba, rgb, grey."""
        return {number: name for name, number in CHANNELS.items()}[self.unet.config.in_channels]

    @property
    def image_size(self) -> int:
        """Side of the pictures in px."""
        return (self.upscaler or self.unet).config.image_size

    @property
    def upscale(self) -> int:
        """How many times larger than those of `unet` the pictures are."""
        return self.upscaler.config.upscale if self.upscaler is not None else 1

    @property
    def networks(self) -> dict[str, Unet]:
        """All that denoise, by the names of their folders."""
        parts = {"unet": self.unet, "refiner": self.refiner, "upscaler": self.upscaler}
        return {name: network for name, network in parts.items() if network is not None}

    def network_at(self, timestep: float) -> Unet:
        """The network that is asked at this timestep, before anything is enlarged."""
        refines = self.refiner is not None and self._sigma(timestep) < self.config.refine_below
        return self.refiner if refines else self.unet

    def prediction_type(self, network: Unet) -> str:
        """What a network predicts: x0 when it is preconditioned, otherwise what the scheduler's configuration says."""
        preconditioned = network.config.get("sigma_data") is not None
        return "sample" if preconditioned else self.scheduler.config.prediction_type

    def encode_prompt(self, prompts: Sequence[str]) -> torch.Tensor:
        """(N, D) text vectors on the network's device; "" gives the null condition that it was trained with."""
        known = {"": self.unet.null_text}
        for prompt in dict.fromkeys(prompts):
            if prompt:  # each alone: in company its vector would differ in the last digit
                known[prompt] = self._load_encoder()([prompt]).pooled[0].to(self.unet.null_text)
        return torch.stack([known[prompt] for prompt in prompts])

    def _load_encoder(self) -> TextEncoder:
        if self._encode is None:
            name, wanted = self.config.text_encoder_name, len(self.unet.null_text)
            own = self.text_encoder is not None
            encode = ClipTextEncoder(self.text_encoder, self.tokenizer, name) if own else load_text_encoder(name)
            if encode.dim != wanted:
                raise PokediffError(f"the network wants {wanted} numbers a prompt, {name} gives {encode.dim}")
            self._encode = encode
        return self._encode

    @property
    def sampler(self) -> str | None:
        """The name of the pipeline's own scheduler in SAMPLERS; None for another one, or one that is set otherwise."""
        for name, (kind, changes) in SAMPLERS.items():
            own = self.scheduler.config
            if type(self.scheduler) is kind and all(own.get(key) == value for key, value in changes.items()):
                return name
        return None

    def make_scheduler(self, sampler: str | None = None, num_steps: int | None = None) -> SchedulerMixin:
        """A fresh scheduler set to `num_steps`: the one called `sampler`, or a copy of the pipeline's own."""
        num_steps = self.config.num_steps if num_steps is None else num_steps
        if sampler is not None and sampler not in SAMPLERS:
            raise PokediffError(f"unknown sampler {sampler!r}, there are {', '.join(SAMPLERS)}")
        if not 1 <= num_steps <= self.scheduler.config.num_train_timesteps:
            raise PokediffError(f"num_steps must be 1 to {self.scheduler.config.num_train_timesteps}, not {num_steps}")
        kind, changes = SAMPLERS[sampler] if sampler else (type(self.scheduler), {})
        # Whatever the network predicts, the scheduler gets v (`_to_v`): some know nothing of x0 predictions.
        scheduler = kind.from_config(self.scheduler.config, **{"prediction_type": "v_prediction", **changes})
        scheduler.set_timesteps(num_steps, device=self.device)
        return scheduler

    def plan(
        self, sampler: str | None = None, num_steps: int | None = None, strength: float = 1.0
    ) -> list[tuple[Any, int]]:
        """The ways to go, one or, with an upscaler, two: a scheduler each, and how many of its timesteps are left out.

        Both together have `num_steps` steps, but each at least one. The upscaler goes the same schedule from the first
        step on that lies below `upscale_below`. Raises PokediffError for a sampler, a number of steps or a strength
        that there is not.
        """
        if not 0 < strength <= 1:
            raise PokediffError(f"strength must be above 0 and at most 1, not {strength}")
        num_steps = self.config.num_steps if num_steps is None else num_steps
        enlarging = 0 if self.upscaler is None else max(1, round(UPSCALER_SHARE * num_steps))
        drawing = self.make_scheduler(sampler, max(min(1, num_steps), num_steps - enlarging))
        ways = [(drawing, _skipped(drawing, strength))]
        if enlarging:
            all_the_way = min(math.ceil(enlarging / self.upscaler_reach), self.scheduler.config.num_train_timesteps)
            again = self.make_scheduler(sampler, all_the_way)
            ways.append((again, _skipped(again, min(strength, enlarging / all_the_way))))
        return ways

    @property
    def upscaler_reach(self) -> float:
        """Share of the timesteps at which the upscaler knows what to do."""
        alphas = self.scheduler.alphas_cumprod
        return float((((1 - alphas) / alphas).sqrt() < self.config.upscale_below).float().mean())

    def count_steps(self, sampler: str | None = None, num_steps: int | None = None, strength: float = 1.0) -> int:
        """How many steps `denoise` yields: one for each evaluation of a network, and the pictures."""
        return 1 + sum(len(way.timesteps) - skipped for way, skipped in self.plan(sampler, num_steps, strength))

    def asked(self, sampler: str | None = None, num_steps: int | None = None) -> list[str]:
        """The name of the network that is asked at every step."""
        names = {id(network): name for name, network in self.networks.items()}
        (drawing, _), *enlarging = self.plan(sampler, num_steps)
        asked = [names[id(self.network_at(float(timestep)))] for timestep in drawing.timesteps]
        return asked + ["upscaler"] * sum(len(way.timesteps) - skipped for way, skipped in enlarging)

    def sigmas(self, sampler: str | None = None, num_steps: int | None = None) -> list[float]:
        """The noise at every evaluation of a network, relative to the picture's unit scale."""
        plan = self.plan(sampler, num_steps)
        return [self._sigma(float(timestep)) for way, skipped in plan for timestep in way.timesteps[skipped:]]

    @torch.inference_mode()
    def denoise(
        self,
        prompts: Sequence[str] | torch.Tensor,
        seeds: Sequence[int],
        *,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
    ) -> Iterator[Step]:
        """Yield every step from noise to pictures, the pictures last.

        Args:
            prompts: N texts, "" draws without a condition; or their vectors (N, D), as `encode_prompt` gives them.
            seeds: N numbers. Each picture has noise of its own: the same seed gives the same picture in any batch.
            image: premultiplied RGBA uint8 (H, W, 4) or (N, H, W, 4) of the model's size to begin with, not noise.
            strength: how much of the way from noise is gone, 0 to 1: 1 is all of it, so that nothing is left of
                `image` but what `mask` keeps (SDEdit, Meng et al. 2022).
            mask: (H, W) or (N, H, W) bool, true where `image` is drawn anew; elsewhere every predicted x0 is set to
                `image`, so that what is new grows onto what is there (DDNM, Wang et al. 2023, section 3.2).
            noise: the first noise, instead of what the seeds mean, as `make_noise` gives it.
            num_steps: steps of the sampler (heun evaluates the network twice in each); None: what suits the network.
            guidance_scale: 1 is off, None what suits the network; x0 is moved away from the negative prompt's by this
                factor (Ho & Salimans 2022).
            guidance_interval: guide only while sigma lies in it (Kynkäänniemi et al. 2024); None is always.
            negative_prompt: what guidance moves away from; "" is the null condition.
            sampler: a name in SAMPLERS; None is the pipeline's own scheduler.
            precision: of the network; auto is bf16 where the device multiplies it in hardware.

        Raises PokediffError for an unknown sampler, a bad number of steps or strength, prompts and seeds that do not
        pair up, or an image or mask of another size.
        """
        if len(prompts) != len(seeds):
            raise PokediffError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        strength = 1.0 if image is None else strength
        plan = self.plan(sampler, num_steps, strength)
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        half = self.in_bf16(precision)
        text = prompts if isinstance(prompts, torch.Tensor) else self.encode_prompt(prompts)  # (N, D)
        against = self.encode_prompt([negative_prompt]).expand_as(text)
        low, high = guidance_interval or (0.0, float("inf"))

        generators, drawn = self.make_noise(seeds)
        noises = drawn if noise is None else noise
        whole, whole_redrawn = self._known(image, mask, len(seeds))
        known, redrawn = self._shrunk(whole, whole_redrawn)
        x, begin, low_res, index = noises[0], known, None, 0
        for stage, (scheduler, skipped) in enumerate(plan):
            if stage == 1:  # x is what was drawn, and is enlarged
                known, redrawn, low_res = whole, whole_redrawn, x
                begin = whole if whole is not None and strength <= self.upscaler_reach else self._enlarged(x)
            x, timesteps = _begin(scheduler, noises[stage].to(self.device), begin, skipped)
            draws = "generator" in inspect.signature(scheduler.step).parameters  # new noise at every step, or may do so
            options = {"generator": generators} if draws else {}
            for timestep in timesteps:
                noisy = scheduler.scale_model_input(x, timestep)  # unit variance, whatever scale the sampler keeps x in
                sigma = self._sigma(float(timestep))
                network = self.network_at(float(timestep)) if low_res is None else self.upscaler
                if guidance_scale == 1 or network is not self.unet or not low <= sigma <= high:
                    output = _predict(network, noisy, timestep, text, low_res, half)
                else:
                    both = torch.cat([text, against])
                    guided, away = _predict(network, noisy.repeat(2, 1, 1, 1), timestep, both, None, half).chunk(2)
                    output = away + guidance_scale * (guided - away)
                x0 = to_x0(self.prediction_type(network), output, noisy, sigma)
                x0 = x0.clamp(-1, 1)  # guidance overshoots; a picture cannot
                if known is not None and redrawn is not None:
                    x0 = torch.where(redrawn, x0, known)
                seen, clean = (noisy, x0) if low_res is not None else (self._enlarged(noisy), self._enlarged(x0))
                yield Step(index, float(timestep), sigma, seen, clean, low_res)
                x = scheduler.step(_to_v(x0, noisy, sigma), timestep, x, **options).prev_sample
                index += 1
            x = x.clamp(-1, 1)
        yield Step(index, 0.0, 0.0, x, x)

    @torch.inference_mode()
    def predict_x0(self, step: Step, text: torch.Tensor) -> torch.Tensor:
        """The clean pictures that a network sees in the noisy one of a step, for other prompts and without guidance.

        step of one picture, before it is enlarged; text (B, D) as `encode_prompt` gives it. Returns (B, C, H, W) in
        [-1, 1].
        """
        x = step.x[..., :: self.upscale, :: self.upscale].expand(len(text), -1, -1, -1)
        network = self.network_at(step.timestep)
        output = _predict(network, x, torch.tensor(step.timestep), text, None, self.in_bf16("auto"))
        return self._enlarged(to_x0(self.prediction_type(network), output, x, step.sigma).clamp(-1, 1))

    def in_bf16(self, precision: Literal["auto", "bf16", "fp32"]) -> bool:
        """What `precision` means here: auto is bf16 where the device multiplies it in hardware. An exported network has
        the precision it was exported with, float32.
        """
        return isinstance(self.unet, Unet) and (precision == "bf16" or (precision == "auto" and has_bf16(self.device)))

    def make_noise(self, seeds: Sequence[int]) -> tuple[list[torch.Generator], list[torch.Tensor]]:
        """The generators that the seeds mean, for new noise at every step, and the noise to begin with: (N, C, S, S) of
        the size that `unet` draws and, with an upscaler, another of the final size. Made on the CPU, whose generator is
        the same everywhere.
        """

        def draw(generators: list[torch.Generator], side: int) -> torch.Tensor:
            shape = (self.unet.config.in_channels, side, side)
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noises = [draw(generators, self.unet.config.image_size)]
        if self.upscaler is not None:  # a stream of its own: what is enlarged is what would be drawn without it
            noises.append(draw([torch.Generator().manual_seed(-1 - seed) for seed in seeds], self.image_size))
        return generators, noises

    def _enlarged(self, small: torch.Tensor) -> torch.Tensor:
        """To the size of the finished pictures, each pixel a square."""
        return small.repeat_interleave(self.upscale, -2).repeat_interleave(self.upscale, -1)

    def _shrunk(
        self, known: torch.Tensor | None, redrawn: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A picture and a mask at the size that `unet` draws; what is redrawn in part, is redrawn."""
        small = None if known is None else F.avg_pool2d(known, self.upscale)
        return small, None if redrawn is None else F.max_pool2d(redrawn.float(), self.upscale) > 0

    def _known(
        self, image: np.ndarray | None, mask: np.ndarray | None, number: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`image` in model space (N, C, H, W), and where it is drawn anew (N, 1, H, W); None for what is not given."""
        if image is None:
            if mask is not None:
                raise PokediffError("a mask needs an image")
            return None, None
        side = (self.image_size, self.image_size)
        for name, values, rest in (("image", image, (4,)), ("mask", mask, ())):
            if values is not None and values.shape[values.ndim - len(rest) - 2 :] != (*side, *rest):
                raise PokediffError(f"{name}: {values.shape}, not (..., {', '.join(map(str, (*side, *rest)))})")
        whole = np.broadcast_to(image, (number, *side, 4))
        known = to_model(torch.from_numpy(whole.copy()), self.channels).to(self.device)
        if mask is None:
            return known, None
        return known, torch.from_numpy(np.broadcast_to(mask, (number, *side)).copy()).to(self.device)[:, None] > 0

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch_size: int = 16, **options: Any
    ) -> np.ndarray:
        """Pictures for N prompts and seeds, straight RGBA uint8 (N, H, W, 4). `options` are those of `denoise`."""
        pictures = []
        single = {"image": 3, "mask": 2}  # dimensions of one; with one more there is one for each picture
        each = {name for name, dims in single.items() if options.get(name) is not None and options[name].ndim > dims}
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            mine = {name: value[part] if name in each else value for name, value in options.items()}
            if options.get("noise") is not None:
                mine["noise"] = [values[part] for values in options["noise"]]
            *_, last = self.denoise(prompts[part], seeds[part], **mine)
            pictures.append(from_model(last.x0))
        return np.concatenate(pictures)

    def __call__(
        self, prompt: str | Sequence[str], num_images: int = 1, seed: int = 0, **options: Any
    ) -> PokeDiffPipelineOutput:
        """`num_images` pictures a prompt, as RGBA PIL images; picture k has seed + k. `options` as in `generate`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise PokediffError("nothing to draw: no prompt")
        prompts = [text for text in prompts for _ in range(num_images)]
        pictures = self.generate(prompts, range(seed, seed + len(prompts)), **options)
        return PokeDiffPipelineOutput(images=[Image.fromarray(picture) for picture in pictures])

    def _sigma(self, timestep: float) -> float:
        """Noise to signal, sqrt((1 - a) / a) with a = alphas_cumprod; some samplers ask between two timesteps."""
        alphas = self.scheduler.alphas_cumprod.double()
        log_sigmas = ((1 - alphas) / alphas).log() / 2
        return float(np.exp(np.interp(timestep, np.arange(len(alphas)), log_sigmas.cpu().numpy())))


def settled(config: Settings, pipeline: PokeDiffPipeline) -> Settings:
    """`config`, a dataclass, with the checkpoint's own steps, guidance and sampler where it leaves them open."""
    own = {name: pipeline.config[name] for name in ("num_steps", "guidance_scale")} | {"sampler": pipeline.sampler}
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})


def _begin(
    scheduler: Any, noise: torch.Tensor, known: torch.Tensor | None, skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first x and the timesteps to go, as the scheduler wants them: from noise, or from a noised picture."""
    if known is None or not skipped:
        return noise * scheduler.init_noise_sigma, scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    timesteps = scheduler.timesteps[skipped:]
    return scheduler.add_noise(known, noise, timesteps[:1].repeat(len(noise))), timesteps


def _predict(
    network: Any, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, low_res: torch.Tensor | None, half: bool
) -> torch.Tensor:
    """The network's output for x (B, C, H, W), text (B, D), low_res None or (B, C, H/f, W/f); float32."""
    given = [values.to(network.dtype) for values in (x, text, low_res) if values is not None]

    def ask(x: torch.Tensor, text: torch.Tensor, *low_res: torch.Tensor) -> torch.Tensor:
        return network(x, timestep, text, None, *low_res).float()

    if half or x.device.type != "cpu":
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return ask(*given)
    # float32 kernels of a CPU are chosen by the number of rows and round differently (bfloat16 ones agree): a picture
    # must not depend on its company, so they always get four rows.
    rows = torch.arange(-(-len(x) // 4) * 4) % len(x)
    parts = zip(*(values[rows].split(4) for values in given), strict=True)
    return torch.cat([ask(*part) for part in parts])[: len(x)]


def to_x0(prediction_type: str, output: torch.Tensor, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """A network's output as x0, where x = alpha x0 + std noise, sigma = std / alpha, alpha^2 + std^2 = 1
    (Salimans & Ho 2022, appendix D).
    """
    alpha, std = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    if prediction_type == "v_prediction":
        return alpha * x - std * output
    return (x - std * output) / alpha if prediction_type == "epsilon" else output


def _to_v(x0: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The v that means this x0, alpha noise - std x0, whatever the network predicts."""
    alpha, std = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    return (alpha * x - x0) / std


def same_noise(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    """Do timesteps mean the same noise to both?"""
    ours, theirs = (scheduler.alphas_cumprod.cpu() for scheduler in (one, other))
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)


def _skipped(scheduler: Any, strength: float) -> int:
    """How many of a scheduler's timesteps are left out when so much of the way is gone; one step is always left."""
    order = scheduler.order  # heun: two timesteps a step, and it must begin with the first of the two
    steps = -(-len(scheduler.timesteps) // order)
    return order * (steps - max(1, round(strength * steps)))


def slerp(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """From `start` to `end` along the sphere, picture by picture (N, ...): between two noises there is noise of the
    same strength, where a straight line would have less (White 2016, "Sampling Generative Networks", section 2.1).
    """
    a, b = start.flatten(1), end.flatten(1)
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    near = angle < 1e-4  # the same: a straight line
    sine = torch.where(near, torch.ones_like(angle), angle.sin())
    left = torch.where(near, torch.full_like(angle, 1 - share), ((1 - share) * angle).sin() / sine)
    right = torch.where(near, torch.full_like(angle, share), (share * angle).sin() / sine)
    return (left * a + right * b).view_as(start)


def diffusion_loss(
    schedule: DDPMScheduler,
    unet: Any,
    x0: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    augment: torch.Tensor | None = None,
    low_res: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B,) mean squared error of what the network predicts (DDPM eq. 14; v: Salimans & Ho 2022, eq. 11).

    An x0 prediction is weighed as the error of the v that it means, 1 + 1 / sigma^2: losses of both compare.
    x0 and noise (B, C, H, W), timesteps (B,), text (B, D), augment (B, AUGMENT_DIM), low_res (B, C, H/f, W/f).
    """
    noisy = schedule.add_noise(x0, noise, timesteps).contiguous(memory_format=torch.channels_last)
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(x0, noise, timesteps)
    else:
        target = noise if schedule.config.prediction_type == "epsilon" else x0
    output = unet(noisy, timesteps, text, augment, low_res).float()
    loss = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    if schedule.config.prediction_type == "sample":
        loss = loss / (1 - schedule.alphas_cumprod.to(loss.device)[timesteps])  # 1 - a = sigma^2 / (1 + sigma^2)
    return loss


def has_bf16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 in hardware? Elsewhere it is emulated, five times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def quiet() -> None:
    """No progress bars of diffusers and transformers for files that load in a blink."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
