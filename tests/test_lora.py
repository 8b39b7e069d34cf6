"""SDXL with LoRA, on a tiny pipeline in the real format."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, write_data
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing import event_accumulator
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pokediff import cli
from pokediff.baselines import lora
from pokediff.baselines.lora import LORA_WEIGHTS, LoraGenerator, load_lora, load_sdxl, train_lora
from pokediff.config import BaselineConfig, LoraConfig, Sampling
from pokediff.data.dataset import TrainingBatches
from pokediff.errors import PokediffError

CONFIG = ROOT / "configs" / "baselines" / "sdxl-lora.yaml"
CPU = torch.device("cpu")
FEW_STEPS = Sampling(num_inference_steps=2)
PROMPTS = ["a red round creature", "a blue square creature", "a green creature"]


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of letters, without merges."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=77)


def make_pipeline(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """SDXL with random weights: 32 px by default, latents of 8x8."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        cross_attention_dim=32,  # the hidden states of both text encoders
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,  # six time ids and the pooled text
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionXLPipeline(
        vae,
        CLIPTextModel(text),
        CLIPTextModelWithProjection(text),
        tokenizer,
        make_tokenizer(),
        unet,
        schedule,
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    """The folder of a tiny SDXL."""
    folder = tmp_path_factory.mktemp("sdxl")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A data set of 16 pictures of 40 px, in training all of them."""
    return write_data(tmp_path_factory.mktemp("data") / "few", 16)


@pytest.fixture(scope="module")
def trained(sdxl, few, tmp_path_factory) -> Path:
    """Two steps by the command and the shipped configuration."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    options = ["--data", few, "--out", out, "--lora.model", sdxl, "--image-size", 48, "--max-steps", 2]
    options += ["--precision", "fp32", "--learning-rate", 0.01, "--log-every", 1]
    cli.main(["baseline", "--config", str(CONFIG), *map(str, options)])
    return out


@pytest.fixture(scope="module")
def visible(trained, tmp_path_factory) -> Path:
    """That LoRA with large B matrices, which start from zero: a change that two steps cannot make."""
    folder = tmp_path_factory.mktemp("runs") / "visible"
    folder.mkdir()
    weights, generator = load_file(trained / LORA_WEIGHTS), torch.Generator().manual_seed(0)
    for name, matrix in weights.items():
        if ".up." in name:
            weights[name] = torch.randn(matrix.shape, generator=generator)
    save_file(weights, folder / LORA_WEIGHTS)
    (folder / "baseline.json").write_bytes((trained / "baseline.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def generator(visible) -> LoraGenerator:
    return load_lora(visible, CPU)


def make_config(sdxl: Path, data: Path, out: Path, **changes) -> BaselineConfig:
    """Two steps of two batches of one picture; `lora` holds changes of the LoRA's own settings."""
    settings = dict(model=str(sdxl), gradient_accumulation=2, validation_images=1) | changes.pop("lora", {})
    values = dict(
        system="sdxl-lora",
        data=(str(data),),
        out=str(out),
        lora=LoraConfig(**settings),
        max_steps=2,
        batch_size=1,
        learning_rate=1e-3,
        precision="fp32",
        log_every=1,
    )
    return BaselineConfig(**{**values, **changes})


# --------------------------------------------------------------------------------------------------------- training


def test_the_command_writes_the_lora_and_what_made_it(trained, sdxl):
    weights = load_file(trained / LORA_WEIGHTS)
    layers = 4 * 2 * (1 + 2 + 1)  # to_q, to_k, to_v, to_out of two attentions in every transformer block
    assert len(weights) == 2 * layers
    assert all(name.startswith("unet.") and matrix.dtype == torch.float32 for name, matrix in weights.items())
    assert all(4 in matrix.shape and matrix.abs().max() > 0 for matrix in weights.values())  # B, too: trained
    settings = json.loads((trained / "baseline.json").read_text())
    assert settings["lora"]["model"] == str(sdxl)
    assert settings["image_size"] == 48
    sheet = Image.open(trained / "previews" / "validation-00000002.png")
    assert sheet.size == (3 * 48 + 2 * 2, 48)
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    curves = event_accumulator.EventAccumulator(str(trained / "tensorboard")).Reload().Tags()
    assert curves["images"] == ["validation"]
    assert "loss" in curves["scalars"]


def test_only_the_adapter_moves(sdxl, few, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(lora, "load_sdxl", lambda *options: loaded.append(load_sdxl(*options)) or loaded[0])
    train_lora(make_config(sdxl, few, tmp_path / "run", learning_rate=0.1))
    (trained,), before = loaded, StableDiffusionXLPipeline.from_pretrained(sdxl)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(trained, part).state_dict()
        own = {name.replace(".base_layer", ""): value for name, value in weights.items() if ".lora_" not in name}
        torch.testing.assert_close(own, dict(getattr(before, part).state_dict()), rtol=0, atol=0)
    moved = [name for name, parameter in trained.unet.named_parameters() if parameter.requires_grad]
    assert moved
    assert all(".lora_" in name for name in moved)
    frozen = (trained.vae, trained.text_encoder, trained.text_encoder_2)
    assert not any(parameter.requires_grad for part in frozen for parameter in part.parameters())


def test_a_step_is_several_batches(sdxl, few, tmp_path, monkeypatch):
    dealt, clipped = [], []
    deal, clip = TrainingBatches.__getitem__, Accelerator.clip_grad_norm_
    monkeypatch.setattr(TrainingBatches, "__getitem__", lambda self, step: dealt.append(step) or deal(self, step))
    monkeypatch.setattr(
        Accelerator, "clip_grad_norm_", lambda self, *given: clipped.append(given) or clip(self, *given)
    )
    train_lora(make_config(sdxl, few, tmp_path / "run", lora={"gradient_accumulation": 3}, max_grad_norm=0.5))
    assert dealt == [0, 1, 2, 3, 4, 5]
    assert [limit for _, limit in clipped] == [0.5, 0.5]
    assert all(len(parameters) == len(load_file(tmp_path / "run" / LORA_WEIGHTS)) for parameters, _ in clipped)


def test_a_step_has_the_mean_gradient_of_its_batches(sdxl, few, tmp_path, monkeypatch):
    gradients, clip = [], Accelerator.clip_grad_norm_

    def keep(self, parameters, limit):
        gradients.append([parameter.grad.clone() for parameter in parameters])
        return clip(self, parameters, limit)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", keep)
    for number in (1, 2):  # with a learning rate that changes nothing in float32
        settings = {"gradient_accumulation": number}
        config = make_config(sdxl, few, tmp_path / str(number), lora=settings, max_steps=3 - number)
        train_lora(replace(config, learning_rate=1e-30))
    for first, second, both in zip(*gradients, strict=True):
        torch.testing.assert_close((first + second) / 2, both, rtol=1e-4, atol=1e-8)


def test_runs_are_reproducible(sdxl, few, tmp_path):
    for name in ("a", "b"):
        train_lora(make_config(sdxl, few, tmp_path / name))
    assert (tmp_path / "a" / LORA_WEIGHTS).read_bytes() == (tmp_path / "b" / LORA_WEIGHTS).read_bytes()


def test_bfloat16_keeps_the_adapter_in_float32(sdxl, few, tmp_path):
    out = train_lora(make_config(sdxl, few, tmp_path / "run", precision="bf16"))
    weights = load_file(out / LORA_WEIGHTS)
    assert all(matrix.dtype == torch.float32 and matrix.isfinite().all() for matrix in weights.values())
    assert load_lora(out, CPU).pipeline.unet.dtype == torch.float32


def test_velocities_are_predicted_where_the_scheduler_says_so(few, tmp_path):
    make_pipeline("v_prediction").save_pretrained(tmp_path / "v")
    train_lora(make_config(tmp_path / "v", few, tmp_path / "run"))
    make_pipeline("sample").save_pretrained(tmp_path / "sample")
    with pytest.raises(PokediffError, match="only epsilon and v_prediction"):
        train_lora(make_config(tmp_path / "sample", few, tmp_path / "other"))


def test_the_loss_is_that_of_the_noise(sdxl):
    """For a U-Net that knows the noise it is zero, and conditions are those of SDXL."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    schedule, given = DDPMScheduler.from_config(pipeline.scheduler.config), {}
    x0 = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = []
    encode = pipeline.vae.encode

    def unet(noisy, timesteps, text, added_cond_kwargs, return_dict):
        given.update(added_cond_kwargs, text=text, timesteps=timesteps)
        kept = schedule.alphas_cumprod[timesteps][:, None, None, None]
        return ((noisy - kept**0.5 * latents[0]) / (1 - kept) ** 0.5,)

    class Posterior:
        def __init__(self, x):
            self.latent_dist = self
            self.mean = encode(x).latent_dist.mean

        def sample(self, generator):
            latents.append(self.mean * pipeline.vae.config.scaling_factor)
            return self.mean

    pipeline.vae.encode = Posterior
    rows = [("a red creature", 475), ("a blue creature", 96)]
    loss = lora.denoising_loss(pipeline, unet, schedule, x0, rows, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert given["time_ids"].tolist() == [[475, 475, 0, 0, 32, 32], [96, 96, 0, 0, 32, 32]]
    text, _, pooled, _ = pipeline.encode_prompt([prompt for prompt, _ in rows], do_classifier_free_guidance=False)
    torch.testing.assert_close(given["text"], text)
    torch.testing.assert_close(given["text_embeds"], pooled)


def test_captions_keep_the_size_of_their_file(few):
    config = BaselineConfig(system="sdxl-lora", data=(str(few),), batch_size=4)
    captions, batches = lora.read_data(config, 64)
    batch = batches[0]
    assert batch.pixels.shape == (4, 64, 64, 4)
    assert {side for _, side in captions[1:]} == {40}
    texts = [captions[row][0] for row in batch.text.tolist()]
    assert all("creature" in text for text in texts)


def test_ctrl_c_saves_what_there_is(sdxl, few, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", interrupting(Accelerator.clip_grad_norm_))
    out = train_lora(make_config(sdxl, few, tmp_path / "run", max_steps=1000))
    assert (out / LORA_WEIGHTS).is_file()
    assert len((out / "log.jsonl").read_text().splitlines()) == 1


def interrupting(function):
    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return function(*given)

    return interrupted


def test_the_time_limit_ends_it(sdxl, few, tmp_path):
    out = train_lora(make_config(sdxl, few, tmp_path / "run", max_steps=1000, max_minutes=1e-6))
    assert len((out / "log.jsonl").read_text().splitlines()) == 1
    assert (out / LORA_WEIGHTS).is_file()


def test_a_loss_that_is_not_finite_keeps_the_lora(sdxl, few, tmp_path, monkeypatch):
    loss, losses = lora.denoising_loss, []

    def worse(*given):
        losses.append(loss(*given))
        return losses[-1] * (float("nan") if len(losses) == 3 else 1)

    monkeypatch.setattr(lora, "denoising_loss", worse)
    with pytest.raises(PokediffError, match="not finite at step 2"):
        train_lora(make_config(sdxl, few, tmp_path / "run", preview_every=1))
    assert all(matrix.isfinite().all() for matrix in load_file(tmp_path / "run" / LORA_WEIGHTS).values())


def test_it_is_uploaded_when_asked(sdxl, few, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: calls.append(options))
    config = make_config(sdxl, few, tmp_path / "run", lora={"hub_model_id": "me/lora"}, max_steps=1)
    out = train_lora(config)
    assert calls[0] == (("me/lora",), {"exist_ok": True})
    assert calls[1]["folder_path"] == out
    assert calls[1]["repo_id"] == "me/lora"

    def refuse(**options):
        raise OSError("no room\nat all")

    monkeypatch.setattr("huggingface_hub.upload_folder", refuse)
    with pytest.raises(PokediffError, match=r"upload to me/lora failed: no room$"):
        train_lora(replace(config, out=str(tmp_path / "again")))
    assert (tmp_path / "again" / LORA_WEIGHTS).is_file()


def test_a_hub_that_refuses_ends_it_before_training(sdxl, few, tmp_path):
    config = make_config(sdxl, few, tmp_path / "run", lora={"hub_model_id": "me/lora"})
    with pytest.raises(PokediffError, match="hub repository me/lora: ") as error:  # offline here
        train_lora(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- drawing


def test_plain_diffusers_draws_the_same(visible, generator, sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    without = draw_plain(pipeline)
    pipeline.load_lora_weights(visible)
    plain = draw_plain(pipeline)
    ours = generator.generate(PROMPTS[:1], [7], FEW_STEPS)[0]
    assert ours.shape == (48, 48, 4)
    assert (ours[..., 3] == 255).all()
    np.testing.assert_allclose(ours[..., :3].astype(int), plain, atol=1)  # halves may be rounded either way
    assert np.abs(without - plain).mean() > 2


def draw_plain(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    """(48, 48, 3), by diffusers alone."""
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(7)
    options = dict(num_inference_steps=2, guidance_scale=5.0, height=48, width=48)
    return np.asarray(pipeline(PROMPTS[0], generator=random, **options).images[0]).astype(int)


def test_half_precision_draws_the_same_up_to_rounding(sdxl):
    """As on a GPU: latents in float16, the VAE in float32."""
    half, full = (LoraGenerator(load_sdxl(str(sdxl), dtype), "", 48) for dtype in (torch.float16, torch.float32))
    assert (half.pipeline.unet.dtype, half.pipeline.vae.dtype) == (torch.float16, torch.float32)
    drawn = [generator.generate(PROMPTS[:1], [7], FEW_STEPS).astype(int) for generator in (half, full)]
    np.testing.assert_allclose(*drawn, atol=3)


def test_a_seed_gives_the_same_picture_in_any_batch(generator):
    together = generator.generate(PROMPTS, [5, 6, 7], FEW_STEPS)
    alone = generator.generate(PROMPTS[1:2], [6], FEW_STEPS)
    np.testing.assert_array_equal(together[1], alone[0])
    other = generator.generate(PROMPTS[1:2], [8], FEW_STEPS)
    assert (other != alone).any()


def test_settings_reach_the_pipeline(generator):
    def draw(**changes) -> np.ndarray:
        return generator.generate(PROMPTS[:1], [7], replace(FEW_STEPS, **changes))

    usual = draw()
    np.testing.assert_array_equal(usual, draw(guidance_scale=5.0, size=48))
    assert (usual != draw(guidance_scale=1.0)).any()
    assert (usual != draw(negative_prompt="blue")).any()
    assert (usual != draw(num_inference_steps=3)).any()
    assert draw(size=64).shape == (1, 64, 64, 4)


def test_the_form_of_a_baseline(generator, sdxl):
    assert (generator.name, generator.image_size, generator.sizes) == ("sdxl-lora", 48, (48,))
    assert not generator.pixel_art
    assert generator.device == CPU
    assert generator.evaluations(Sampling()) == []
    assert not generator.in_bf16("auto")
    own = StableDiffusionXLPipeline.from_pretrained(sdxl)
    parts = (own.unet, own.vae)  # and the LoRA
    assert generator.parameters > sum(p.numel() for part in parts for p in part.parameters())
    assert generator.resolved(Sampling()) == Sampling(size=48, num_inference_steps=30, guidance_scale=5.0)
    assert generator.resolved(Sampling(guidance_scale=0.0)).guidance_scale == 0


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(sampler="ddim"), "leave out sampler"),
        (Sampling(fast=True), "leave out fast"),
        (Sampling(best_of=2), "leave out best_of"),
        (Sampling(guidance_interval=(0.1, 1.0)), "leave out guidance_interval"),
        (Sampling(size=100), "multiples of 8 px, not 100"),
    ],
)
def test_what_sdxl_does_not_have_is_refused(generator, sampling, words):
    with pytest.raises(PokediffError, match=words):
        generator.generate(PROMPTS[:1], [0], sampling)


def test_the_size_is_that_of_training_else_of_the_model(visible, sdxl, tmp_path):
    (tmp_path / LORA_WEIGHTS).write_bytes((visible / LORA_WEIGHTS).read_bytes())  # of another trainer: no baseline.json
    assert load_lora(tmp_path, CPU, str(sdxl)).image_size == 32
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert lora.picture_size(BaselineConfig(system="sdxl-lora", image_size=1024), pipeline) == 1024
    with pytest.raises(PokediffError, match="multiple of 8"):
        lora.picture_size(BaselineConfig(system="sdxl-lora", image_size=100), pipeline)


# ------------------------------------------------------------------------------------------------- what is not there


def test_an_unreachable_hub_is_one_line(few, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    config = make_config(Path("stabilityai/stable-diffusion-xl-base-1.0"), few, tmp_path / "run")
    with pytest.raises(PokediffError, match="cannot be reached; give the folder of an SDXL pipeline") as error:
        train_lora(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_float16_needs_a_gpu(sdxl, few, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(PokediffError, match="fp16 needs a GPU"):
        train_lora(make_config(sdxl, few, tmp_path / "run", precision="fp16"))


def test_missing_peft_is_one_line(visible, sdxl, few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for attempt in (lambda: train_lora(make_config(sdxl, few, tmp_path / "run")), lambda: load_lora(visible, CPU)):
        with pytest.raises(PokediffError, match=r'pip install "pokediff\[lora\]"'):
            attempt()


def test_folders_that_hold_something_else(visible, sdxl, tmp_path):
    with pytest.raises(PokediffError, match=f"has no {LORA_WEIGHTS}"):
        load_lora(tmp_path, CPU)
    for index in (None, "{}"):
        if index is not None:
            (tmp_path / "model_index.json").write_text(index)
        with pytest.raises(PokediffError, match="is no SDXL pipeline: ") as error:
            load_lora(visible, CPU, str(tmp_path))
        assert "\n" not in str(error.value)
    weights = load_file(visible / LORA_WEIGHTS)
    save_file({name: torch.zeros(4, 4) for name in weights}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(PokediffError, match="does not fit") as error:
        load_lora(tmp_path, CPU, str(sdxl))
    assert "\n" not in str(error.value)
    (tmp_path / "baseline.json").write_text("{")
    with pytest.raises(PokediffError, match=r"baseline.json:1: not JSON"):
        load_lora(tmp_path, CPU, str(sdxl))
