from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_data
from safetensors.torch import load_file
from tiny import REFINER, UPSCALER, tiny_config, tiny_stage, write_open_clip

from pokediff.config import CriticConfig, Sampling, TrainConfig, dump_yaml, load_yaml
from pokediff.data.dataset import embed, load_pictures
from pokediff.data.records import split_of
from pokediff.errors import PokediffError
from pokediff.model import checkpoint
from pokediff.model.diffusion import cosine_sigmas
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.text import embeddings_path, load_embeddings, save_embeddings
from pokediff.training import loop
from pokediff.training.clock import Pace
from pokediff.training.objectives import trained_timesteps
from pokediff.training.stages import fitted, outcome, remove_trial, resized, select, times, timetable, train, with_steps

SHORT = dict(max_steps=3, preview_every=3)
STAGES = {
    "base-16": tiny_stage(**SHORT),
    "refiner-16": replace(REFINER, **SHORT),
    "upscaler-32": replace(UPSCALER, **SHORT),
}


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


@pytest.mark.slow
def test_a_stopped_cascade_resumes_to_the_same_bits(cascade, data, tmp_path):
    config = tiny_config(data, tmp_path / "run", STAGES)
    train(replace(config, max_minutes=1e-9))  # one step of the first stage
    assert not (tmp_path / "run" / "cascade" / "refiner-16").exists()
    train(config, resume="auto")
    for name in STAGES:
        assert same(weights(tmp_path / "run", name), weights(cascade, name)), name


@pytest.mark.slow
def test_no_stage_begins_after_the_limit(data, tmp_path, capsys):
    config = with_steps(tiny_config(data, tmp_path / "run", STAGES, max_minutes=1e-9), {"base-16": 1})
    out = train(config)
    assert (
        "stopped after base-16; continue with --resume auto; later stages need about 1 min" in capsys.readouterr().out
    )
    assert list(PokeDiffPipeline.from_pretrained(out).cascade) == ["base-16"]


@pytest.mark.slow
def test_one_stage_is_trained_again_and_the_others_stay(cascade, data, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(cascade, out)
    config = tiny_config(data, out, STAGES)
    train(replace(config, max_minutes=1e-9), only=["refiner-16"])  # stopped after one step
    assert same(weights(out, "base-16"), weights(cascade, "base-16"))
    assert same(weights(out, "upscaler-32"), weights(cascade, "upscaler-32"))
    assert not same(weights(out, "refiner-16"), weights(cascade, "refiner-16"))
    assert [path.name for path in (out / "state" / "refiner-16").iterdir()] == ["step-00000001"]
    train(config, resume="auto")  # it is not finished, though it had been
    assert same(weights(out, "refiner-16"), weights(cascade, "refiner-16"))


def test_a_stage_killed_before_its_first_checkpoint_is_not_finished(cascade, data, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(cascade, out)
    monkeypatch.setattr("pokediff.training.stages.train_stage", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_config(data, out, STAGES), only=["refiner-16"])
    facts = json.loads((out / "run.json").read_text())["stages"]
    assert {name: "finished" in stage for name, stage in facts.items()} == {"base-16": True, "upscaler-32": True}


def test_an_upscaler_of_one_step_is_trained_at_the_timestep_of_its_drawing(cascade, data, tmp_path, monkeypatch):
    asked, batch_of = set(), loop.training_batch
    monkeypatch.setattr(loop, "training_batch", lambda *a: asked.add(a[5]) or batch_of(*a))
    for steps, expected in ((1, {499}), (2, {None})):
        stage = replace(UPSCALER, model=replace(UPSCALER.model, steps=steps), max_steps=1)
        config = tiny_config(data, tmp_path / str(steps), {"upscaler-32": stage}, base=str(cascade))
        out = train(config)
        assert asked == expected
        asked.clear()
    pipe = PokeDiffPipeline.from_pretrained(out.parent / "1")
    assert [e.timestep for e in pipe.evaluations(Sampling(size=32)) if e.size == 32] == [499]


@pytest.mark.slow
def test_the_critic_sees_what_the_cascade_draws_also_after_a_resume(cascade, data, squeeze, tmp_path, monkeypatch):
    seen, draw = [], loop.make_drawings
    monkeypatch.setattr(loop, "make_drawings", lambda *a: seen.append(draw(*a)) or seen[-1])
    model = replace(UPSCALER.model, steps=1)
    stage = replace(UPSCALER, model=model, critic=CriticConfig(squeeze, drawings=6), max_steps=2, checkpoint_every=1)
    config = tiny_config(data, tmp_path / "whole", {"upscaler-32": stage}, base=str(cascade))
    train(config)
    part = replace(config, out=str(tmp_path / "part"))
    train(replace(part, max_minutes=1e-9))  # stopped after one step
    train(part, resume="auto")
    assert same(weights(tmp_path / "part", "upscaler-32"), weights(tmp_path / "whole", "upscaler-32"))
    pipe = PokeDiffPipeline.from_pretrained(cascade)
    *_, last = pipe.denoise(seen[0].text, range(6), Sampling(size=16))
    for drawings in seen:
        torch.testing.assert_close(drawings.pictures, last.x0.float(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_part_is_written_alone_and_names_its_base(cascade, data, tmp_path, capsys):
    stages = {"upscaler-32": replace(UPSCALER, max_steps=1)}
    config = tiny_config(data, tmp_path / "part", stages, base=str(cascade), start_from=str(cascade))
    out = train(config)
    assert f"M weights from {cascade}" in capsys.readouterr().out
    index = json.loads((out / "model_index.json").read_text())
    assert (out / index["base"]).resolve() == cascade.resolve()
    assert [path.parent.name for path in (out / "cascade").glob("*/*.safetensors")] == ["upscaler-32"]
    for folder in (out, out / "best"):
        assert list(PokeDiffPipeline.from_pretrained(folder).cascade) == list(STAGES)
    PokeDiffPipeline.from_pretrained(out).save_pretrained(tmp_path / "whole")
    assert PokeDiffPipeline.from_pretrained(tmp_path / "whole").sizes == (16, 32)


@pytest.mark.slow
def test_a_base_may_be_given_by_the_name_of_a_shipped_checkpoint(cascade, data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped", lambda _, name="": cascade.parent / name)
    (tmp_path / "cascade").mkdir()  # as the package's own folder in a checkout, which has the name of the model
    monkeypatch.chdir(tmp_path)
    stages = {"upscaler-32": replace(UPSCALER, max_steps=1)}
    out = train(tiny_config(data, tmp_path / "part", stages, base="cascade", start_from="cascade"))
    assert json.loads((out / "model_index.json").read_text())["base"] == "cascade"
    assert list(PokeDiffPipeline.from_pretrained(out).cascade) == list(STAGES)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_trial_runs_every_stage_draws_and_tells_the_time(data, tmp_path, capsys):
    config = tiny_config(data, tmp_path / "run", STAGES, pixel_art=True)
    out = train(with_steps(config, {"base-16": 1_000_000}), trial=True, only=["upscaler-32"])
    said = capsys.readouterr().out
    assert out.name == "run-trial"
    assert (out / "trial.png").is_file()
    assert "base-16: 1,000,000 steps of 8 pictures, about" in said
    assert "to draw 16 px, 32 px with hard edges" in said
    assert not (tmp_path / "run").exists()
    remove_trial(out)
    assert list(out.iterdir()) == []
    (out / "mine").mkdir(parents=True)
    with pytest.raises(PokediffError, match="holds other files"):
        train(config, trial=True)
    assert (out / "mine").is_dir()


def test_a_sample_of_a_data_set_has_all_splits(data):
    pictures = load_pictures(data, 16, report=lambda _: None, limit=8)
    assert {split_of(record) for record in pictures.records} == {"train", "validation", "test"}
    assert 8 <= len(pictures) <= 11


def test_stages_that_fit_a_limit_are_shortened_in_proportion(data, tmp_path):
    steps = {"base-16": 1000, "refiner-16": 600, "upscaler-32": 400}
    long = with_steps(tiny_config(data, tmp_path / "run", STAGES, max_minutes=1.1, fit_limit=True), steps)
    seconds = {"base-16": Pace(0.2, 4), "refiner-16": Pace(0.1, 3), "upscaler-32": Pace(0.1, 5)}
    left = 66 + 12  # seconds
    none = dict.fromkeys(steps)

    def lengths(config: TrainConfig) -> list[int]:
        return [stage.max_steps for stage in config.stages.values()]

    short = fitted(long, tmp_path, seconds, none, left)
    assert lengths(short) == [200, 120, 80]  # 300 s of steps, 1.1 of them with the rest, in 66 s
    assert sum(times(short, seconds, none).values()) == pytest.approx(left)
    assert lengths(fitted(long, tmp_path, dict.fromkeys(seconds, Pace(1e-9)), none, left)) == [1000, 600, 400]
    assert lengths(fitted(long, tmp_path, seconds, none, 11)) == [1, 1, 1]  # less than the closing alone

    (tmp_path / "config.yaml").write_text(dump_yaml(short))
    states = {"base-16": Path("step-00000200"), "refiner-16": Path("step-00000060"), "upscaler-32": None}
    assert lengths(fitted(long, tmp_path, seconds, states, left)) == [200, 120, 80]  # it was stopped
    states = {name: Path(f"step-{stage.max_steps:08}") for name, stage in short.stages.items()}
    done = {name: {"finished": "steps", "steps": stage.max_steps} for name, stage in short.stages.items()}
    (tmp_path / "run.json").write_text(json.dumps({"stages": done}))
    more = fitted(long, tmp_path, seconds, states, left)
    assert lengths(more) == [400, 240, 160]  # it goes on: a quarter of the rest
    assert fitted(long, tmp_path, {}, states, left) == long


def test_the_end_says_what_to_expect_and_the_next_command(data, tmp_path):
    recipe = tiny_config(data, tmp_path / "a run", STAGES, fit_limit=True, max_minutes=1.0)
    recipe = with_steps(recipe, {"base-16": 2000, "refiner-16": 1000, "upscaler-32": 1000})
    paces = dict.fromkeys(recipe.stages, Pace(0.06))
    (tmp_path / "a run").mkdir()
    facts = {name: {"steps": 11} for name in recipe.stages}
    (tmp_path / "a run" / "run.json").write_text(json.dumps({"stages": facts}))
    said = outcome(tmp_path / "a run", recipe, paces)
    assert "After 11 of 2,000 steps, too few" in said
    quoted = f"'{tmp_path / 'a run'}'"
    assert f"pokediff train {data} --out {quoted} --resume auto --max-minutes 6" in said  # 3,967 steps, and a half more
    facts = {name: {"steps": stage.max_steps} for name, stage in recipe.stages.items()}
    (tmp_path / "a run" / "run.json").write_text(json.dumps({"stages": facts}))
    assert "\n" not in outcome(tmp_path / "a run", recipe, paces)


def test_the_time_that_is_told_knows_the_limit(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_minutes=5)
    paces = {"base-16": Pace(1.0, 30.0)}
    states = {"base-16": None}
    for steps, words in ((6000, "; --max-minutes 5 ends it before"), (60, "")):
        long = with_steps(config, {"base-16": steps})
        told = timetable(long, times(long, paces, states), paces, states, "no")
        assert told.endswith(f"to draw 16 px{words}")
        assert "8 pictures/s, fp32" in told


@pytest.mark.slow
def test_a_run_that_fits_a_limit_keeps_its_lengths_when_it_is_resumed(data, tmp_path):
    long = tiny_config(data, tmp_path / "run", STAGES, max_minutes=0.05, fit_limit=True)
    long = with_steps(long, {"base-16": 100_000, "upscaler-32": 50_000})
    out = train(long)
    before = (out / "config.yaml").read_text()
    assert load_yaml(out / "config.yaml", TrainConfig).stages["base-16"].max_steps < 2000
    train(replace(long, max_minutes=1e-9), resume="auto")
    assert (out / "config.yaml").read_text().partition("max_minutes")[0] == before.partition("max_minutes")[0]


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
    ("stages", "words"),
    [
        ({"upscaler-32": UPSCALER}, "upscaler-32 cannot draw with the cascade so far, upscaler-32: size 16"),
        (
            {"refiner-16": REFINER},
            "refiner-16 cannot draw with the cascade so far, refiner-16: no denoiser of 16",
        ),
        ({"base-16": tiny_stage(start_from=("C:/nowhere/pokediff",))}, "C:/nowhere/pokediff is no checkpoint"),
    ],
)
def test_what_cannot_draw_is_named_before_anything_is_trained(data, tmp_path, stages, words):
    with pytest.raises(PokediffError, match=words):
        train(tiny_config(data, tmp_path / "run", stages))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_the_base_is_named(cascade, data, tmp_path):
    config = tiny_config(data, tmp_path / "out", {"upscaler-32": UPSCALER}, base=str(cascade))
    with pytest.raises(PokediffError, match=r"dataset\.channels"):
        train(replace(config, dataset=replace(config.dataset, channels="rgb")))
    with pytest.raises(PokediffError, match="another noise schedule"):
        train(replace(config, diffusion=replace(config.diffusion, noise_shift=2.0)))
    shutil.copytree(data, tmp_path / "data")  # vectors of another encoder, of the same length
    known = load_embeddings(embeddings_path(data, "builtin"), "builtin")
    path = embeddings_path(tmp_path / "data", "clip:other")
    save_embeddings(path, "clip:other", list(known), torch.stack(list(known.values())))
    with pytest.raises(PokediffError, match=r"text_encoder differs .* \(clip:other and builtin\)"):
        train(replace(config, data=(str(tmp_path / "data"),), text_encoder="clip:other"))


@pytest.mark.slow
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
