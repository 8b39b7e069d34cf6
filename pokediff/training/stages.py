"""train(config): train the stages of a cascade in order, each resumable, after an estimate of the time."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object

from pokediff.config import Sampling, StageConfig, TrainConfig, load_yaml, plain
from pokediff.data.images import encode_png, enlarge, grid
from pokediff.errors import PokediffError, first_line
from pokediff.files import LOCK, WRITER, own_folder, refuse_foreign, refuse_inside, write_whole
from pokediff.model.cascade import Cascade
from pokediff.model.checkpoint import INDEX, quiet
from pokediff.model.denoiser import has_bf16
from pokediff.model.diffusion import make_noise_schedule, same_noise
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import runs
from pokediff.training.build import Run, new_pipeline, prepare
from pokediff.training.clock import Limit, Pace, agreed, duration
from pokediff.training.launch import join, machines, threads_per_process
from pokediff.training.loop import closing_seconds, opening_seconds, seconds_per_step, train_stage
from pokediff.training.recipes import what_to_expect

SAMPLE = 256  # pictures that a trial and the estimates load
TRIAL_STEPS = 4
# Settings that may differ between processes.
OF_ONE_MACHINE = ("out", "data", "base", "start_from", "threads", "workers")
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
        PokediffError: missing data or encoder, an existing run, an unknown stage, a configuration that does not
            fit the state, or a loss that stays non-finite (the last state is intact).
    """
    quiet()
    full, names = config, select(config, only)
    if trial:
        config, names, resume = shortened(config), list(config.stages), "never"
    out = Path(config.out or "checkpoints/run")
    refuse_inside(out, config.data)
    if not trial:
        refuse_other_run(out, names, resume, only)
    run = start(config, out, trial)
    with own_folder(out, runs.FACTS) if run.main else nullcontext():
        if run.main and trial:
            remove_trial(out)
        if run.main:
            runs.set_aside_damaged(out, names, run.say)
        run.accelerator.wait_for_everyone()
        states = runs.find_states(out, names, resume)
        settings = {key: value for key, value in plain(config).items() if key not in OF_ONE_MACHINE}
        require_same(run, "settings", settings)
        require_same(run, f"states in {out}", {name: runs.steps_of(state) for name, state in states.items()})
        train_run(run, full, names, resume, states, trial)
    return out


def train_run(
    run: Run, full: TrainConfig, names: Sequence[str], resume: str, states: Mapping[str, Path | None], trial: bool
) -> None:
    """`train` with all that it needs: estimate, then the stages. `full` is the configuration that the time is for."""
    config, out = run.config, run.out

    def unfinished() -> list[str]:
        again = [name for name in names if resume not in ("never", "auto") and states[name] == Path(resume)]
        return [name for name in names if resume == "never" or name in again or not runs.is_finished(out, name, config)]

    recipe, paces = config, estimate(run, unfinished())
    if config.fit_limit and config.max_minutes is not None:
        config = full = run.config = fitted(config, out, paces, states, broadcast_object_list([run.limit.left()])[0])
    if run.main:
        runs.describe(run)
        runs.start_trackers(run.accelerator, run.out, config.wandb)
    paces = {name: paces[name] for name in unfinished()}
    left = times(full, paces, states)
    if (number := run.accelerator.num_processes) > 1:
        run.say(f"{number} processes on {machines()} machine{'s' * (machines() > 1)}, batches are shared")
    run.say(timetable(full, left, paces, states, run.accelerator.mixed_precision))
    train_stages(run, names, left, paces, states)
    if trial:
        draw_trial(run)
    else:
        if config.fit_limit and paces:
            run.say(outcome(out, recipe, paces))
        drawing = f'"{max(config.preview_prompts, key=len)}" --checkpoint {shlex.quote(str(out))}'
        run.say(f"draw with: pokediff sample {drawing}")
    for tracker in run.accelerator.trackers:  # end_training would disconnect the processes, too
        tracker.finish()


def outcome(out: Path, recipe: TrainConfig, paces: Mapping[str, Pace]) -> str:
    """What to expect of a folder's model, and the command that trains the rest of its recipe, if any is left."""
    done = {name: facts.get("steps", 0) for name, facts in runs.read_facts(out).get("stages", {}).items()}
    base = next(iter(recipe.stages))
    expected = what_to_expect(done.get(base, 0), recipe.stages[base].max_steps)
    rest = times(recipe, paces, {name: Path(f"step-{done.get(name, 0)}") for name in paces})
    if all(done.get(name, 0) >= recipe.stages[name].max_steps for name in paces):
        return expected
    command = f"pokediff train {shlex.quote(recipe.data[0])} --out {shlex.quote(str(out))} --resume auto"
    return f"{expected}\ntrain on with: {command} --max-minutes {math.ceil(1.2 * sum(rest.values()) / 60)}"


def train_stages(
    run: Run,
    names: Sequence[str],
    left: Mapping[str, float],
    paces: Mapping[str, Pace],
    states: Mapping[str, Path | None],
) -> None:
    """Train the stages of `left`, in seconds, one after the other, until one of them has to be resumed."""
    whole = run.limit
    for number, name in enumerate(names):
        if name not in left:
            run.say(f"{name}: finished already")
            continue
        rest = sum(left.get(later, 0.0) for later in names[number + 1 :])
        if run.config.fit_limit:  # so that a slower machine does not use up the time of later stages
            run.limit = whole.part(left[name] / (left[name] + rest))
        stop = train_one(run, name, states[name], paces[name].closing)
        is_left = stop == "signal" or (stop == "time" and not run.config.fit_limit)
        if is_left or (rest and agreed(run.accelerator, "time" if whole.reached() else "")):
            more = f"; later stages need about {duration(rest)}" if rest else ""
            run.say(f"stopped {'in' if is_left else 'after'} {name}; continue with --resume auto{more}")
            break
        if rest and run.sample is None:  # not in a trial, which is shorter
            run.say(f"time left: about {duration(rest)}")


def select(config: TrainConfig, only: Sequence[str]) -> list[str]:
    """The names of the stages to train, in order. Raises PokediffError for an unknown one."""
    if unknown := [name for name in only if name not in config.stages]:
        raise PokediffError(f"--stages {' '.join(unknown)}: not in this configuration ({', '.join(config.stages)})")
    return [name for name in config.stages if not only or name in only]


def refuse_other_run(out: Path, names: Sequence[str], resume: str, only: Sequence[str]) -> None:
    """Raise PokediffError when the run would overwrite another one, or has no states to resume from."""
    refuse_foreign(out, (runs.FACTS, INDEX))
    held = (out / INDEX).exists() or any(runs.states(out, name) for name in names)
    if resume == "never" and held and not only:
        raise PokediffError(f"{out} already holds a run: resume it with --resume auto, or choose another --out")
    if (out / INDEX).exists() and not (out / runs.FACTS).exists():
        raise PokediffError(f"{out} holds a model without the states to resume from: choose another --out")


def start(config: TrainConfig, out: Path, trial: bool = False) -> Run:
    """Processes, threads, and the cascade to build on. Raises PokediffError when it has another noise schedule."""
    limit = Limit(config.max_minutes)
    join()
    AcceleratorState._reset_state()  # of an earlier training in this process, which may have had another precision
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision(config.precision))
    except ValueError as error:  # of a device without bf16
        raise PokediffError(f"--precision {config.precision}: {first_line(error)}; use --precision fp32") from None
    if accelerator.device.type == "cpu":  # accelerate launch leaves all but one core idle
        torch.set_num_threads(config.threads or threads_per_process())
    schedule, pipeline = make_noise_schedule(config.diffusion), None
    own = config.base or config.start_from
    if (source := out if (out / INDEX).is_file() and not trial else own) is not None:
        pipeline = PokeDiffPipeline.from_pretrained(source)
        if not same_noise(schedule, pipeline.scheduler):
            raise PokediffError(f"{source} has another noise schedule (diffusion.*)")
        if source != out and not config.base:  # the same denoisers, to be trained on
            parts = {name: denoiser for name, denoiser in pipeline.cascade.items() if name in config.stages}
            pipeline = new_pipeline(Cascade(parts), schedule, config) if parts else None
    if pipeline is not None:
        pipeline = pipeline.to(accelerator.device)
    return Run(config, out, accelerator, schedule, pipeline, limit, SAMPLE if trial else None)


def mixed_precision(precision: str) -> str:
    """accelerate's name of it. Never fp16: its overflow is the most reported failure of diffusion training."""
    if precision == "auto":
        precision = "bf16" if has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"
    return "no" if precision == "fp32" else precision


def require_same(run: Run, what: str, here: object) -> None:
    """Raise PokediffError, in all processes, when they differ: they would train different models, or wait for ever."""
    if any(there != here for there in gather_object([here])):
        raise PokediffError(
            f"the processes have different {what}: start all with the same options, and put --data and --out on a disk "
            "that all machines share"
        )


def estimate(run: Run, names: Sequence[str]) -> dict[str, Pace]:
    """The pace of every stage, measured on a few pictures before the first one starts; the same on all processes."""
    quick = dataclasses.replace(run, sample=SAMPLE, silent=True)
    paces = {}
    for name in run.bar(names, desc="measuring the speed", unit="stage", leave=False):
        stage = prepare(quick, name)
        step = seconds_per_step(quick, stage)
        paces[name] = Pace(step, closing_seconds(quick, stage, step), opening_seconds(quick, stage, step))
        quick.pipeline = stage.pipeline  # later stages check what comes before them
    return broadcast_object_list([paces])[0]


def steps_left(config: TrainConfig, name: str, states: Mapping[str, Path | None]) -> int:
    return max(1, config.stages[name].max_steps - runs.steps_of(states[name]))


def times(config: TrainConfig, paces: Mapping[str, Pace], states: Mapping[str, Path | None]) -> dict[str, float]:
    """{stage: remaining seconds}, drawings, validation, previews and checkpoints included."""
    return {
        name: pace.opening + OVERHEAD * pace.step * steps_left(config, name, states) + pace.closing
        for name, pace in paces.items()
    }


def timetable(
    config: TrainConfig,
    left: Mapping[str, float],
    paces: Mapping[str, Pace],
    states: Mapping[str, Path | None],
    precision: str,
) -> str:
    """A line for each stage, and the whole."""
    lines, precision = [], "fp32" if precision == "no" else precision
    for name, needed in left.items():
        size, steps = config.stages[name].batch_size, steps_left(config, name, states)
        speed = f"{size / paces[name].step:.0f} pictures/s, {precision}"
        lines.append(f"{name}: {steps:,} steps of {size} pictures, about {duration(needed)} ({speed})")
    whole, limit = sum(left.values()), 60 * (config.max_minutes or math.inf)
    ends = f"; --max-minutes {config.max_minutes:g} ends it before" if whole > 1.1 * limit else ""
    sizes = ", ".join(f"{size} px" for size in sorted({stage.image_size for stage in config.stages.values()}))
    drawing = f"to draw {sizes}" + (" with hard edges" if config.pixel_art else "")
    compiling = ", before compilation" if config.compile else ""
    return "\n".join([*lines, f"in total about {duration(whole)}{compiling}, {drawing}{ends}"])


def train_one(run: Run, name: str, state: Path | None, closing: float) -> str:
    """One stage: load, train, and add its denoiser to the cascade. Returns why it stops, one of clock.STOPS."""
    began, stage = time.monotonic(), prepare(run, name, state)
    run.say(
        f"{name}: {stage.facts['parameters'] / 1e6:.2f} M parameters, {stage.facts['gflops']:.2f} GFLOP a picture, "
        f"{stage.facts['training_pictures']} training and {stage.facts['validation_pictures']} validation pictures"
    )
    require_same(run, "data", stage.facts["data_sha256"])
    if run.main:
        runs.begin(run, stage)
    run.accelerator.wait_for_everyone()
    stop = train_stage(run, stage, closing)
    if run.main:
        report = runs.read_facts(run.out)
        facts = report["stages"][name]
        facts["seconds"] = round(facts.get("seconds", 0) + time.monotonic() - began)
        facts["finished"] = stop if stop in ("steps", "copies", "patience") else None
        facts["patience"] = stage.config.patience
        runs.write_facts(run.out, report)
    # Rounded as in the checkpoint, so that a resumed run uses the same weights.
    stage.average.module.half().float()
    run.pipeline = stage.pipeline
    run.accelerator.free_memory()
    return stop


def fitted(
    config: TrainConfig, out: Path, paces: Mapping[str, Pace], states: Mapping[str, Path | None], left: float
) -> TrainConfig:
    """The configuration with the remaining stages shortened in proportion to fit into the `left` seconds. A run that
    was stopped keeps its lengths until all its stages are finished.
    """
    if not paces:
        return config
    if any(states.values()) and (out / "config.yaml").is_file():
        saved = load_yaml(out / "config.yaml", TrainConfig).stages
        lengths = {name: saved[name].max_steps for name in paces if name in saved}
        before = with_steps(config, lengths)
        if not all(runs.is_finished(out, name, before) for name in paces):
            return before
    fixed = sum(pace.opening + pace.closing for pace in paces.values())
    steps = sum(times(config, paces, states).values()) - fixed
    share = min(1.0, max(0.0, left - fixed) / steps)
    done = {name: runs.steps_of(states[name]) for name in paces}
    lengths = {name: done[name] + round(share * (config.stages[name].max_steps - done[name])) for name in paces}
    return with_steps(config, lengths)


def with_steps(config: TrainConfig, steps: dict[str, int]) -> TrainConfig:
    """The configuration with other numbers of steps for some stages; warmup and decay change in proportion."""
    stages = dict(config.stages)
    for name, number in steps.items():
        stages[name] = resized(stages[name], max(1, number))
    return dataclasses.replace(config, stages=stages)


def resized(stage: StageConfig, steps: int) -> StageConfig:
    """The stage with `steps` steps; warmup, decay and intervals shrink in proportion."""
    share = min(1.0, steps / stage.max_steps)
    every = ("validate_every", "preview_every", "checkpoint_every")
    changes = {name: min(getattr(stage, name), steps) for name in every}
    changes |= {name: int(share * getattr(stage, name)) for name in ("warmup_steps", "decay_steps")}
    return dataclasses.replace(stage, max_steps=steps, **changes)


def shortened(config: TrainConfig) -> TrainConfig:
    """The configuration of a trial: a few steps of every stage, in the folder <out>-trial, not compiled."""
    out = f"{config.out or 'checkpoints/run'}-trial"
    metrics = dataclasses.replace(config.metrics, every=0, early_stop=False, best_by="validation_loss")
    short = with_steps(config, dict.fromkeys(config.stages, TRIAL_STEPS))
    return dataclasses.replace(short, out=out, metrics=metrics, compile=False, fit_limit=False, max_minutes=None)


def remove_trial(out: Path) -> None:
    """Remove an earlier trial."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, WRITER):
            path.unlink()


def draw_trial(run: Run) -> None:
    """Draw two of the preview prompts with the cascade as it is: trial.png."""
    if not run.main or run.pipeline is None:
        return
    prompts = list(run.config.preview_prompts)[:2]
    size = run.pipeline.sizes[-1]
    pictures = run.pipeline.generate(prompts, range(len(prompts)), Sampling(size=size))
    file = run.out / "trial.png"
    write_whole(file, encode_png(enlarge(grid(pictures), max(1, 128 // size))))
    run.say(f"{len(prompts)} pictures of {size} px after {TRIAL_STEPS} steps: {file}")
