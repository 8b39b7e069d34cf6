from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, write_data
from forks import ended, forked
from PIL import Image
from safetensors.torch import load_file
from tiny import REFINER, tiny_config, tiny_stage, with_stage

from pokediff import files
from pokediff.config import (
    CriticConfig,
    ModelConfig,
    PerceptualConfig,
    Sampling,
    StageConfig,
    TrainConfig,
    ValidationMetricsConfig,
    dump_yaml,
    load_yaml,
)
from pokediff.data.dataset import load_pictures
from pokediff.data.images import grid, unpremultiply
from pokediff.errors import PokediffError, one_line_errors
from pokediff.files import own_folder
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training import loop
from pokediff.training.build import ema_with_warmup
from pokediff.training.loop import learning_rate
from pokediff.training.objectives import mix
from pokediff.training.runs import Progress, load_state, log_images
from pokediff.training.stages import train

PATIENCE_S = 600  # only what hangs takes longer, on any machine


def launch(config: TrainConfig, *options: str, processes: int = 1) -> subprocess.Popen:
    """train.py as a user starts it."""
    path = Path(config.out).parent / f"{Path(config.out).name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += "--num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1".split()
    if processes > 1:
        command += ["--main_process_port", str(free_port())]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), "--config", str(path), *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def newest_state(run: Path) -> Path:
    return sorted((run / "state" / "base-16").glob("step-*"))[-1]


def assert_same_state(a: Path, b: Path, **tolerance) -> None:
    for name in ("denoiser", "average", "optimizer"):
        left, right = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    return train(tiny_config(data, tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished, data):
    for name in ("config.yaml", "run.json", "log.jsonl", "README.md", "model_index.json", "best/model_index.json"):
        assert (finished / name).is_file(), name
    assert load_yaml(finished / "config.yaml", TrainConfig) == tiny_config(data, finished)
    facts = json.loads((finished / "run.json").read_text())
    stage = facts["stages"]["base-16"]
    assert stage["parameters"] > 0
    assert stage["gflops"] > 0
    assert stage["data_sha256"]
    assert stage["finished"] == "steps"
    assert facts["packages"]["torch"] == version("torch")
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert {row.pop("stage") for row in rows} == {"base-16"}
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert list((finished / "tensorboard").rglob("events.out*"))
    assert [path.name for path in sorted((finished / "state" / "base-16").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]
    with Image.open(finished / "previews" / "base-16-00000006.png") as sheet:
        assert (sheet.mode, sheet.height) == ("RGBA", 128)  # 16 px pictures, every pixel eight wide
    with Image.open(finished / "previews" / "base-16-00000006.gif") as clip:
        assert 8 < clip.n_frames <= 16  # equal frames are merged
    with Image.open(finished / "previews" / "base-16-00000006-pairs.png") as sheet:
        assert (sheet.mode, *sheet.size) == ("RGBA", 560, 560)  # four rows of four pictures, 2 px between them
    card = (finished / "README.md").read_text()
    assert "| 6 | 48 |" in card
    assert not list(finished.rglob("*.tmp*"))
    assert not list(finished.rglob("*.bin")) + list(finished.rglob("*.pt")) + list(finished.rglob("*.pkl"))


def test_previews_show_real_pictures_above_drawn_ones(finished, data):
    """Rows: training pictures and the drawn ones, validation pictures and the drawn ones."""
    with Image.open(finished / "previews" / "base-16-00000006-pairs.png") as image:
        sheet = np.asarray(image)[::8, ::8]  # 16 px pictures, every pixel eight wide
    rows = [sheet[top : top + 16] for top in range(0, 72, 18)]
    pipe = PokeDiffPipeline.from_pretrained(finished)
    for split, above, below in (("train", *rows[:2]), ("validation", *rows[2:])):
        pictures = load_pictures(data, 16).split(split)
        pictures = (pictures.with_shared_captions() if split == "train" else pictures).spread(4)
        np.testing.assert_array_equal(above, grid(pictures.straight(), columns=4))
        captions = [several[0] for several in pictures.captions]
        drawn = grid(pipe.generate(captions, range(4), Sampling(size=16)), columns=4)
        assert np.abs(below.astype(int) - drawn.astype(int)).mean() < 1  # the checkpoint is rounded to half precision


def test_trackers_get_the_previews(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), {"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"base-16/previews", "base-16/previews-pairs"}
    (image,) = events.Images("base-16/previews-pairs")
    assert (image.step, image.width, image.height) == (6, 560, 560)


def test_every_tracker_gets_pictures_in_its_own_form():
    """wandb.log, to which W&B's tracker passes all options, takes no `dataformats`."""
    trackers = [Mock(), Mock()]
    for tracker, name in zip(trackers, ("tensorboard", "wandb"), strict=True):
        tracker.name = name
    log_images(Mock(trackers=trackers), {"x": np.zeros((2, 3, 3), np.uint8)}, step=7)
    for tracker, options in zip(trackers, ({"dataformats": "NHWC"}, {}), strict=True):
        (values,), given = tracker.log_images.call_args
        assert values["x"].shape == (1, 2, 3, 3)
        assert given == {"step": 7, **options}


def test_the_checkpoint_draws_with_the_averaged_weights(finished):
    pipe = PokeDiffPipeline.from_pretrained(finished)
    average = load_file(newest_state(finished) / "average.safetensors")
    for name, parameter in pipe.base.state_dict().items():
        torch.testing.assert_close(parameter, average[name].half().float(), rtol=0, atol=0)
    assert pipe("a red round creature", num_inference_steps=2).images[0].size == (16, 16)
    assert pipe.base.null_text.norm().item() == pytest.approx(1, abs=1e-3)


def test_a_run_is_not_overwritten(finished, data):
    with pytest.raises(PokediffError, match="--resume auto"):
        train(tiny_config(data, finished))


@pytest.mark.slow
def test_resuming_equals_never_having_stopped(finished, data, tmp_path):
    config = tiny_config(data, tmp_path / "run")
    train(with_stage(config, max_steps=3))
    train(config, resume="auto")
    assert_same_state(newest_state(tmp_path / "run"), newest_state(finished), rtol=0, atol=0)
    losses = [
        [row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in row]
        for run in (tmp_path / "run", finished)
    ]
    assert [row["loss"] for row in losses[0]] == [row["loss"] for row in losses[1]]


@pytest.mark.slow
def test_lpips_and_a_critic_resume_to_the_same_bits(squeeze, data, tmp_path):
    losses = dict(perceptual=PerceptualConfig(squeeze), critic=CriticConfig(squeeze), max_steps=4, checkpoint_every=2)
    configs = [with_stage(tiny_config(data, tmp_path / name), **losses) for name in ("whole", "parts")]
    train(configs[0])
    train(with_stage(configs[1], max_steps=2))
    train(configs[1], resume="auto")
    whole, parts = (newest_state(tmp_path / name) for name in ("whole", "parts"))
    assert_same_state(parts, whole, rtol=0, atol=0)
    for part in ("critic", "critic-optimizer"):
        ours, theirs = (load_file(state / f"{part}.safetensors") for state in (whole, parts))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0)
    assert load_file(whole / "critic.safetensors")["updates"] == 4


def test_resuming_finished_work_does_nothing_but_say_so(finished, data):
    before = (newest_state(finished) / "denoiser.safetensors").read_bytes()
    train(tiny_config(data, finished), resume="auto")
    assert (newest_state(finished) / "denoiser.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_path_resumes_there_and_what_came_later_is_made_again(finished, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    state = out / "state" / "base-16" / "step-00000003"
    train(with_stage(tiny_config(data, out), max_steps=5), resume=str(state))
    assert newest_state(out).name == "step-00000005"
    train(tiny_config(data, out), resume=str(out / "state" / "base-16" / "step-00000003"))
    assert_same_state(newest_state(out), newest_state(finished), rtol=0, atol=0)
    elsewhere = train(tiny_config(data, tmp_path / "new"), resume=str(newest_state(finished)))  # nothing is left to do
    assert PokeDiffPipeline.from_pretrained(elsewhere).sizes == (16,)
    for path in (out, out / "state" / "base-16" / "step-00000004", tmp_path / "state" / "base-32" / "step-00000004"):
        with pytest.raises(PokediffError, match="no state of base-16 there"):
            train(tiny_config(data, out), resume=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.safetensors", "progress.json"])
def test_a_state_that_was_cut_is_set_aside_and_the_one_before_it_used(finished, data, tmp_path, capsys, name):
    run = shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["stages"]["base-16"]["finished"] = None
    (run / "run.json").write_text(json.dumps(facts))
    cut = run / "state" / "base-16" / "step-00000006" / name
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(PokediffError, match="step-00000006 is damaged"):
        load_state(Mock(), Mock(), cut.parent)
    train(tiny_config(data, run), resume="auto")
    said = capsys.readouterr().out
    assert "step-00000006 is damaged" in said
    assert "resumed from" in said
    assert (run / "state/base-16/damaged-step-00000006/step-00000006" / name).is_file()
    assert_same_state(newest_state(run), newest_state(finished))


def test_a_folder_that_is_no_run_or_lies_in_the_data_is_refused(finished, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for resume in ("never", "auto"):
        with pytest.raises(PokediffError, match=r"holds other files \(thesis.txt\)"):
            train(tiny_config(data, tmp_path / "run"), resume=resume)
    for out in (data, data / "model"):
        with pytest.raises(PokediffError, match="lies in the data"):
            train(tiny_config(data, out))
    with own_folder(finished, "run.json"), pytest.raises(PokediffError, match=f"process {os.getpid()} .* writes to"):
        train(tiny_config(data, finished), resume="auto")


@pytest.mark.slow
def test_a_full_disk_ends_in_a_line_with_the_last_state_intact(finished, data, tmp_path, monkeypatch, capsys):
    whole = files.os.fsync

    def full(handle: int) -> None:
        if list((tmp_path / "run" / "state" / "base-16").glob(".step-00000006*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SystemExit) as exit, one_line_errors():
        train(tiny_config(data, tmp_path / "run"))
    assert exit.value.code == 2
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device: make space" in error
    assert [path.name for path in (tmp_path / "run" / "state" / "base-16").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    train(tiny_config(data, tmp_path / "run"), resume="auto")
    assert_same_state(newest_state(tmp_path / "run"), newest_state(finished))


@pytest.mark.slow
def test_a_state_does_not_fit_another_configuration(finished, data, tmp_path):
    config = with_stage(tiny_config(data, tmp_path / "other"), max_steps=9)
    other = write_data(tmp_path / "data", 60)
    for changed, words in (
        (replace(config, seed=1), "has seed = 0, not 1"),
        (with_stage(config, batch_size=4), r"stages.base-16.batch_size"),
        (replace(config, data=(str(other),)), "other data"),
    ):
        with pytest.raises(PokediffError, match=words):
            train(changed, resume=str(newest_state(finished)))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_killed_at_random_moments_it_ends_the_same(data, tmp_path):
    stages = {"base-16": tiny_stage(max_steps=16, checkpoint_every=2, validate_every=8, preview_every=16)}
    train(tiny_config(data, tmp_path / "whole", stages))
    config = tiny_config(data, tmp_path / "killed", stages)
    rng, kills = random.Random(0), 0
    while True:
        process = forked(train, config, "auto", log=tmp_path / "log")
        state = tmp_path / "killed" / "state" / "base-16"
        begin, seen = time.monotonic(), len(list(state.glob("step-*"))) and newest_state(tmp_path / "killed").name
        while process.is_alive() and kills < 3:  # wait for some progress, then kill anywhere in the next steps
            done = state.is_dir() and list(state.glob("step-*")) and newest_state(tmp_path / "killed").name
            if (done and done != seen) or time.monotonic() - begin > PATIENCE_S:
                time.sleep(rng.uniform(0, 0.4))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        if ended(process, PATIENCE_S) == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert kills >= 1
    assert_same_state(newest_state(tmp_path / "killed"), newest_state(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_ctrl_c_ends_with_a_checkpoint(data, tmp_path):
    stage = tiny_stage(max_steps=100_000, checkpoint_every=100_000, validate_every=100_000, preview_every=100_000)
    config = tiny_config(data, tmp_path / "run", {"base-16": stage})
    process = launch(config)
    log = tmp_path / "run" / "log.jsonl"
    begin = time.monotonic()
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None
        assert time.monotonic() - begin < PATIENCE_S
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert json.loads((newest_state(tmp_path / "run") / "progress.json").read_text())["progress"]["step"] >= 3
    assert PokeDiffPipeline.from_pretrained(tmp_path / "run").image_size == 16


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(finished, data, tmp_path):
    stages = {"base-16": tiny_stage(), "refiner-16": replace(REFINER, max_steps=2)}
    shutil.copytree(finished, tmp_path / "one")
    config = tiny_config(data, tmp_path / "two", stages, max_minutes=60, fit_limit=True)
    finish(launch(config, processes=2))
    assert PokeDiffPipeline.from_pretrained(tmp_path / "two").cascade.sizes == (16,)
    assert (tmp_path / "two" / "state" / "refiner-16" / "step-00000002").is_dir()
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert_same_state(newest_state(tmp_path / "two"), newest_state(tmp_path / "one"), rtol=1e-3, atol=1e-5)
    losses = []
    for name in ("one", "two"):
        rows = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row and row["stage"] == "base-16"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_three_in_a_row_stop(data, tmp_path, monkeypatch, capsys):
    batch_of, bad = loop.training_batch, {2}

    def spoilt(pictures, config, stage, accelerator, step, *rest):
        batch = batch_of(pictures, config, stage, accelerator, step, *rest)
        return replace(batch, noise=batch.noise * math.nan) if step in bad and len(asked) > 3 else batch

    asked: list[int] = []  # the first three are the estimate's
    monkeypatch.setattr(loop, "training_batch", lambda *a: asked.append(1) or spoilt(*a))
    stage = tiny_stage(validate_every=100)
    config = tiny_config(data, tmp_path / "run", {"base-16": stage})
    train(config)
    assert "step 2: loss nan" in capsys.readouterr().out
    state = newest_state(tmp_path / "run")
    assert all(torch.isfinite(v).all() for v in load_file(state / "denoiser.safetensors").values())

    bad |= {7, 8, 9}
    with pytest.raises(PokediffError, match=r"3 steps in a row, at step 9.*learning-rate"):
        train(with_stage(replace(config, out=str(tmp_path / "other")), max_steps=20))
    state = sorted((tmp_path / "other" / "state" / "base-16").glob("step-*"))[-1]
    assert all(torch.isfinite(v).all() for v in load_file(state / "denoiser.safetensors").values())
    bad.clear()
    train(with_stage(replace(config, out=str(tmp_path / "other")), max_steps=12), resume="auto")


@pytest.mark.slow
def test_metrics_are_logged_and_best_can_follow_them(data, tmp_path, features):
    metrics = ValidationMetricsConfig(every=3, number=4, features=features, best_by="kernel_distance")
    train(tiny_config(data, tmp_path / "run", metrics=metrics))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "copy_ratio" in row]
    assert [row["step"] for row in measured] == [3, 6]
    assert all(0 <= row["copy_ratio"] <= 1 and 0 <= row["color_adherence"] <= 1 for row in measured)
    progress = json.loads((newest_state(tmp_path / "run") / "progress.json").read_text())["progress"]
    assert progress["best_score"] == min(row["kernel_distance"] for row in measured)
    assert PokeDiffPipeline.from_pretrained(tmp_path / "run" / "best").sizes == (16,)


@pytest.mark.slow
def test_training_stops_when_the_model_begins_to_copy(data, tmp_path, monkeypatch, capsys):
    known = load_pictures(data, 16).split("train")
    copied = np.stack([unpremultiply(picture) for picture in known.pixels[:]])
    monkeypatch.setattr(PokeDiffPipeline, "generate", lambda self, prompts, seeds, *_, **__: copied[: len(prompts)])
    metrics = ValidationMetricsConfig(every=2, number=4, early_stop=True)
    stages = {"base-16": tiny_stage(max_steps=100), "refiner-16": replace(REFINER, max_steps=4)}
    train(tiny_config(data, tmp_path / "run", stages, metrics=metrics))
    assert "100% of the pictures are close to a training picture" in capsys.readouterr().out
    progress = json.loads((newest_state(tmp_path / "run") / "progress.json").read_text())["progress"]
    assert progress["copying_since"] == 2
    assert progress["step"] == 3
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    # the refiner is trained to its end: it draws what the base draws
    assert [facts[name]["finished"] for name in stages] == ["copies", "steps"]


def falling_then_rising(monkeypatch, lowest: int) -> None:
    """Validation losses with their minimum at step `lowest`."""
    monkeypatch.setattr(
        loop, "validate", lambda _, stage: {"validation_loss": 1 + abs(stage.progress.step - lowest) / 100}
    )


@pytest.mark.slow
def test_a_stage_ends_when_its_patience_does(data, tmp_path, monkeypatch, capsys):
    falling_then_rising(monkeypatch, lowest=4)
    changes = dict(max_steps=100, validate_every=2, preview_every=100, checkpoint_every=100)
    config = tiny_config(data, tmp_path / "run", {"base-16": tiny_stage(**changes, patience=2)}, log_every=5)
    train(config)
    assert "ended after 2 validations without a lower validation loss" in capsys.readouterr().out
    assert newest_state(tmp_path / "run").name == "step-00000009"  # noticed at the step after the validation
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["base-16"]["finished"] == "patience"
    train(config, resume="auto")
    assert "finished already" in capsys.readouterr().out
    train(with_stage(config, patience=4), resume="auto")
    assert newest_state(tmp_path / "run").name == "step-00000013"
    train(with_stage(config, patience=None, max_steps=14), resume="auto")
    assert newest_state(tmp_path / "run").name == "step-00000014"


@pytest.mark.slow
def test_a_stopped_run_has_the_patience_of_one_that_was_not(data, tmp_path, monkeypatch):
    """A stop validates once more, here at step 5, which does not count."""
    falling_then_rising(monkeypatch, lowest=5)
    changes = dict(max_steps=5, validate_every=2, preview_every=100, checkpoint_every=100, patience=2)
    parts, whole = (tiny_config(data, tmp_path / name, {"base-16": tiny_stage(**changes)}) for name in ("a", "b"))
    train(parts)
    for config in (parts, whole):
        train(with_stage(config, max_steps=100), resume="auto")
    assert newest_state(tmp_path / "b").name == "step-00000009"
    assert_same_state(newest_state(tmp_path / "a"), newest_state(tmp_path / "b"), rtol=0, atol=0)


def test_patience_counts_validations_after_the_lowest():
    progress = Progress()
    assert not progress.is_out_of(1, every=10)
    for step, loss in enumerate([3, 2, 2, math.nan, 4, 1]):
        progress.step = 10 * step
        progress.note(None, loss)
        assert progress.is_out_of(1, every=10) == (step in (2, 3, 4))
        assert progress.is_out_of(2, every=10) == (step == 4)
        assert not progress.is_out_of(None, every=10)
        assert not progress.is_out_of(2, every=20)


def test_overfitting_is_seen_in_the_losses():
    progress = Progress()
    for step, losses in enumerate([(3, 3), (2, 2), (1.5, 2.1), (1.2, 2.2), (1.1, 2.3)]):
        progress.step = step
        assert progress.overfitting_since() is None
        progress.note(*losses)
    assert progress.overfitting_since() == 1
    progress.note(1.0, 1.9)
    assert progress.overfitting_since() is None
    progress.note(1.0, math.nan)
    assert progress.validation_loss is None
    assert progress.is_best(2.0)
    assert not progress.is_best(math.nan)
    assert not progress.is_best(2.0)
    assert progress.is_best(-1.0)
    assert not progress.is_best(0.0)


@pytest.mark.slow
def test_training_learns(data, tmp_path):
    stage = tiny_stage(max_steps=60, batch_size=16, learning_rate=2e-3, validate_every=30, preview_every=1000)
    train(tiny_config(data, tmp_path / "run", {"base-16": stage}, log_every=10))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert validation[-1] < validation[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_it_learns_the_same(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes that import torch to share it
    model = ModelConfig(widths=(32,), attention=(False,), blocks=(1,), embedding_dim=32)
    losses = []
    for compiled in (False, True):
        stage = tiny_stage(model=model, max_steps=3)
        config = tiny_config(data, tmp_path / str(compiled), {"base-16": stage}, compile=compiled)
        log = (train(config) / "log.jsonl").read_text().splitlines()
        losses.append([row["loss"] for line in log if "loss" in (row := json.loads(line))])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_without_a_compiler_it_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PokediffError, match="no C\\+\\+ compiler no-such-compiler"):
        train(tiny_config(data, tmp_path / "run", compile=True))


@pytest.mark.slow
def test_max_minutes_stops_with_a_checkpoint(data, tmp_path):
    stage = tiny_stage(max_steps=100_000, checkpoint_every=100_000)
    train(tiny_config(data, tmp_path / "run", {"base-16": stage}, max_minutes=1e-9))
    assert newest_state(tmp_path / "run").name == "step-00000001"


@pytest.mark.slow
def test_the_limit_is_that_of_the_whole_and_every_phase_has_a_bar(data, tmp_path, monkeypatch, capsys):
    """What follows the last step would take longer than the limit, so the first step is the last."""
    monkeypatch.setattr("pokediff.training.stages.closing_seconds", lambda *_: 1e6)
    monkeypatch.setattr("pokediff.progress.EVERY", 0)  # bars as lines, at once
    out = train(tiny_config(data, tmp_path / "run", max_minutes=60))
    assert json.loads((out / "run.json").read_text())["stages"]["base-16"]["steps"] == 1
    said = capsys.readouterr()
    for phase in ("base-16: validation", "base-16: preview", "base-16: checkpoint", "drawing", "measuring the speed"):
        assert phase in said.err
    assert "continue with --resume auto" in said.out


@pytest.mark.slow
def test_trainings_of_several_precisions_in_one_process(data, tmp_path):
    stages = {"base-16": tiny_stage(max_steps=1)}
    for number, precision in enumerate(("fp32", "bf16", "fp32")):
        out = train(tiny_config(data, tmp_path / str(number), stages, precision=precision))
        assert json.loads((out / "run.json").read_text())["mixed_precision"] == {"fp32": "no"}.get(precision, "bf16")


def test_learning_rate_schedule():
    config = StageConfig(max_steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_average_follows_its_closed_form():
    average, values = torch.zeros(1), [torch.tensor([float(v)]) for v in (1, 5, 2, 8)]
    update, expected = ema_with_warmup(0.3), 0.0
    for n, value in enumerate(values):
        update([average], [value], n)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value.item()
    assert average.item() == pytest.approx(expected)


def test_seeds_are_well_mixed():
    seeds = {mix(a, b, c) for a in range(10) for b in range(100) for c in range(3)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow
@pytest.mark.parametrize("channels", ["rgb", "grey"])
def test_other_channels_train_and_draw(data, tmp_path, channels):
    config = tiny_config(data, tmp_path / channels, {"base-16": tiny_stage(max_steps=2)})
    train(replace(config, dataset=replace(config.dataset, channels=channels)))
    pipe = PokeDiffPipeline.from_pretrained(tmp_path / channels)
    assert pipe.channels == channels
    assert pipe("a red creature", num_inference_steps=2).images[0].getextrema()[3] == (255, 255)


def test_no_validation_families_is_said(tmp_path):
    with pytest.raises(PokediffError, match="validation pictures"):
        train(tiny_config(write_data(tmp_path / "d", number=4), tmp_path / "run"))
