"""The commands as a user meets them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from pokediff.config import DatasetConfig, SampleConfig, TrainConfig, dump_yaml, load_yaml
from pokediff.errors import PokediffError


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120)


POKEDIFF = ("-c", "from pokediff.cli import main; main()")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((*POKEDIFF, "--help"), ["scrape", "embed", "train", "sample"]),
        ((*POKEDIFF, "sample", "--help"), ["--prompts-file", "--guidance-interval"]),
        (("train.py", "--help"), ["--max-steps", "--dataset.image-size", "--resume"]),
        (("sample.py", "--help"), ["--sampler", "dpmpp_2m", "--save-frames"]),
        (("scraper/run.py", "--help"), ["--base-url", "--no-forms", "--contact"]),
        ((*POKEDIFF, "embed", "--help"), ["--text-encoder"]),
    ],
)
def test_help(command, words):
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((*POKEDIFF, "smaple"), "unknown verb 'smaple'"),
        (("sample.py", "--promt", "x"), "--prompt"),
        (("sample.py",), "nothing to draw"),
        (("sample.py", "--prompt", "x", "--num-images", "0"), "num_images must be positive"),
        (("sample.py", "--prompt", "x", "--checkpoint", "checkpoints/none"), "no checkpoint"),
        (("sample.py", "--prompt", "x", "--sampler", "magic"), "magic"),
        (("sample.py", "--prompt", "a", "--prompt", "b"), "--prompt is given twice"),
        (("sample.py", "--prompt", "x", "--guidance-interval", "5", "0.1"), "the smaller first"),
        (("train.py", "--preview-every", "0"), "preview_every must be positive"),
        (("scraper/run.py", "--out", "setup.cfg", "--text-encoder", "none"), "setup.cfg"),
        (("scraper/run.py", "--out", "x", "--text-encoder", "magic"), "magic"),
        (("train.py", "--config", "none.yaml"), "none.yaml not found"),
        (("train.py", "--data", "/none"), "none not found"),
        (("train.py", "--dataset.image-size", "40"), "multiple of 16"),
        (("scraper/run.py", "--out", "x", "--base-url", "nonsense"), "is no address"),
        ((*POKEDIFF, "embed", "x", "--text-encoder", "magic"), "unknown kind"),
    ],
)
def test_mistakes_are_answered_in_a_line(command, words):
    done = run(*command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_options_win_over_the_file(tmp_path):
    from pokediff.cli import TrainCommand, _early, _parse

    path = tmp_path / "my.yaml"
    path.write_text("max_steps: 7\nlearning_rate: 1e-3\ndataset:\n  image_size: 64\n")
    args = ["--config", str(path), "--max-steps", "9", "--dataset.flip", "0"]
    base = load_yaml(_early(args, "--config"), TrainConfig)
    command = _parse(TrainCommand, args, "train.py", TrainCommand(base))
    settings = command.settings
    assert (settings.max_steps, settings.learning_rate, settings.dataset.image_size, settings.dataset.flip) == (
        9,
        1e-3,
        64,
        0,
    )


def test_a_configuration_survives_yaml(tmp_path):
    for config in (
        TrainConfig(dataset=DatasetConfig(styles={"artwork": 0.5, "b": 1})),
        SampleConfig(prompt=("é",), guidance_interval=(0.1, 2)),
    ):
        path = tmp_path / "c.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        assert load_yaml(path, type(config)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_stesp: 3", "max_stesp: unknown key"),
        ("dataset:\n  image_sice: 3", "dataset.image_sice: unknown key"),
        ("dataset:\n  image_size: big", "dataset.image_size"),
        ("model:\n  widths: [96, 100, 96]", "multiples of model.head_dim"),
        ("model:\n  widths: [96]", "model.blocks must have as many"),
        ("dataset:\n  styles: {artwork: 0}", "styles.artwork must be positive"),
        ("a: [", "not YAML"),
        ("- 1", "c.yaml"),
    ],
)
def test_a_bad_configuration_is_named_by_its_key(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(PokediffError) as error:
        load_yaml(path, TrainConfig)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    load_yaml(path, TrainConfig)


def test_import_is_quick_quiet_and_light():
    code = "import sys, pokediff; print([m for m in ('torch', 'diffusers', 'numpy', 'requests') if m in sys.modules])"
    begin = time.monotonic()
    done = run("-c", code)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
    assert time.monotonic() - begin < 5
