"""PokeDiffPipeline: prompt to steps to pictures.

    pipe = PokeDiffPipeline.from_pretrained("checkpoints/pokediff")
    pipe("a blue water turtle", seed=7).images[0].save("turtle.png")

`denoise()` is a generator of steps; progress bars, GIFs, previews and live views consume it.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import SafetensorError

from pokediff.config import Sampling
from pokediff.data.images import CHANNELS, Channels, fit_square, from_model, to_model
from pokediff.errors import PokediffError, first_line
from pokediff.model.cascade import Cascade, guided
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import schedule_sigmas
from pokediff.model.samplers import first_x, make_scheduler, sampler_name, skipped_steps, to_v
from pokediff.model.text import ClipTextEncoder, TextEncoder, cached_or_downloaded, load_text_encoder

INDEX = "model_index.json"
BATCH_SIZE = 16


@dataclass(frozen=True)
class Step:
    """One evaluation of a denoiser, or the end: sigma 0, denoiser None, x = x0 = the pictures.

    x, x0 are (B, C, S, S) of the size S of the denoiser; only what displays a step enlarges it.
    """

    index: int  # 0, 1, 2 ...
    timestep: float  # 999 (noise) ... 0
    sigma: float  # standard deviation of the noise relative to the picture's unit scale
    x: torch.Tensor  # the noisy picture, unit variance
    x0: torch.Tensor  # the clean picture as predicted from it, in [-1, 1]
    denoiser: str | None = None  # its name in the cascade
    low_res: torch.Tensor | None = None  # (B, C, S/f, S/f): the pictures that an upscaler enlarges


@dataclass(frozen=True)
class Leg:
    """The steps at one size."""

    size: int  # px
    scheduler: Any  # a diffusers scheduler with its timesteps set
    skipped: int  # how many of its timesteps are not run
    reach: float  # fraction of the noise schedule at which the denoisers of this size are trained


@dataclass(frozen=True)
class Evaluation:
    """What one step of `denoise` will be."""

    size: int  # px
    timestep: float
    sigma: float
    denoiser: str


@dataclass
class PokeDiffPipelineOutput(BaseOutput):
    """images: RGBA PIL images, or one array (N, H, W, 4) or tensor (N, 4, H, W) in [0, 1]; seeds: one each."""

    images: Any
    seeds: list[int]


class PokeDiffPipeline(DiffusionPipeline):
    """A text-conditional cascade of pixel-space denoisers.

    Args:
        cascade: the denoisers; which one is used at which size and noise is `Cascade.expert`.
        scheduler: the noise schedule and the default sampler; any diffusers scheduler made `from_config` of it fits.
        text_encoder, tokenizer: a CLIPTextModelWithProjection, when the encoder is part of the checkpoint.
        text_encoder_name: otherwise the encoder with this name is loaded when it is first needed.
        pixel_art: whether the training pictures have hard edges, so that drawings should.
    """

    model_cpu_offload_seq = "text_encoder->cascade"
    settings = ("text_encoder_name", "pixel_art")  # in model_index.json beside the components
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents", "x0"]  # noqa: RUF012

    def __init__(
        self,
        cascade: Cascade,
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_name: str = "builtin",
        pixel_art: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(cascade=cascade, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(text_encoder_name=text_encoder_name, pixel_art=pixel_art)
        self._encoder: TextEncoder | None = None

    # --------------------------------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PokeDiffPipeline:
        """A folder written by training, or a hub repository. Weights become float32 unless dtype is given.

        A folder that holds a part of a cascade names its base, relative to itself; the base is loaded, and the part put
        into it. Raises PokediffError when there is no such folder, or it is no pipeline of ours.
        """
        name, path = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32
        load = super().from_pretrained
        if (path / INDEX).is_file():
            try:
                if base := json.loads((path / INDEX).read_text(encoding="utf-8")).get("base"):
                    pipeline = cls.from_pretrained(path / base, **kwargs)
                    part = Cascade.from_pretrained(path / "cascade", torch_dtype=pipeline.dtype)
                    pipeline.register_modules(cascade=pipeline.cascade.updated(part))
                    return pipeline
                return load(name, **kwargs)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                raise PokediffError(f"{path} cannot be loaded: {first_line(error)}") from error
        found = sorted(index.parent.as_posix() for index in Path("checkpoints").glob(f"*/{INDEX}"))
        here = f"checkpoints here: {', '.join(found) or 'none'}"
        if path.is_dir() or path.parent.is_dir() or name.count("/") != 1:
            raise PokediffError(f"{path} is no checkpoint (no {INDEX}); {here}")
        return cached_or_downloaded(
            lambda local: load(name, **{**kwargs, "local_files_only": local}), f"checkpoint {name}", here
        )

    def save_part(self, folder: str | Path, names: Sequence[str], base: str) -> None:
        """Write the denoisers `names` alone; `base` is the checkpoint that they belong to, relative to `folder`."""
        Cascade({name: self.cascade[name] for name in names}).save_pretrained(Path(folder) / "cascade")
        index = {"_class_name": type(self).__name__, "base": base}
        (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    # ---------------------------------------------------------------------------------------------------------- facts

    @property
    def base(self) -> Denoiser:
        """The first denoiser of the cascade."""
        return self.cascade[next(iter(self.cascade))]

    @property
    def channels(self) -> Channels:
        """One of rgba, rgb, grey."""
        return {number: name for name, number in CHANNELS.items()}[self.base.config.in_channels]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in px that it draws, ascending."""
        return self.cascade.sizes

    @property
    def image_size(self) -> int:
        """The size in px that it draws by default."""
        return self.cascade.default_size

    @property
    def sampler(self) -> str | None:
        """The name in SAMPLERS of its own scheduler; None for another one."""
        return sampler_name(self.scheduler)

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with the checkpoint's own size, steps, guidance and sampler in place of None.

        Raises PokediffError for a size or variant that the checkpoint does not have.
        """
        size = sampling.size or self.image_size
        first = self.cascade.leading(self.cascade.legs(size)[0], sampling.fast).config
        return replace(
            sampling,
            size=size,
            num_inference_steps=sampling.num_inference_steps or first.steps,
            guidance_scale=first.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale,
            sampler=sampling.sampler or self.sampler,
        )

    def in_bf16(self, precision: Literal["auto", "bf16", "fp32"]) -> bool:
        """Whether `precision` means bfloat16 here: auto does where the device multiplies it in hardware. Exported
        denoisers always run in float32.
        """
        torch_denoiser = isinstance(self.base, Denoiser) and self.base.dtype == torch.float32
        return torch_denoiser and (precision == "bf16" or (precision == "auto" and has_bf16(self.device)))

    # ------------------------------------------------------------------------------------------------------------ text

    def encode_prompt(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """(N, D) text vectors on the pipeline's device; a string is one prompt; "" gives the null condition."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        null = self.base.null_text
        known = {"": null}
        for prompt in dict.fromkeys(prompts):
            if prompt:  # each alone: in a batch its vector would differ in the last digit
                known[prompt] = self._load_encoder()([prompt]).pooled[0].to(null)
        return torch.stack([known[prompt] for prompt in prompts])

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            name, wanted = self.config.text_encoder_name, len(self.base.null_text)
            own = self.text_encoder is not None
            encoder = ClipTextEncoder(self.text_encoder, self.tokenizer, name) if own else load_text_encoder(name)
            if encoder.dim != wanted:
                raise PokediffError(f"the denoisers need text vectors of {wanted} numbers, {name} gives {encoder.dim}")
            self._encoder = encoder
        return self._encoder

    # -------------------------------------------------------------------------------------------------------- planning

    def plan(self, sampling: Sampling, strength: float = 1.0) -> list[Leg]:
        """The legs of a drawing, from the base to `sampling.size`.

        The first leg takes `num_inference_steps`, of which the fraction `strength` is run. Every further leg runs the
        end of the noise schedule that its denoisers are trained on, in the steps that suit them. Raises PokediffError
        for a sampler, size, number of steps or strength that cannot be used.
        """
        if not 0 < strength <= 1:
            raise PokediffError(f"strength must be above 0 and at most 1, not {strength}")
        sampling = self.resolved(sampling)
        sigmas, legs = schedule_sigmas(self.scheduler), []
        for size in self.cascade.legs(sampling.size or self.image_size):
            leading = self.cascade.leading(size, sampling.fast)
            reach = float((sigmas < leading.below).double().mean())
            steps, run = sampling.num_inference_steps or leading.config.steps, strength
            if legs:
                own = leading.config.steps
                steps = min(math.ceil(own / reach), len(sigmas))
                run = min(strength, own / steps)
            scheduler = make_scheduler(self.scheduler, sampling.sampler, steps, self.device)
            legs.append(Leg(size, scheduler, skipped_steps(scheduler, run), reach))
        return legs

    def evaluations(self, sampling: Sampling, strength: float = 1.0) -> list[Evaluation]:
        """What each step of `denoise` will be, the last one (the pictures) excepted."""
        rows = []
        for leg in self.plan(sampling, strength):
            for timestep in map(float, leg.scheduler.timesteps[leg.skipped :]):
                sigma = self.sigma(timestep)
                rows.append(Evaluation(leg.size, timestep, sigma, self.cascade.expert(leg.size, sigma, sampling.fast)))
        return rows

    def sigma(self, timestep: float) -> float:
        """sigma at a timestep; some samplers use timesteps between two whole ones."""
        log_sigmas = schedule_sigmas(self.scheduler).log().cpu().numpy()
        return float(np.exp(np.interp(timestep, np.arange(len(log_sigmas)), log_sigmas)))

    # -------------------------------------------------------------------------------------------------------- denoising

    @torch.inference_mode()
    def denoise(
        self,
        prompts: Sequence[str] | torch.Tensor,
        seeds: Sequence[int] | Sequence[torch.Generator],
        sampling: Sampling | None = None,
        *,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Yield every step from noise to pictures, the pictures last.

        Args:
            prompts: N texts, "" for no condition; or their vectors (N, D), as `encode_prompt` gives them.
            seeds: N numbers or generators. Each picture has noise of its own, whatever the batch.
            sampling: how to draw; single fields of it may be given by name: `num_inference_steps=20`.
            image: img2img: premultiplied RGBA uint8 (H, W, 4) or (N, H, W, 4) of the final size to start from.
            strength: fraction of the noise schedule that is run on `image`; 1 starts from pure noise, which keeps
                nothing of it but what `mask` keeps (SDEdit, Meng et al. 2022).
            mask: inpainting: (H, W) or (N, H, W) bool, true where to draw; elsewhere every predicted x0 is set to
                `image`, so that the new grows onto the old (DDNM, Wang et al. 2023, section 3.2).
            noise: the first noise of every leg, as `make_noise` gives it, in place of that of the seeds.

        Raises PokediffError for a bad sampling or strength, prompts and seeds that do not pair up, and an image or mask
        of another size.
        """
        if len(prompts) != len(seeds):
            raise PokediffError(f"{len(prompts)} prompts need {len(prompts)} seeds, not {len(seeds)}")
        sampling = self.resolved(make_sampling(sampling, options))
        size = sampling.size or self.image_size
        strength = 1.0 if image is None else strength
        legs = self.plan(sampling, strength)
        text = prompts if isinstance(prompts, torch.Tensor) else self.encode_prompt(prompts)  # (N, D)
        negative = self.encode_prompt(sampling.negative_prompt).expand_as(text)
        generators, drawn = self.make_noise(seeds, size)
        noises = drawn if noise is None else noise
        known, drawable = self._known(image, mask, len(seeds), size)

        x, low_res, index = noises[0], None, 0
        for number, leg in enumerate(legs):
            factor = size // leg.size
            here = None if known is None else F.avg_pool2d(known, factor)
            free = None if drawable is None else F.max_pool2d(drawable.float(), factor) > 0
            start = here
            if number > 0:
                low_res = x
                if here is None or strength > leg.reach:
                    start = F.interpolate(x, scale_factor=leg.size / x.shape[-1], mode="nearest")
            x, timesteps = first_x(leg.scheduler, noises[number].to(self.device), start, leg.skipped)
            draws = "generator" in inspect.signature(leg.scheduler.step).parameters  # some add noise at every step
            step_options = {"generator": generators} if draws else {}
            for timestep in timesteps:
                noisy = leg.scheduler.scale_model_input(x, timestep)  # unit variance, whatever scale the sampler keeps
                sigma = self.sigma(float(timestep))
                name = self.cascade.expert(leg.size, sigma, sampling.fast)
                x0 = self._x0(name, noisy, timestep, sigma, text, negative, low_res, sampling)
                if here is not None and free is not None:
                    x0 = torch.where(free, x0, here)
                yield Step(index, float(timestep), sigma, noisy, x0, name, low_res)
                x = leg.scheduler.step(to_v(x0, noisy, sigma), timestep, x, **step_options).prev_sample
                index += 1
            x = x.clamp(-1, 1)
        yield Step(index, 0.0, 0.0, x, x)

    @torch.inference_mode()
    def predict_x0(self, step: Step, text: torch.Tensor) -> torch.Tensor:
        """x0 that the denoiser of a step of one picture predicts for other texts (B, D), without guidance. Returns
        (B, C, S, S) in [-1, 1].
        """
        assert step.denoiser is not None, "the last step has no denoiser"
        number = len(text)
        x = step.x.expand(number, -1, -1, -1)
        low_res = None if step.low_res is None else step.low_res.expand(number, -1, -1, -1)
        timestep, off = torch.tensor(step.timestep), Sampling(guidance_scale=1.0)
        return self._x0(step.denoiser, x, timestep, step.sigma, text, text, low_res, off)

    def _x0(
        self,
        name: str,
        x: torch.Tensor,
        timestep: torch.Tensor,
        sigma: float,
        text: torch.Tensor,
        negative: torch.Tensor,
        low_res: torch.Tensor | None,
        sampling: Sampling,
    ) -> torch.Tensor:
        """x0 (B, C, S, S), float32 in [-1, 1], of the denoiser `name`, guided where it wants to be."""
        denoiser, scale = self.cascade[name], 1.0
        low, high = sampling.guidance_interval or (0.0, math.inf)
        if denoiser.config.guidance_scale is not None and low <= sigma <= high:
            scale = denoiser.config.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
        small = low_res if denoiser.config.upscale > 1 else None
        given = [values.to(denoiser.dtype) for values in (x, text, negative, small) if values is not None]

        def run(x: torch.Tensor, text: torch.Tensor, negative: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
            return guided(denoiser, scale, x, timestep, text, negative, None, *small).float()

        half = self.in_bf16(sampling.precision)
        if sampling.exact and not half and x.device.type == "cpu":
            # A CPU's float32 kernels depend on the number of rows and round differently: always use four.
            rows = torch.arange(-(-len(x) // 4) * 4) % len(x)
            parts = zip(*(values[rows].split(4) for values in given), strict=True)
            x0 = torch.cat([run(*part) for part in parts])[: len(x)]
        else:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                x0 = run(*given)
        return x0.clamp(-1, 1)  # guidance overshoots; a picture cannot

    def make_noise(
        self, seeds: Sequence[int] | Sequence[torch.Generator], size: int | None = None
    ) -> tuple[list[torch.Generator], list[torch.Tensor]]:
        """The generators of the seeds, for samplers that add noise at every step, and the first noise of every leg,
        (N, C, S, S) each. Drawn on the CPU, whose generator gives the same numbers everywhere.

        The base's noise does not depend on `size`: a seed gives the same creature at every size.
        """
        generators = [
            torch.Generator().manual_seed(int(seed)) if not isinstance(seed, torch.Generator) else seed
            for seed in seeds
        ]

        def draw(sources: list[torch.Generator], side: int) -> torch.Tensor:
            shape = (self.base.config.in_channels, side, side)
            return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in sources])

        sizes = self.cascade.legs(size or self.image_size)
        noises = [draw(generators, sizes[0])]
        for number, side in enumerate(sizes[1:], 1):  # a stream of its own for every further leg
            own = [-((1 + generator.initial_seed()) * number % 2**63) for generator in generators]
            noises.append(draw([torch.Generator().manual_seed(seed) for seed in own], side))
        return generators, noises

    def _known(
        self, image: np.ndarray | None, mask: np.ndarray | None, number: int, size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`image` in model space (N, C, H, W), and where to draw (N, 1, H, W) bool; None for what is not given."""
        if image is None:
            if mask is not None:
                raise PokediffError("a mask needs an image")
            return None, None
        for name, values, rest in (("image", image, (4,)), ("mask", mask, ())):
            if values is not None and values.shape[values.ndim - len(rest) - 2 :] != (size, size, *rest):
                raise PokediffError(f"{name}: {values.shape}, not (..., {', '.join(map(str, (size, size, *rest)))})")
        whole = np.broadcast_to(image, (number, size, size, 4))
        known = to_model(torch.from_numpy(whole.copy()), self.channels).to(self.device)
        if mask is None:
            return known, None
        return known, torch.from_numpy(np.broadcast_to(mask, (number, size, size)).copy()).to(self.device)[:, None] > 0

    # --------------------------------------------------------------------------------------------------------- pictures

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | Sequence[torch.Generator],
        sampling: Sampling | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        on_step: Callable[[Step], None] = lambda _: None,
        **options: Any,
    ) -> np.ndarray:
        """Pictures for N prompts and seeds, straight RGBA uint8 (N, S, S, 4), exactly as the denoisers leave them.
        `options` are those of `denoise`; `on_step` gets every step of every batch.
        """
        pictures = []
        single = {"image": 3, "mask": 2}  # dimensions of one; with one more there is one for each picture
        each = {name for name, dims in single.items() if options.get(name) is not None and options[name].ndim > dims}
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            mine = {name: value[part] if name in each else value for name, value in options.items()}
            if options.get("noise") is not None:
                mine["noise"] = [values[part] for values in options["noise"]]
            for step in self.denoise(prompts[part], seeds[part], sampling, **mine):
                on_step(step)
            pictures.append(from_model(step.x0))
        return np.concatenate(pictures)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
        mask_image: Image.Image | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> PokeDiffPipelineOutput | tuple:
        """Draw pictures; the arguments are those of diffusers' pipelines, `options` further fields of `Sampling`.

        Args:
            seed: of the first picture, the k-th has seed + k; None and no `generator`: a random one, returned in
                `seeds`.
            image, strength, mask_image: img2img and inpainting (white where to draw); fitted into a square.
            output_type: "pil" RGBA images, "np" (N, S, S, 4) or "pt" (N, 4, S, S), straight RGBA in [0, 1].
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": x, "x0": x0}) to look at a step.

        Raises PokediffError as `denoise`, and for no prompt or an unknown output_type.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not prompts:
            raise PokediffError("no prompt given")
        if output_type not in ("pil", "np", "pt"):
            raise PokediffError(f"output_type must be pil, np or pt, not {output_type!r}")
        number = len(prompts) * num_images_per_prompt
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        seeds = make_seeds(seed, generator, number)
        sampling = make_sampling(
            None, {**options, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        )
        sampling = self.resolved(replace(sampling, negative_prompt=_one(negative_prompt)))
        given: dict[str, Any] = {}
        if image is not None:
            size = sampling.size or self.image_size
            given = {"image": fit_square(np.array(image.convert("RGBA")), size), "strength": strength}
            if mask_image is not None:
                white = np.array(mask_image.convert("L"))
                given |= {"mask": fit_square(np.dstack([white] * 4), size)[..., 3] >= 128, "strength": 1.0}
        total = len(self.evaluations(sampling, given.get("strength", 1.0)))
        with self.progress_bar(total=total * -(-number // batch_size)) as bar:

            def on_step(step: Step) -> None:
                if step.denoiser is None:
                    return
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": step.x, "x0": step.x0}
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_on_step_end(self, step.index, torch.tensor(step.timestep), shown)

            pictures = self.generate(prompts, seeds, sampling, batch_size=batch_size, on_step=on_step, **given)
        images = _output(pictures, output_type)
        if not return_dict:
            return (images,)
        return PokeDiffPipelineOutput(
            images, [g.initial_seed() if isinstance(g, torch.Generator) else g for g in seeds]
        )


def make_sampling(sampling: Sampling | None, options: dict[str, Any]) -> Sampling:
    """`sampling` with the fields in `options` changed. Raises PokediffError for a field that it does not have."""
    options = dict(options)
    if "num_steps" in options:  # its name until 0.2
        options["num_inference_steps"] = options.pop("num_steps")
    unknown = options.keys() - Sampling.__dataclass_fields__.keys()
    if unknown:
        raise PokediffError(
            f"unknown option {', '.join(sorted(unknown))}; options: {', '.join(Sampling.__dataclass_fields__)}"
        )
    return replace(sampling or Sampling(), **options)


def make_seeds(
    seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None, number: int
) -> list[Any]:
    """`number` seeds or generators: consecutive seeds, or what diffusers' `generator` argument means.

    A fresh generator draws what its seed draws; one generator for several pictures draws their noise in turn.
    """
    if generator is None:
        first = random.SystemRandom().randrange(2**32) if seed is None else seed
        return list(range(first, first + number))
    generators = [generator] * number if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != number:
        raise PokediffError(f"{number} pictures need {number} generators, or one, not {len(generators)}")
    return generators


def _one(negative_prompt: str | Sequence[str] | None) -> str:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return negative_prompt or ""
    if len(set(negative_prompt)) > 1:
        raise PokediffError("negative_prompt: one for all pictures; call the pipeline once for each")
    return next(iter(negative_prompt), "")


def _output(pictures: np.ndarray, output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in pictures]
    scaled = pictures.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, five times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def quiet() -> None:
    """No progress bars of diffusers and transformers for files that load at once."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
