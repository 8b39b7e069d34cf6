from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_denoiser
from safetensors.torch import load_file

from pokediff.config import SampleConfig, Sampling
from pokediff.data.images import premultiply
from pokediff.drawing.export import OnnxDenoiser, export, in_steps, is_exported, load_exported, store_small
from pokediff.drawing.sample import sample
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.checkpoint import write_part_index
from pokediff.model.pipeline import PokeDiffPipeline

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tiny"
    assert export(tiny_checkpoint, out)["largest_difference"] <= 2
    return out


@pytest.mark.parametrize("size", [32, 64])
def test_drawings_are_at_most_two_levels_apart(tiny_pipe, exported, size):
    sampling = Sampling(size=size, num_inference_steps=5, precision="fp32", guidance_scale=2.0, sampler="heun")
    prompts, seeds = ["a red creature", "a blue cat", "a green turtle"], [1, 2, 3]
    expected, drawn = (
        premultiply(pipeline.generate(prompts, seeds, sampling)).astype(int)
        for pipeline in (tiny_pipe, load_exported(exported))
    )
    assert expected.std() > 20
    assert np.abs(drawn - expected).max() <= 2


def test_every_denoiser_returns_x0(tiny_pipe, exported):
    pipeline = load_exported(exported)
    text = tiny_pipe.encode_prompt(["a red creature", "a blue creature", ""])
    for name, denoiser in pipeline.cascade.items():
        expected = tiny_pipe.cascade[name]
        assert isinstance(denoiser, OnnxDenoiser)
        assert denoiser.below == expected.below
        side, factor = denoiser.config.image_size, denoiser.config.upscale
        x, timesteps = torch.randn(3, 4, side, side), torch.tensor([0.0, 100.5, 400.0])
        low_res = torch.rand(3, 4, side // factor, side // factor) if factor > 1 else None
        with torch.inference_mode():
            ours = expected(x, timesteps, text, None, low_res)
        torch.testing.assert_close(denoiser(x, timesteps, text, None, low_res), ours, rtol=1e-3, atol=1e-3)


def test_the_text_encoder_is_exported_too(tiny_pipe, exported):
    session = onnxruntime.InferenceSession((exported / "text_encoder" / "model.onnx").as_posix())
    for prompt in ("a cat", "official artwork of a blue water turtle creature"):
        batch = tiny_pipe.tokenizer([prompt], return_tensors="np")
        values = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        (vector,) = session.run(None, values)
        torch.testing.assert_close(torch.from_numpy(vector), tiny_pipe.encode_prompt(prompt), rtol=1e-3, atol=1e-4)


def test_sample_draws_with_an_exported_checkpoint(exported, tmp_path):
    assert is_exported(exported)
    config = SampleConfig(prompt=("a cat",), checkpoint=str(exported), out=str(tmp_path / "a"))
    out = sample(config)
    assert (out / "0000.png").is_file()
    stored = json.loads((out / "sample.json").read_text())["settings"]["sampling"]
    assert (stored["precision"], stored["size"]) == ("fp32", 64)


def test_only_what_draws_is_exported(tiny_checkpoint, exported):
    assert not is_exported(tiny_checkpoint)
    names = {"cascade", "scheduler", "text_encoder", "tokenizer", "model_index.json"}
    assert {path.name for path in exported.iterdir()} - {"README.md"} == names
    assert not list(exported.rglob("diffusion_pytorch_model*"))


def test_a_size_limits_the_export_and_a_part_is_exported_whole(tiny_checkpoint, tiny_pipe, tmp_path):
    part, out = tmp_path / "part", tmp_path / "small"
    Cascade({"refiner-32": tiny_pipe.cascade["refiner-32"]}).save_pretrained(part / "cascade")
    write_part_index(part, os.path.relpath(tiny_checkpoint, part))
    assert export(part, out, size=32)["largest_difference"] <= 2
    assert list(load_exported(out).cascade) == ["base-32", "refiner-32"]
    shutil.rmtree(tmp_path / "part")
    assert load_exported(out).sizes == (32,)


def test_the_few_step_denoisers_alone_can_be_exported(tiny_checkpoint, tiny_pipe, tmp_path):
    student = make_denoiser(1, steps=3, guidance_scale=1.0, fast=True)
    student.load_state_dict(tiny_pipe.cascade["base-32"].state_dict())
    Cascade({"base-32-fast": student}).save_pretrained(tmp_path / "part" / "cascade")
    write_part_index(tmp_path / "part", os.path.relpath(tiny_checkpoint, tmp_path / "part"))
    assert export(tmp_path / "part", tmp_path / "few", size=32, fast=True)["largest_difference"] <= 2
    few, whole = load_exported(tmp_path / "few"), PokeDiffPipeline.from_pretrained(tmp_path / "part")
    assert list(few.cascade) == ["refiner-32", "base-32-fast"]
    drawn, expected = (
        premultiply(pipe.generate(["a red creature"], [1], Sampling(size=32, precision="fp32", fast=fast))).astype(int)
        for pipe, fast in ((few, False), (whole, True))
    )
    assert np.abs(drawn - expected).max() <= 2


def test_what_cannot_be_exported_is_named(tiny_checkpoint, exported, tmp_path):
    with pytest.raises(PokediffError, match="itself"):
        export(tiny_checkpoint, tiny_checkpoint)
    with pytest.raises(PokediffError, match="is no checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "other")
    with pytest.raises(PokediffError, match="draws 32, 64 px"):
        export(tiny_checkpoint, tmp_path / "other", size=128)
    assert not (tmp_path / "other").exists()
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "cascade" / "base-32" / "model.onnx").unlink()
    with pytest.raises(PokediffError, match="not found"):
        load_exported(broken)


def test_an_export_is_no_checkpoint_of_pytorch(exported):
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(exported)


# ------------------------------------------------------------------------------------------------- weights in 8 bits


@pytest.fixture
def round_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("round_weights")


@pytest.mark.parametrize("scale", [1.0, 0.01, 3e-7])  # the last one is within float16's smallest numbers
@pytest.mark.parametrize("shape", [(24, 8, 3, 3), (24, 40)])
def test_rounded_weights_are_multiples_of_a_step_and_near(round_weights, shape, scale):
    weights = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights[3] = 0
    rounded = round_weights.rounded(weights.half())
    for values in (rounded.float().numpy(), rounded.float().numpy().swapaxes(0, 1)):
        multiples, steps = in_steps(values)
        assert multiples.dtype == np.int8
        assert np.array_equal(multiples * steps, values)  # float32, as a runtime computes it
    error = (rounded.double() - weights.double()).flatten(1).abs().amax(1)
    assert (error <= 0.6 * weights.flatten(1).abs().amax(1) / 112 + 2**-25).all()


def test_other_weights_are_no_multiples(round_weights):
    weights = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).half()
    assert in_steps(weights.float().numpy()) is None
    almost = round_weights.rounded(weights).float().numpy()
    almost[5, 39] *= 1.01
    assert in_steps(almost) is None


def test_a_rounded_checkpoint_takes_less_room_and_draws_the_same(
    round_weights, tiny_checkpoint, exported, tmp_path, monkeypatch
):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "rounded")
    shutil.copytree(exported, tmp_path / "plain")
    monkeypatch.setattr("sys.argv", ["round_weights", str(checkpoint), "base-32"])
    round_weights.main()
    weights = checkpoint / "cascade" / "base-32" / "diffusion_pytorch_model.safetensors"
    once = weights.read_bytes()
    round_weights.main()
    assert weights.read_bytes() == once
    assert export(checkpoint, tmp_path / "small", size=32, small=True)["largest_difference"] <= 2
    for name in ("base-32", "refiner-32"):
        store_small(tmp_path / "plain" / "cascade" / name / "model.onnx")
    of = {
        (kind, name): (tmp_path / kind / "cascade" / name / "model.onnx").stat().st_size
        for kind in ("plain", "small")
        for name in ("base-32", "refiner-32")
    }
    numbers = sum(value.numel() for value in load_file(weights).values() if value.ndim > 1 and value.numel() >= 256)
    assert of["plain", "base-32"] - of["small", "base-32"] > 0.8 * numbers  # a byte each, less the steps and nodes
    assert of["plain", "refiner-32"] == of["small", "refiner-32"]
