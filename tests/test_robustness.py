"""The attack of benchmarks/robustness.py in short, and one test for each thing that it found.

A checkpoint, a data set and a page are data from a stranger: reading one runs no code, opens no file outside of it, and
takes no more memory than its files justify.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pokediff.errors import PokediffError
from pokediff.model.checkpoint import INDEX, base_of, write_part_index
from pokediff.model.pipeline import PokeDiffPipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import mutations  # noqa: E402 (benchmarks/ is no package)

WEIGHTS = "cascade/base-16/diffusion_pytorch_model.safetensors"
EVIL_CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of 1 MB."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    mutations.small_checkpoint(folder)
    return folder


@pytest.fixture
def stranger(small, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(small, tmp_path / "stranger")


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(PokediffError, match=words) as error:
        PokeDiffPipeline.from_pretrained(folder)
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------------- a checkpoint from a stranger


@pytest.mark.parametrize(
    ("name", "component", "words"),
    [
        ("cascade", ["pipeline", "Cascade"], "is of 'pipeline'"),
        ("cascade", ["os", "system"], "is of 'os'"),
        ("text_encoder", ["transformers", "AutoModel"], "not CLIPTextModelWithProjection of transformers"),
        ("text_encoder", ["diffusers", "DiffusionPipeline"], "not CLIPTextModelWithProjection"),
        ("scheduler", ["diffusers", "ModularPipeline"], "not DDIMParallelScheduler"),
        ("scheduler", ["diffusers"], "not DDIMParallelScheduler"),
        ("scheduler", [["diffusers"], "DDIMScheduler"], "is of"),
        ("vae", ["diffusers", "AutoencoderKL"], "vae is no component"),
        ("text_encoder_name", {"a": 1}, "must be a text"),
    ],
)
def test_an_index_names_no_other_class(stranger, name, component, words):
    change_json(stranger / INDEX, **{name: component})
    refused(stranger, words)


def test_code_in_a_checkpoint_is_not_run(stranger, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    for place in ("pipeline.py", "modeling.py", "text_encoder/modeling_clip.py", "tokenizer/tokenization.py"):
        (stranger / place).write_text(EVIL_CODE.format(marker=str(marker)))
    change_json(stranger / INDEX, _class_name=["pipeline", "PokeDiffPipeline"])
    monkeypatch.chdir(stranger)
    PokeDiffPipeline.from_pretrained(stranger, trust_remote_code=True, custom_pipeline="pipeline")
    for part, key in (("text_encoder/config.json", "auto_map"), ("tokenizer/tokenizer_config.json", "auto_map")):
        before = (stranger / part).read_text()
        change_json(stranger / part, **{key: {"AutoModel": "modeling_clip.Evil"}})
        refused(stranger, "auto_map is not allowed")
        (stranger / part).write_text(before)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["quantization_config", "attn_implementation", "_attn_implementation_internal"])
def test_a_text_encoder_asks_for_no_other_library(stranger, key):
    change_json(stranger / "text_encoder/config.json", **{key: "someone/kernels"})
    refused(stranger, f"{key} is not allowed")


class Evil:
    """Its pickle makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("part", ["cascade/base-16", "text_encoder"])
def test_no_pickle_is_loaded_in_place_of_weights(stranger, tmp_path, part):
    (weights,) = (stranger / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save({**tensors, "x": Evil(tmp_path / "marker")}, stranger / part / name)
    refused(stranger, "safetensors not found")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_leads_to_no_other_model(stranger, tmp_path, file):
    (stranger / "text_encoder" / file).write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    refused(stranger, "adapters are not read")


@pytest.mark.parametrize(
    "file", [WEIGHTS, "text_encoder/model.safetensors", "tokenizer/tokenizer.json", INDEX, "words.json", "README.md"]
)
def test_a_link_out_of_a_checkpoint_is_not_followed(stranger, small, tmp_path, file):
    outside = shutil.copytree(small, tmp_path / "outside")
    (outside / file).touch()
    (stranger / file).unlink(missing_ok=True)
    (stranger / file).symlink_to(outside / file)
    refused(stranger, "is a link out of the checkpoint")


def test_a_linked_folder_is_not_followed_and_a_download_of_the_hub_is(stranger, small, tmp_path):
    shutil.rmtree(stranger / "cascade" / "base-16")
    (stranger / "cascade" / "base-16").symlink_to(small / "cascade" / "base-16")
    refused(stranger, "is a link out of the checkpoint")

    repository = tmp_path / "models--someone--creatures"
    snapshot = shutil.copytree(small, repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(number), path.parent))
    assert PokeDiffPipeline.from_pretrained(snapshot).sizes == (16, 32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
@pytest.mark.parametrize("file", [WEIGHTS, INDEX, "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
def test_a_pipe_is_not_waited_for(stranger, file):
    (stranger / file).unlink()
    os.mkfifo(stranger / file)
    with pytest.raises(PokediffError):
        PokeDiffPipeline.from_pretrained(stranger)


def test_a_base_is_a_name_or_a_relative_path_and_no_circle(small, tmp_path):
    for base in ("/etc", "C:\\windows", "\\\\host\\share", "C:x", "a\nb", ["x"]):
        (tmp_path / INDEX).write_text(json.dumps({"base": base}))
        refused(tmp_path, "base must be a name or a relative path")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, other in ((one, "../two"), (two, "../one")):
        folder.mkdir()
        write_part_index(folder, other)
    refused(one, "is itself or a part of it")
    with pytest.raises(PokediffError, match="is itself or a part of it"):
        base_of(two)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("cascade/base-16/config.json", {"widths": [10**9]}, "no network of these settings"),
        ("cascade/base-16/config.json", {"blocks": [10**9]}, "blocks are more than"),
        ("cascade/base-16/config.json", {"text_dim": 10**12}, "by config.json"),
        ("cascade/base-16/config.json", {"image_size": 2**20}, "image_size 1048576 is not 1 to 1024"),
        ("cascade/base-16/config.json", {"image_size": 0}, "image_size 0"),
        ("cascade/base-16/config.json", {"in_channels": 2}, "in_channels 2 is none of"),
        ("cascade/base-16/config.json", {"steps": 10**9}, "more than num_train_timesteps"),
        ("cascade/base-16/config.json", {"num_train_timesteps": 10**9}, "within reason"),
        ("cascade/base-16/config.json", {"sigma_data": float("inf")}, "not finite"),
        ("cascade/base-16/config.json", {"patch": 3}, "whole maps"),
        ("cascade/base-16/config.json", {"widths": "wide"}, "widths"),
        ("cascade/upscaler-32/config.json", {"in_channels": 3}, "by config.json"),
        ("cascade/config.json", {"denoisers": ["../../x"]}, "not a valid denoiser name"),
        ("cascade/config.json", {"denoisers": []}, "1 to 64 names"),
        ("cascade/config.json", {"denoisers": ["base-16"] * 2}, "1 to 64 names"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "2 to 100,000"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.5]}, "must be 1000 numbers"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "does not fit"),
        ("text_encoder/config.json", {"vocab_size": 10**9}, "by config.json"),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "../../outside.json"}, "a file elsewhere"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.1/../../x.json"]}, "a file elsewhere"),
    ],
)
def test_a_configuration_asks_for_no_more_than_its_files_hold(stranger, file, values, words):
    change_json(stranger / file, **values)
    refused(stranger, words)


@pytest.mark.parametrize("file", [WEIGHTS, "text_encoder/model.safetensors"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(stranger, file, number):
    change_tensors(stranger / file, lambda tensors: next(iter(tensors.values())).view(-1)[0:1].fill_(number))
    refused(stranger, "holds numbers that are not finite")


def test_weights_of_another_shape_or_kind_are_refused(stranger):
    whole = (stranger / WEIGHTS).read_bytes()
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.update({"out.bias": torch.zeros(2)}))
    refused(stranger, r"out.bias is \(2,\), but by config.json")
    (stranger / WEIGHTS).write_bytes(whole)
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.pop("out.bias"))
    refused(stranger, "out.bias is missing")
    (stranger / WEIGHTS).write_bytes(whole)
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.update({"x": torch.zeros(2)}))
    refused(stranger, "x is no tensor of the network")
    (stranger / WEIGHTS).write_bytes(whole)
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.update({"out.bias": torch.zeros(4, dtype=torch.int64)}))
    refused(stranger, "no floating-point numbers")


@pytest.mark.parametrize("way", ["offsets", "huge", "length", "deep"])
def test_a_header_that_lies_is_refused(stranger, way):
    data = (stranger / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = next(value for name, value in header.items() if name != "__metadata__")
    if way == "offsets":
        entry["data_offsets"] = [0, 2**40]
    elif way == "huge":
        entry["shape"] = [2**40, 2**20]
    text = b'{"a":' * 10_000 + b"}" * 10_000 if way == "deep" else json.dumps(header).encode()
    size = 2**60 if way == "length" else len(text)
    (stranger / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])
    refused(stranger, "is no whole safetensors file")


@pytest.mark.parametrize(
    "file", [INDEX, "cascade/config.json", "cascade/base-16/config.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 10_000, "[]", "null", "\ufeff", "1e999"])
def test_json_of_another_form_is_one_line(stranger, file, text):
    (stranger / file).write_text(text, encoding="utf-8")
    refused(stranger, "cannot be loaded")


def test_parts_that_do_not_fit_each_other_are_refused(stranger, tmp_path):
    vocabulary = json.loads((stranger / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["a</w>"] = 10**6
    (stranger / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused(stranger, "knows words that the model does not")
