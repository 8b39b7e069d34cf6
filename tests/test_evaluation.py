"""Metrics against closed forms and other implementations, and defects planted to be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import COLORS, ROOT, draw_creature, tiny_config, write_data
from safetensors.torch import save_file

from pokediff.config import EvaluateConfig
from pokediff.data.dataset import load_pictures
from pokediff.data.images import composite, encode_png, read_image, unpremultiply
from pokediff.errors import PokediffError
from pokediff.evaluation import copies, distances, prompts
from pokediff.evaluation.evaluate import check_disjoint, evaluate, measure_looks, real_halves
from pokediff.evaluation.features import CLIP, Lpips, clip_similarity, load_features, resized
from pokediff.evaluation.report import Report, compare
from pokediff.model.text import load_text_encoder
from pokediff.training.loop import train

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------ distances


def test_kid_of_two_gaussians_is_its_closed_form():
    # E[(xy + 1)^3] is a sum over moments: MMD^2 = (m3 - m3')^2 + 3 (m2 - m2')^2 + 3 (m1 - m1')^2 in one dimension;
    # N(0, 1) has moments 0, 1, 0 and N(1, 1) has 1, 2, 4.
    values = [distances.kid(RNG.normal(0, 1, (400, 1)), RNG.normal(1, 1, (400, 1))) for _ in range(60)]
    assert np.mean(values) == pytest.approx(22, abs=3 * np.std(values) / 60**0.5)
    assert np.std(values) / 60**0.5 < 1.5
    values = [distances.kid(RNG.normal(size=(50, 4)), RNG.normal(size=(50, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20  # unbiased: around 0 for equal distributions


def test_kid_and_fid_agree_with_torchmetrics():
    fid, kid = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.kid")
    x, y = RNG.normal(size=(60, 8)), RNG.normal(0.3, 1.2, (70, 8))
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    theirs = kid.poly_mmd(tx[:60], ty[:60], degree=3, gamma=None, coef=1.0)
    assert distances.kid(x, y[:60]) == pytest.approx(float(theirs), rel=1e-6)
    theirs = fid._compute_fid(tx.mean(0), tx.T.cov(), ty.mean(0), ty.T.cov())
    assert distances.frechet(x, y) == pytest.approx(float(theirs), rel=1e-6)


def test_frechet_of_known_moments():
    x = np.linalg.qr(RNG.normal(size=(200, 5)) - RNG.normal(size=(200, 5)).mean(0))[0]
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(199)  # mean 0, covariance the unit matrix, exactly
    assert distances.frechet(x, 3 * x + 2) == pytest.approx(5 * 2**2 + 5 * (3 - 1) ** 2)
    few = RNG.normal(size=(20, 100))  # fewer pictures than features
    assert distances.frechet(few, few) == pytest.approx(0, abs=1e-6)


def test_the_interval_of_kid_holds_the_truth_and_repeated_pictures_do_not_raise_it():
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        estimate = distances.kid_bootstrap(rng.normal(size=(80, 2)), rng.normal(0.5, 1, (80, 2)), 300, seed)
        truth = kid_truth()
        held += estimate.low <= truth <= estimate.high
    assert held >= 51  # of 60 at 95 %
    x, y = RNG.normal(size=(40, 2)), RNG.normal(size=(40, 2))
    estimate = distances.kid_bootstrap(x, y)
    assert (estimate.low + estimate.high) / 2 == pytest.approx(estimate.value, abs=(estimate.high - estimate.low) / 3)


def kid_truth() -> float:
    """Of N(0, I) and N(0.5, I) in two dimensions, by a very large sample's moments."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(10**6, 2)), rng.normal(0.5, 1, (10**6, 2))

    def moments(z: np.ndarray) -> list[np.ndarray]:
        return [np.einsum(",".join(["na", "nb", "nc"][:k]) + "->" + "abc"[:k], *[z] * k) / len(z) for k in (1, 2, 3)]

    squares = [((a - b) ** 2).sum() for a, b in zip(moments(x), moments(y), strict=True)]
    return squares[2] / 8 + 3 * squares[1] / 4 + 3 * squares[0] / 2


def test_subsets_larger_than_a_set_are_refused():
    with pytest.raises(ValueError, match="subsets of 50"):
        distances.kid_subsets(RNG.normal(size=(40, 2)), RNG.normal(size=(60, 2)), 3, 50)


def test_coverage_of_a_copied_and_of_a_collapsed_set():
    real = RNG.normal(size=(100, 6))
    assert distances.manifold(real, real) == pytest.approx({"precision": 1, "recall": 1, "density": 1, "coverage": 1})
    collapsed = distances.manifold(real, np.repeat(real[:1], 100, axis=0) + 1e-6 * RNG.normal(size=(100, 6)))
    assert collapsed["precision"] == 1
    assert collapsed["coverage"] < 0.15
    assert collapsed["recall"] < 0.05
    assert distances.manifold(real, real + 50)["density"] == 0
    with pytest.raises(ValueError, match="equal numbers"):
        distances.manifold(real, real[:50])


def test_jackknife_of_a_mean_is_its_standard_error():
    values = RNG.normal(9, 1, size=400)
    estimate = distances.jackknife(lambda index: float(values[index].mean()), 400)
    assert estimate.high - estimate.value == pytest.approx(1.96 * values.std() / 20, rel=0.4)


def test_a_share_of_nothing_is_not_certain():
    estimate = distances.share_estimate(np.zeros(500, bool))
    assert (estimate.value, estimate.low) == (0, 0)
    assert estimate.high == pytest.approx(0.0076, abs=1e-4)
    half = distances.share_estimate(np.arange(100) < 50)
    assert (half.low, half.high) == pytest.approx((0.404, 0.596), abs=1e-3)


# --------------------------------------------------------------------------------------------------------- copies


@pytest.fixture(scope="module")
def creatures() -> np.ndarray:
    """Sixty different drawn creatures, (60, 32, 32, 4)."""
    rng = np.random.default_rng(5)
    drawn = []
    for index in range(60):
        color = tuple(int(v) for v in rng.integers(0, 256, 3))
        picture = draw_creature(color, ("round", "square")[index % 2], 32, seed=index)
        for _ in range(6):
            x, y = (int(v) for v in rng.integers(6, 26, 2))
            cv2.circle(picture, (x, y), int(rng.integers(2, 6)), (*(int(v) for v in rng.integers(0, 256, 3)), 255), -1)
        drawn.append(picture)
    return np.stack(drawn)


def test_planted_copies_are_found_and_none_is_invented(creatures):
    known, new = creatures[:40], creatures[40:]
    families = [str(i) for i in range(40)]
    rng = np.random.default_rng(0)
    copied = known[:8].copy()
    noise = rng.integers(-6, 7, (8, 32, 32, 3))
    copied[..., :3] = np.where(copied[..., 3:] > 0, (copied[..., :3] + noise).clip(0, 255), 0)
    copied[2:4] = copied[2:4, :, ::-1]  # mirrored
    copied[4:6] = np.roll(copied[4:6], 1, axis=2)  # moved
    found = copies.nearest_in_pixels(np.concatenate([copied, new]), known, families)
    assert found.copies.tolist() == [True] * 8 + [False] * 20
    assert found.index[:8].tolist() == list(range(8))
    assert copies.nearest_in_features(known[:3].reshape(3, -1), known.reshape(40, -1), families).copies.all()


def test_several_pictures_of_one_family_do_not_hide_a_copy(creatures):
    known = np.concatenate([creatures[:20], creatures[:20]])  # every creature twice
    families = [str(i) for i in range(20)] * 2
    assert copies.nearest_in_pixels(creatures[:5], known, families).copies.all()


def test_an_empty_picture_is_no_copy(creatures):
    assert not copies.nearest_in_pixels(
        np.zeros((1, 32, 32, 4), np.uint8), creatures, ["a"] * 30 + ["b"] * 30
    ).copies.any()


# ---------------------------------------------------------------------------------------------------------- LPIPS


def test_lpips_is_torchmetrics(tmp_path, creatures):
    """The same random SqueezeNet in both; torchmetrics brings the true weights of the channels."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")._LPIPS(
        pretrained=True, net="squeeze", pnet_rand=True
    )
    layers = [layer for part in theirs.net.slices for layer in part]
    tensors = {"shift": theirs.scaling_layer.shift.flatten().view(1, 3, 1, 1), "scale": theirs.scaling_layer.scale}
    for index, layer in enumerate(layers):
        tensors |= {f"net.features.{index}.{key}": value for key, value in layer.state_dict().items()}
    for depth in range(7):
        tensors[f"lin.{depth}"] = getattr(theirs, f"lin{depth}").model[1].weight.flatten()
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, tmp_path / "s.safetensors")
    ours = Lpips(f"squeeze:{tmp_path / 's.safetensors'}")(creatures[:6], creatures[6:12], side=64)
    x, y = (
        torch.nn.functional.interpolate(
            torch.from_numpy(composite(part)).permute(0, 3, 1, 2).float() / 255, 64, mode="bicubic", antialias=True
        ).clamp(0, 1)
        for part in (creatures[:6], creatures[6:12])
    )
    with torch.no_grad():
        expected = theirs(2 * x - 1, 2 * y - 1).flatten()
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(PokediffError, match="lpips"):
        Lpips("squeeze:none.safetensors")


def test_lpips_of_the_shared_file_is_zero_for_equal_pictures_and_grows(shared, creatures):
    lpips = Lpips(f"squeeze:{shared / 'weights' / 'lpips_squeeze_v0.1.safetensors'}")
    assert lpips(creatures[:2], creatures[:2]) == pytest.approx([0, 0], abs=1e-6)
    noisy = creatures[:8].copy()
    noisy[..., :3] ^= np.random.default_rng(0).integers(0, 16, noisy[..., :3].shape, dtype=np.uint8)
    assert 0 < lpips(creatures[:8], noisy).mean() < lpips(creatures[:8], creatures[8:16]).mean()


# -------------------------------------------------------------------------------------------------------- prompts


def test_colours_asked_for_are_recognised():
    asked = prompts.color_grid(["artwork"])
    assert len({ask.prompt for ask in asked}) == len(asked) == 11 * len(prompts.TYPES)
    drawn = np.stack([draw_creature(COLORS[name], "round") for name in ("red", "green", "blue")])
    assert prompts.color_hits(drawn, ["red", "green", "blue"])[0].all()
    assert not prompts.color_hits(drawn, ["green", "blue", "red"])[1].any()  # swapped


def test_looks_tell_blur_backgrounds_and_haze(creatures, tmp_path):
    real = load_pictures(write_data(tmp_path / "d", number=60), 32)
    blurred = np.stack([cv2.GaussianBlur(picture, (7, 7), 0) for picture in creatures])
    filled = creatures.copy()
    filled[creatures[..., 3] == 0] = (30, 30, 30, 255)
    values = {}
    for name, pictures in (("whole", creatures), ("blurred", blurred), ("filled", filled)):
        report = Report({})
        measure_looks(report, pictures, creatures, real)
        values[name] = {figure.name: figure.value for figure in report.figures}
    whole, sharp = values["whole"], "sharpness (mean difference of neighbours)"
    assert values["blurred"][sharp] < 0.8 * whole[sharp]
    assert values["blurred"]["share of half-transparent pixels"] > whole["share of half-transparent pixels"] + 0.05
    assert values["filled"]["share of opaque pixels"] == 1
    assert values["filled"]["mean alpha on the border"] == 1
    assert whole["mean alpha on the border"] < 0.05


def test_clip_scores_are_the_model_s_own(tmp_path, creatures):
    """A small random CLIP in the format of openai/clip-vit-base-patch32."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = load_text_encoder("builtin").tokenizer
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**shape, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = ["a red cat", "a blue dog", "a red cat"]
    similarity = clip_similarity(str(tmp_path), creatures[:3], asked)
    assert similarity.shape == (3, 2)
    rgb = torch.from_numpy(composite(creatures[:3])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        for column, prompt in enumerate(asked[:2]):
            tokens = tokenizer([prompt], return_tensors="pt")
            output = model(pixel_values=resized(rgb, 32, CLIP), **tokens)
            expected = (output.logits_per_image / model.logit_scale.exp())[:, 0]
            np.testing.assert_allclose(similarity[:, column], expected.numpy(), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the command


def test_features_depend_on_size_and_background(features, creatures):
    net = load_features(features)
    white = net(creatures[:4])
    assert white.shape == (4, 1280)
    assert np.abs(net(creatures[:4], "black") - white).max() > 1e-3
    small = np.stack([cv2.resize(picture, (16, 16), interpolation=cv2.INTER_AREA) for picture in creatures[:4]])
    assert np.abs(net(small) - white).max() > 1e-3
    np.testing.assert_allclose(net(creatures[:4], batch_size=1), white, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["magic", "mobilenet_v2:none.safetensors", "dinov2:/none", "clip:/none"])
def test_features_that_cannot_be_loaded_say_so(name, monkeypatch):
    with pytest.raises(PokediffError, match=r"features"):
        load_features(name)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, features):
    """(config, folder of the report) of a tiny model on drawn data."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = write_data(folder / "data", number=400)
    rng = np.random.default_rng(0)
    for path in sorted((data / "images").iterdir()):  # no two alike
        picture = read_image(path.read_bytes())
        cv2.circle(picture, (20, 26), 4, (*(int(v) for v in rng.integers(0, 256, 3)), 255), -1)
        path.write_bytes(encode_png(picture))
    checkpoint = train(tiny_config(data, folder / "tiny", max_steps=2))
    config = EvaluateConfig(
        checkpoint=str(checkpoint), data=str(data), out=str(folder / "report"), number=24, num_steps=2,
        styles=("artwork", "sprite"),
        features=(features, "magic"),
    )  # fmt: skip
    return config, evaluate(config)


def test_a_report_says_everything(evaluated):
    _, out = evaluated
    report = json.loads((out / "report.json").read_text())
    by_name = {figure["name"]: figure for figure in report["figures"]}
    for figure in report["figures"]:
        assert figure["n"] or figure["value"] is None
        assert figure["value"] is not None or "not measured" in figure["note"]
        if figure["low"] is not None:
            assert figure["low"] <= figure["value"] <= figure["high"]
    kid = by_name["kernel distance (KID, unbiased) x 1000"]
    assert kid["floor"] < kid["value"] < 1.5 * kid["ceiling"]
    assert "unknown kind" in by_name["all of it"]["note"]
    assert by_name["copies in pixels"]["value"] == 0
    assert report["settings"]["n_real"] >= 12
    assert (report["settings"]["sampler"], report["settings"]["guidance_scale"]) == (
        "dpmpp_2m",
        1.5,
    )  # what it drew with
    assert [row["style"] for row in report["tables"]["styles"]] == ["artwork", "sprite"]
    assert "| copies in pixels |" in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_run_again_it_draws_and_extracts_nothing(evaluated, monkeypatch):
    config, out = evaluated
    before = json.loads((out / "report.json").read_text())["figures"]
    monkeypatch.setattr("pokediff.model.pipeline.PokeDiffPipeline.generate", None)
    monkeypatch.setattr("pokediff.evaluation.features.FeatureNet.__call__", None)
    evaluate(config)
    after = json.loads((out / "report.json").read_text())["figures"]
    assert [f for f in after if "memory" not in f["name"]] == [f for f in before if "memory" not in f["name"]]


def test_a_folder_of_copies_is_caught(evaluated, tmp_path):
    config, _ = evaluated
    pictures = load_pictures(config.data, 16).split("train").spread(20)
    rows = []
    for index, picture in enumerate(pictures.pixels):
        (tmp_path / f"{index}.png").write_bytes(encode_png(unpremultiply(picture)))
        rows.append({"file_name": f"{index}.png", "text": pictures.captions[index][0]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = evaluate(
        EvaluateConfig(
            images=str(tmp_path), data=config.data, styles=config.styles, out=str(tmp_path / "r"), features=("magic",)
        )
    )
    report = json.loads((out / "report.json").read_text())
    found = {figure["name"]: figure["value"] for figure in report["figures"]}
    assert found["distance to the nearest training picture"] < 0.01
    assert found["nearer to a training picture than 99 % of real held-out ones"] > 0.5


def test_training_pictures_in_the_reference_are_refused(evaluated):
    config, _ = evaluated
    pictures = load_pictures(config.data, 16)
    check_disjoint(pictures.split("test"), pictures.split("train"), "test")
    with pytest.raises(PokediffError, match="reference pictures are in the training split"):
        check_disjoint(pictures, pictures.split("train"), "test")
    first, second = real_halves(pictures)[:2]
    families = np.array([record.family_key for record in pictures.records])
    assert not set(families[first]) & set(families[second])


def test_reports_stand_side_by_side_only_when_they_may(evaluated, tmp_path):
    _, out = evaluated
    page = compare([out, out], tmp_path / "c")
    assert page.read_text().count("<th>report</th>") >= 2
    other = tmp_path / "other"
    other.mkdir()
    data = json.loads((out / "report.json").read_text())
    data["settings"]["background"] = "black"
    (other / "report.json").write_text(json.dumps(data))
    with pytest.raises(PokediffError, match="background is"):
        compare([out, other], tmp_path / "c")
    with pytest.raises(PokediffError, match=r"no report\.json"):
        compare([tmp_path], tmp_path / "c")


def test_two_processes_draw_what_one_draws(evaluated, tmp_path):
    config, out = evaluated
    options = ["--checkpoint", config.checkpoint, "--data", config.data, "--out", str(tmp_path / "two")]
    options += ["--number", "24", "--num-steps", "2", "--features", "magic", "--styles", *config.styles]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pokediff", "evaluate"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for path in sorted((out / "pictures").glob("*.png")):
        assert (tmp_path / "two" / "pictures" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "two" / "report.json").read_text())["settings"]["processes"] == 2
