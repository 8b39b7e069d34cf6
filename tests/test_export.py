from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from pokediff.config import SampleConfig, Sampling
from pokediff.data.images import premultiply
from pokediff.drawing.export import OnnxDenoiser, export, is_exported, load_exported
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
