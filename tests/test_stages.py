from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_data
from safetensors.torch import load_file
from tiny import REFINER, UPSCALER, tiny_config, tiny_stage, write_open_clip

from pokediff.config import TrainConfig, load_yaml
from pokediff.data.dataset import embed
from pokediff.errors import PokediffError
from pokediff.model.diffusion import cosine_sigmas
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.objectives import trained_timesteps
from pokediff.training.stages import resized, select, train, with_steps

STAGES = {"base-16": tiny_stage(max_steps=3), "refiner-16": replace(REFINER, max_steps=3), "upscaler-32": UPSCALER}


def weights(folder, name):
    return load_file(folder / "cascade" / name / "diffusion_pytorch_model.safetensors")


def same(a, b) -> bool:
    return all(np.array_equal(a[key].numpy(), b[key].numpy()) for key in a)


@pytest.fixture(scope="module")
def cascade(data, tmp_path_factory):
    """A run of three stages."""
    return train(tiny_config(data, tmp_path_factory.mktemp("runs") / "cascade", STAGES))


def test_one_command_trains_every_stage_into_one_checkpoint(cascade, data):
    pipe = PokeDiffPipeline.from_pretrained(cascade)
    assert list(pipe.cascade) == list(STAGES)
    assert pipe.sizes == (16, 32)
    assert pipe.cascade["refiner-16"].config.below == 1.0
    assert pipe("a red round creature", seed=1, size=32).images[0].size == (32, 32)
    assert load_yaml(cascade / "config.yaml", TrainConfig) == tiny_config(data, cascade, STAGES)
    facts = json.loads((cascade / "run.json").read_text())["stages"]
    assert {name: stage["finished"] for name, stage in facts.items()} == dict.fromkeys(STAGES, "steps")
    rows = [json.loads(line) for line in (cascade / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == set(STAGES)
    assert not list(cascade.rglob("*.tmp*"))


def test_no_weights_lie_twice_in_a_checkpoint(cascade):
    sizes = [path.stat().st_size for path in cascade.rglob("*.safetensors") if "state" not in path.parts]
    own = [path for path in cascade.rglob("*.safetensors") if not {"state", "best"} & set(path.parts)]
    assert len(own) == len(STAGES) + 1  # the denoisers and the text encoder
    assert len(sizes) == 2 * len(STAGES) + 1  # best/ holds denoisers only: it is a part of the checkpoint
    assert list(PokeDiffPipeline.from_pretrained(cascade / "best").cascade) == list(STAGES)


def test_a_stopped_cascade_resumes_to_the_same_bits(cascade, data, tmp_path):
    config = tiny_config(data, tmp_path / "run", STAGES)
    short = with_steps(config, {"refiner-16": 1})
    train(replace(short, max_minutes=1e-9))  # one step of the first stage
    assert not (tmp_path / "run" / "cascade" / "refiner-16").exists()
    train(config, resume="auto")
    for name in STAGES:
        assert same(weights(tmp_path / "run", name), weights(cascade, name)), name


def test_one_stage_is_trained_again_and_the_others_stay(cascade, data, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(cascade, out)
    config = with_steps(tiny_config(data, out, STAGES), {"refiner-16": 2})
    train(config, only=["refiner-16"])
    assert same(weights(out, "base-16"), weights(cascade, "base-16"))
    assert same(weights(out, "upscaler-32"), weights(cascade, "upscaler-32"))
    assert not same(weights(out, "refiner-16"), weights(cascade, "refiner-16"))


def test_a_part_is_written_alone_and_names_its_base(cascade, data, tmp_path):
    config = tiny_config(data, tmp_path / "part", {"upscaler-32": UPSCALER}, base=str(cascade))
    out = train(config)
    index = json.loads((out / "model_index.json").read_text())
    assert (out / index["base"]).resolve() == cascade.resolve()
    assert [path.parent.name for path in (out / "cascade").glob("*/*.safetensors")] == ["upscaler-32"]
    pipe = PokeDiffPipeline.from_pretrained(out)
    assert list(pipe.cascade) == list(STAGES)
    pipe.save_pretrained(tmp_path / "whole")
    assert PokeDiffPipeline.from_pretrained(tmp_path / "whole").sizes == (16, 32)


def test_every_stage_starts_from_the_denoiser_of_its_name(cascade, data, tmp_path, capsys):
    config = tiny_config(data, tmp_path / "own", STAGES, start_from=str(cascade))
    train(with_steps(config, dict.fromkeys(STAGES, 1)))
    said = capsys.readouterr().out
    assert all(f"{name}: " in said and f"M weights from {cascade}" in said for name in STAGES)
    for name in STAGES:
        moved = [
            np.abs(a.numpy().astype(float) - b.numpy().astype(float)).max()
            for a, b in zip(weights(tmp_path / "own", name).values(), weights(cascade, name).values(), strict=True)
        ]
        assert max(moved) < 0.05, name


def test_a_trial_runs_every_stage_draws_and_tells_the_time(data, tmp_path, capsys):
    config = tiny_config(data, tmp_path / "run", STAGES)
    out = train(with_steps(config, {"base-16": 1_000_000}), trial=True)
    said = capsys.readouterr().out
    assert out.name == "run-trial"
    assert (out / "trial.png").is_file()
    assert "base-16: 1,000,000 steps of 8 pictures, about" in said
    assert not (tmp_path / "run").exists()
    train(config, trial=True)  # again: the earlier trial is replaced
    (tmp_path / "mine-trial").mkdir()
    (tmp_path / "mine-trial" / "letter.txt").write_text("mine")
    with pytest.raises(PokediffError, match="no earlier trial"):
        train(replace(config, out=str(tmp_path / "mine")), trial=True)
    assert (tmp_path / "mine-trial" / "letter.txt").read_text() == "mine"


def test_stages_that_fit_a_limit_are_shortened_in_proportion(data, tmp_path):
    long = with_steps(tiny_config(data, tmp_path / "run", STAGES), {"base-16": 100_000, "upscaler-32": 50_000})
    out = train(replace(long, max_minutes=0.05, fit_limit=True))
    stages = load_yaml(out / "config.yaml", TrainConfig).stages
    assert stages["base-16"].max_steps < 2000
    assert stages["base-16"].max_steps == pytest.approx(2 * stages["upscaler-32"].max_steps, abs=2)
    before = (out / "config.yaml").read_text()
    train(replace(long, max_minutes=0.05, fit_limit=True), resume="auto")
    assert (out / "config.yaml").read_text() == before


def test_a_shorter_stage_keeps_the_shape_of_its_schedule():
    stage = tiny_stage(max_steps=1000, warmup_steps=100, decay_steps=500, validate_every=200)
    short = resized(stage, 100)
    assert (short.max_steps, short.warmup_steps, short.decay_steps, short.validate_every) == (100, 10, 50, 100)
    assert resized(stage, 2000).decay_steps == 500


def test_a_stage_is_trained_on_its_range_of_noise_only(data, tmp_path):
    config = tiny_config(data, tmp_path, {"refiner-16": replace(REFINER, model=replace(REFINER.model, below=0.8))})
    last = trained_timesteps(config, config.stages["refiner-16"]) - 1
    sigmas = cosine_sigmas(torch.arange(1000).double(), 1000, *config.diffusion.range)
    assert sigmas[last - 1] < 0.8 <= sigmas[last]
    assert trained_timesteps(config, tiny_stage()) == 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(stages={"upscaler-64": replace(UPSCALER, image_size=64)}), "nothing in the cascade draws 32 px"),
        (dict(dataset_channels="rgb"), "dataset.channels"),
        (dict(noise_shift=2.0), "another noise schedule"),
    ],
)
def test_what_does_not_fit_the_base_is_named(cascade, data, tmp_path, changes, words):
    config = tiny_config(data, tmp_path / "out", {"upscaler-32": UPSCALER}, base=str(cascade))
    if "stages" in changes:
        base = train(tiny_config(data, tmp_path / "small", {"base-16": tiny_stage(max_steps=1)}))
        config = replace(config, stages=changes["stages"], base=str(base))
    if "dataset_channels" in changes:
        config = replace(config, dataset=replace(config.dataset, channels=changes["dataset_channels"]))
    if "noise_shift" in changes:
        config = replace(config, diffusion=replace(config.diffusion, noise_shift=changes["noise_shift"]))
    with pytest.raises(PokediffError, match=words):
        train(config)


@pytest.mark.filterwarnings("ignore:only the first")
def test_it_trains_from_the_vectors_of_a_clip(tmp_path):
    """What the scraper writes by default: the vectors of an open_clip model, read from the file beside the data."""
    folder = write_data(tmp_path / "data", 40)
    (tmp_path / "clip").mkdir()
    name = f"open_clip:local-dir:{write_open_clip(tmp_path / 'clip')}"
    embed(folder, name)
    stages = {"base-16": tiny_stage(max_steps=2)}
    out = train(tiny_config(folder, tmp_path / "run", stages, text_encoder=name))
    pipe = PokeDiffPipeline.from_pretrained(out)
    assert pipe.text_encoder is None
    assert pipe.base.config.text_dim == 24
    assert pipe.encode_prompt("a red creature").shape == (1, 24)
    assert pipe("a red creature", seed=1).images[0].size == (16, 16)


def test_an_unknown_stage_is_named(data, tmp_path):
    with pytest.raises(PokediffError, match=r"--stages refiner-64: not in this configuration \(base-16"):
        select(tiny_config(data, tmp_path, STAGES), ["refiner-64"])


def test_a_model_without_states_is_not_resumed(data, tmp_path, cascade):
    pipe = PokeDiffPipeline.from_pretrained(cascade)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(PokediffError, match="without the states"):
        train(tiny_config(data, tmp_path / "model", STAGES), resume="auto")
    assert os.listdir(tmp_path / "model")
