"""The commands as a user meets them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from pokediff import __version__
from pokediff.cli import COMMANDS, SampleOptions, main, parse, refuse_duplicates, sample_defaults
from pokediff.config import DatasetConfig, EvaluateConfig, SampleConfig, Sampling, TrainConfig, dump_yaml, load_yaml
from pokediff.errors import PokediffError
from pokediff.training import launch
from pokediff.training.launch import missing_processes


def answer(capsys, *args: str, code: int) -> str:
    """What a command prints; it must exit with `code`."""
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    assert exit.value.code == code
    return re.sub(r"[│╭╮╰╯─\s]+", " ", "".join(capsys.readouterr()))


# ------------------------------------------------------------------------------------------------ help and mistakes


def test_the_entry_point_starts_quietly_and_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "pokediff"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize("script", ["sample.py", "train.py", "scraper/run.py"])
def test_the_scripts_are_the_commands(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {script}" in done.stdout


def test_importing_the_package_loads_nothing_large():
    code = (
        "import sys, pokediff.cli; print([m for m in ('torch', 'diffusers', 'open_clip', 'bs4') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_importing_the_package_turns_reports_of_onnx_runtime_off(given, kept):
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {"ORT_DISABLE_TELEMETRY": given} if given else {}
    code = "import os, pokediff; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (kept, "")


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"pokediff {__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "sample",
            ["[PROMPT ...]", "-n INT, --num-images INT, --num-images-per-prompt", "--steps INT", "--cfg", "--size"],
        ),
        ("sample", ["--guidance-interval FLOAT FLOAT", "--hard-alpha, --no-hard-alpha", "--fast", "--from-json"]),
        ("train", ["[FOLDER]", "--stages NAME ...", "--max-steps", "--trial", "--data STR ...", "--dataset.flip"]),
        ("distill", ["--checkpoint", "--steps INT", "--data STR ..."]),
        ("evaluate", ["--size INT", "--features STR ..."]),
        ("export", ["--size INT", "--out PATH"]),
        ("embed", ["FOLDER", "--text-encoder"]),
        ("scrape", ["--base-url", "--no-forms", "--contact"]),
        ("demo", ["--port", "--size"]),
        ("compare", ["FOLDER ..."]),
        ("survey", ["--collect", "--examples"]),
    ],
)
def test_help_is_plain(capsys, command, words):
    text = answer(capsys, command, "--help", code=0)
    assert all(word in text for word in words), text
    assert "None" not in re.sub(r"; None: all", "", text)
    assert "stages.base-32.max-steps" not in text
    assert not re.search(r"\(default: [^()]*\) \(default", text)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("smaple",), "unknown command 'smaple'; did you mean sample?"),
        (("paint",), "commands: scrape, embed"),
        (("sample", "--promt", "x"), "--prompt"),
        (("sample",), "no prompt"),
        (("sample", "a \udcff cat"), "prompt must be UTF-8 text"),
        (("sample", "a cat", "--negative-prompt", "a \udcff dog"), "negative_prompt must be UTF-8 text"),
        (("sample", "x", "-n", "0"), "num_images_per_prompt must be positive"),
        (("sample", "x", "--checkpoint", "checkpoints/none"), "checkpoints/none"),
        (("sample", "x", "--checkpoint", "creature"), "creature"),
        (("sample", "x", "--sampler", "magic"), "magic"),
        (("sample", "x", "--seed", "new"), "--seed 'new' is not a whole number"),
        (("sample", "x", "--seed", "1e20"), "--seed '1e20' is not a whole number"),
        (("sample", "x", "--seed", str(10**20)), "seed must be from 0 to 2^63 - 1"),
        (("sample", "x", "--guidance-interval", "1"), "--guidance-interval '1' is not FLOAT FLOAT"),
        (("sample", "x", "--sizee", "32"), "unknown option --sizee: did you mean --size?"),
        (("sample", "x", "--width", "32"), "unknown option --width: use --size"),
        (("sample", "x", "--nothing-like-it", "32"), "unknown option --nothing-like-it (pokediff sample --help lists"),
        (("sample", "x", "--steps"), "--steps needs a value"),
        (("sample", "a", "blue", "turtle"), '3 prompts of one word each: write "a blue turtle" in quotes'),
        (("a blue turtle",), 'to draw: pokediff sample "a blue turtle"'),
        (("--size", "64"), "the command comes before its options"),
        (("trian", "d"), "did you mean train?"),
        (("train", ".", "more"), "unexpected 'more': join data sets with --data A B and --config FILE"),
        (("train", ".", "--lr", "1"), "unknown option --lr: use --stages.base-32.learning-rate"),
        (("train", ".", "--size", "48"), "--size '48' is none of 32, 64, 128"),
        (("train", "--data", "d"), "without it: pokediff train d"),
        (("train", "--config", "."), ". is a folder, not a file"),
        (("embed",), "missing: FOLDER"),
        (("sample", "--prompt", "a", "--prompt", "b"), "--prompt is given twice"),
        (("sample", "x", "--guidance-interval", "5", "0.1"), "the smaller first"),
        (("sample", "--from-json", "none.json"), "none.json not found"),
        (("train",), "give a folder of pictures, or --config FILE"),
        (("train", __file__), "is a file and not a folder of pictures: give the folder it is in"),
        (("train", "none"), "none not found"),
        (("train", "--config", "none.yaml"), "none.yaml not found"),
        (("train", "--config", "pokemon", "--stages", "base-16"), "--stages base-16: not in this configuration"),
        (("train", "--config", "pokemon", "--stages.base-32.preview-every", "0"), "preview_every must be positive"),
        (("train", "--config", "pokemon", "--stages.base-32.image-size", "40"), "multiple of 16"),
        (("train", "--config", "pokemon", "--stages.base-16.max-steps", "3"), "base-16"),
        (("train", "--config", "pokemon", "--data", "/none", "--out", "/none/x"), "none"),
        (("distill", "--steps", "few"), "whole number"),
        (("scrape", "--out", "x", "--text-encoder", "magic"), "magic"),
        (("scrape", "--out", "x", "--base-url", "nonsense"), "is not a URL"),
        (("embed", "x", "--text-encoder", "magic"), "x not found"),
        (("evaluate", "--number", "1"), "number must be at least 2"),
        (("survey", "--images", "x", "--questions", "likeness"), "--questions likeness needs --examples"),
    ],
)
def test_mistakes_are_answered_in_a_line(capsys, monkeypatch, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    text = answer(capsys, *args, code=2)
    assert words in text
    assert text.startswith("error: ")
    assert "│" not in text


def test_an_archive_is_to_be_unpacked(capsys, tmp_path):
    (tmp_path / "pics.zip").write_bytes(b"PK")
    words = "pics.zip is a file and not a folder of pictures: unpack it, and give its folder"
    assert words in answer(capsys, "train", str(tmp_path / "pics.zip"), code=2)


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_a_console_that_is_not_utf8(tmp_path, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for args, code in ((["train", "--help"], 0), (["sample", "--help"], 0), (["train", "火のé"], 2)):
        command = [sys.executable, "-m", "pokediff", *args]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------ options


def options_of(*args: str) -> SampleConfig:
    return parse(SampleOptions, args, "sample", sample_defaults(list(args))).settings


@pytest.mark.parametrize(
    "args",
    [
        ("a", "b", "-n", "4", "--steps", "9", "--cfg", "3", "--size", "32"),
        ("-n", "4", "--num-steps", "9", "--guidance-scale", "3", "--size", "32", "a", "b"),
        ("--num-images-per-prompt", "4", "a", "b", "--num-inference-steps=9", "--cfg=3.0", "--size=32"),
        ("--num_images", "4", "--num_inference_steps", "9", "--cfg", "3", "--size", "32", "--", "a", "b"),
    ],
)
def test_aliases_and_bare_prompts_anywhere(args):
    options = parse(SampleOptions, args, "sample")
    assert options.prompts == ("a", "b")
    assert options.settings.num_images_per_prompt == 4
    expected = Sampling(size=32, num_inference_steps=9, guidance_scale=3.0)
    assert options.settings.sampling == expected


def test_flags_without_a_value():
    assert options_of("x").hard_alpha is None
    assert options_of("x", "--hard-alpha").hard_alpha is True
    assert options_of("x", "--no-hard-alpha", "--no-clean", "--fast").hard_alpha is False
    assert options_of("x", "--no-clean").clean is False
    assert options_of("x", "--fast").sampling.fast is True


@pytest.mark.parametrize(
    "args",
    [
        ("--seed", "1", "--seed", "1"),
        ("--steps", "4", "--num-inference-steps", "5"),
        ("-n", "4", "--num-images=5"),
        ("--guidance_scale", "1", "--cfg", "2"),
    ],
)
def test_an_option_given_twice_is_an_error_by_any_name(args):
    with pytest.raises(PokediffError, match="is given twice"):
        refuse_duplicates(args)


def test_evaluate_takes_the_same_words():
    options = parse(EvaluateConfig, ["--steps", "9", "--cfg", "1", "--size", "32", "--fast"], "evaluate")
    assert options.sampling == Sampling(size=32, num_inference_steps=9, guidance_scale=1.0, fast=True)


def test_settings_of_a_file_are_overridden_by_options(tmp_path):
    settings = {"prompt": ["a cat"], "seed": 7, "hard_alpha": True, "sampling": {"size": 32, "guidance_scale": 3}}
    (tmp_path / "sample.json").write_text(json.dumps({"settings": settings}))
    config = options_of("--from-json", str(tmp_path / "sample.json"), "--seed", "8", "--steps", "4")
    assert config == SampleConfig(
        prompt=("a cat",), seed=8, hard_alpha=True, sampling=Sampling(32, guidance_scale=3, num_inference_steps=4)
    )


@pytest.mark.slow
def test_the_command_draws_with_what_it_is_told(tiny_checkpoint, tmp_path, capsys):
    words = ["--checkpoint", str(tiny_checkpoint), "--size", "32", "--steps", "2", "-n", "2", "--animations", "apng"]
    main(["sample", "a red creature", *words, "--seed", "3", "--out", str(tmp_path / "a")])
    assert f"2 pictures, seed 3: {tmp_path / 'a'}" in capsys.readouterr().out
    main(["sample", "--from-json", str(tmp_path / "a" / "sample.json"), "--out", str(tmp_path / "b")])
    for name in ("0000.png", "0001.png", "denoising.apng"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def trained(monkeypatch):
    """What `train` would have been called with: the training itself has tests of its own."""
    calls = []
    monkeypatch.setattr("pokediff.training.stages.train", lambda *args: calls.append(args))
    return calls


def test_every_key_of_a_configuration_is_an_option(trained):
    words = ["--data", "a", "b", "--stages.base-32.max-steps", "7", "--stages.base-32.model.widths", "32", "32", "64"]
    main(
        ["train", "--config", "pokemon", *words, "--dataset.flip", "0", "--stages", "base-32", "upscaler-64", "--trial"]
    )
    ((config, resume, only, trial),) = trained
    assert config.data == ("a", "b")
    assert config.stages["base-32"].max_steps == 7
    assert config.stages["base-32"].model.widths == (32, 32, 64)
    assert config.stages["upscaler-64"].max_steps > 7
    assert config.dataset.flip == 0
    assert config.out == "checkpoints/pokemon"
    assert (resume, only, trial) == ("never", ("base-32", "upscaler-64"), True)


def test_max_steps_shortens_the_chosen_stages_in_proportion(trained):
    full = load_yaml(ROOT / "configs" / "pokemon.yaml", TrainConfig).stages
    main(["train", "--config", str(ROOT / "configs/pokemon.yaml"), "--max-steps", "515", "--stages", "base-32"])
    stages = trained[0][0].stages
    base = stages["base-32"]
    assert base.max_steps == 515
    assert base.decay_steps == int(full["base-32"].decay_steps * 515 / full["base-32"].max_steps)
    assert base.warmup_steps == int(full["base-32"].warmup_steps * 515 / full["base-32"].max_steps)
    assert stages["refiner-32"] == full["refiner-32"]


@pytest.mark.parametrize("order", [("FOLDER", "--max-minutes", "5"), ("--max-minutes", "5", "FOLDER")])
def test_a_folder_before_or_after_the_options(trained, data, order):
    main(["train", *(word.replace("FOLDER", str(data)) for word in order)])
    ((config, *_),) = trained
    assert config.data == (data.as_posix(),)
    assert config.max_minutes == 5
    assert config.out == "checkpoints/creatures"
    assert {stage.image_size for stage in config.stages.values()} == {32}


def test_the_size_of_a_folder_can_be_chosen(trained, data):
    main(["train", str(data), "--size", "64", "--stages", "base-32"])
    main(["train", str(data), "--size", "128", "--start-from", "pokediff", "--stages", "base-32"])
    sizes = [{stage.image_size for stage in config.stages.values()} for config, *_ in trained]
    assert sizes == [{32, 64}, {32, 64, 128}]


def test_distill_makes_a_run_for_a_few_step_base(trained, tiny_checkpoint):
    main(["distill", "--checkpoint", str(tiny_checkpoint), "--steps", "2", "--data", "d", "--max-steps", "30"])
    ((config, *_),) = trained
    ((name, stage),) = config.stages.items()
    assert name == "base-32-fast"
    assert (stage.fast, stage.model.steps, stage.max_steps) == (True, 2, 30)
    assert config.data == ("d",)


@pytest.mark.slow
def test_one_step_of_a_stage_from_the_command_line(data, tmp_path, capsys):
    model = ["--stages.base-32.model.widths", "16", "16", "32", "--stages.base-32.model.head-dim", "16"]
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--no-compile", "--threads", "1"]
    main(["train", "--config", "pokemon", "--stages", "base-32", "--max-steps", "1", *words, *model])
    assert (tmp_path / "run" / "cascade" / "base-32" / "config.json").is_file()
    assert "base-32: 1 steps" in capsys.readouterr().out


def test_processes_that_accelerate_did_not_start_are_counted(monkeypatch):
    for name in (*launch.STARTED_BY, "ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert missing_processes() == []
    code = "from pokediff.training.launch import missing_processes; print(missing_processes())"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"  # as accelerate's launcher
    for options, printed in ((["--num_processes", "2"], "2"), ([], "--num_processes N on its command line")):
        command = [sys.executable, "-c", parent, *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert printed in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------ configurations


def test_a_configuration_survives_yaml(tmp_path):
    for config in (
        TrainConfig(dataset=DatasetConfig(styles={"artwork": 0.5, "b": 1})),
        SampleConfig(prompt=("é",), sampling=Sampling(guidance_interval=(0.1, 2))),
    ):
        path = tmp_path / "c.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        assert load_yaml(path, type(config)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_stesp: 3", "max_stesp: unknown key"),
        ("stages:\n  base-32:\n    image_sice: 3", "stages.base-32.image_sice: unknown key"),
        ("stages:\n  base-32:\n    image_size: big", "stages.base-32.image_size"),
        ("stages:\n  base-32:\n    model:\n      widths: [96, 100, 96]", "multiples of model.head_dim"),
        ("stages:\n  base-32:\n    model:\n      widths: [96]", "model.blocks must have as many"),
        ("stages:\n  Base 32: {}", "must be small letters"),
        ("dataset:\n  styles: {artwork: 0}", "styles.artwork must be positive"),
        ("a: [", "not YAML"),
        ("- 1", "c.yaml"),
        ("extends: none.yaml", "none.yaml not found"),
        ("extends: c.yaml", "extends itself"),
    ],
)
def test_a_bad_configuration_is_named_by_its_key(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(PokediffError) as error:
        load_yaml(path, TrainConfig)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_extends_another(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\nstages:\n  b: {max_steps: 5, batch_size: 8}\n  c: {max_steps: 6}\n")
    (tmp_path / "d.yaml").write_text("extends: a.yaml\nprecision: fp32\nstages:\n  b: {max_steps: 9}\n")
    config = load_yaml(tmp_path / "d.yaml", TrainConfig)
    assert (config.seed, config.precision, list(config.stages)) == (3, "fp32", ["b", "c"])
    assert [(stage.max_steps, stage.batch_size) for stage in config.stages.values()] == [(9, 8), (6, 32)]
    (tmp_path / "e.yaml").write_text("extends: d.yaml\nstages:\n  c: null\n  b: {batch_size: null}\n")
    (stage,) = load_yaml(tmp_path / "e.yaml", TrainConfig).stages.values()
    assert (stage.max_steps, stage.batch_size) == (9, 32)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path):
    assert load_yaml(path, TrainConfig).stages


def test_the_demo_listens_where_the_environment_says(monkeypatch):
    started = []
    monkeypatch.setitem(COMMANDS, "demo", replace(COMMANDS["demo"], run=started.append))
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "8000")
    runpy.run_path(str(ROOT / "app.py"), run_name="__main__")
    assert (started[0].host, started[0].port) == ("0.0.0.0", 8000)
