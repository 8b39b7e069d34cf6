"""PokeDiffPipeline: prompt to steps to pictures.

    pipe = PokeDiffPipeline.from_pretrained("checkpoints/pokediff")
    pipe("a blue water turtle", seed=7).images[0].save("turtle.png")

`denoise()` is a generator of steps; progress bars, GIFs, previews and live views consume it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from pokediff.config import Precision, Sampler, Sampling
from pokediff.data.images import CHANNELS, Channels, from_model
from pokediff.errors import PokediffError, printable
from pokediff.files import is_text
from pokediff.model import interface
from pokediff.model.cascade import Cascade, guidance_at, guided, in_fours
from pokediff.model.checkpoint import CheckpointPipeline, quiet
from pokediff.model.denoiser import Denoiser, has_bf16
from pokediff.model.interface import PokeDiffPipelineOutput
from pokediff.model.plan import Evaluation, Step, plan
from pokediff.model.samplers import first_x, sampler_name, to_v
from pokediff.model.scorer import Scorer
from pokediff.model.text import ClipTextEncoder, TextEncoder, load_text_encoder

__all__ = ["PokeDiffPipeline", "PokeDiffPipelineOutput", "Step", "has_bf16", "quiet"]
BATCH_SIZE = 16
Seeds = Sequence[int] | Sequence[torch.Generator]
Texts = Sequence[str] | torch.Tensor  # prompts or their vectors (N, D)
OnStep = Callable[[Step], None]


class PokeDiffPipeline(CheckpointPipeline):
    """A text-conditional cascade of pixel-space denoisers.

    Args:
        cascade: the denoisers; which one is used at which size and noise is `Cascade.expert`.
        scheduler: the noise schedule and the default sampler; `samplers.SCHEDULERS` lists the diffusers schedulers that
            can be used, made `from_config` of it.
        text_encoder, tokenizer: a CLIPTextModelWithProjection, when the encoder is part of the checkpoint.
        text_encoder_name: otherwise the encoder with this name is loaded when it is first needed.
        pixel_art: whether drawings get hard edges by default, as in the training pictures.
        scorer: chooses among drawings of the base (`best_seeds`); None: `Sampling.best_of` cannot be used.
    """

    model_cpu_offload_seq = "text_encoder->cascade"
    settings = ("text_encoder_name", "pixel_art")  # in model_index.json beside the components
    _optional_components = ["text_encoder", "tokenizer", "scorer"]  # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents", "x0"]  # noqa: RUF012

    def __init__(
        self,
        cascade: Cascade,
        scheduler: SchedulerMixin,
        text_encoder: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_name: str = "builtin",
        pixel_art: bool = False,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(cascade=cascade, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_modules(scorer=scorer)
        self.register_to_config(text_encoder_name=text_encoder_name, pixel_art=pixel_art)
        self._encoder: TextEncoder | None = None
        self._interrupt = False
        self._num_timesteps = 0

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
    def sampler(self) -> Sampler | None:
        """The name of `self.scheduler` in SAMPLERS; None for another scheduler."""
        return sampler_name(self.scheduler)

    @property
    def has_fast(self) -> bool:
        """Whether it has few-step denoisers."""
        return self.cascade.has_fast

    @property
    def pixel_art(self) -> bool:
        """Whether drawings get hard edges by default."""
        return self.config.pixel_art

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with the checkpoint's default size, steps, guidance scale and sampler in place of None, and one
        drawing of a picture.

        Raises PokediffError for a size, variant or scorer that the checkpoint does not have.
        """
        if sampling.chooses and self.scorer is None:
            raise PokediffError("best_of: this checkpoint has no scorer; scripts/train_scorer.py trains one")
        size = sampling.size or self.image_size
        first = self.cascade.leading(self.cascade.legs(size)[0], sampling.fast).config
        return replace(
            sampling,
            size=size,
            num_inference_steps=sampling.num_inference_steps or first.steps,
            guidance_scale=first.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale,
            sampler=sampling.sampler or ("ddim" if first.fast else self.sampler),  # distillation uses DDIM steps
            best_of=sampling.best_of or 1,
        )

    def with_components(self, **others: Any) -> PokeDiffPipeline:
        """A pipeline with some other components; with another base, without the scorer, which knows the former one."""
        if next(iter(others.get("cascade", self.cascade).items()))[1] is not self.base:
            others = {"scorer": None, **others}
        return PokeDiffPipeline(**{**self.components, **{key: self.config[key] for key in self.settings}, **others})

    def evaluations(self, sampling: Sampling, strength: float = 1.0) -> list[Evaluation]:
        """The planned evaluations of `denoise`, one per step but the last (the pictures)."""
        legs = plan(self.cascade, self.scheduler, self.resolved(sampling), strength, self.device)
        return [evaluation for leg in legs for evaluation in leg.evaluations]

    def in_bf16(self, precision: Precision) -> bool:
        """Whether `precision` means bfloat16 here: auto does where the device multiplies it in hardware. Exported
        denoisers, and those loaded in half precision, run as they are.
        """
        castable = isinstance(self.base, Denoiser) and self.base.dtype == torch.float32
        return castable and (precision == "bf16" or (precision == "auto" and has_bf16(self._execution_device)))

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to true, as in diffusers' pipelines, to end `generate` or a call after the present step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the present call, or the last one."""
        return self._num_timesteps

    # ------------------------------------------------------------------------------------------------------------ text

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """(N, D) text vectors on the pipeline's device; a string is one prompt; "" gives the null condition.

        Raises PokediffError for a prompt with lone surrogates.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if wrong := [text for text in prompts if not is_text(text)]:
            raise PokediffError(f"prompt {printable(wrong[0])!r} is not UTF-8 text")
        null = self.base.null_text
        known = {"": null}
        for text in dict.fromkeys(prompts):
            if text:  # each alone: in a batch its vector would differ in the last digit
                known[text] = self._load_encoder()([text]).pooled[0].to(null)
        return torch.stack([known[text] for text in prompts])

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            name, wanted = self.config.text_encoder_name, len(self.base.null_text)
            own = self.text_encoder is not None
            encoder = ClipTextEncoder(self.text_encoder, self.tokenizer, name) if own else load_text_encoder(name)
            if encoder.dim != wanted:
                raise PokediffError(f"the denoisers need text vectors of {wanted} numbers, {name} gives {encoder.dim}")
            self._encoder = encoder
        return self._encoder

    # -------------------------------------------------------------------------------------------------------- denoising

    @torch.inference_mode()
    def denoise(
        self,
        prompts: Texts,
        seeds: Seeds,
        sampling: Sampling | None = None,
        *,
        negative_prompts: Texts | None = None,
        image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        on_step_end: Callable[[Step, torch.Tensor], torch.Tensor] | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Yield every step from noise to pictures, the pictures last.

        Args:
            prompts: N texts, "" for no condition; or their vectors (N, D), as `encode_prompt` gives them.
            seeds: N numbers or generators; the noise of a picture does not depend on the batch.
            sampling: how to draw; single fields of it may be given by name: `num_inference_steps=20`.
            negative_prompts: N texts or vectors, in place of `sampling.negative_prompt` for all pictures.
            image: img2img: premultiplied RGBA uint8 (H, W, 4) or (N, H, W, 4) of the final size to start from.
            strength: fraction of the noise schedule that is run on `image`; 1 starts from pure noise, which keeps
                nothing of it but what `mask` keeps (SDEdit, Meng et al. 2022).
            mask: inpainting: (H, W) or (N, H, W) bool, true where to draw; elsewhere every predicted x0 is set to
                `image`, so that the new grows onto the old (DDNM, Wang et al. 2023, section 3.2).
            noise: the first noise of every leg, as `make_noise` gives it, in place of that of the seeds.
            on_step_end: gets each step and the x that follows it, at the scheduler's scale, and returns the x to go on
                with.

        Raises PokediffError for a bad sampling or strength, prompts and seeds that do not pair up, and an image or mask
        of another size.
        """
        if len(prompts) != len(seeds):
            raise PokediffError(f"{len(prompts)} prompts need {len(prompts)} seeds, not {len(seeds)}")
        sampling = self.resolved(interface.make_sampling(sampling, options))
        if sampling.chooses:
            if image is not None or noise is not None:
                raise PokediffError("best_of chooses the noise: leave out image and noise")
            seeds = self.best_seeds(prompts, seeds, sampling, negative_prompts=negative_prompts)
            sampling = replace(sampling, best_of=1)
        size, device = sampling.size or self.image_size, self._execution_device
        strength = 1.0 if image is None else strength
        legs = plan(self.cascade, self.scheduler, sampling, strength, device)
        text = self._vectors(prompts, len(seeds))
        negative = self._vectors(sampling.negative_prompt if negative_prompts is None else negative_prompts, len(seeds))
        generators, drawn = self.make_noise(seeds, size)
        noises = drawn if noise is None else noise
        known, drawable = interface.known_pixels(image, mask, len(seeds), size, self.channels)

        x, low_res, index = noises[0], None, 0
        for number, leg in enumerate(legs):
            factor = size // leg.size
            here = None if known is None else F.avg_pool2d(known.to(device), factor)
            free = None if drawable is None else F.max_pool2d(drawable.to(device).float(), factor) > 0
            start = here
            if number > 0:
                low_res = x
                if here is None or strength > leg.reach:
                    start = interface.enlarge(x, leg.size)
            x, timesteps = first_x(leg.scheduler, noises[number].to(device), start, leg.skipped)
            draws = "generator" in inspect.signature(leg.scheduler.step).parameters  # some add noise at every step
            step_options = {"generator": generators} if draws else {}
            for timestep, planned in zip(timesteps, leg.evaluations, strict=True):
                noisy = leg.scheduler.scale_model_input(x, timestep)  # unit variance, whatever scale the sampler keeps
                name, sigma = planned.denoiser, planned.sigma
                x0 = self._x0(name, noisy, timestep, sigma, text, negative, low_res, sampling)
                if here is not None and free is not None:
                    x0 = torch.where(free, x0, here)
                step = Step(index, planned.timestep, sigma, noisy, x0, name, low_res)
                yield step
                x = leg.scheduler.step(to_v(x0, noisy, sigma), timestep, x, **step_options).prev_sample
                if on_step_end is not None:
                    x = on_step_end(step, x)
                index += 1
            x = x.clamp(-1, 1)
        yield Step(index, 0.0, 0.0, x, x)

    @torch.inference_mode()
    def best_seeds(
        self,
        prompts: Texts,
        seeds: Seeds,
        sampling: Sampling | None = None,
        *,
        negative_prompts: Texts | None = None,
        batch_size: int = BATCH_SIZE,
        on_step: OnStep = lambda _: None,
        **options: Any,
    ) -> list[int]:
        """Of `sampling.best_of` seeds for each of N pictures, the one that the scorer rates highest, by `base_x0`. They
        are the seed given and others a million apart, or what a generator draws. `on_step` gets every step of every
        batch.

        Arguments and errors are those of `denoise`; it also raises PokediffError for a checkpoint without scorer.
        """
        sampling = self.resolved(interface.make_sampling(sampling, options))
        if (sampling.best_of or 1) == 1:
            return [seed for several in seeds for seed in interface.candidates(several, 1)]
        negative = sampling.negative_prompt if negative_prompts is None else negative_prompts
        tried, ratings = self.rated_seeds(prompts, seeds, sampling, negative, batch_size, on_step)
        return [several[index] for several, index in zip(tried, ratings.argmax(1).tolist(), strict=True)]

    @torch.inference_mode()
    def rated_seeds(
        self,
        prompts: Texts,
        seeds: Seeds,
        sampling: Sampling,
        negative_prompts: Texts = "",
        batch_size: int = BATCH_SIZE,
        on_step: OnStep = lambda _: None,
    ) -> tuple[list[list[int]], torch.Tensor]:
        """The seeds that `best_seeds` chooses from, M = `sampling.best_of` for each of N pictures, and what the scorer
        thinks of them, (N, M).
        """
        number = sampling.best_of or 1
        tried = [interface.candidates(seed, number) for seed in seeds]
        flat = [seed for several in tried for seed in several]
        text = self._vectors(prompts, len(seeds)).repeat_interleave(number, dim=0)
        negative = self._vectors(negative_prompts, len(seeds)).repeat_interleave(number, dim=0)
        ratings = []
        for start in range(0, len(flat), batch_size):
            part = slice(start, start + batch_size)
            x0 = self.base_x0(text[part], flat[part], sampling, negative_prompts=negative[part], on_step=on_step)
            given = [values.to(self.base.dtype) for values in (x0, text[part])]
            ratings.append(in_fours(partial(self.scorer, self.base), given))
        return tried, torch.cat(ratings).view(len(seeds), number)

    @torch.inference_mode()
    def base_x0(
        self,
        prompts: Texts,
        seeds: Seeds,
        sampling: Sampling | None = None,
        *,
        negative_prompts: Texts | None = None,
        on_step: OnStep = lambda _: None,
    ) -> torch.Tensor:
        """x0 (N, C, S, S) of drawings at the smallest size where the denoiser for the most noise, whose steps `on_step`
        gets, hands over to the next one. What is torn and what is whole is decided there, at a third of the cost of the
        whole drawing (docs/LOG.md). Arguments and errors are those of `denoise`.
        """
        small = replace(sampling or Sampling(), size=self.sizes[0], best_of=1)
        steps = self.denoise(prompts, seeds, small, negative_prompts=negative_prompts)
        for step in islice(steps, self.base_steps(small)):
            on_step(step)
        return step.x0

    def base_steps(self, sampling: Sampling) -> int:
        """The number of steps of `base_x0`."""
        planned = self.evaluations(replace(sampling, size=self.sizes[0]))
        return sum(each.denoiser == planned[0].denoiser for each in planned)

    def _vectors(self, prompts: str | Texts, number: int) -> torch.Tensor:
        """(N, D) text vectors of N prompts, or of one for all."""
        vectors = prompts if isinstance(prompts, torch.Tensor) else self.encode_prompt(prompts)
        if len(vectors) not in (1, number):
            raise PokediffError(f"{number} pictures need {number} prompts, not {len(vectors)}")
        return vectors.expand(number, -1).to(self._execution_device)

    @torch.inference_mode()
    def predict_x0(self, step: Step, text: torch.Tensor) -> torch.Tensor:
        """x0 that the denoiser of a step of one picture predicts for other texts (B, D), without guidance. Returns
        (B, C, S, S) in [-1, 1].
        """
        if step.denoiser is None:
            raise ValueError("the last step has no denoiser")
        x = step.x.expand(len(text), -1, -1, -1)
        low_res = None if step.low_res is None else step.low_res.expand(len(text), -1, -1, -1)
        off, timestep = Sampling(guidance_scale=1.0), torch.tensor(step.timestep)
        return self._x0(step.denoiser, x, timestep, step.sigma, text, text, low_res, off)

    def guidance(self, name: str, sigma: float, sampling: Sampling) -> float:
        """The guidance scale of the denoiser `name` at a noise level; where it is not 1, a step evaluates it twice."""
        return guidance_at(self.cascade[name], sigma, sampling.guidance_scale, sampling.guidance_interval)

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
        denoiser, scale = self.cascade[name], self.guidance(name, sigma, sampling)
        small = low_res if denoiser.config.upscale > 1 else None
        given = [values.to(denoiser.dtype) for values in (x, text, negative, small) if values is not None]

        def run(x: torch.Tensor, text: torch.Tensor, negative: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
            return guided(lambda *given: self.cascade(name, *given), scale, x, timestep, text, negative, None, *small)

        half = self.in_bf16(sampling.precision)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            exact = sampling.exact and not half and x.device.type == "cpu"
            x0 = in_fours(run, given) if exact else run(*given)
        return x0.float().clamp(-1, 1)  # guidance overshoots; a picture cannot

    def make_noise(self, seeds: Seeds, size: int | None = None) -> tuple[list[torch.Generator], list[torch.Tensor]]:
        """The generators of the seeds, for samplers that add noise at every step, and the first noise of every leg,
        (N, C, S, S) each. Drawn on the CPU, whose generator gives the same numbers everywhere.

        The base's noise does not depend on `size`: a seed gives the same creature at every size.
        """
        generators = interface.make_generators(seeds)
        sizes = self.cascade.legs(size or self.image_size)
        return generators, interface.make_noises(generators, self.base.config.in_channels, sizes)

    # --------------------------------------------------------------------------------------------------------- pictures

    def generate(
        self,
        prompts: Texts,
        seeds: Seeds,
        sampling: Sampling | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        on_step: OnStep = lambda _: None,
        **options: Any,
    ) -> np.ndarray:
        """Pictures for N prompts and seeds, straight RGBA uint8 (N, S, S, 4), exactly as the denoisers leave them.
        `options` are those of `denoise`; `on_step` gets every step of every batch.
        """
        return from_model(self._draw(prompts, seeds, sampling, batch_size, on_step, options))

    def _draw(
        self, prompts: Texts, seeds: Seeds, sampling: Sampling | None, batch: int, on_step: OnStep, options: dict
    ) -> torch.Tensor:
        """Pictures (N, C, S, S) in [-1, 1]; after an interrupt those of the batches so far, as last predicted."""
        self._interrupt = False
        drawn: list[torch.Tensor] = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            mine = interface.take(options, part)
            for step in self.denoise(prompts[part], seeds[part], sampling, **mine):
                on_step(step)
                if self._interrupt:
                    break
            drawn.append(step.x0.cpu())
            if self._interrupt:
                break
        size = options.get("size") or (sampling and sampling.size) or self.image_size
        return torch.cat([interface.enlarge(pictures, size) for pictures in drawn])

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
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> PokeDiffPipelineOutput | tuple:
        """Draw pictures; the arguments are those of diffusers' pipelines, `options` further fields of `Sampling`.

        Args:
            negative_prompt: one for all prompts, or one each.
            seed: of the first picture, the k-th has seed + k; None and no `generator`: a random one, returned in
                `seeds`.
            image, strength, mask_image: img2img and inpainting (white where to draw); fitted into a square.
            output_type: "pil" RGBA images, "np" (N, S, S, 4) or "pt" (N, 4, S, S), straight RGBA in [0, 1]; "latent"
                (N, C, S, S) in [-1, 1], as the denoisers leave them.
            callback_on_step_end: called with (pipeline, step, timestep, tensors) after every step; tensors are the
                `latents` after it and the predicted `x0`, as far as named in `callback_on_step_end_tensor_inputs`. It
                may return a dict with other latents, and may set `pipeline._interrupt`.

        Raises PokediffError as `denoise`, and for no prompt or an unknown output_type.
        """
        prompts, negative = interface.make_prompts(prompt, negative_prompt, num_images_per_prompt)
        interface.check_choice("output_type", output_type, interface.OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            interface.check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        seeds = interface.make_seeds(seed, generator, len(prompts))
        options |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        sampling = self.resolved(interface.make_sampling(None, options))
        given: dict[str, Any] = {"negative_prompts": negative}
        given |= interface.fit_images(image, mask_image, sampling.size or self.image_size)
        if sampling.chooses and image is None:  # here, so that `seeds` of the output draw the pictures again
            seeds = self.best_seeds(prompts, seeds, sampling, negative_prompts=negative, batch_size=batch_size)
            sampling = replace(sampling, best_of=1)
        given["strength"] = strength if image is not None and mask_image is None else 1.0
        self._num_timesteps = len(self.evaluations(sampling, given["strength"]))
        with self.progress_bar(total=self._num_timesteps * -(-len(prompts) // batch_size)) as bar:

            def on_step_end(step: Step, x: torch.Tensor) -> torch.Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                tensors = {"latents": x, "x0": step.x0}
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, step.index, torch.tensor(step.timestep), shown)
                return (changed or {}).get("latents", x)

            given["on_step_end"] = on_step_end
            pictures = self._draw(prompts, seeds, sampling, batch_size, lambda _: None, given)
        self.maybe_free_model_hooks()
        images = interface.convert(pictures, output_type)
        if not return_dict:
            return (images,)
        drawn = [g.initial_seed() if isinstance(g, torch.Generator) else g for g in seeds[: len(pictures)]]
        return PokeDiffPipelineOutput(images, drawn)
