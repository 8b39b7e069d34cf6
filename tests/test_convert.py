"""scripts/convert_checkpoint.py: a checkpoint of version 0.1 and its converted folder draw the same pictures."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_denoiser
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import save_file

from pokediff.config import DiffusionConfig
from pokediff.errors import PokediffError
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import make_noise_schedule, schedule_sigmas
from pokediff.model.pipeline import PokeDiffPipeline

REFINE_BELOW, UPSCALE_BELOW, GUIDANCE = 1.0, 2.0, 1.5
NEW_FIELDS = ("below", "fast", "gate", "guidance_scale", "norm_free", "steps")  # of config.json, since 0.2
SHAPE = dict(widths=(16,), attention=(False,), blocks=(1,), norm_free=True, sigma_data=0.3, gate=True)


@pytest.fixture(scope="module")
def converter():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "scripts" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BodyOnly(Denoiser):
    """A network of 0.1 that predicts v: what its last layer gives, without preconditioning."""

    def _precondition(self, h, x, timestep):
        return h


def write_old(
    folder: Path, tiny: Path, noise: DiffusionConfig, seed: int = 1, upscaler: bool = True
) -> dict[str, Denoiser]:
    """A checkpoint in the layout of 0.1. Returns its networks: `unet` gives v, the others x0."""
    values = dict(noise_range=noise.range)
    made = make_denoiser(seed, guidance_scale=None, **values)
    networks = {"unet": BodyOnly(**{k: v for k, v in made.config.items() if not k.startswith("_")})}
    networks["unet"].load_state_dict(made.state_dict())
    networks["refiner"] = make_denoiser(2, patch=1, **SHAPE, **values)
    if upscaler:
        networks["upscaler"] = make_denoiser(3, image_size=64, patch=2, upscale=2, **SHAPE, **values)
    vector = PokeDiffPipeline.from_pretrained(tiny).base.null_text
    for name, network in networks.items():
        network.null_text.copy_(vector)
        network.half().float()  # files are float16
        config = {key: value for key, value in network.config.items() if key not in NEW_FIELDS}
        if name == "unet":
            config["sigma_data"] = None
            del config["noise_range"], config["num_train_timesteps"]
        else:
            config["plain"] = True
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config | {"_class_name": "Unet"}))
        tensors = {key.replace("x0_head.", "painted."): t.half() for key, t in network.state_dict().items()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny / part, folder / part)
    DPMSolverMultistepScheduler.from_config(make_noise_schedule(noise).config).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "PokeDiffPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_name": "builtin",
        "guidance_scale": GUIDANCE,
        "refine_below": REFINE_BELOW,
        "upscale_below": UPSCALE_BELOW if upscaler else None,
        **{name: ["pokediff.unet", "Unet"] for name in networks},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return {name: network.eval() for name, network in networks.items()}


@torch.no_grad()
def draw_old(networks: dict[str, Denoiser], noise: DiffusionConfig, seed: int, text, null) -> torch.Tensor:
    """One 64 px picture as version 0.1 drew it: 15 steps of 32 px, then 5 of the upscaler, with v in the scheduler."""
    schedule = make_noise_schedule(noise)
    sigmas = schedule_sigmas(schedule)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 32, 32, generator=generator)

    def run(scheduler, timesteps, x, low_res=None):
        for timestep in timesteps:
            sigma = sigmas[int(timestep)].item()
            alpha, std = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
            if low_res is not None:
                x0 = networks["upscaler"](x, timestep, text, None, low_res)
            elif sigma < REFINE_BELOW:
                x0 = networks["refiner"](x, timestep, text)
            else:
                v, v_null = networks["unet"](x, timestep, text), networks["unet"](x, timestep, null)
                x0 = alpha * x - std * (v_null + GUIDANCE * (v - v_null))
            v = (alpha * x - x0.clamp(-1, 1)) / std
            x = scheduler.step(v, timestep, x).prev_sample
        return x.clamp(-1, 1)

    scheduler = DPMSolverMultistepScheduler.from_config(schedule.config)
    scheduler.set_timesteps(15)
    small = run(scheduler, scheduler.timesteps, x)
    scheduler = DPMSolverMultistepScheduler.from_config(schedule.config)
    scheduler.set_timesteps(math.ceil(5 / (sigmas < UPSCALE_BELOW).double().mean()))
    timesteps = scheduler.timesteps[-5:]
    scheduler.set_begin_index(len(scheduler.timesteps) - 5)
    own = torch.Generator().manual_seed(-((1 + seed) % 2**63))  # the second stream of a seed
    large = small.repeat_interleave(2, -1).repeat_interleave(2, -2)
    x = scheduler.add_noise(large, torch.randn(1, 4, 64, 64, generator=own), timesteps[:1])
    return run(scheduler, timesteps, x, small)


@pytest.mark.slow
@pytest.mark.parametrize("noise_shift", [1.0, 2.0])
def test_old_and_new_draw_the_same(converter, tiny_checkpoint, tmp_path, monkeypatch, capsys, noise_shift):
    noise = DiffusionConfig(noise_shift=noise_shift)
    networks = write_old(tmp_path / "old", tiny_checkpoint, noise)
    command = ["convert_checkpoint.py", str(tmp_path / "old"), "--out", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", command)
    converter.main()
    assert "base-32, refiner-32, upscaler-64" in capsys.readouterr().out

    pipe = PokeDiffPipeline.from_pretrained(tmp_path / "new")
    assert pipe.base.config.noise_range == pytest.approx(noise.range, rel=1e-3)
    assert [part.below for _, part in pipe.cascade.items()] == [math.inf, REFINE_BELOW, UPSCALE_BELOW]
    text, null = pipe.encode_prompt("a red creature"), pipe.encode_prompt("")
    for seed in (0, 7):
        *_, last = pipe.denoise(["a red creature"], [seed], precision="fp32")
        expected = draw_old(networks, noise, seed, text, null)
        assert expected.std() > 0.1  # a picture, not a plain one
        torch.testing.assert_close(last.x0, expected, rtol=0, atol=1 / 127.5)


def test_several_folders_with_one_base_become_one(converter, tiny_checkpoint, tmp_path):
    noise = DiffusionConfig()
    write_old(tmp_path / "small", tiny_checkpoint, noise, upscaler=False)
    write_old(tmp_path / "large", tiny_checkpoint, noise)
    converter.convert([tmp_path / "small", tmp_path / "large"], tmp_path / "new")
    files = [path.parent.name for path in sorted((tmp_path / "new" / "cascade").rglob("*.safetensors"))]
    assert files == ["base-32", "refiner-32", "upscaler-64"]
    assert "Infinity" not in (tmp_path / "new" / "scheduler" / "scheduler_config.json").read_text()


def test_folders_with_different_bases_are_refused(converter, tiny_checkpoint, tmp_path):
    write_old(tmp_path / "a", tiny_checkpoint, DiffusionConfig(), upscaler=False)
    write_old(tmp_path / "b", tiny_checkpoint, DiffusionConfig(), seed=9, upscaler=False)
    with pytest.raises(PokediffError, match="its base-32 is another one than in"):
        converter.convert([tmp_path / "a", tmp_path / "b"], tmp_path / "new")
