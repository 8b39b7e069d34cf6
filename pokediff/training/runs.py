"""What a training run writes, and what it reads back to go on.

A run's folder is a pipeline folder (the newest averaged weights, fp16) with beside it

    config.yaml run.json log.jsonl     what it is and how it went
    previews/ tensorboard/             fixed prompts at chosen steps, PNG and GIF; the curves
    best/                              the pipeline with the lowest validation loss
    state/step-00012000/               what resuming needs, the newest two

Safetensors and JSON only: no pickle is ever loaded.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, is_wandb_available, on_main_process
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pokediff.config import TrainConfig, dump_yaml, from_values, plain
from pokediff.data.dataset import Pictures
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline

KEEP_STATES = 2
OVERFIT_ROWS, OVERFIT_FACTOR = 3, 1.005  # so many validations in a row that much above the lowest
FIXED_KEYS = (
    "seed",
    "text_encoder",
    "dataset",
    "model",
    "diffusion",
    "refine",
    "distill",
    "batch_size",
)  # a resumed run cannot change these
PACKAGES = ("pokediff", "torch", "diffusers", "accelerate", "transformers", "numpy")


@dataclass
class Progress:
    """How far a run has come; all of it is saved with the state."""

    step: int = 0
    images_seen: int = 0
    validation_loss: float | None = None
    best_score: float | None = None  # the lowest validation loss, or kernel distance, so far
    losses: list[tuple[int, float, float]] = field(default_factory=list)  # step, training loss, validation loss
    copying_since: int | None = None  # the step at which a quick look first found copies

    def is_best(self, score: float) -> bool:
        """Note a score; is it the lowest so far?"""
        if not math.isfinite(score) or score >= (math.inf if self.best_score is None else self.best_score):
            return False
        self.best_score = score
        return True

    def note(self, training_loss: float | None, validation_loss: float) -> None:
        """Note the two losses of this step."""
        self.validation_loss = validation_loss if math.isfinite(validation_loss) else None
        if training_loss is not None and self.validation_loss is not None:
            self.losses.append((self.step, training_loss, self.validation_loss))

    def overfitting_since(self) -> int | None:
        """The step of the lowest validation loss, when it has been clearly higher since and training loss lower."""
        if len(self.losses) < OVERFIT_ROWS + 1:
            return None
        step, training, validation = min(self.losses[:-OVERFIT_ROWS], key=lambda row: row[2])
        late = self.losses[-OVERFIT_ROWS:]
        rising = all(row[2] > OVERFIT_FACTOR * validation for row in late)
        return step if rising and sum(row[1] for row in late) < len(late) * training else None

    def loss_text(self) -> str:
        """The validation loss as people read it."""
        return "not measured" if self.validation_loss is None else f"{self.validation_loss:.4f}"


# ------------------------------------------------------------------------------------------------------------ states


def find_state(out: Path, resume: str) -> Path | None:
    """The state folder to go on from, or None for a fresh start. Raises PokediffError when `resume` cannot be done."""
    states = sorted((out / "state").glob("step-*/progress.json"))
    if resume == "never":
        if states or (out / "model_index.json").exists():
            raise PokediffError(f"{out} already holds a run: go on with --resume auto, or choose another --out")
        return None
    if resume == "auto":
        if not states and (out / "model_index.json").exists():
            raise PokediffError(f"{out} holds a model without the state to resume from: choose another --out")
        return states[-1].parent if states else None
    if not (Path(resume) / "progress.json").is_file():
        raise PokediffError(f"--resume {resume}: no state there (use auto, never, or a folder .../state/step-N)")
    return Path(resume)


def save_state(
    folder: Path,
    config: TrainConfig,
    digest: str,
    unet: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write folder/step-N whole (a temporary folder, then a rename) and delete all but the newest states."""
    target = folder / f"step-{progress.step:08}"
    temporary = folder / f".step-{progress.step:08}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    moments = {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    parts = {"unet": unet.state_dict(), "average": average.module.state_dict(), "optimizer": moments}
    for name, tensors in parts.items():
        whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(whole, temporary / f"{name}.safetensors")
    facts = {
        "config": plain(config),
        "data_sha256": digest,
        "updates": int(average.n_averaged),
        "progress": asdict(progress),
    }
    write_whole(temporary / "progress.json", json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in sorted(folder.glob("step-*"))[:-KEEP_STATES]:
        shutil.rmtree(old)


def load_state(
    folder: Path,
    config: TrainConfig,
    digest: str,
    unet: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Put a saved state into network, average and optimizer. Raises PokediffError when config or data do not fit it."""
    facts = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    before, now = plain(from_values(facts["config"], TrainConfig, str(folder))), plain(config)
    for key in FIXED_KEYS:
        if before[key] != now[key]:
            raise PokediffError(f"{folder} has {key} = {before[key]}, not {now[key]}: choose another --out")
    if facts["data_sha256"] != digest:
        raise PokediffError(f"{folder} was trained on other data than {config.data} holds now: choose another --out")
    unet.load_state_dict(load_file(folder / "unet.safetensors"))
    average.module.load_state_dict(load_file(folder / "average.safetensors"))
    average.n_averaged.fill_(facts["updates"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = int(key.split(".")[0]), key.split(".")[1]
        # The fused optimizer walks memory: moments must lie as their parameter does, channels last. And they must be
        # copies: a tensor that lives in a mapped file keeps Windows from deleting it.
        like = parameters[number] if value.ndim else value
        state.setdefault(number, {})[name] = torch.empty_like(like).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**facts["progress"])


# --------------------------------------------------------------------------------------------------------- pipelines


def publish(pipeline: PokeDiffPipeline, folder: Path, card: str) -> None:
    """Write a pipeline folder in fp16. Each file is replaced whole; the index, which makes it a pipeline, is last."""
    temporary = folder / ".pipeline.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    parts: dict[str, Any] = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
    }
    half = PokeDiffPipeline(**parts, **{name: pipeline.config[name] for name in PokeDiffPipeline.settings})
    half.save_pretrained(temporary)
    write_whole(temporary / "README.md", card)
    files = [path for path in temporary.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path.name == "model_index.json"):
        target = folder / file.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(temporary)


def model_card(config: TrainConfig, pictures: Pictures, progress: Progress) -> str:
    """README.md of a checkpoint: what it was trained on, and the figures that training measured."""
    styles = ", ".join(config.dataset.styles) if config.dataset.styles else "all"
    kind = "upscaler" if config.model.upscale > 1 else "refiner"
    base = f"\n| these are figures of its {kind} | all else is of {config.refine.base} |" if config.refine else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [pixel-art, sprites, pixel-space-diffusion]
---

# {Path(config.out or "run").name}

A text-to-sprite diffusion model in pixel space, made with pokediff:
{config.dataset.image_size} px, {config.dataset.channels}.

```python
from pokediff import PokeDiffPipeline

pipe = PokeDiffPipeline.from_pretrained("this folder")
pipe("a blue water turtle", seed=7).images[0].save("turtle.png")
```

| | |
| --- | --- |
| data | {len(pictures)} pictures, styles: {styles}; sha256 {pictures.digest[:16]} |
| split | by family; validation and test families were not trained on |
| trained | {progress.step} steps, {progress.images_seen:,} pictures drawn |
| validation loss | {progress.loss_text()} ({config.diffusion.prediction_type}, averaged weights) |
| text encoder | {config.text_encoder} |{base}

A model may resemble what it was trained on: whose pictures those were, and what that allows, is a question for the
person who uses it.
"""


# --------------------------------------------------------------------------------------------- what is told and logged


def describe(out: Path, config: TrainConfig, accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """config.yaml and run.json: what is run, with what, on what."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        **facts,
        "seed": config.seed,
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }
    write_whole(out / "config.yaml", dump_yaml(config))
    write_whole(out / "run.json", json.dumps(facts, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this file lies in, if it lies in one."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def start_trackers(accelerator: Accelerator, out: Path, config: TrainConfig, step: int) -> None:
    """log.jsonl, TensorBoard and, if asked, Weights & Biases; rows after `step` are made again and so dropped."""
    trackers: list[GeneralTracker] = [
        JsonLinesTracker(out / "log.jsonl", step),
        TensorBoardTracker("tensorboard", logging_dir=out, purge_step=step),
    ]
    if config.wandb:
        if not is_wandb_available():
            raise PokediffError("wandb is not installed: pip install wandb")
        trackers.append(WandBTracker("pokediff", name=out.name, dir=str(out)))
    accelerator.log_with = trackers
    accelerator.init_trackers("pokediff")


class JsonLinesTracker(GeneralTracker):
    """One JSON object a line: {"step": 20, "loss": ...}."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path = path
        if path.exists():
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_whole(path, "".join(row + "\n" for row in rows))

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        """config.yaml holds it already."""

    @on_main_process
    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # cut short when the run was killed
