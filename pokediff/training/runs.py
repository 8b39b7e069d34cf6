"""Files of a training run: states, checkpoints, logs, model card.

A run's folder is a pipeline folder (the newest averaged weights, fp16) with beside it

    config.yaml run.json log.jsonl       the configuration, facts of machine and stages, the curves
    words.json ATTRIBUTION.md            words that the training pictures share, and whose pictures they are
    previews/ tensorboard/               fixed prompts at chosen steps, PNG and GIF, and pairs of real and drawn
                                         pictures, PNG; curves and previews again
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
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, is_wandb_available
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from pokediff import __version__
from pokediff.config import TrainConfig, dump_yaml, from_values, plain
from pokediff.data.vocabulary import (
    ATTRIBUTION,
    FEWEST_PICTURES,
    Words,
    attribution,
    read_words,
    word_list,
    write_words,
)
from pokediff.errors import PokediffError, first_line
from pokediff.files import move_whole, new_folder, read_json, read_text, write_whole
from pokediff.model.cascade import LIST, Cascade, write_list
from pokediff.model.checkpoint import INDEX, find_folder, write_part_index
from pokediff.training.launch import machines

if TYPE_CHECKING:
    from pokediff.training.build import Run, Stage

FACTS = "run.json"
KEEP_STATES = 2
PARTS = ("denoiser", "average", "optimizer")  # files of a state
OVERFIT_ROWS, OVERFIT_FACTOR = 3, 1.005  # consecutive validations, and their factor above the lowest loss
# Settings that a resumed stage cannot change.
FIXED_KEYS = ("seed", "text_encoder", "dataset", "diffusion")
FIXED_STAGE_KEYS = ("image_size", "model", "styles", "distill", "preference", "fast", "batch_size", "low_res_noise")
PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "numpy")


@dataclass
class Progress:
    """The progress of a stage, saved with its state."""

    step: int = 0
    images_seen: int = 0
    validation_loss: float | None = None
    best_score: float | None = None  # the lowest validation loss, or kernel distance, so far
    # step, training loss (None before the first log line), validation loss
    losses: list[tuple[int, float | None, float]] = field(default_factory=list)
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
        if self.validation_loss is not None:
            self.losses.append((self.step, training_loss, self.validation_loss))

    def overfitting_since(self) -> int | None:
        """The step of the lowest validation loss, when it has been clearly higher since and training loss lower."""
        rows = [(step, training, validation) for step, training, validation in self.losses if training is not None]
        if len(rows) < OVERFIT_ROWS + 1:
            return None
        step, training, validation = min(rows[:-OVERFIT_ROWS], key=lambda row: row[2])
        late = rows[-OVERFIT_ROWS:]
        rising = all(row[2] > OVERFIT_FACTOR * validation for row in late)
        return step if rising and sum(row[1] for row in late) < len(late) * training else None

    def is_out_of(self, patience: int | None, every: int) -> bool:
        """Whether `patience` validations followed that of the lowest validation loss.

        Only those at multiples of `every` steps count: a run that is stopped and resumed validates once more, and must
        end at the same step as one that is not.
        """
        losses = [validation for step, _, validation in self.losses if step % every == 0]
        return patience is not None and losses != [] and len(losses) - 1 - losses.index(min(losses)) >= patience


def loss_text(loss: float | None) -> str:
    """A validation loss as text."""
    return "not measured" if loss is None else f"{loss:.4f}"


# ------------------------------------------------------------------------------------------------------------ states


def states(out: Path, name: str) -> list[Path]:
    """The state folders of a stage, oldest first."""
    return [path.parent for path in sorted((out / "state" / name).glob("step-*/progress.json"))]


def damage_of(state: Path) -> str:
    """What is wrong with a state, "" for a whole one."""
    try:
        if not isinstance(read_json(state / "progress.json"), dict):
            return "progress.json"
        for part in PARTS:
            if not (state / f"{part}.safetensors").is_file():
                return f"{part}.safetensors not found"
            with safe_open(state / f"{part}.safetensors", "pt") as file:  # compares its header with its length
                file.keys()
    except (OSError, PokediffError, SafetensorError) as error:
        return first_line(error)
    return ""


def set_aside_damaged(out: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Rename states that were cut, by a full disk or a loss of power, so that the next older one is used."""
    for name in names:
        for state in states(out, name):
            if damage := damage_of(state):
                aside = new_folder(state.with_name(f"damaged-{state.name}"))
                state.replace(aside / state.name)
                say(f"{name}: {state} is damaged ({damage}), set aside as {aside}; the state before it is used")


def find_states(out: Path, names: Sequence[str], resume: str) -> dict[str, Path | None]:
    """The state folder from which each stage resumes, None to start. With a path the stage that it is of resumes there,
    the others as with "auto".

    Raises PokediffError when the path holds no state of one of these stages.
    """
    found: dict[str, Path | None] = dict.fromkeys(names)
    if resume != "never":
        found = {name: next(reversed(states(out, name)), None) for name in names}
    if resume not in ("never", "auto"):
        name = Path(resume).resolve().parent.name
        if not (Path(resume) / "progress.json").is_file() or name not in found:
            raise PokediffError(
                f"--resume {resume}: no state of {' or '.join(names)} there (use auto, never, or a folder "
                ".../state/STAGE/step-N)"
            )
        found[name] = Path(resume)
    return found


def steps_of(state: Path | None) -> int:
    """The step at which a state was saved."""
    return int(state.resolve().name.removeprefix("step-")) if state else 0


def is_finished(out: Path, name: str, config: TrainConfig) -> bool:
    """Whether a stage was trained for its `max_steps`, or stopped because it copied or its `patience` ended."""
    facts, patience = read_facts(out).get("stages", {}).get(name, {}), config.stages[name].patience
    if facts.get("finished") == "copies":
        return config.metrics.early_stop
    if facts.get("finished") == "patience" and patience is not None and patience <= facts["patience"]:
        return True
    return bool(facts.get("finished")) and facts["steps"] >= config.stages[name].max_steps


def begin(run: Run, stage: Stage) -> None:
    """Remove files of an earlier training of the stage from steps after the one at which this training begins."""
    report, step = read_facts(run.out), stage.progress.step
    facts = report.setdefault("stages", {}).pop(stage.name, {})
    if step:
        report["stages"][stage.name] = {key: value for key, value in facts.items() if key != "finished"}
    write_facts(run.out, report)
    if not step or facts.get("data_sha256") != stage.facts["data_sha256"]:
        describe_pictures(run, stage)  # takes 15 s for a million
    for state in states(run.out, stage.name):
        if steps_of(state) > step:
            _remove(state)
    for left in (run.out / "state" / stage.name).glob(".step-*"):
        shutil.rmtree(left)
    log = run.out / "log.jsonl"
    if log.exists():
        rows = [row for row in log.read_text(encoding="utf-8").splitlines() if _kept(row, stage.name, step)]
        write_whole(log, "".join(row + "\n" for row in rows))


def save_state(run: Run, stage: Stage) -> None:
    """Write out/state/NAME/step-N whole (a temporary folder, then a rename) and delete all but the newest states."""
    target = run.out / "state" / stage.name / f"step-{stage.progress.step:08}"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parts = {
        "denoiser": stage.denoiser.state_dict(),
        "average": stage.average.module.state_dict(),
        "optimizer": moments(stage.optimizer),
    }
    if stage.critic:
        parts |= {"critic": stage.critic.critic.state_dict(), "critic-optimizer": moments(stage.critic.optimizer)}
    facts = {
        "config": plain(run.config),
        "data_sha256": stage.facts["data_sha256"],
        "updates": int(stage.average.n_averaged),
        "progress": asdict(stage.progress),
    }
    try:
        for part, tensors in parts.items():
            whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
            write_whole(temporary / f"{part}.safetensors", save(whole))
        write_whole(temporary / "progress.json", json.dumps(facts, indent=2) + "\n")
    except OSError:  # a full disk needs its space back
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        _remove(target)
    temporary.rename(target)
    for old in states(run.out, stage.name)[:-KEEP_STATES]:
        _remove(old)


def _remove(folder: Path) -> None:
    """Delete a state. The rename first keeps an interrupted deletion from leaving an incomplete state."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def load_state(run: Run, stage: Stage, folder: Path) -> None:
    """Load a saved state into a stage. Raises PokediffError when configuration or data differ."""
    if damage := damage_of(folder):
        raise PokediffError(f"{folder} is damaged ({damage}): resume from another state, or with --resume auto")
    facts = read_json(folder / "progress.json")
    before, now = plain(from_values(facts["config"], TrainConfig, str(folder))), plain(run.config)
    here = f"stages.{stage.name}"
    pairs = [(key, before[key], now[key]) for key in FIXED_KEYS]
    old, new = (config["stages"][stage.name] for config in (before, now))
    pairs += [(f"{here}.{key}", old[key], new[key]) for key in FIXED_STAGE_KEYS]
    for key, was, wanted in pairs:
        if was != wanted:
            raise PokediffError(f"{folder} has {key} = {was}, not {wanted}: choose another --out")
    if facts["data_sha256"] != stage.facts["data_sha256"]:
        data = " ".join(run.config.data)
        raise PokediffError(f"{folder} was trained on other data than {data}: choose another --out")
    stage.denoiser.load_state_dict(load_file(folder / "denoiser.safetensors"))
    stage.average.module.load_state_dict(load_file(folder / "average.safetensors"))
    stage.average.n_averaged.fill_(facts["updates"])
    load_moments(stage.optimizer, load_file(folder / "optimizer.safetensors"))
    if stage.critic and (folder / "critic.safetensors").is_file():  # a critic may begin at any step
        stage.critic.critic.load_state_dict(load_file(folder / "critic.safetensors"))
        load_moments(stage.critic.optimizer, load_file(folder / "critic-optimizer.safetensors"))
    stage.progress = Progress(**facts["progress"])


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimizer as plain tensors, "<number of the parameter>.<moment>"."""
    return {
        f"{number}.{moment}": value
        for number, values in optimizer.state_dict()["state"].items()
        for moment, value in values.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load what `moments` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, moment = int(key.split(".")[0]), key.split(".")[1]
        # The fused optimizer walks memory: moments must lie as their parameter does, channels last. And they must be
        # copies: a tensor that lives in a mapped file keeps Windows from deleting it.
        like = parameters[number] if value.ndim else value
        state.setdefault(number, {})[moment] = torch.empty_like(like).copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# --------------------------------------------------------------------------------------------------------- pipelines


def publish(run: Run, stage: Stage) -> None:
    """Write the stage's averaged denoiser in fp16 into the run's folder: the first time with the whole checkpoint
    around it or, in a run with a `base`, with the place of the base.
    """
    base, progress = run.config.base, stage.progress
    if base is not None and (Path(base) / INDEX).is_file():
        base = Path(os.path.relpath(base, run.out)).as_posix()
    if base is not None or (run.out / INDEX).is_file():
        publish_denoiser(stage, run.out, base)
    else:
        parts = {key: _half(part) for key, part in stage.pipeline.components.items()}
        _replace(run.out, stage.pipeline.with_components(**parts).save_pretrained)
    report = read_facts(run.out)
    facts = {"steps": progress.step, "images_seen": progress.images_seen, "validation_loss": progress.validation_loss}
    report.setdefault("stages", {}).setdefault(stage.name, {}).update({**stage.facts, **facts})
    write_facts(run.out, report)
    attributed = (run.out / ATTRIBUTION).is_file()
    card = model_card(run.config, report["stages"], read_words(run.out), attributed)
    write_whole(run.out / "README.md", card)


def publish_denoiser(stage: Stage, folder: Path, base: str | None) -> None:
    """Write the averaged denoiser alone in fp16 into a checkpoint or, with `base`, as a part of that checkpoint: a path
    relative to `folder`, or a name.
    """
    index = folder / "cascade" / LIST
    listed = read_json(index)["denoisers"] if index.is_file() else []

    def save(target: Path) -> None:
        Cascade({stage.name: _half(stage.average.module)}).save_pretrained(target / "cascade")
        write_list(target / "cascade", list(dict.fromkeys([*listed, stage.name])))
        if base is not None:
            write_part_index(target, base)

    _replace(folder, save)


def _half(part: Any) -> Any:
    return copy.deepcopy(part).half() if isinstance(part, nn.Module) else part


def _replace(folder: Path, save: Callable[[Path], Any]) -> None:
    """Save into a temporary folder, then move every file to its place: the list of denoisers, and the index that makes
    a folder a checkpoint, after what they name.
    """
    temporary = folder / ".pipeline.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    move_whole(temporary, folder, last=(f"cascade/{LIST}", INDEX))


def model_card(config: TrainConfig, stages: dict[str, dict[str, Any]], words: Words, attributed: bool) -> str:
    """The model card (README.md) of a checkpoint: training data, measured losses, known words. `attributed`: whether
    ATTRIBUTION.md lies beside it.
    """
    known = f"Words that at least {FEWEST_PICTURES} training pictures share, the most frequent first:\n\n"
    known = f"{known}{word_list(words)}\n" if words else ""
    rights = "Whose pictures those were, and what that allows, is for its user to check."
    if attributed:
        rights = f"Whose pictures those were, and under which licences, is listed in {ATTRIBUTION}."
    if sources := started_from(config):
        rights += f" Weights start from {', '.join(sources)}, trained on pictures of its own."
    styles = ", ".join(config.dataset.styles) if config.dataset.styles else "all"
    rows = "\n".join(
        f"| {name} | {facts['parameters'] / 1e6:.1f} M | {facts['training_pictures']} | {facts['steps']} | "
        f"{facts['images_seen']:,} | {loss_text(facts['validation_loss'])} |"
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

{known}
**Rights.** A model may resemble its training pictures. {rights}
"""


# ------------------------------------------------------------------------------------------------- facts and curves


def describe(run: Run) -> None:
    """Write config.yaml and run.json: the configuration, and the software and hardware."""
    config, accelerator = run.config, run.accelerator
    run.out.mkdir(parents=True, exist_ok=True)
    facts = {
        **read_facts(run.out),
        "data": list(config.data),
        "seed": config.seed,
        "processes": accelerator.num_processes,
        "machines": machines(),
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "packages": {"pokediff": __version__, **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
    }
    write_facts(run.out, facts)  # first, since it marks the folder as ours
    write_whole(run.out / "config.yaml", dump_yaml(config))


def describe_pictures(run: Run, stage: Stage) -> None:
    """Write words.json and, where the data set or the weights that training starts from name authors or licences,
    ATTRIBUTION.md. Later stages may use fewer pictures, so only the first stage writes them.
    """
    if stage.name != next(iter(run.config.stages)):
        return
    records = stage.batches.pictures.records
    write_words(run.out, records)
    folders = {find_folder(source_parts(source)[0], {}) for source in started_from(run.config)}
    lists = [folder / ATTRIBUTION for folder in sorted(folders)]
    if text := attribution(records, [read_text(file) for file in lists if file.is_file()]):
        write_whole(run.out / ATTRIBUTION, text)


def started_from(config: TrainConfig) -> list[str]:
    """Where weights of this training come from: FOLDER or FOLDER:DENOISER each."""
    of_stages = (source for stage in config.stages.values() for source in stage.start_from)
    return sorted({source for source in (config.base, config.start_from, *of_stages) if source})


def source_parts(source: str) -> tuple[str, str | None]:
    """FOLDER and, in FOLDER:DENOISER, the denoiser."""
    # a Windows drive letter is not FOLDER:DENOISER
    folder, denoiser = re.fullmatch(r"(.+?)(?::([a-z0-9-]+))?", source).groups()  # type: ignore[union-attr]
    return folder, denoiser


def read_facts(out: Path) -> dict[str, Any]:
    """run.json, {} where there is none."""
    return read_json(out / FACTS) if (out / FACTS).is_file() else {}


def write_facts(out: Path, facts: dict[str, Any]) -> None:
    write_whole(out / FACTS, json.dumps(facts, indent=2) + "\n")


def _commit() -> str | None:
    """The git commit of this checkout, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def start_trackers(accelerator: Accelerator, out: Path, wandb: bool) -> None:
    """TensorBoard and, with wandb, Weights & Biases, beside log.jsonl of the folder `out`."""
    trackers: list[GeneralTracker] = [TensorBoardTracker("tensorboard", logging_dir=out)]
    if wandb:
        if not is_wandb_available():
            raise PokediffError("wandb is not installed: pip install wandb")
        trackers.append(WandBTracker("pokediff", name=out.name, dir=str(out)))
    accelerator.log_with = trackers
    accelerator.init_trackers("pokediff")


def log(run: Run, stage: Stage, values: dict[str, Any]) -> None:
    """Add a line {"stage": "base-32", "step": 20, "loss": ...} to log.jsonl; the other trackers get STAGE/VALUE."""
    step = stage.progress.step
    run.accelerator.log({f"{stage.name}/{name}": value for name, value in values.items()}, step=step)
    if run.main:
        with (run.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage.name, "step": step, **values}) + "\n")


def log_images(accelerator: Accelerator, images: dict[str, np.ndarray], step: int) -> None:
    """Give the trackers opaque pictures, uint8 (H, W, 3), by name."""
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: image[None] for name, image in images.items()}, step=step, **options)


def _kept(line: str, stage: str, step: int) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] != stage or row["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
