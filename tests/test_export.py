from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config

from pokediff.config import DatasetConfig, DiffusionConfig, ModelConfig, RefineConfig, SampleConfig
from pokediff.drawing.export import export, is_exported, load_exported
from pokediff.drawing.sample import sample
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.loop import train

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    base = train(tiny_config(data, folder / "base"))
    model = ModelConfig(widths=(32,), attention=(False,), blocks=(1,), embedding_dim=64, plain=True, sigma_data=0.3)
    rest = dict(diffusion=DiffusionConfig(prediction_type="sample"), refine=RefineConfig(str(base), 0.8))
    refined = train(tiny_config(data, folder / "refined", model=model, **rest))
    rest |= dict(dataset=DatasetConfig(image_size=32), refine=RefineConfig(str(refined), 2.0))
    return train(tiny_config(data, folder / "tiny", model=replace(model, patch=2, upscale=2), **rest))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tiny"
    tried = export(checkpoint, out)
    assert tried["largest_difference"] <= 2
    return out


def test_the_exported_network_draws_the_same_pictures(checkpoint, exported):
    options = dict(num_steps=5, precision="fp32", guidance_scale=2.0, sampler="heun")
    prompts, seeds = ["a red dragon", "a blue cat", "a green turtle"], [1, 2, 3]
    expected = PokeDiffPipeline.from_pretrained(checkpoint).generate(prompts, seeds, **options)
    drawn = load_exported(exported).generate(prompts, seeds, **options)
    assert np.abs(drawn.astype(int) - expected).max() <= 2


def test_the_text_encoder_is_exported_too(checkpoint, exported):
    pipeline = PokeDiffPipeline.from_pretrained(checkpoint)
    session = onnxruntime.InferenceSession((exported / "text_encoder" / "model.onnx").as_posix())
    for prompt in ("a cat", "official artwork of a blue water turtle creature"):
        batch = pipeline.tokenizer([prompt], return_tensors="np")
        values = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        (vector,) = session.run(None, values)
        torch.testing.assert_close(torch.from_numpy(vector), pipeline.encode_prompt([prompt]), rtol=1e-3, atol=1e-4)


def test_sample_draws_with_an_exported_checkpoint(exported, tmp_path):
    assert is_exported(exported)
    settings = dict(prompt=("a red dragon",), checkpoint=str(exported), num_steps=3)
    out = sample(SampleConfig(out=str(tmp_path / "a"), **settings))
    assert (out / "0000.png").is_file()
    assert json.loads((out / "sample.json").read_text())["settings"]["precision"] == "fp32"  # what it really was


def test_a_picture_of_an_exported_network_does_not_depend_on_its_company(exported):
    pipeline, prompts = load_exported(exported), ["a cat", "a dog", "a red dragon", "a blue turtle", "a fox"]
    together = pipeline.generate(prompts, range(5), num_steps=4)
    alone = [pipeline.generate([prompt], [seed], num_steps=4)[0] for seed, prompt in enumerate(prompts)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_only_what_draws_is_exported(checkpoint, exported, monkeypatch):
    assert (checkpoint / "state").is_dir()
    parts = {"unet", "refiner", "upscaler", "scheduler", "text_encoder", "tokenizer"}
    assert {path.name for path in exported.iterdir()} == parts | {"model_index.json", "README.md"}
    assert not list(exported.rglob("diffusion_pytorch_model*"))
    with pytest.raises(PokediffError, match="is no checkpoint"):
        export(exported.parent / "nowhere", exported.parent / "other")
    pipeline = PokeDiffPipeline.from_pretrained(checkpoint)
    monkeypatch.setattr(PokeDiffPipeline, "from_pretrained", lambda *_: pipeline)  # as if the hub were in reach
    with pytest.raises(PokediffError, match="is of the hub"):
        export("somebody/something", exported.parent / "other")


def test_a_checkpoint_is_not_exported_onto_itself(checkpoint):
    with pytest.raises(PokediffError, match="itself"):
        export(checkpoint, checkpoint)
