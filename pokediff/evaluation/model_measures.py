"""Measures of a checkpoint itself, not of its pictures: loss by noise level, and cost."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from pokediff.config import Sampling
from pokediff.data.dataset import Pictures
from pokediff.data.images import to_model
from pokediff.evaluation.distances import Estimate, mean_estimate
from pokediff.evaluation.generators import Generated, denoisers_used
from pokediff.evaluation.report import Report
from pokediff.model.denoiser import flops_per_image
from pokediff.model.diffusion import denoising_loss, schedule_sigmas
from pokediff.model.pipeline import PokeDiffPipeline

NOISE_LEVELS = 10
PICTURES = 256  # of each set
LOSS, COST = "Loss by noise level", "Cost"


def measure_loss(
    report: Report, pipeline: PokeDiffPipeline, held_out: Pictures, training: Pictures, sampling: Sampling
) -> None:
    """Denoising loss at NOISE_LEVELS noise levels of each size that `sampling` draws, of training and of held-out
    pictures with the same noise. The gap between the two is memorised.

    At each level the denoiser is the one that draws there.
    """
    assert sampling.size is not None
    sets = {"held-out": held_out.spread(PICTURES), "training": training.spread(PICTURES)}
    curves = {}
    for size in pipeline.cascade.legs(sampling.size):
        levels = _levels(pipeline, size, sampling.fast)
        sigmas = schedule_sigmas(pipeline.scheduler)[levels].tolist()
        losses = {name: _losses(pipeline, pictures, size, levels, sampling) for name, pictures in sets.items()}
        curve: dict[str, list] = {"sigma": [round(sigma, 5) for sigma in sigmas]}
        curve |= {name: [asdict(mean_estimate(loss)) for loss in values] for name, values in losses.items()}
        curves[str(size)] = curve
        means = {name: values.mean(0) for name, values in losses.items()}
        note = f"mean over {len(levels)} noise levels, sigma {sigmas[0]:.3g} to {sigmas[-1]:.3g}"
        for name, values in means.items():
            report.add(LOSS, f"denoising loss at {size} px, {name}", mean_estimate(values), len(values), note=note)
        gap = float(means["held-out"].mean() - means["training"].mean())
        error = math.hypot(*(float(values.std() / len(values) ** 0.5) for values in means.values()))
        report.add(
            LOSS,
            f"gap at {size} px",
            Estimate(gap, gap - 1.96 * error, gap + 1.96 * error),
            " and ".join(str(len(values)) for values in means.values()),
            real=0.0,
            note="held-out less training; grows with what is memorised",
        )
    report.curves["loss"] = curves


def _levels(pipeline: PokeDiffPipeline, size: int, fast: bool) -> list[int]:
    """Timesteps, evenly spaced over those that the denoisers of `size` are used at."""
    sigmas = schedule_sigmas(pipeline.scheduler)
    used = int((sigmas < pipeline.cascade.leading(size, fast).below).sum())
    return np.linspace(0, used - 1, NOISE_LEVELS + 2).round().astype(int)[1:-1].tolist()


@torch.inference_mode()
def _losses(
    pipeline: PokeDiffPipeline, pictures: Pictures, size: int, levels: list[int], sampling: Sampling
) -> np.ndarray:
    """(levels, pictures) losses at `size` px; larger pictures are averaged down, also to what an upscaler enlarges."""
    schedule, device = DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.device
    text = pipeline.encode_prompt([several[0] for several in pictures.captions]).to(device)
    whole = to_model(torch.from_numpy(np.array(pictures.pixels[:])), pipeline.channels)
    x0 = F.avg_pool2d(whole, whole.shape[-1] // size)
    result = []
    for level, sigma in zip(levels, schedule_sigmas(schedule)[levels].tolist(), strict=True):
        denoiser = pipeline.cascade[pipeline.cascade.expert(size, sigma, sampling.fast)]
        upscale = denoiser.config.upscale
        low_res = F.avg_pool2d(x0, upscale) if upscale > 1 else None
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level))
        timesteps = torch.full((len(x0),), level)
        losses = []
        for rows in torch.arange(len(x0)).split(32):
            given = (None if values is None else values[rows].to(device) for values in (text, None, low_res))
            batch = (values[rows].to(device) for values in (x0, noise, timesteps))
            losses.append(denoising_loss(schedule, denoiser, *batch, *given))
        result.append(torch.cat(losses).double().cpu().numpy())
    return np.stack(result)


def measure_cost(
    report: Report, pipeline: PokeDiffPipeline, generated: Generated, sampling: Sampling, batch_size: int
) -> None:
    """What a picture costs on this machine."""
    section = COST
    measure_speed(report, generated, batch_size, pipeline.device)
    for name, part in denoisers_used(pipeline, sampling).items():
        denoiser, number = pipeline.cascade[name], part["evaluations"] + part["guided"]
        note = "two a step with guidance" if part["guided"] else ""
        report.add(section, f"evaluations of {name}", number, 1, note=note)
        report.add(section, f"parameters of {name}, M", sum(p.numel() for p in denoiser.parameters()) / 1e6, 1)
        report.add(section, f"GFLOP an evaluation of {name}", flops_per_image(denoiser) / 1e9, 1)
    report.add(section, "peak memory, MB", peak_memory_mb(), 1, note="of the whole process, feature networks included")


def measure_speed(report: Report, generated: Generated, batch_size: int, device: torch.device) -> None:
    note = f"median, in batches of {batch_size}, on {device}, when they were drawn"
    report.add(COST, "seconds a picture", generated.seconds_per_image, len(generated.pixels), note=note)


def peak_memory_mb() -> float | None:
    """The peak memory of this process; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
