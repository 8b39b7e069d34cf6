from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from pokediff.config import SampleConfig
from pokediff.drawing import sample as sampling
from pokediff.drawing.sample import read_settings, sample
from pokediff.errors import PokediffError
from pokediff.training.loop import train


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> str:
    return str(train(tiny_config(data, tmp_path_factory.mktemp("run") / "tiny")))


def settings(checkpoint, out, **changes) -> SampleConfig:
    values = dict(
        prompt=("a red dragon", "a blue turtle"), checkpoint=checkpoint, out=str(out), num_steps=3, num_images=2
    )
    return SampleConfig(**{**values, **changes})


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_everything_promised_is_written(checkpoint, tmp_path):
    out = sample(settings(checkpoint, tmp_path, seed=5, save_frames=2, animations=("gif", "mp4", "apng"), batch_size=3))
    names = {path.name for path in out.iterdir()}
    assert names == {
        "0000.png", "0001.png", "0002.png", "0003.png", "grid.png", "denoising.gif", "denoising.mp4", "denoising.apng",
        "frames", "sample.json",
    }  # fmt: skip
    assert picture(out / "0000.png").shape == (16, 16, 4)
    assert picture(out / "grid.png").shape == (8 * 33, 8 * 33, 4)
    assert sorted(path.name for path in (out / "frames" / "0003").iterdir()) == [
        "00-x.png",
        "00-x0.png",
        "01-x.png",
        "01-x0.png",
    ]
    np.testing.assert_array_equal(picture(out / "frames" / "0003" / "01-x0.png"), picture(out / "0003.png"))
    with Image.open(out / "denoising.gif") as clip:
        assert clip.n_frames == 4
        clip.seek(3)
        assert clip.info["duration"] > 1000  # it rests on the picture
    facts = json.loads((out / "sample.json").read_text())
    assert [row["seed"] for row in facts["pictures"]] == [5, 6, 7, 8]
    assert [row["prompt"] for row in facts["pictures"]] == ["a red dragon"] * 2 + ["a blue turtle"] * 2


def test_sample_json_makes_the_same_pictures_again(checkpoint, tmp_path):
    first = sample(settings(checkpoint, tmp_path / "a", seed=9, guidance_interval=(0.1, 5.0), sampler="euler_a"))
    again = read_settings(first / "sample.json")
    second = sample(SampleConfig(**{**again.__dict__, "out": str(tmp_path / "b"), "batch_size": 1}))
    for name in ("0000.png", "0003.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_enlarged_on_a_background(checkpoint, tmp_path):
    plain = sample(settings(checkpoint, tmp_path / "a"))
    big = sample(settings(checkpoint, tmp_path / "b", enlarge=3, background="#ff00ff"))
    shown = picture(big / "0001.png")
    assert shown.shape == (48, 48, 3)
    small = picture(plain / "0001.png")
    clear = small[..., 3] == 0
    assert (shown[1::3, 1::3][clear] == (255, 0, 255)).all()


def test_old_and_new_pictures_do_not_mix(checkpoint, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"kept")
    sample(settings(checkpoint, tmp_path, save_frames=2, animations=("gif", "apng")))
    sample(settings(checkpoint, tmp_path, num_images=1))
    assert {path.name for path in tmp_path.glob("*.png")} == {"0000.png", "0001.png", "grid.png", "mine.png"}
    assert not list((tmp_path / "frames").iterdir())
    assert not (tmp_path / "denoising.apng").exists()


def test_prompts_from_a_file(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na red dragon\n\n  a blue turtle \n", encoding="utf-8-sig")
    out = sample(settings(checkpoint, tmp_path / "o", prompt=(), prompts_file=str(file), num_images=1))
    assert [row["prompt"] for row in json.loads((out / "sample.json").read_text())["pictures"]] == [
        "a red dragon",
        "a blue turtle",
    ]


def test_ctrl_c_keeps_what_is_done(checkpoint, tmp_path, monkeypatch):
    drawn = sampling.draw
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drawn(*args)

    monkeypatch.setattr(sampling, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(settings(checkpoint, tmp_path, batch_size=3))
    assert {path.name for path in tmp_path.glob("*.png")} == {"0000.png", "0001.png", "0002.png", "grid.png"}
    assert len(json.loads((tmp_path / "sample.json").read_text())["pictures"]) == 3


@pytest.mark.parametrize("broken", ["draw", "write_picture"])
def test_ctrl_c_in_the_first_batch_leaves_nothing_false(checkpoint, tmp_path, monkeypatch, broken):
    sample(settings(checkpoint, tmp_path))
    whole, calls = getattr(sampling, broken), []

    def interrupted(*args):
        calls.append(1)
        if broken == "draw" or len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(sampling, broken, interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(settings(checkpoint, tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    if broken == "draw":
        assert left <= {"frames"}
    else:
        assert left == {"0000.png", "0001.png", "grid.png", "sample.json"}
        assert len(json.loads((tmp_path / "sample.json").read_text())["pictures"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, "nothing to draw"),
        ({"prompts_file": "none.txt"}, "not found"),
        ({"checkpoint": "checkpoints/none"}, "no checkpoint"),
        ({"background": "octarine"}, "not a colour"),
        ({"device": "abacus"}, "not there"),
    ],
)
def test_what_cannot_be_used_is_named(checkpoint, tmp_path, changes, words):
    with pytest.raises(PokediffError, match=words):
        sample(settings(**{"checkpoint": checkpoint, "out": tmp_path / "o", **changes}))


def test_settings_from_something_else(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(PokediffError, match=r"no sample\.json"):
        read_settings(tmp_path / "x.json")


# ------------------------------------------------------------------------- from a picture, in between, as pixel art


def drawn(folder) -> list[np.ndarray]:
    return [picture(path) for path in sorted(folder.glob("0*.png"))]


def test_interpolation_ends_at_the_pictures_of_its_prompts(checkpoint, tmp_path):
    ends = drawn(sample(settings(checkpoint, tmp_path / "a", num_images=1, seed=3)))
    out = sample(settings(checkpoint, tmp_path / "b", num_images=1, seed=3, interpolate=5, batch_size=2))
    way = drawn(out)
    assert len(way) == 5
    np.testing.assert_array_equal(way[0], ends[0])
    np.testing.assert_array_equal(way[-1], ends[1])
    assert (way[2] != ends[0]).any()
    with Image.open(out / "interpolation.gif") as clip:
        assert clip.n_frames == 8  # there and back, no end twice
    rows = json.loads((out / "sample.json").read_text())["pictures"]
    assert [row["share"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    again = read_settings(out / "sample.json")
    np.testing.assert_array_equal(drawn(sample(SampleConfig(**{**vars(again), "out": str(tmp_path / "c")}))), way)


def test_one_prompt_is_interpolated_between_its_seeds(checkpoint, tmp_path):
    out = sample(settings(checkpoint, tmp_path, prompt=("a red dragon",), num_images=3, interpolate=3))
    assert len(drawn(out)) == 5  # three stops, one between each two


def test_variations_come_nearer_the_smaller_they_are(checkpoint, tmp_path):
    def spread(amount: float) -> float:
        out = tmp_path / str(amount)
        first, *others = drawn(
            sample(settings(checkpoint, out, prompt=("a red dragon",), num_images=4, variation=amount, clean=False))
        )
        return float(np.mean([np.abs(other.astype(int) - first).mean() for other in others]))

    assert 0 < spread(0.05) < spread(0.9)


def test_a_picture_to_begin_with_is_never_replaced(checkpoint, tmp_path):
    out = sample(settings(checkpoint, tmp_path / "out", save_frames=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ours = [path for path in before if path.suffix in (".png", ".gif")]
    assert {path.name for path in ours} >= {"0000.png", "grid.png", "denoising.gif"}
    for image, words in (*((path, "would be replaced") for path in ours), (out / "missing.png", "No such file")):
        with pytest.raises(PokediffError, match=words):
            sample(settings(checkpoint, out, image=str(image)))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "sample.json").unlink()  # whoever drew it, it would be written over
    with pytest.raises(PokediffError, match="would be replaced"):
        sample(settings(checkpoint, out, image=str(ours[0])))


def test_an_image_is_begun_with_and_a_mask_keeps_the_rest(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (16, 16, 4), np.uint8)
    given[..., 3] = 255
    Image.fromarray(given).save(tmp_path / "in.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = dict(prompt=("a red dragon",), image=str(tmp_path / "in.png"))
    (weak, *_) = drawn(sample(settings(checkpoint, tmp_path / "weak", strength=0.34, **options)))
    (strong, *_) = drawn(sample(settings(checkpoint, tmp_path / "strong", strength=1.0, **options)))
    assert np.abs(weak.astype(int) - given).mean() < np.abs(strong.astype(int) - given).mean()
    (filled, *_) = drawn(sample(settings(checkpoint, tmp_path / "mask", mask=str(tmp_path / "mask.png"), **options)))
    np.testing.assert_array_equal(filled[8:], given[8:])
    assert (filled[:8] != given[:8]).any()


def test_pixel_art_options_are_applied_to_the_pictures_and_to_the_last_frame(checkpoint, tmp_path):
    out = sample(settings(checkpoint, tmp_path, palette="4", hard_alpha=True, save_frames=2))
    for art in drawn(out):
        assert set(np.unique(art[..., 3])) <= {0, 255}
        assert len(np.unique(art[art[..., 3] > 0][:, :3], axis=0)) <= 4
    np.testing.assert_array_equal(picture(out / "frames" / "0001" / "01-x0.png"), picture(out / "0001.png"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": __file__}, "not a picture"),
        ({"palette": "nowhere.hex"}, "nowhere.hex"),
        ({"prompt": ("one",), "num_images": 1, "interpolate": 4}, "two prompts"),
    ],
)
def test_what_cannot_be_used_is_said(checkpoint, tmp_path, changes, words):
    with pytest.raises(PokediffError, match=words):
        sample(settings(checkpoint, tmp_path, **changes))


def test_a_mask_of_another_shape_is_refused(checkpoint, tmp_path):
    Image.new("RGBA", (20, 20)).save(tmp_path / "in.png")
    Image.new("L", (10, 20)).save(tmp_path / "mask.png")
    with pytest.raises(PokediffError, match="10x20 px, the image 20x20"):
        sample(settings(checkpoint, tmp_path, image=str(tmp_path / "in.png"), mask=str(tmp_path / "mask.png")))
