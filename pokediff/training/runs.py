"""What a training run writes, and what it reads back to resume.

A run's folder is a pipeline folder (the newest averaged weights, fp16) with beside it

    config.yaml run.json log.jsonl       the configuration, facts of machine and stages, the curves
    previews/ tensorboard/               fixed prompts at chosen steps, PNG and GIF; the curves again
    best/                                the weights with the lowest validation loss, as a part of this checkpoint
    state/base-32/step-00012000/         what resuming a stage needs, the newest two

Safetensors and JSON only: no pickle is ever loaded.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, is_wandb_available, on_main_process
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pokediff.config import TrainConfig, dump_yaml, from_values, plain
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade, write_list
from pokediff.model.checkpoint import INDEX
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.text import ClipTextEncoder, load_text_encoder

KEEP_STATES = 2
OVERFIT_ROWS, OVERFIT_FACTOR = 3, 1.005  # so many validations in a row that much above the lowest
# What a resumed stage cannot change.
FIXED_KEYS = ("seed", "text_encoder", "dataset", "diffusion")
FIXED_STAGE_KEYS = ("image_size", "model", "styles", "distill", "fast", "batch_size", "low_res_noise")
PACKAGES = ("pokediff", "torch", "diffusers", "accelerate", "transformers", "numpy")


@dataclass
class Progress:
    """How far a stage has come; all of it is saved with the state."""

    step: int = 0
    images_seen: int = 0
    validation_loss: float | None = None
    best_score: float | None = None  # the lowest validation loss, or kernel distance, so far
    losses: list[tuple[int, float, float]] = field(default_factory=list)  # step, training loss, validation loss
    copying_since: int | None = None  # the step at which the metrics first found copies
    training_loss: float | None = None  # of the last log line

    def is_best(self, score: float) -> bool:
        """Record a score; whether it is the lowest so far."""
        if not math.isfinite(score) or score >= (math.inf if self.best_score is None else self.best_score):
            return False
        self.best_score = score
        return True

    def note(self, training_loss: float | None, validation_loss: float) -> None:
        """Record the two losses of this step."""
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
        """The validation loss for people."""
        return "not measured" if self.validation_loss is None else f"{self.validation_loss:.4f}"

    def facts(self) -> dict[str, Any]:
        """What the run's report of its stages says."""
        return {"steps": self.step, "images_seen": self.images_seen, "validation_loss": self.validation_loss}


# ------------------------------------------------------------------------------------------------------------ states


def states(out: Path, name: str) -> list[Path]:
    """The state folders of a stage, oldest first."""
    return [path.parent for path in sorted((out / "state" / name).glob("step-*/progress.json"))]


def find_state(out: Path, name: str, resume: str) -> Path | None:
    """The state folder from which a stage resumes, or None to start. A path resumes only the stage that it is of.

    Raises PokediffError when there is no state in that path.
    """
    if resume in ("auto", "never"):
        found = states(out, name) if resume == "auto" else []
        return found[-1] if found else None
    folder = Path(resume)
    if not (folder / "progress.json").is_file():
        raise PokediffError(f"--resume {resume}: no state there (use auto, never, or a folder .../state/STAGE/step-N)")
    return folder if folder.resolve().parent.name == name else find_state(out, name, "auto")


def is_finished(out: Path, name: str, max_steps: int) -> bool:
    """Whether a stage was trained for `max_steps`, or stopped because it copied."""
    facts = read_facts(out).get("stages", {}).get(name, {})
    return bool(facts.get("finished")) and (facts["finished"] == "copies" or facts["steps"] >= max_steps)


def save_state(
    out: Path,
    config: TrainConfig,
    name: str,
    digest: str,
    denoiser: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write out/state/NAME/step-N whole (a temporary folder, then a rename) and delete all but the newest states."""
    folder = out / "state" / name
    target = folder / f"step-{progress.step:08}"
    temporary = folder / f".step-{progress.step:08}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    moments = {
        f"{number}.{moment}": value
        for number, values in optimizer.state_dict()["state"].items()
        for moment, value in values.items()
    }
    parts = {"denoiser": denoiser.state_dict(), "average": average.module.state_dict(), "optimizer": moments}
    for part, tensors in parts.items():
        whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(whole, temporary / f"{part}.safetensors")
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
    name: str,
    digest: str,
    denoiser: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Load a saved state into denoiser, average and optimizer. Raises PokediffError when config or data differ."""
    facts = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    before, now = plain(from_values(facts["config"], TrainConfig, str(folder))), plain(config)
    pairs = [(key, before[key], now[key]) for key in FIXED_KEYS]
    if name not in before["stages"]:
        raise PokediffError(f"{folder} is no state of a stage {name}")
    pairs += [
        (f"stages.{name}.{key}", before["stages"][name][key], now["stages"][name][key]) for key in FIXED_STAGE_KEYS
    ]
    for key, was, wanted in pairs:
        if was != wanted:
            raise PokediffError(f"{folder} has {key} = {was}, not {wanted}: choose another --out")
    if facts["data_sha256"] != digest:
        raise PokediffError(f"{folder} was trained on other data than {' '.join(config.data)}: choose another --out")
    denoiser.load_state_dict(load_file(folder / "denoiser.safetensors"))
    average.module.load_state_dict(load_file(folder / "average.safetensors"))
    average.n_averaged.fill_(facts["updates"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, moment = int(key.split(".")[0]), key.split(".")[1]
        # The fused optimizer walks memory: moments must lie as their parameter does, channels last. And they must be
        # copies: a tensor that lives in a mapped file keeps Windows from deleting it.
        like = parameters[number] if value.ndim else value
        state.setdefault(number, {})[moment] = torch.empty_like(like).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**facts["progress"])


# --------------------------------------------------------------------------------------------------------- pipelines


def new_pipeline(cascade: Cascade, schedule: DDPMScheduler, config: TrainConfig) -> PokeDiffPipeline:
    """A pipeline of these denoisers. Only the built-in text encoder is part of it; others are loaded by name."""
    encoder = load_text_encoder(config.text_encoder) if config.text_encoder == "builtin" else None
    model, tokenizer = (encoder.model, encoder.tokenizer) if isinstance(encoder, ClipTextEncoder) else (None, None)
    sampler = DPMSolverMultistepScheduler.from_config(schedule.config)
    return PokeDiffPipeline(cascade, sampler, model, tokenizer, config.text_encoder, config.pixel_art)


def publish(pipeline: PokeDiffPipeline, out: Path, name: str, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Write the denoiser `name` in fp16, and what is not there yet of the checkpoint around it: all of it, or, for a
    run with a `base`, the place of the base. Each file is replaced whole; the index, which makes it a checkpoint, last.
    """
    if config.base is not None:
        base = os.path.relpath(config.base, out) if Path(config.base).is_dir() else config.base
        publish_part(pipeline, out, name, base)
    else:
        others = {key: part for key, part in pipeline.components.items() if key != "cascade"}
        settings = {key: pipeline.config[key] for key in PokeDiffPipeline.settings}
        there = {path.parent.name for path in (out / "cascade").glob("*/config.json")}
        written = {key: part for key, part in pipeline.cascade.items() if key == name or key not in there}
        cascade = Cascade({key: _half(part) for key, part in written.items()})
        whole = PokeDiffPipeline(cascade, **{key: _half(part) for key, part in others.items()}, **settings)
        _replace(out, whole.save_pretrained, list(pipeline.cascade))
    report = read_facts(out)
    report.setdefault("stages", {})[name] = facts
    write_facts(out, report)
    write_whole(out / "README.md", model_card(config, report["stages"]))


def publish_part(pipeline: PokeDiffPipeline, folder: Path, name: str, base: str) -> None:
    """Write the denoiser `name` in fp16 as a part of the checkpoint `base`, a path relative to `folder`."""
    index = folder / "cascade" / "config.json"
    listed = json.loads(index.read_text(encoding="utf-8"))["denoisers"] if index.is_file() else []
    half = PokeDiffPipeline(Cascade({name: _half(pipeline.cascade[name])}), pipeline.scheduler)
    _replace(folder, lambda target: half.save_part(target, [name], base), list(dict.fromkeys([*listed, name])))


def _half(part: Any) -> Any:
    return copy.deepcopy(part).half() if isinstance(part, nn.Module) else part


def _replace(folder: Path, save: Callable[[Path], Any], denoisers: list[str]) -> None:
    """Save into a temporary folder, list `denoisers` as the cascade, then move every file to its place."""
    temporary = folder / ".pipeline.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    write_list(temporary / "cascade", denoisers)
    files = [path for path in temporary.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: (path.name == INDEX, path.parent.name == "cascade")):
        target = folder / file.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(temporary)


def model_card(config: TrainConfig, stages: dict[str, dict[str, Any]]) -> str:
    """README.md of a checkpoint: what it was trained on, and the figures that training measured."""
    styles = ", ".join(config.dataset.styles) if config.dataset.styles else "all"
    rows = "\n".join(
        f"| {name} | {facts['parameters'] / 1e6:.1f} M | {facts['training_pictures']} | {facts['steps']} | "
        f"{facts['images_seen']:,} | "
        + ("not measured" if facts["validation_loss"] is None else f"{facts['validation_loss']:.4f}")
        + " |"
        for name, facts in stages.items()
    )
    base = f"\nThese denoisers belong to the cascade of {config.base}.\n" if config.base else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [pixel-art, sprites, pixel-space-diffusion]
---

# {Path(config.out or "run").name}

A text-to-sprite diffusion model in pixel space: a cascade of denoisers, made with pokediff.

```python
from pokediff import PokeDiffPipeline

pipe = PokeDiffPipeline.from_pretrained("this folder")
pipe("a blue water turtle", seed=7).images[0].save("turtle.png")
```

| denoiser | parameters | training pictures | steps | pictures seen | validation loss |
| --- | --- | --- | --- | --- | --- |
{rows}
{base}
Styles: {styles}. Text encoder: {config.text_encoder}. Data are split by family; validation and test families were not
trained on. The loss is that of v, of the averaged weights.

A model may resemble its training pictures. Whose pictures those were, and what that allows, is for its user to check.
"""


# ------------------------------------------------------------------------------------------------- facts and curves


def describe(out: Path, config: TrainConfig, accelerator: Accelerator) -> None:
    """config.yaml and run.json: the configuration, and what it runs on."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        **read_facts(out),
        "data": list(config.data),
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
    write_facts(out, facts)


def read_facts(out: Path) -> dict[str, Any]:
    """run.json, {} where there is none."""
    path = out / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_facts(out: Path, facts: dict[str, Any]) -> None:
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


def start_trackers(accelerator: Accelerator, out: Path, config: TrainConfig) -> None:
    """log.jsonl, TensorBoard and, with wandb, Weights & Biases. Values are named STAGE/VALUE."""
    trackers: list[GeneralTracker] = [JsonLinesTracker(out / "log.jsonl")]
    trackers.append(TensorBoardTracker("tensorboard", logging_dir=out))
    if config.wandb:
        if not is_wandb_available():
            raise PokediffError("wandb is not installed: pip install wandb")
        trackers.append(WandBTracker("pokediff", name=out.name, dir=str(out)))
    accelerator.log_with = trackers
    accelerator.init_trackers("pokediff")


def drop_rows(path: Path, stage: str, step: int) -> None:
    """Remove from log.jsonl the rows of a stage after `step`, which are made again, and rows cut short by a kill."""
    if path.exists():
        rows = [row for row in path.read_text(encoding="utf-8").splitlines() if _kept(row, stage, step)]
        write_whole(path, "".join(row + "\n" for row in rows))


def _kept(line: str, stage: str, step: int) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] != stage or row["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


class JsonLinesTracker(GeneralTracker):
    """One JSON object a line: {"stage": "base-32", "step": 20, "loss": ...}."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        """config.yaml holds it."""

    @on_main_process
    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        stage = next(iter(values)).partition("/")[0]
        row = {"stage": stage, "step": step, **{name.partition("/")[2]: value for name, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
