"""train(config): the stages of a cascade in turn, each resumable, each with its time said beforehand."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pokediff.config import Sampling, StageConfig, TrainConfig, load_yaml
from pokediff.data.images import encode_png, enlarge, grid
from pokediff.data.records import write_whole
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.checkpoint import INDEX, quiet
from pokediff.model.diffusion import make_noise_schedule, same_noise
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import runs
from pokediff.training.build import Run
from pokediff.training.clock import Limit, duration
from pokediff.training.loop import mixed_precision, prepare, seconds_per_step, train_stage, usable_cores
from pokediff.training.recipes import what_to_expect

SAMPLE = 256  # pictures that a trial and the estimates load
TRIAL_STEPS = 4
OVERHEAD = 1.1  # validation, previews and checkpoints, beside the steps


def train(config: TrainConfig, resume: str = "never", only: Sequence[str] = (), trial: bool = False) -> Path:
    """Train the stages of `config` in their order. Returns the run's folder, a checkpoint after every stage.

    Args:
        resume: "never" refuses a folder that already holds a run; "auto" resumes each stage from its newest state and
            skips finished ones; a path resumes its stage from that state folder.
        only: names of the stages to train; with resume "never" they are trained again from the beginning.
        trial: run a few steps of every stage on a sample of the data, draw, and print the time of the full recipe; in
            the folder OUT-trial.

    Raises:
        PokediffError: data or encoder out of reach, a run in the way, an unknown stage, a configuration that does not
            fit the state, or a loss that stays non-finite (the last state is intact).
    """
    quiet()
    full, names = config, select(config, only)
    if trial:
        config = shortened(config)
        remove_trial(Path(config.out or ""))
    out = Path(config.out or "checkpoints/run")
    refuse_other_run(out, names, resume, only)
    run = start(config, out, SAMPLE if trial else None)
    seconds = estimate(run, names)
    if config.fit_limit and config.max_minutes is not None:
        config = full = run.config = fitted(config, out, seconds, resume)
    if run.main:
        runs.describe(out, config, run.accelerator)
        runs.start_trackers(run.accelerator, out, config)
    run.say(timetable(full, names, seconds, run.accelerator.mixed_precision))
    needed = {name: seconds[name] * config.stages[name].max_steps * OVERHEAD for name in names}
    whole = run.limit
    for number, name in enumerate(names):
        if resume != "never" and runs.is_finished(out, name, config.stages[name].max_steps):
            run.say(f"{name}: finished already")
            continue
        if resume == "never":
            shutil.rmtree(out / "state" / name, ignore_errors=True)
        left = sum(needed[later] for later in names[number + 1 :])
        if config.fit_limit:  # a machine that has become slower must not cost a later stage its turn
            run.limit = whole.part(needed[name] / (needed[name] + left))
        finished = train_one(run, name, resume)
        if not finished and not (config.fit_limit and run.limit.reached()):
            run.say(
                f"stopped in {name}; continue with --resume auto" + (f", {duration(left)} after it" if left else "")
            )
            break
        if left:
            run.say(f"time left: about {duration(left)}")
    if trial and run.main:
        draw_trial(out, run)
    elif config.fit_limit:
        run.say(what_to_expect(config))
    prompt = max(config.preview_prompts, key=len)
    run.say(f'draw with: pokediff sample "{prompt}" --checkpoint {out}')
    run.accelerator.end_training()
    return out


def select(config: TrainConfig, only: Sequence[str]) -> list[str]:
    """The names of the stages to train, in order. Raises PokediffError for one that there is not."""
    if unknown := [name for name in only if name not in config.stages]:
        raise PokediffError(f"--stages {' '.join(unknown)}: not in this configuration ({', '.join(config.stages)})")
    return [name for name in config.stages if not only or name in only]


def refuse_other_run(out: Path, names: Sequence[str], resume: str, only: Sequence[str]) -> None:
    """Raise PokediffError when the folder holds what this run would replace, or lacks what it resumes."""
    held = (out / INDEX).exists() or any(runs.states(out, name) for name in names)
    if resume == "never" and held and not only:
        raise PokediffError(f"{out} already holds a run: go on with --resume auto, or choose another --out")
    if resume == "auto" and (out / INDEX).exists() and not (out / "run.json").exists():
        raise PokediffError(f"{out} holds a model without the states to resume from: choose another --out")


def start(config: TrainConfig, out: Path, sample: int | None) -> Run:
    """Processes, threads, and the cascade to build on. Raises PokediffError when it has another noise schedule."""
    limit = Limit(config.max_minutes)
    AcceleratorState._reset_state()  # of an earlier training in this process, which may have had another precision
    accelerator = Accelerator(mixed_precision=mixed_precision(config.precision))
    if accelerator.device.type == "cpu":  # accelerate launch leaves all but one core idle
        torch.set_num_threads(config.threads or max(1, usable_cores() // accelerator.num_processes))
    schedule, pipeline = make_noise_schedule(config.diffusion), None
    source = out if (out / INDEX).is_file() else config.base or config.start_from
    if source is not None:
        pipeline = PokeDiffPipeline.from_pretrained(source)
        if not same_noise(schedule, pipeline.scheduler):
            raise PokediffError(f"{source} has another noise schedule (diffusion.*)")
    if pipeline is not None and source == config.start_from:  # the same denoisers, to be trained on
        parts = {name: denoiser for name, denoiser in pipeline.cascade.items() if name in config.stages}
        pipeline = runs.new_pipeline(Cascade(parts), schedule, config) if parts else None
    if pipeline is not None:
        pipeline = pipeline.to(accelerator.device)
    return Run(config, out, accelerator, schedule, pipeline, limit, sample)


def estimate(run: Run, names: Sequence[str]) -> dict[str, float]:
    """{stage: seconds a step}, measured on a few pictures before the first stage starts."""
    quick = dataclasses.replace(run, sample=SAMPLE, silent=True)
    seconds = {}
    for name in names:
        stage = prepare(quick, name, "never")
        seconds[name] = seconds_per_step(quick, stage)
        quick.pipeline = stage.pipeline  # later stages check what comes before them
    return seconds


def timetable(config: TrainConfig, names: Sequence[str], seconds: dict[str, float], precision: str) -> str:
    """A line for each stage, and the whole."""
    lines, whole = [], 0.0
    for name in names:
        stage = config.stages[name]
        needed = seconds[name] * stage.max_steps * OVERHEAD
        whole += needed
        speed = stage.batch_size / seconds[name]
        lines.append(
            f"{name}: {stage.max_steps:,} steps of {stage.batch_size} pictures, about {duration(needed)} "
            f"({speed:.0f} pictures/s, {precision})"
        )
    return "\n".join([*lines, f"in all about {duration(whole)}" + (", before compilation" if config.compile else "")])


def train_one(run: Run, name: str, resume: str) -> str | None:
    """One stage: load, train, and add its denoiser to the cascade. Returns why it is finished, None if it is not."""
    began, before = time.monotonic(), runs.read_facts(run.out).get("stages", {}).get(name, {}).get("seconds", 0.0)
    stage = prepare(run, name, resume)
    run.say(
        f"{name}: {stage.facts['parameters'] / 1e6:.2f} M parameters, {stage.facts['gflops']:.2f} GFLOP a picture, "
        f"{stage.facts['training_pictures']} training and {stage.facts['validation_pictures']} validation pictures"
    )
    if run.main:
        runs.drop_rows(run.out / "log.jsonl", name, stage.progress.step)
    run.accelerator.wait_for_everyone()
    finished = train_stage(run, stage)
    if run.main:
        facts = runs.read_facts(run.out)
        facts["stages"][name] |= {"finished": finished, "seconds": round(before + time.monotonic() - began)}
        runs.write_facts(run.out, facts)
    run.pipeline = stage.pipeline
    run.accelerator.free_memory()
    return finished


def fitted(config: TrainConfig, out: Path, seconds: dict[str, float], resume: str) -> TrainConfig:
    """All stages shortened in proportion, so that the run ends within max_minutes; a resumed run keeps its lengths."""
    saved = out / "config.yaml"
    if resume != "never" and saved.is_file():
        lengths = {name: stage.max_steps for name, stage in load_yaml(saved, TrainConfig).stages.items()}
        return with_steps(config, lengths)
    whole = sum(seconds[name] * config.stages[name].max_steps * OVERHEAD for name in seconds)
    share = min(1.0, 60 * (config.max_minutes or 0) / whole)
    return with_steps(config, {name: int(share * stage.max_steps) for name, stage in config.stages.items()})


def with_steps(config: TrainConfig, steps: dict[str, int]) -> TrainConfig:
    """Other numbers of steps for some stages; warm-up and decay of the rate change in proportion."""
    stages = dict(config.stages)
    for name, number in steps.items():
        stages[name] = resized(stages[name], max(1, number))
    return dataclasses.replace(config, stages=stages)


def resized(stage: StageConfig, steps: int) -> StageConfig:
    """The stage with `steps` steps; all that is counted in steps at most in proportion."""
    share = min(1.0, steps / stage.max_steps)
    every = {
        name: max(1, min(getattr(stage, name), steps))
        for name in ("validate_every", "preview_every", "checkpoint_every")
    }
    return dataclasses.replace(
        stage,
        max_steps=steps,
        warmup_steps=int(share * stage.warmup_steps),
        decay_steps=int(share * stage.decay_steps) if steps < stage.max_steps else stage.decay_steps,
        **every,
    )


def shortened(config: TrainConfig) -> TrainConfig:
    """The configuration of a trial: a few steps of every stage, in a folder of its own, not compiled."""
    out = f"{config.out or 'checkpoints/run'}-trial"
    metrics = dataclasses.replace(config.metrics, every=0, early_stop=False, best_by="validation_loss")
    short = with_steps(config, dict.fromkeys(config.stages, TRIAL_STEPS))
    return dataclasses.replace(short, out=out, metrics=metrics, compile=False, fit_limit=False, max_minutes=None)


def remove_trial(out: Path) -> None:
    """Remove an earlier trial. Raises PokediffError when the folder is something else."""
    if out.exists() and not (out / "run.json").is_file():
        raise PokediffError(f"{out} is no earlier trial: choose another --out")
    shutil.rmtree(out, ignore_errors=True)


def draw_trial(out: Path, run: Run) -> None:
    """Draw two of the preview prompts with the cascade as it is: trial.png."""
    assert run.pipeline is not None
    prompts = list(run.config.preview_prompts)[:2]
    size = run.pipeline.sizes[-1]
    pictures = run.pipeline.generate(prompts, range(len(prompts)), Sampling(size=size))
    write_whole(out / "trial.png", encode_png(enlarge(grid(pictures), max(1, 128 // size))))
    run.say(f"{len(prompts)} pictures of {size} px after {TRIAL_STEPS} steps: {out / 'trial.png'}")
