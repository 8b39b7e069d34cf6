"""Minutes until pokediff's base denoises as well as lucidrains' Unet after an hour. Both curves in one plot.

    pip install denoising-diffusion-pytorch matplotlib
    python benchmarks/time_to_quality.py --system lucidrains --minutes 60 --data DATA
    python benchmarks/time_to_quality.py --system pokediff   --minutes 10 --data DATA
    python benchmarks/time_to_quality.py --plot

The same pictures (stage base-32 of configs/pokemon.yaml), batches and held-out families; lucidrains' Unet with the
defaults of its own trainer (batch 16, Adam 1e-4, average .995 every 10 steps, sigmoid schedule, v), plus bf16 and
channels_last. Common metric: mean squared error of the predicted x0 at fixed noise levels, the geometric mean over
them. lucidrains' Unet takes no text, so pokediff is measured without prompts, and also with them. A minute is a minute
of processor time divided by the number of threads, so other load on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import make_lucidrains
from torch.optim.swa_utils import AveragedModel

from pokediff.config import TrainConfig, load_yaml
from pokediff.data.dataset import Pictures, TrainingBatches, caption_vectors, load_pictures
from pokediff.data.images import to_model
from pokediff.model.diffusion import cosine_timestep, denoising_loss, make_noise_schedule
from pokediff.training.build import ema_with_warmup, make_denoiser, make_optimizer
from pokediff.training.launch import threads_per_process
from pokediff.training.objectives import trained_timesteps

ROOT = Path(__file__).resolve().parent.parent
STAGE = "base-32"
SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0)
Predict = Callable[[torch.Tensor, float, torch.Tensor | None], torch.Tensor]  # (x of unit variance, sigma, text): x0


@torch.inference_mode()
def denoising_error(predict: Predict, pictures: Pictures, text: torch.Tensor | None) -> dict[str, float]:
    """Error of x0 at each sigma on 256 held-out pictures, always the same noise, and their geometric mean."""
    x0 = to_model(torch.from_numpy(pictures.pixels[:]), "rgba")
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    errors = {}
    for sigma in SIGMAS:
        alpha = 1 / (1 + sigma**2) ** 0.5
        total = 0.0
        for start in range(0, len(x0), 64):
            part = slice(start, start + 64)
            x = (alpha * (x0[part] + sigma * noise[part])).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                guess = predict(x, sigma, None if text is None else text[part]).float()
            total += ((guess.clamp(-1, 1) - x0[part]) ** 2).mean(dim=(1, 2, 3)).sum().item()
        errors[f"sigma_{sigma}"] = total / len(x0)
    return {**errors, "geometric_mean": math.exp(np.mean([math.log(error) for error in errors.values()]))}


def v_predictor(network: Any, alphas_cumprod: torch.Tensor) -> Predict:
    """x0 from a network that predicts v, at the timestep whose sigma is nearest."""
    log_sigmas = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).log() / 2

    def predict(x: torch.Tensor, sigma: float, text: torch.Tensor | None) -> torch.Tensor:
        timestep = (log_sigmas - math.log(sigma)).abs().argmin().repeat(len(x))
        alpha, std = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        return alpha * x - std * network(x, timestep)

    return predict


class Ours:
    """The stage base-32 of the shipped recipe, its learning rate decaying to zero within the given minutes."""

    def __init__(self, config: TrainConfig, batches: TrainingBatches, text_dim: int) -> None:
        self.config, self.stage, self.batches, self.done = config, config.stages[STAGE], batches, 0
        self.network = make_denoiser(config, self.stage, text_dim, batches.augment_dim)
        self.network.null_text.copy_(batches.vectors.table[0])
        self.network = self.network.to(memory_format=torch.channels_last)
        self.average = AveragedModel(self.network, multi_avg_fn=ema_with_warmup(0.999))
        self.schedule = make_noise_schedule(config.diffusion)
        self.optimizer = make_optimizer(self.network, self.stage)

    def predict(self, x: torch.Tensor, sigma: float, text: torch.Tensor | None) -> torch.Tensor:
        denoiser, diffusion = self.average.module, self.config.diffusion
        timestep = cosine_timestep(sigma, diffusion.num_train_timesteps, *diffusion.range)
        text = denoiser.null_text.expand(len(x), -1) if text is None else text
        return denoiser(x, torch.full((len(x),), timestep), text)

    def step(self, share: float) -> None:
        """One optimizer step, after the fraction `share` of the time."""
        rate = self.stage.learning_rate * min(1, (self.done + 1) / 100) * (1 - share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batches[self.done]
        x0 = to_model(batch.pixels, "rgba")
        timesteps = torch.randint(trained_timesteps(self.config, self.stage), (len(x0),))
        with torch.autocast("cpu", torch.bfloat16):
            condition = (batch.text, batch.augment)
            loss = denoising_loss(self.schedule, self.network, x0, torch.randn_like(x0), timesteps, *condition).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.stage.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.network)
        self.done += 1


class Lucidrains:
    """The steps of its Trainer, without sampling and saving."""

    def __init__(self, config: TrainConfig, batches: TrainingBatches, text_dim: int) -> None:
        from ema_pytorch import EMA

        self.batches, self.done = batches, 0
        self.diffusion, self.optimizer = make_lucidrains(config.stages[STAGE].image_size)
        self.average = EMA(self.diffusion, beta=0.995, update_every=10)

    def predict(self, x: torch.Tensor, sigma: float, text: torch.Tensor | None) -> torch.Tensor:
        averaged = self.average.ema_model
        return v_predictor(averaged.model, averaged.alphas_cumprod)(x, sigma, text)

    def step(self, share: float) -> None:
        x0 = to_model(self.batches[self.done].pixels, "rgba")
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.diffusion((x0 + 1) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.done += 1


def measure(name: str, minutes: float, every: float, data: str, out: Path) -> None:
    """Train for `minutes` and measure the held-out error every `every` minutes. Writes OUT/<name>.jsonl."""
    config = load_yaml(ROOT / "configs" / "pokemon.yaml", TrainConfig)
    stage = config.stages[STAGE]
    batch_size = stage.batch_size if name == "pokediff" else 16
    dataset = config.dataset if name == "pokediff" else replace(config.dataset, flip=0.5, shift=0.0)  # its own flips
    dataset = replace(dataset, styles=stage.styles or dataset.styles)
    pictures = load_pictures(data, stage.image_size, dataset, report=lambda _: None)
    train = pictures.split("train").with_shared_captions()
    held_out = pictures.split("validation").spread(256)
    vectors, held_out_vectors = (caption_vectors(data, part, "builtin") for part in (train, held_out))
    text = held_out_vectors.table[[rows[0] for rows in held_out_vectors.rows]]
    torch.manual_seed(0)
    batches = TrainingBatches(train, vectors, dataset, batch_size=batch_size, caption_dropout=0.15, seed=0)
    system: Any = (Ours if name == "pokediff" else Lucidrains)(config, batches, vectors.table.shape[1])
    out.mkdir(parents=True, exist_ok=True)
    used, next_look, threads = 0.0, every, torch.get_num_threads()
    with (out / f"{name}.jsonl").open("w") as file:
        while used < 60 * minutes:
            begin = time.process_time()
            system.step(used / (60 * minutes))
            used += (time.process_time() - begin) / threads
            if used >= 60 * next_look or used >= 60 * minutes:
                row: dict[str, Any] = {"system": name, "minutes": round(used / 60, 2), "threads": threads}
                row |= {"steps": system.done, "images": system.done * batch_size}
                row |= denoising_error(system.predict, held_out, None)
                if name == "pokediff":
                    with_text = denoising_error(system.predict, held_out, text)
                    row["with_prompts"] = with_text["geometric_mean"]
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(json.dumps(row), flush=True)
                next_look += every


def plot(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {path.stem: [json.loads(line) for line in path.open()] for path in sorted(out.glob("*.jsonl"))}
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, rows in curves.items():
        axes.plot([row["minutes"] for row in rows], [row["geometric_mean"] for row in rows], label=name)
    goal = curves["lucidrains"][-1]["geometric_mean"]
    axes.axhline(goal, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel=f"minutes on {curves['lucidrains'][-1]['threads']} core(s)", ylabel="held-out error of x0", yscale="log"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "time_to_quality.png", dpi=120)
    reached = next((row["minutes"] for row in curves["pokediff"] if row["geometric_mean"] <= goal), None)
    hour = curves["lucidrains"][-1]["minutes"]
    print(json.dumps({"lucidrains_minutes": hour, "lucidrains_error": round(goal, 5), "pokediff_minutes": reached}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("pokediff", "lucidrains"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--every", type=float, default=1, help="minutes between two measurements (default: %(default)s)"
    )
    parser.add_argument("--data", default="data/bulbapedia")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    parser.add_argument("--threads", type=int, default=threads_per_process())
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.system:
        measure(args.system, args.minutes, args.every, args.data, args.out)
    if args.plot:
        plot(args.out)


if __name__ == "__main__":
    main()
