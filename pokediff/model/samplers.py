"""Samplers: diffusers schedulers by name, and where in their steps a drawing starts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from pokediff.config import Sampler
from pokediff.errors import PokediffError, first_line

# name: a diffusers scheduler and the changes to its configuration. A new sampler is a new line.
SAMPLERS: dict[Sampler, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
}

# The classes that fit by hand as `pipe.scheduler`; tests/test_diffusion.py tries every scheduler of diffusers.
SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in """DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep
    EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete SASolver TCD
    UniPCMultistep""".split()
)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise PokediffError for a scheduler that is not of SCHEDULERS: one that does not solve this noise schedule (flow
    matching, EDM's, inverse ones), that cannot start in the middle of it, or that needs a network of another kind.
    """
    if not {kind.__name__ for kind in type(scheduler).__mro__} & SCHEDULERS:
        raise PokediffError(
            f"{type(scheduler).__name__} cannot draw with this model; schedulers: {', '.join(sorted(SCHEDULERS))}"
        )


def make_scheduler(own: SchedulerMixin, sampler: Sampler | None, steps: int, device: torch.device) -> SchedulerMixin:
    """A fresh scheduler with `steps` steps and the noise schedule of `own`: `sampler`, or one of the class of `own`.

    Raises PokediffError for an unknown sampler, and a number of steps outside 1 to num_train_timesteps or too many for
    the scheduler.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise PokediffError(f"unknown sampler {sampler!r}; samplers: {', '.join(SAMPLERS)}")
    total = own.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise PokediffError(f"num_inference_steps must be 1 to {total}, not {steps}")
    kind, changes = SAMPLERS[sampler] if sampler else (type(own), {})
    scheduler = kind.from_config(own.config, **{"prediction_type": "v_prediction", **changes})
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:  # TCD has at most 50 steps
        raise PokediffError(f"{kind.__name__}: {steps} steps cannot be used ({first_line(error)})") from None
    return scheduler


def sampler_name(scheduler: SchedulerMixin) -> Sampler | None:
    """The name in SAMPLERS of a scheduler; None for another one, or one configured otherwise."""
    for name, (kind, changes) in SAMPLERS.items():
        if type(scheduler) is kind and all(scheduler.config.get(key) == value for key, value in changes.items()):
            return name
    return None


def skipped_steps(scheduler: SchedulerMixin, strength: float) -> int:
    """How many timesteps are skipped when the fraction `strength` of the schedule is run; one step at least is run."""
    order = scheduler.order  # heun: two timesteps a step, and it must begin with the first of the two
    steps = -(-len(scheduler.timesteps) // order)
    return order * (steps - max(1, round(strength * steps)))


def first_x(
    scheduler: SchedulerMixin, noise: torch.Tensor, image: torch.Tensor | None, skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first x, at the scale that the scheduler keeps, and the timesteps to run: from pure noise, or from an image
    with noise when timesteps are skipped. noise and image (B, C, H, W).
    """
    if image is None or not skipped:
        return noise * scheduler.init_noise_sigma, scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    timesteps = scheduler.timesteps[skipped:]
    return scheduler.add_noise(image, noise, timesteps[:1].repeat(len(noise))), timesteps


def to_v(x0: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The v of x0, alpha noise - std x0 (Salimans & Ho 2022): schedulers receive it, since some do not support x0."""
    alpha, std = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    return (alpha * x - x0) / std


def slerp(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """Spherical interpolation, picture by picture (N, ...): interpolated noise keeps its variance, which linear
    interpolation would reduce (White 2016, "Sampling Generative Networks", section 2.1). share 0 to 1.
    """
    a, b = start.flatten(1), end.flatten(1)
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    near = angle < 1e-4  # nearly equal: linear
    sine = torch.where(near, torch.ones_like(angle), angle.sin())
    left = torch.where(near, torch.full_like(angle, 1 - share), ((1 - share) * angle).sin() / sine)
    right = torch.where(near, torch.full_like(angle, share), (share * angle).sin() / sine)
    return (left * a + right * b).view_as(start)
