"""What users of diffusers expect of a pipeline: the call, callbacks, half precision, folders, the generic class.

docs/diffusers.md says how diffusers' own PipelineTesterMixin fares.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import hub_utils
from PIL import Image

from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline

PROMPT = "a red creature"
QUICK = dict(num_inference_steps=2, size=32, precision="fp32")


@pytest.fixture
def pipe(tiny_pipe) -> PokeDiffPipeline:
    return tiny_pipe


# ------------------------------------------------------------------------------------------------------------- the call


def test_the_call_has_diffusers_arguments(pipe):
    parameters = inspect.signature(pipe.__call__).parameters
    expected = """prompt num_inference_steps guidance_scale negative_prompt num_images_per_prompt generator image
    strength mask_image output_type return_dict callback_on_step_end callback_on_step_end_tensor_inputs"""
    assert set(expected.split()) <= parameters.keys()
    assert all(p.default is not inspect.Parameter.empty for p in parameters.values() if p.kind != p.VAR_KEYWORD)


def test_output_types_hold_the_same_picture(pipe):
    drawn = {kind: pipe(PROMPT, seed=3, output_type=kind, **QUICK).images for kind in ("pil", "np", "pt", "latent")}
    (image,) = drawn["pil"]
    assert (image.size, image.mode) == ((32, 32), "RGBA")
    assert drawn["np"].shape == (1, 32, 32, 4)
    np.testing.assert_array_equal((drawn["np"][0] * 255).round().astype(np.uint8), np.array(image))
    torch.testing.assert_close(drawn["pt"], torch.from_numpy(drawn["np"]).permute(0, 3, 1, 2))
    assert drawn["latent"].shape == (1, 4, 32, 32)
    assert drawn["latent"].abs().max() <= 1
    alpha = (drawn["latent"][:, 3] + 1) / 2
    torch.testing.assert_close(alpha, drawn["pt"][:, 3], rtol=0, atol=1 / 255)
    with pytest.raises(PokediffError, match="output_type: 'jpg' is none of pil, np, pt, latent"):
        pipe(PROMPT, output_type="jpg", **QUICK)


def test_return_dict(pipe):
    output = pipe(PROMPT, seed=3, output_type="np", **QUICK)
    (images,) = pipe(PROMPT, seed=3, output_type="np", return_dict=False, **QUICK)
    np.testing.assert_array_equal(output.images, images)
    np.testing.assert_array_equal(output[0], images)
    assert output.seeds == [3]


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("copies", [1, 2])
def test_number_of_images(pipe, prompts, copies):
    words = [f"a {word} creature" for word in ("red", "blue")][:prompts]
    output = pipe(words, num_images_per_prompt=copies, seed=7, output_type="np", **QUICK)
    assert output.images.shape == (prompts * copies, 32, 32, 4)
    assert output.seeds == list(range(7, 7 + prompts * copies))
    last = pipe(words[-1], seed=output.seeds[-1], output_type="np", exact=True, **QUICK).images[0]
    assert np.abs(last - output.images[-1]).max() < 0.02


def test_a_random_seed_unless_one_is_given(pipe):
    first, second = (pipe(PROMPT, output_type="np", **QUICK) for _ in range(2))
    assert first.seeds != second.seeds
    assert (first.images != second.images).any()
    np.testing.assert_array_equal(pipe(PROMPT, seed=first.seeds[0], output_type="np", **QUICK).images, first.images)


def test_generators(pipe):
    def draw(**options) -> np.ndarray:
        return pipe([PROMPT] * 2, output_type="np", **QUICK, **options).images

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    np.testing.assert_array_equal(draw(generator=[generator(5), generator(6)]), draw(seed=5))
    one = draw(generator=generator(5))
    np.testing.assert_array_equal(draw(generator=generator(5)), one)
    assert (one[0] != one[1]).any()
    assert (one[0] == draw(seed=5)[0]).all()
    with pytest.raises(PokediffError, match="2 pictures need 2 generators, or one, not 3"):
        draw(generator=[generator(seed) for seed in (1, 2, 3)])


def test_negative_prompt_is_one_for_all_or_one_for_each(pipe):
    def draw(negative) -> np.ndarray:
        options = dict(seed=1, guidance_scale=4.0, output_type="np", exact=True)
        return pipe([PROMPT] * 2, negative_prompt=negative, **options, **QUICK).images

    one, two, none = draw("a blue creature"), draw(["a blue creature", ""]), draw(None)
    np.testing.assert_array_equal(draw(["a blue creature"] * 2), one)
    np.testing.assert_array_equal(two[0], one[0])
    np.testing.assert_array_equal(two[1], none[1])
    assert (one[1] != none[1]).any()
    with pytest.raises(PokediffError, match="2 prompts need 2 negative_prompt, or one, not 3"):
        draw(["", "", ""])


def test_img2img_and_inpainting_take_pil_images_of_any_size(pipe):
    image = Image.new("RGB", (80, 80), (20, 200, 40))
    near, far = (pipe(PROMPT, seed=1, image=image, strength=s, output_type="np", **QUICK).images for s in (0.1, 1.0))
    green = np.array([20, 200, 40, 255]) / 255
    assert np.abs(near - green).mean() < np.abs(far - green).mean()
    mask = Image.new("L", (80, 80), 0)
    mask.paste(255, (0, 0, 40, 80))
    drawn = pipe(PROMPT, seed=1, image=image, mask_image=mask, output_type="np", **QUICK).images[0]
    assert np.abs(drawn[:, 16:] - green).max() < 0.01
    assert np.abs(drawn[:, :16] - green).mean() > 0.05
    with pytest.raises(PokediffError, match="a mask needs an image"):
        pipe(PROMPT, mask_image=mask, **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, "no prompt given"),
        ({"prompt": []}, "no prompt given"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be positive"),
        ({"height": 64}, "unknown option height; options: size"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise' is none of latents, x0"),
    ],
)
def test_bad_arguments_are_named(pipe, options, words):
    with pytest.raises(PokediffError, match=words):
        pipe(**{"prompt": PROMPT, **QUICK, **options})


def test_set_progress_bar_config_governs_the_bar(tiny_checkpoint, capsys):
    pipe = PokeDiffPipeline.from_pretrained(tiny_checkpoint)
    capsys.readouterr()
    pipe([PROMPT] * 2, batch_size=1, **QUICK)
    shown = capsys.readouterr().err
    assert "4/4" in shown  # two batches of two steps
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, **QUICK)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_a_callback_sees_every_step(pipe):
    seen = []

    def callback(owner, index, timestep, tensors):
        assert owner is pipe
        seen.append((index, float(timestep), {name: tuple(value.shape) for name, value in tensors.items()}))

    names = pipe._callback_tensor_inputs
    pipe(PROMPT, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, num_inference_steps=3)
    assert [index for index, *_ in seen] == list(range(pipe.num_timesteps))
    assert [timestep for _, timestep, _ in seen[:3]] == sorted((t for _, t, _ in seen[:3]), reverse=True)
    assert {tuple(shapes) for *_, shapes in seen} == {("latents", "x0")}
    assert [shapes["latents"][-1] for *_, shapes in seen] == [32] * 3 + [64] * 2


def test_a_callback_may_change_the_latents(pipe):
    def clear(owner, index, _timestep, tensors):
        if index == owner.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert pipe(PROMPT, callback_on_step_end=clear, output_type="latent", **QUICK).images.abs().sum() == 0


def test_a_callback_may_stop_the_drawing(pipe):
    """The pictures drawn so far come back at full size, as last predicted; later batches are not drawn."""
    indices = []

    def stop(owner, index, _timestep, _tensors):
        indices.append(index)
        owner._interrupt = index == 1

    output = pipe([PROMPT] * 3, seed=4, callback_on_step_end=stop, batch_size=1, num_inference_steps=10, size=64)
    assert indices == [0, 1]
    assert pipe.interrupt
    assert [image.size for image in output.images] == [(64, 64)]
    assert output.seeds == [4]
    blocks = np.array(output.images[0]).reshape(32, 2, 32, 2, 4)
    assert (blocks == blocks[:, :1, :, :1]).all()  # a 32 px picture, enlarged
    assert len(pipe([PROMPT], **QUICK).images) == 1  # the next call is whole again
    assert not pipe.interrupt


# ------------------------------------------------------------------------------------------------ precision and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_draw_nearly_the_same(pipe, tiny_checkpoint, dtype):
    half = PokeDiffPipeline.from_pretrained(tiny_checkpoint, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert {half.dtype, half.text_encoder.dtype, half.base.dtype} == {dtype}
    expected = pipe(PROMPT, seed=3, output_type="latent", **QUICK).images
    drawn = half(PROMPT, seed=3, output_type="latent", **QUICK).images
    assert drawn.dtype == torch.float32
    assert (drawn - expected).abs().mean() < 0.05


def test_to_casts_every_model(tiny_checkpoint):
    pipe = PokeDiffPipeline.from_pretrained(tiny_checkpoint)
    assert {pipe.cascade.dtype, pipe.text_encoder.dtype} == {torch.float32}  # whatever the file holds
    assert pipe.to(torch.bfloat16) is pipe
    assert {pipe.cascade.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, **QUICK).images[0].size == (32, 32)


def test_offload_moves_the_models_that_a_drawing_calls(pipe):
    """enable_model_cpu_offload hooks the forward of each component in this order; a drawing must go through them."""
    names = pipe.model_cpu_offload_seq.split("->")
    assert set(names) == {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    called = []
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda _module, _inputs, name=name: called.append(name))
        for name in names
    ]
    pipe("a creature that no test has named", **QUICK)
    for hook in hooks:
        hook.remove()
    assert list(dict.fromkeys(called)) == names


# -------------------------------------------------------------------------------------------------------------- folders


def same(one: PokeDiffPipeline, other: PokeDiffPipeline) -> None:
    options = dict(**QUICK, exact=True)
    np.testing.assert_array_equal(one.generate([PROMPT], [1], **options), other.generate([PROMPT], [1], **options))


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    same(PokeDiffPipeline.from_pretrained(tmp_path), pipe)
    same(PokeDiffPipeline.from_pretrained(str(tmp_path)), pipe)


def test_components_and_optional_components(pipe, tiny_checkpoint, tmp_path):
    assert set(pipe.components) == {"cascade", "scheduler", "text_encoder", "tokenizer", "scorer"}
    without = PokeDiffPipeline.from_pretrained(tiny_checkpoint, text_encoder=None, tokenizer=None)
    assert without.text_encoder is None
    same(without, pipe)  # the built-in encoder is loaded by its name
    without.save_pretrained(tmp_path)
    loaded = PokeDiffPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None
    assert not (tmp_path / "text_encoder").exists()
    same(PokeDiffPipeline(**pipe.components), pipe)


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_configurations_are_json_for_every_parser(tiny_checkpoint, tmp_path):
    """And hold no path of the machine that saved them."""
    pipe = PokeDiffPipeline.from_pretrained(tiny_checkpoint)
    pipe.scheduler.register_to_config(lambda_min_clipped=-float("inf"))
    pipe.save_pretrained(tmp_path)
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) >= 7
    for path in files:
        strict(path.read_text(encoding="utf-8"))
        assert str(tiny_checkpoint) not in path.read_text(encoding="utf-8")
    assert PokeDiffPipeline.from_pretrained(tmp_path).scheduler.config.lambda_min_clipped == -float("inf")


def test_the_shipped_checkpoint_is_complete():
    from pokediff.paths import shipped

    folder = shipped("checkpoints", "pokediff")
    for path in folder.rglob("*.json"):
        strict(path.read_text(encoding="utf-8"))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == ["pipeline", "PokeDiffPipeline"]
    assert (folder / "pipeline.py").is_file()


def test_variants_are_refused(pipe, tmp_path):
    with pytest.raises(PokediffError, match="variant: a checkpoint has one set of weights"):
        pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(PokediffError, match="variant: a checkpoint has one set of weights"):
        PokeDiffPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    for name in (tmp_path, "checkpoints/misspelt", "misspelt"):
        with pytest.raises(PokediffError, match="is no checkpoint"):
            PokeDiffPipeline.from_pretrained(name)


def test_a_shipped_checkpoint_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PokeDiffPipeline.from_pretrained("pokediff").sizes == (32, 64, 128)


def test_a_checkpoint_that_is_broken_or_not_ours_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    weights = folder / "cascade" / "base-32" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(PokediffError, match="cannot be loaded"):
        PokeDiffPipeline.from_pretrained(folder)


# ------------------------------------------------------------------------------------------- the generic class, the hub


def test_the_generic_class_loads_a_folder(pipe, tiny_checkpoint):
    generic = DiffusionPipeline.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    assert type(generic) is PokeDiffPipeline
    assert generic.base.dtype == torch.float32
    same(generic, pipe)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tiny_checkpoint)


HOSTILE = "from pathlib import Path\nPath({marker!r}).touch()\nfrom pokediff import PokeDiffPipeline, Cascade\n"


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"custom_pipeline": "pipeline"}])
def test_our_loader_imports_no_file_of_a_folder(pipe, tiny_checkpoint, tmp_path, monkeypatch, options):
    folder, marker = shutil.copytree(tiny_checkpoint, tmp_path / "hostile"), tmp_path / "imported"
    code = HOSTILE.format(marker=str(marker))
    (folder / "pipeline.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    same(PokeDiffPipeline.from_pretrained(folder, **options), pipe)
    assert not marker.exists()

    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "cascade": ["pipeline", "Cascade"]}))
    with pytest.raises(PokediffError, match="cascade is of 'pipeline', not of diffusers, pokediff, transformers"):
        PokeDiffPipeline.from_pretrained(folder, **options)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("None.py", "cascade/pokediff.py", "scheduler/diffusers.py", "text_encoder/transformers.py"):
        (folder / name).write_text(code)  # places in which diffusers looks for code by itself
        try:
            PokeDiffPipeline.from_pretrained(folder, **options)
        except PokediffError as error:
            assert "cannot be loaded" in str(error)  # noqa: PT017 (either is safe)
        assert not marker.exists(), name
        (folder / name).unlink()


def test_a_hub_out_of_reach_is_one_quick_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PokediffError, match=r"^checkpoint someone/creatures: .* cannot be reached; .*$"):
        PokeDiffPipeline.from_pretrained("someone/creatures")


def test_from_the_hub_only_data_is_fetched(pipe, tiny_checkpoint, monkeypatch):
    """The network call alone is replaced, by the copy that it would leave."""
    import fnmatch

    asked = {}

    def download(name, allow_patterns, **options):
        asked.update(options, name=name, patterns=allow_patterns)
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    same(PokeDiffPipeline.from_pretrained("someone/creatures", revision="v1"), pipe)
    assert (asked["name"], asked["revision"]) == ("someone/creatures", "v1")
    fetched = {
        path.relative_to(tiny_checkpoint).as_posix()
        for path in tiny_checkpoint.rglob("*")
        if any(fnmatch.fnmatch(path.relative_to(tiny_checkpoint).as_posix(), pattern) for pattern in asked["patterns"])
    }
    every = {path.relative_to(tiny_checkpoint).as_posix() for path in tiny_checkpoint.rglob("*") if path.is_file()}
    assert every - fetched == {"pipeline.py"}


def test_push_to_hub_sends_a_whole_pipeline(pipe, monkeypatch):
    """The calls of the hub alone are replaced; what would be sent is looked at on the way."""
    sent: list[str] = []

    def upload(*_args, folder_path, **_options):
        sent.extend(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file())
        sent.append(json.loads((Path(folder_path) / "model_index.json").read_text())["_class_name"][0])

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    monkeypatch.setattr(
        hub_utils, "load_or_create_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None)
    )
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card, **_: card)
    pipe.push_to_hub("someone/creatures")
    weights = {f"cascade/{name}/diffusion_pytorch_model.safetensors" for name in pipe.cascade}
    assert weights | {
        "model_index.json",
        "pipeline.py",
        "pipeline",
        "cascade/config.json",
        "cascade/base-32/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    } <= set(sent)
