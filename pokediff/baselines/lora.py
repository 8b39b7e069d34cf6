"""SDXL with LoRA: the U-Net of a pretrained latent diffusion model learns a low-rank change on our captions.

`load_lora(folder, device).generate(["a blue turtle"], [7])` draws with what `train_lora(config)` wrote, and so does
plain diffusers, by `StableDiffusionXLPipeline.load_lora_weights(folder)`. Everything random in batch n is drawn from
(seed, n). Hu et al., "LoRA" (2021); Podell et al., "SDXL" (2023).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub.errors import HTTPError
from PIL import Image

from pokediff.baselines.interface import LORA_WEIGHTS, DrawsAtOnce, read_config, write_config
from pokediff.baselines.loop import Values, make_accelerator, train_steps, training_batches
from pokediff.config import BaselineConfig, Sampling
from pokediff.data.dataset import CaptionVectors, TrainingBatches, load_pictures
from pokediff.data.images import composite, encode_png, from_model, grid, to_model
from pokediff.data.records import picture_bytes
from pokediff.errors import PokediffError, first_line
from pokediff.files import write_whole
from pokediff.model.text import cached_or_downloaded
from pokediff.progress import ProgressBar
from pokediff.training.objectives import mix
from pokediff.training.runs import log_images, start_trackers

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LoraGenerator(DrawsAtOnce):
    """An SDXL pipeline with a LoRA."""

    slow = True

    def __init__(self, pipeline: Any, name: str, image_size: int) -> None:
        self.pipeline, self.name, self.image_size, self.sizes = pipeline, name, image_size, (image_size,)
        self.device = pipeline.device

    @property
    def parameters(self) -> int:
        """Of U-Net, LoRA and VAE."""
        return sum(p.numel() for part in (self.pipeline.unet, self.pipeline.vae) for p in part.parameters())

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with defaults in place of None. Raises PokediffError for what SDXL does not have here."""
        given = {
            "guidance_interval": sampling.guidance_interval is not None,
            "sampler": sampling.sampler is not None,
            "fast": sampling.fast,
            "best_of": sampling.chooses,
        }
        if wrong := [name for name, is_given in given.items() if is_given]:
            raise PokediffError(f"SDXL draws with its own scheduler and guidance; leave out {', '.join(wrong)}")
        size, steps, guidance = sampling.size or self.image_size, sampling.num_inference_steps, sampling.guidance_scale
        if size % 8:
            raise PokediffError(f"SDXL draws sizes that are multiples of 8 px, not {size}")
        guidance = 5.0 if guidance is None else guidance
        return replace(sampling, size=size, num_inference_steps=steps or 30, guidance_scale=guidance)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> np.ndarray:
        """Straight RGBA uint8 (N, S, S, 4), opaque; one picture after another, so each is the same in any batch."""
        sampling, vae, pictures = self.resolved(sampling or Sampling()), self.pipeline.vae, []
        options = {key: getattr(sampling, key) for key in ("num_inference_steps", "guidance_scale")}
        options["negative_prompt"] = sampling.negative_prompt or None  # without one, SDXL guides away from zeros
        options |= {"height": sampling.size, "width": sampling.size, "output_type": "latent"}
        for prompt, seed in zip(prompts, seeds, strict=True):
            generator = torch.Generator().manual_seed(int(seed))  # of the CPU: the same noise on every device
            latents = self.pipeline(prompt, generator=generator, **options).images  # (1, 4, S/8, S/8)
            # Decoded here, for the pipeline would give float16 latents to its VAE of float32.
            pictures.append(from_model(vae.decode(latents.float() / vae.config.scaling_factor).sample))
        return np.concatenate(pictures)


def load_lora(folder: Path, device: torch.device, model: str | None = None) -> LoraGenerator:
    """The LoRA in `folder` on SDXL `model` (default: the one it was trained on, or 1.0), float16 on a GPU.

    Raises PokediffError when peft, the LoRA or the model is missing, or the two do not fit.
    """
    if not (folder / LORA_WEIGHTS).is_file():
        raise PokediffError(f"{folder} has no {LORA_WEIGHTS}")
    config = read_config(folder)
    model = model or config.lora.model
    pipeline = load_sdxl(model, torch.float16 if device.type == "cuda" else torch.float32)
    logging.getLogger("diffusers.loaders.lora_base").setLevel("ERROR")  # it warns that text encoders have no LoRA
    with one_line_for(f"{folder / LORA_WEIGHTS} does not fit {model}"):
        pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHTS, local_files_only=True)
    return LoraGenerator(pipeline.to(device), config.system, picture_size(config, pipeline))


def load_sdxl(model: str, dtype: torch.dtype) -> Any:
    """The SDXL pipeline of a folder or hub repository. Raises PokediffError when there is none, or no peft."""
    if find_spec("peft") is None:  # diffusers needs it for LoRA
        raise PokediffError('SDXL LoRA needs peft: pip install "pokediff[lora]"')
    from diffusers import StableDiffusionXLPipeline

    dtypes = {"default": dtype, "vae": torch.float32}  # SDXL's VAE overflows in float16
    options = {"dtype": dtypes, "use_safetensors": True, "add_watermarker": False}

    def load(local: bool) -> Any:
        return StableDiffusionXLPipeline.from_pretrained(model, local_files_only=local, **options)

    instead = "give the folder of an SDXL pipeline as --lora.model"
    with one_line_for(f"{model} is no SDXL pipeline"):
        pipeline = load(True) if Path(model).is_dir() else cached_or_downloaded(load, f"SDXL {model}", instead)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_size(config: BaselineConfig, pipeline: Any) -> int:
    """Side of the pictures in px: `image_size`; for its default of 32, with which SDXL would have latents of 4x4, that
    of the pipeline (1024). Raises PokediffError when it is no multiple of 8.
    """
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    size = config.image_size if config.image_size > BaselineConfig.image_size else own
    if size % 8:
        raise PokediffError(f"image_size {size}: SDXL needs a multiple of 8")
    return size


@contextmanager
def one_line_for(what: str) -> Iterator[None]:
    """Errors of diffusers and of the hub become a PokediffError, "<what>: <their first line>"."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, HTTPError) as error:
        raise PokediffError(f"{what}: {first_line(error)}") from error


# --------------------------------------------------------------------------------------------------------- training


def train_lora(config: BaselineConfig) -> Path:
    """Train until max_steps, the time limit or Ctrl-C, each of which saves the LoRA. Returns the folder.

    Raises PokediffError for a missing library or model, a precision that the device does not have, no training
    pictures, a loss that is not finite (the LoRA saved last is intact), and a failed upload (all files are).
    """
    from diffusers import DDPMScheduler

    lora, out = config.lora, Path(config.out or f"checkpoints/{config.system}")
    accelerator = make_accelerator(config, lora.gradient_accumulation)
    device = accelerator.device
    torch.backends.cuda.matmul.allow_tf32 = True  # as published
    pipeline = load_sdxl(lora.model, DTYPES[accelerator.mixed_precision]).to(device)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    if lora.hub_model_id:  # now, for it may be refused after hours of training
        with one_line_for(f"hub repository {lora.hub_model_id}"):
            huggingface_hub.create_repo(lora.hub_model_id, exist_ok=True)
    captions, batches = read_data(config, picture_size(config, pipeline))
    adapter = add_adapter(pipeline, lora.rank, config.seed)
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, betas=config.betas)
    unet, optimizer = accelerator.prepare(pipeline.unet, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    start_trackers(accelerator, out, config.wandb)

    def train_step(step: int) -> Values:
        losses, number = [], lora.gradient_accumulation
        for index in range(step * number, (step + 1) * number):
            batch, generator = batches[index], torch.Generator(device).manual_seed(mix(config.seed, index))
            x0 = to_model(batch.pixels.to(device), "rgb")  # (B, 3, S, S), on white
            with accelerator.accumulate(unet):
                rows = [captions[row] for row in batch.text.tolist()]
                losses.append(denoising_loss(pipeline, unet, schedule, x0, rows, generator))
                accelerator.backward(losses[-1])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(adapter, config.max_grad_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
        return {"total": torch.stack(losses).detach().mean(), "grad_norm": norm}

    def save_and_draw(step: int) -> None:
        save(config, pipeline, out)
        preview(config, pipeline, accelerator, out, step)

    interrupted = train_steps(config, accelerator, out, train_step, [(config.preview_every, save_and_draw)])
    accelerator.end_training()
    if lora.hub_model_id and not interrupted:
        with one_line_for(f"{out} is complete, but its upload to {lora.hub_model_id} failed"):
            huggingface_hub.upload_folder(repo_id=lora.hub_model_id, folder_path=out, ignore_patterns="tensorboard/*")
    return out


def read_data(config: BaselineConfig, size: int) -> tuple[list[tuple[str, int]], TrainingBatches]:
    """Batches of size px, whose `text` (B,) are rows of the list beside them: a caption, and the side in px of its
    picture's file. Raises PokediffError when there are no training pictures.
    """
    pictures = load_pictures(config.data, size, config.dataset, ProgressBar.write, ProgressBar)
    pictures = pictures.split("train").with_shared_captions()
    if not len(pictures):
        raise PokediffError(f"{' '.join(config.data)} has no training pictures")
    captions, rows = [("", size)], []
    for record, several in zip(pictures.records, pictures.captions, strict=True):
        with Image.open(BytesIO(picture_bytes(record))) as file:
            side = max(file.size)  # it was padded to a square
        rows.append(np.arange(len(captions), len(captions) + len(several)))
        captions += [(caption, side) for caption in several]
    return captions, training_batches(config, pictures, CaptionVectors(torch.arange(len(captions)), tuple(rows)))


def add_adapter(pipeline: Any, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Freeze the pipeline and add a LoRA to its U-Net's attention. Returns the LoRA's parameters."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet):
        part.requires_grad_(False)
    torch.manual_seed(seed)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights="gaussian")
    pipeline.unet.add_adapter(adapter)
    cast_training_params(pipeline.unet, torch.float32)  # in half precision small updates vanish
    # A list, for optimizer and clipping: diffusers' example clips an iterator that the optimizer has exhausted.
    return [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]


def denoising_loss(
    pipeline: Any, unet: Any, schedule: Any, x0: torch.Tensor, rows: Sequence[tuple[str, int]], random: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the noise, or v, of pictures x0 (B, 3, S, S) in [-1, 1]; `rows` (B) as of `read_data`.

    Raises PokediffError when the model predicts something else.
    """
    device, number, size = x0.device, len(x0), x0.shape[-1]
    with torch.no_grad():
        prompts = [caption for caption, _ in rows]
        text, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        latents = pipeline.vae.encode(x0).latent_dist.sample(random) * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=random, device=device)  # (B, 4, S/8, S/8)
    timesteps = torch.randint(schedule.config.num_train_timesteps, (number,), generator=random, device=device)
    # SDXL's micro-conditioning (its section 2.2): original size, top left of the crop, target size.
    time_ids = torch.tensor([[side, side, 0, 0, size, size] for _, side in rows], device=device)  # (B, 6)
    noisy = schedule.add_noise(latents, noise, timesteps).to(text.dtype)
    conditions = {"text_embeds": pooled, "time_ids": time_ids}
    predicted = unet(noisy, timesteps, text, added_cond_kwargs=conditions, return_dict=False)[0]
    targets = {"epsilon": noise, "v_prediction": schedule.get_velocity(latents, noise, timesteps)}
    if (kind := schedule.config.prediction_type) not in targets:
        raise PokediffError(f"this SDXL predicts {kind}; only {' and '.join(targets)} can be trained")
    return F.mse_loss(predicted.float(), targets[kind])


def save(config: BaselineConfig, pipeline: Any, out: Path) -> None:
    """Write the LoRA in diffusers' format, and the configuration."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers, name = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet)), f"new-{LORA_WEIGHTS}"
    pipeline.save_lora_weights(out, unet_lora_layers=layers, weight_name=name)
    os.replace(out / name, out / LORA_WEIGHTS)
    write_config(out, config)


def preview(config: BaselineConfig, pipeline: Any, accelerator: Accelerator, out: Path, step: int) -> None:
    """Draw the validation prompt: a sheet in previews/, which the trackers get, too."""
    prompts = [config.lora.validation_prompt] * config.lora.validation_images
    generator = LoraGenerator(pipeline, config.system, picture_size(config, pipeline))
    sheet = composite(grid(generator.generate(prompts, range(len(prompts))), columns=len(prompts)))
    (out / "previews").mkdir(exist_ok=True)
    write_whole(out / "previews" / f"validation-{step:08}.png", encode_png(sheet))
    log_images(accelerator, {"validation": sheet}, step)
