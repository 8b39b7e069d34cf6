"""Measures against closed forms and other implementations, and planted defects that must be found."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import COLORS, SHARED, draw_creature, write_data
from safetensors.torch import save_file

from pokediff.data.dataset import load_pictures
from pokediff.data.images import composite
from pokediff.errors import PokediffError
from pokediff.evaluation import copies, distances, looks, prompts
from pokediff.evaluation.classifiers import LinearClassifier, two_sample_hits
from pokediff.evaluation.features import CLIP, IMAGENET, Lpips, clip_similarity, load_features, resized
from pokediff.evaluation.measures import measure_looks
from pokediff.evaluation.report import Report, to_json
from pokediff.model.text import load_text_encoder

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
    held, truth = 0, kid_truth()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        estimate = distances.kid_bootstrap(rng.normal(size=(80, 2)), rng.normal(0.5, 1, (80, 2)), 300, seed)
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


# --------------------------------------------------------------------------------------------------- two samples


def test_two_sample_accuracy_of_two_gaussians_is_that_of_the_best_plane():
    # Between N(0, I) and N(d, I) the best plane is right with probability Phi(|d| / 2): 0.8413 for |d| = 2.
    x, y = RNG.normal(size=(1500, 3)), RNG.normal(size=(1500, 3)) + np.array([0, 2, 0])
    hits = two_sample_hits(x, y, range(1500), range(1500, 3000))
    assert hits.mean() == pytest.approx(0.8413, abs=3 * (0.84 * 0.16 / 3000) ** 0.5)
    same = two_sample_hits(x, RNG.normal(size=(1500, 3)), range(1500), range(1500, 3000))
    assert same.mean() == pytest.approx(0.5, abs=0.04)
    apart = two_sample_hits(x[:40], y[:60] + 50, range(40), range(40, 100))
    assert apart.all()
    assert len(apart) == 80  # equally many of both


def test_families_do_not_give_two_samples_away():
    """Sets of equal distribution whose families look alike: only a classifier that saw a family's sisters is right."""
    faces = RNG.normal(size=(40, 30))  # of 40 families, 10 pictures each
    x, y = (np.repeat(part, 10, axis=0) + 0.01 * RNG.normal(size=(200, 30)) for part in (faces[:20], faces[20:]))
    families = np.repeat(np.arange(40), 10)
    honest = two_sample_hits(x, y, families[:200], families[200:])
    fooled = two_sample_hits(x, y, range(200), range(200, 400))
    assert honest.mean() < 0.75
    assert fooled.mean() > 0.95


def test_linear_classifier_of_three_classes():
    centres = np.array([[0, 0], [8, 0], [0, 8]])
    labels = np.repeat([0, 1, 2], 50)
    classify = LinearClassifier(centres[labels] + RNG.normal(size=(150, 2)), labels)
    assert classify(centres + 0.5).tolist() == [0, 1, 2]


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


# -------------------------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def mobilenet() -> torch.nn.Module:
    """A MobileNetV2 of random weights whose batch norms have something to do."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    network = mobilenet_v2()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values, spread in ((layer.weight, 0.1), (layer.bias, 0.1), (layer.running_mean, 0.1)):
                values.data += spread * torch.randn_like(values)
            layer.running_var *= 1.3
    return network.eval()


def folded(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The convolutions with batch norm folded in, in the naming that `features.mobilenet_v2` reads, too."""
    layers = [m for m in network.features.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.BatchNorm2d)]
    names = ["stem", "blocks.0.0", "blocks.0.1"]
    names += [f"blocks.{block}.{layer}" for block in range(1, 17) for layer in range(3)]
    tensors = {}
    for name, convolution, norm in zip([*names, "head"], layers[::2], layers[1::2], strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        tensors[f"{name}.weight"] = (convolution.weight * scale[:, None, None, None]).detach()
        tensors[f"{name}.bias"] = (norm.bias - norm.running_mean * scale).detach()
    return tensors


def test_mobilenet_reads_torchvision_s_state_and_folded_convolutions(mobilenet, creatures, tmp_path):
    save_file(mobilenet.state_dict(), tmp_path / "torchvision.safetensors")
    save_file(folded(mobilenet), tmp_path / "folded.safetensors")
    rgb = torch.from_numpy(composite(creatures[:4])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = mobilenet.features(resized(rgb, 224, IMAGENET)).mean((2, 3)).numpy()
    assert expected.std() > 0.01
    for name in ("torchvision", "folded"):
        net = load_features(f"mobilenet_v2:{tmp_path / name}.safetensors")
        np.testing.assert_allclose(net(creatures[:4]), expected, rtol=1e-3, atol=1e-4)


def test_features_depend_on_size_and_background_and_not_on_the_batch(mobilenet, creatures, tmp_path):
    save_file(mobilenet.state_dict(), tmp_path / "m.safetensors")
    net = load_features(f"mobilenet_v2:{tmp_path / 'm.safetensors'}")
    white = net(creatures[:4])
    assert white.shape == (4, 1280)
    assert np.abs(net(creatures[:4], "black") - white).max() > 1e-3
    small = np.stack([cv2.resize(picture, (16, 16), interpolation=cv2.INTER_AREA) for picture in creatures[:4]])
    assert np.abs(net(small) - white).max() > 1e-3
    np.testing.assert_allclose(net(creatures[:1]), white[:1], rtol=1e-4, atol=1e-4)


def test_features_of_the_shared_file_are_those_of_its_own_code(creatures):
    if not (SHARED / "weights" / "feature_nets.py").is_file():
        pytest.skip("needs the weights in ../shared")
    import importlib.util

    spec = importlib.util.spec_from_file_location("feature_nets", SHARED / "weights" / "feature_nets.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    file = SHARED / "weights" / "mobilenet_v2_feat1280.safetensors"
    rgb = torch.from_numpy(composite(creatures[:4])).permute(0, 3, 1, 2).float() / 255
    ours = load_features(f"mobilenet_v2:{file}")(creatures[:4])
    np.testing.assert_allclose(ours, theirs.mobilenet_v2(file)(rgb).numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["magic", "mobilenet_v2:none.safetensors", "dinov2:/none", "clip:/none"])
def test_features_that_cannot_be_loaded_say_so(name):
    with pytest.raises(PokediffError, match=r"features"):
        load_features(name)


@pytest.mark.parametrize("load", [lambda f: load_features(f"mobilenet_v2:{f}"), lambda f: Lpips(f"squeeze:{f}")])
def test_weights_that_do_not_fit_are_one_line(load, tmp_path):
    (tmp_path / "text").write_text("no weights")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    save_file({"features.0.weight": torch.zeros(2), "features.0.0.weight": torch.zeros(2)}, tmp_path / "part")
    for name, words in (("none", "not found"), ("text", "no safetensors file"), ("other", "does not fit")):
        with pytest.raises(PokediffError, match=words) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_lpips_reads_torchvision_s_squeezenet(tmp_path, creatures):
    """Against torchmetrics with the same weights; it is 0 for equal pictures and grows with their difference."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")._LPIPS(net="squeeze", pnet_rand=True)
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    network = squeezenet1_1()
    save_file(network.state_dict(), tmp_path / "s.safetensors")
    lpips = Lpips(f"squeeze:{tmp_path / 's.safetensors'}")
    for part in theirs.net.slices:
        for name, layer in part.named_children():
            layer.load_state_dict(network.features[int(name)].state_dict())
    x, y = (
        torch.nn.functional.interpolate(
            torch.from_numpy(composite(part)).permute(0, 3, 1, 2).float() / 255, 64, mode="bicubic", antialias=True
        ).clamp(0, 1)
        for part in (creatures[:6], creatures[6:12])
    )
    with torch.no_grad():
        expected = theirs(x, y, normalize=True).flatten().numpy()
    np.testing.assert_allclose(lpips(creatures[:6], creatures[6:12]), expected, rtol=1e-4, atol=1e-6)
    assert lpips(creatures[:2], creatures[:2]) == pytest.approx([0, 0], abs=1e-6)


def test_lpips_of_the_shared_file_grows_with_the_difference(shared, creatures):
    lpips = Lpips(f"squeeze:{shared / 'weights' / 'lpips_squeeze_v0.1.safetensors'}")
    noisy = creatures[:8].copy()
    noisy[..., :3] ^= np.random.default_rng(0).integers(0, 16, noisy[..., :3].shape, dtype=np.uint8)
    assert 0 < lpips(creatures[:8], noisy).mean() < lpips(creatures[:8], creatures[8:16]).mean()


# -------------------------------------------------------------------------------------------------------- prompts


def test_colours_of_prompts_are_recognised():
    grid = prompts.color_grid(["artwork"])
    assert len({cell.prompt for cell in grid}) == len(grid) == 11 * len(prompts.TYPES)
    drawn = np.stack([draw_creature(COLORS[name], "round") for name in ("red", "green", "blue")])
    assert looks.color_hits(drawn, ["red", "green", "blue"])[0].all()
    assert not looks.color_hits(drawn, ["green", "blue", "red"])[1].any()  # swapped


def test_looks_tell_blur_backgrounds_and_haze(creatures):
    blurred = np.stack([cv2.GaussianBlur(picture, (7, 7), 0) for picture in creatures])
    filled = creatures.copy()
    filled[creatures[..., 3] == 0] = (30, 30, 30, 255)
    values = {}
    for name, pictures in (("whole", creatures), ("blurred", blurred), ("filled", filled)):
        report = Report({})
        measure_looks(report, pictures, creatures)
        values[name] = {figure.name: figure.value for figure in report.figures}
    whole, sharp = values["whole"], "sharpness (mean difference of neighbours)"
    assert values["blurred"][sharp] < 0.8 * whole[sharp]
    assert values["blurred"]["share of half-transparent pixels"] > whole["share of half-transparent pixels"] + 0.05
    assert values["filled"]["share of opaque pixels"] == 1
    assert values["filled"]["mean alpha on the border"] == 1
    assert whole["mean alpha on the border"] < 0.05


def test_styles_and_subjects_of_the_prompts_are_those_of_the_data(tmp_path):
    species = load_pictures(write_data(tmp_path / "d", number=8), 16).records
    assert prompts.grid_styles(species) == ("artwork",)
    assert prompts.subjects(species)[0] == "fire creature"
    from dataclasses import replace

    things = [
        replace(record, shape=None, types=(), kind=kind, style=style)
        for record, kind, style in zip(
            species, ["animal"] * 4 + ["plant"] * 4, ["emoji-flat"] * 5 + ["clip-art"] * 3, strict=True
        )
    ]
    assert prompts.grid_styles(things) == ("emoji-flat", "clip-art")
    grid = prompts.color_grid(prompts.grid_styles(things), prompts.subjects(things))
    assert grid[0].prompt == "flat emoji of a black animal"
    assert len(grid) == 2 * 2 * 11


def test_captions_are_taken_in_turns():
    assert prompts.held_out_captions([("a", "b"), ("c",), ("d", "e", "f")], 5) == ["a", "c", "d", "b", "e"]


def test_run_lengths_are_counted():
    row = [[9, 0, 0, 255], [9, 0, 0, 255], [9, 0, 0, 255], [200, 0, 0, 255], [0, 0, 0, 0], [200, 0, 0, 255]]
    picture = np.array([[row]], np.uint8).reshape(1, 1, 6, 4)
    assert looks.run_length(picture)[0] == pytest.approx((3 + 1 + 1) / 3)  # runs of 3, 1 and, after a gap, 1
    assert looks.palette_size(picture)[0] == 2
    assert looks.run_length(np.zeros((1, 4, 4, 4), np.uint8))[0] == 0
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 4), np.uint8)
    noise[..., 3] = 255
    assert looks.run_length(noise) == pytest.approx([1, 1], abs=0.01)
    assert looks.run_length(noise.repeat(4, axis=2)) == pytest.approx(4 * looks.run_length(noise))


def test_reports_are_json_that_browsers_parse():
    import json

    text = to_json({"a": float("nan"), "b": [np.float32("inf"), np.int64(3), 0.5], "c": {"d": (1, None)}})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    expected = {"a": None, "b": [None, 3, 0.5], "c": {"d": [1, None]}}
    assert json.loads(text, parse_constant=refuse) == expected


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
    texts = ["a red cat", "a blue dog", "a red cat"]
    similarity = clip_similarity(str(tmp_path), creatures[:3], texts)
    assert similarity.shape == (3, 2)
    rgb = torch.from_numpy(composite(creatures[:3])).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        for column, prompt in enumerate(texts[:2]):
            tokens = tokenizer([prompt], return_tensors="pt")
            output = model(pixel_values=resized(rgb, 32, CLIP), **tokens)
            expected = (output.logits_per_image / model.logit_scale.exp())[:, 0]
            np.testing.assert_allclose(similarity[:, column], expected.numpy(), atol=1e-5)
