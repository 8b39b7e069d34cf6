"""Alternatives side by side with pokediff: training steps, memory and sampling on this machine.

    pip install denoising-diffusion-pytorch
    python benchmarks/peers.py --sizes 32 64 128 --out benchmarks/results/peers.jsonl

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/peers.py --precision fp32   # an older processor

Each round visits every system once (A B C D A B C D), in one process, and the median of the rounds counts. All get bf16
autocast, unless --precision says fp32 (and channels_last, which hurts diffusers' networks and is left out there), the
same synthetic pictures, clipping, AdamW or the optimizer of their own trainer, and an average of the weights. Systems
that take text get it. Sampling is 20 steps for 16 pictures: of the peers 20 evaluations of the network, with guidance
where the system has it (two in one batch); of ours the whole pipeline. Our training at 32 px is the base's, at 64 and
128 px the upscaler's. Networks differ in size, so GFLOP and the share of this machine's measured convolution ceiling
are listed beside images/s; benchmarks/time_to_quality.py compares learning speed. Run it alone: a second load on the
cores invalidates the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from pokediff.config import TrainConfig, load_yaml
from pokediff.model.denoiser import compile_network
from pokediff.model.diffusion import denoising_loss, make_noise_schedule
from pokediff.model.pipeline import PokeDiffPipeline, quiet
from pokediff.training.build import make_denoiser
from pokediff.training.objectives import make_low_res, trained_timesteps

ROOT = Path(__file__).resolve().parent.parent
STAGES = {32: "base-32", 64: "upscaler-64", 128: "upscaler-128"}
TEXT_DIM, AUGMENT_DIM, TOKENS = 384, 3, 77
EVALUATIONS = 20  # of a sampler
BATCH = {"lucidrains": 16, "diffusers-uncond": 16, "diffusers-cond": 16}  # pokediff: as in its configuration

precision = "bf16"  # or fp32, by --precision


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


@dataclass
class System:
    """One network with what a training step and a network evaluation are for it."""

    name: str
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor], torch.Tensor]  # of clean pictures (B, 4, S, S) in [-1, 1]
    evaluate: Callable[[torch.Tensor], object]  # of noise (B, 4, S, S): network calls
    batch: int
    evaluations: int = 1
    guidance: bool = False  # each evaluation twice

    def __post_init__(self) -> None:
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.9995))

    def step(self, x0: torch.Tensor) -> None:
        with autocast():
            loss = self.loss(x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.network)


def pokediff(size: int) -> System:
    config = load_yaml(ROOT / "configs" / "pokemon.yaml", TrainConfig)
    stage, schedule = config.stages[STAGES[size]], make_noise_schedule(config.diffusion)
    network = make_denoiser(config, stage, TEXT_DIM, AUGMENT_DIM).to(memory_format=torch.channels_last)
    pipeline = PokeDiffPipeline.from_pretrained("pokediff")
    *_, last = pipeline.cascade.legs(size)
    own = 0 if last == pipeline.sizes[0] else pipeline.cascade.leading(last).config.steps  # of the upscaler

    def loss(x0: torch.Tensor) -> torch.Tensor:
        text = F.normalize(torch.randn(len(x0), TEXT_DIM), dim=1)
        timesteps = torch.randint(trained_timesteps(config, stage), (len(x0),))
        low_res = make_low_res(x0, stage, torch.Generator().manual_seed(0), len(x0), slice(None))
        return denoising_loss(schedule, network, x0, torch.randn_like(x0), timesteps, text, None, low_res).mean()

    def evaluate(x: torch.Tensor) -> object:
        """All steps from noise to pictures: the denoisers take turns, and not all are guided."""
        prompts = ["a blue water turtle"] * len(x)
        steps = EVALUATIONS - own
        return pipeline.generate(prompts, range(len(x)), size=size, num_inference_steps=steps, precision=precision)

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    return System("pokediff", network, optimizer, loss, evaluate, stage.batch_size, evaluations=EVALUATIONS)


def make_lucidrains(size: int) -> tuple[Any, torch.optim.Optimizer]:
    """GaussianDiffusion of a Unet as in its README, dim 64 and multipliers 1-2-4; Adam at 1e-4 as in its trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from denoising_diffusion_pytorch import Unet as LucidUnet

    network = LucidUnet(dim=64, dim_mults=(1, 2, 4), channels=4).to(memory_format=torch.channels_last)
    return GaussianDiffusion(network, image_size=size), torch.optim.Adam(network.parameters(), 1e-4, (0.9, 0.99))


def lucidrains(size: int) -> System:
    diffusion, optimizer = make_lucidrains(size)
    network = diffusion.model

    def evaluate(x: torch.Tensor) -> torch.Tensor:
        return network(x, torch.full((len(x),), 500))

    return System("lucidrains", network, optimizer, lambda x0: diffusion((x0 + 1) / 2), evaluate, BATCH["lucidrains"])


def diffusers_system(size: int, conditional: bool) -> System:
    """UNet2DModel as in diffusers' unconditional training example; UNet2DConditionModel at (64, 128, 256)."""
    from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

    schedule = DDPMScheduler(1000)
    network: Any
    if conditional:
        network = UNet2DConditionModel(
            sample_size=size,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(64, 128, 256),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=512,
        )
    else:
        network = UNet2DModel(
            sample_size=size,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        )
    tokens = torch.randn(1, TOKENS, 512)

    def evaluate(x: torch.Tensor, timesteps: Any = 500) -> torch.Tensor:
        extra = {"encoder_hidden_states": tokens.expand(len(x), -1, -1)} if conditional else {}
        return network(x, timesteps, **extra).sample

    def loss(x0: torch.Tensor) -> torch.Tensor:
        noise, timesteps = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        return F.mse_loss(evaluate(schedule.add_noise(x0, noise, timesteps), timesteps).float(), noise)

    name = "diffusers-cond" if conditional else "diffusers-uncond"
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    return System(name, network, optimizer, loss, evaluate, BATCH[name], guidance=conditional)


SYSTEMS: dict[str, Callable[[int], System]] = {
    "pokediff": pokediff,
    "lucidrains": lucidrains,
    "diffusers-uncond": lambda size: diffusers_system(size, conditional=False),
    "diffusers-cond": lambda size: diffusers_system(size, conditional=True),
}


def ceiling() -> float:
    """GFLOP/s of a plain 3x3 convolution forward and backward here: 256 channels, 16x16, batch 64."""
    conv = torch.nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(64, 256, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(64, 256, 16, 16).contiguous(memory_format=torch.channels_last)
    work = 3 * 2 * 64 * 256 * 256 * 9 * 16 * 16
    rates = []
    for _ in range(8):
        begin = time.perf_counter()
        with autocast():
            out = conv(x)
        out.backward(gradient.to(out.dtype))
        rates.append(work / (time.perf_counter() - begin) / 1e9)
    return max(rates)


def gflop(system: System, size: int) -> float:
    """Of one picture through the network that is trained, once."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        system.loss(torch.zeros(1, 4, size, size))
    return counter.get_total_flops() / 1e9


def compare(size: int, rounds: int, names: list[str], compiled: bool) -> list[dict[str, Any]]:
    systems = [SYSTEMS[name](size) for name in names]
    work = {system.name: gflop(system, size) for system in systems}
    if compiled:
        for system in systems:
            compile_network(system.network)
    pictures = torch.rand(64, 4, size, size) * 2 - 1
    step_s: dict[str, list[float]] = {name: [] for name in names}
    call_s: dict[str, list[float]] = {name: [] for name in names}
    peak = ceiling()
    for _ in range(rounds + 1):  # the first warms up
        for system in systems:
            x0 = pictures[: system.batch].contiguous(memory_format=torch.channels_last)
            begin = time.perf_counter()
            system.step(x0)
            step_s[system.name].append(time.perf_counter() - begin)
            x = pictures[:16].repeat(2 if system.guidance else 1, 1, 1, 1)
            begin = time.perf_counter()
            with torch.inference_mode(), autocast():
                system.evaluate(x)
            call_s[system.name].append(time.perf_counter() - begin)
        peak = max(peak, ceiling())
    rows = []
    for system in systems:
        images = system.batch / statistics.median(step_s[system.name][1:])
        rows.append(
            {
                "size": size,
                "system": system.name,
                "parameters_M": round(sum(p.numel() for p in system.network.parameters()) / 1e6, 2),
                "gflop": round(work[system.name], 2),
                "batch": system.batch,
                "training_images_per_s": round(images, 1),
                "share_of_convolution_ceiling": round(3 * work[system.name] * images / peak, 2),
                "compiled": compiled,
                "precision": precision,
                "sampling_s_per_image_20": round(
                    EVALUATIONS / system.evaluations * statistics.median(call_s[system.name][1:]) / 16, 3
                ),
                "ceiling_gflop_per_s": round(peak),
            }
        )
    return rows


def memory(name: str, size: int) -> float:
    """Peak memory in GB of a process that trains 4 steps of 16 and holds nothing else."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import peers, torch; torch.set_num_threads(2);"
        f"peers.precision = {precision!r};"
        f"s = peers.SYSTEMS[{name!r}]({size}); x = torch.rand(16, 4, {size}, {size});"
        "[s.step(x) for _ in range(4)]; print(peers.peak_gb())"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def peak_gb() -> float:
    """Of this process. Not getrusage where there is /proc: its maximum is handed down from the parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def processor() -> str:
    """Its name, and the vector instructions that it has or is held to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.environ.get('ONEDNN_MAX_CPU_ISA') or torch.backends.cpu.get_cpu_capability()}"


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="all networks, by torch.compile")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    args = parser.parse_args()
    global precision
    precision = args.precision
    quiet()
    rows = []
    for size in args.sizes:
        for row in compare(size, args.rounds, args.systems, args.compile):
            row["processor"] = processor()
            row["training_GB_batch_16"] = round(memory(row["system"], size), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
