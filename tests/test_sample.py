from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pokediff.config import SampleConfig, Sampling
from pokediff.data.images import composite
from pokediff.drawing import sample as sampling
from pokediff.drawing import sheets
from pokediff.drawing.attribution import word_influence
from pokediff.drawing.jobs import Job, slug
from pokediff.drawing.sample import read_settings, sample
from pokediff.drawing.sheets import listed_files, weights_sha256
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.checkpoint import write_part_index

STEPS = 3  # of the base; the upscaler of the tiny checkpoint takes 2 of its own


@pytest.fixture
def settings(tiny_checkpoint, tmp_path):
    """Makes a SampleConfig of two prompts with two pictures each, 32 px, not animated; fields of Sampling are arguments
    too.
    """

    def make(out: str = "out", **changes) -> SampleConfig:
        own = {name: changes.pop(name) for name in list(changes) if name in Sampling.__dataclass_fields__}
        values = dict(
            prompt=("a red creature", "a blue creature"),
            checkpoint=str(tiny_checkpoint),
            out=str(tmp_path / out),
            num_images_per_prompt=2,
            seed=0,
            animations=(),
            sampling=Sampling(**{"size": 32, "num_inference_steps": STEPS, "precision": "fp32", **own}),
        )
        return SampleConfig(**{**values, **changes})

    return make


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def drawn(folder) -> list[np.ndarray]:
    return [picture(path) for path in sorted(folder.glob("0*.png"))]


def facts(folder) -> dict:
    return json.loads((folder / "sample.json").read_text(encoding="utf-8"))


def content(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ what is written


def test_all_files_are_written_and_listed(settings):
    out = sample(settings(size=64, seed=5, save_frames=2, animations=("gif", "apng"), batch_size=3))
    names = {"grid.png", "denoising.gif", "denoising.apng", "sample.json"}
    for k in range(4):
        names |= {f"{k:04}.png", f"large/{k:04}.png"}
        names |= {f"frames/{k:04}/{name}.png" for name in ("00-x", "00-x0", "01-x", "01-x0")}
    assert set(content(out)) == names == set(facts(out)["files"])
    assert picture(out / "0000.png").shape == (64, 64, 4)
    np.testing.assert_array_equal(picture(out / "large/0000.png")[1::4, 2::4], picture(out / "0000.png"))
    assert picture(out / "grid.png").shape == (2 * (2 * 65 - 1), 2 * (2 * 65 - 1), 4)
    np.testing.assert_array_equal(picture(out / "frames/0003/01-x0.png"), picture(out / "0003.png"))
    assert picture(out / "frames/0003/00-x.png").shape == (64, 64, 4)  # the base's steps are of 32 px
    assert [(row["seed"], row["prompt"]) for row in facts(out)["pictures"]] == [
        (5, "a red creature"),
        (6, "a red creature"),
        (7, "a blue creature"),
        (8, "a blue creature"),
    ]


def test_the_animation_shows_every_step_and_rests_on_the_pictures(settings):
    out = sample(
        settings(size=64, num_images_per_prompt=1, prompt=("a red creature",), background="white", animations=("gif",))
    )
    with Image.open(out / "denoising.gif") as clip:
        assert clip.n_frames == STEPS + 2 + 1
        clip.seek(clip.n_frames - 1)
        assert clip.info["duration"] > 1000
        right = np.asarray(clip.convert("RGB"))[:, 128:].astype(int)
    assert np.abs(right - picture(out / "grid.png")).mean() < 6  # a GIF has 256 colours


@pytest.mark.parametrize(("size", "side", "large"), [(32, 32, 256), (64, 64, 256), (None, 64, 256)])
def test_the_size_says_how_far_down_the_cascade(settings, size, side, large):
    out = sample(settings(size=size, num_images_per_prompt=1))
    assert picture(out / "0000.png").shape == (side, side, 4)
    assert picture(out / "large/0000.png").shape == (large, large, 4)
    assert facts(out)["settings"]["sampling"]["size"] == side


@pytest.mark.slow
def test_enlarged_on_a_background(settings):
    plain = sample(settings("plain"))
    big = sample(settings("big", enlarge=8, background="#ff00ff"))
    assert not (big / "large").exists()  # 256 px are large enough
    shown, small = picture(big / "0001.png"), picture(plain / "0001.png")
    assert shown.shape == (256, 256, 3)
    np.testing.assert_array_equal(shown[1::8, 1::8], composite(small, "#ff00ff"))


def test_draw_marks_its_last_frame_and_finishes_it_alone(settings, tiny_pipe):
    config = settings(size=64, hard_alpha=True, clean=False)
    jobs = [Job("a red creature", 1), Job("a blue creature", 2)]
    frames = list(sampling.draw(tiny_pipe, jobs, config))
    assert [frame.sigma > 0 for frame in frames] == [True] * (STEPS + 2) + [False]
    assert [frame.x.shape[1] for frame in frames] == [32] * STEPS + [64] * 3
    assert set(np.unique(frames[-1].x0[..., 3])) <= {0, 255}
    assert len(np.unique(frames[-1].x[..., 3])) > 2
    (last,) = sampling.draw(tiny_pipe, jobs, config, every=False)
    np.testing.assert_array_equal(last.x0, frames[-1].x0)


def test_a_prompt_for_pixel_art_ends_in_hard_edges_and_few_colours(settings, tiny_pipe):
    jobs = [Job("pixel sprite of a red creature", 1), Job("a red creature", 1)]

    def last(**changes) -> np.ndarray:
        *_, frame = sampling.draw(tiny_pipe, jobs, settings(size=64, **changes))
        np.testing.assert_array_equal(frame.x, drawn)
        return frame.x0

    *_, frame = sampling.draw(tiny_pipe, jobs, settings(size=64))
    drawn, (sprite, other) = frame.x, frame.x0
    assert set(np.unique(sprite[..., 3])) <= {0, 255}
    assert len(np.unique(sprite.reshape(-1, 4), axis=0)) <= 15
    assert len(np.unique(other.reshape(-1, 4), axis=0)) > 50
    raw = last(raw=True)
    np.testing.assert_array_equal(raw, drawn)
    assert len(np.unique(raw[0].reshape(-1, 4), axis=0)) > 50
    assert len(np.unique(last(palette="4")[0].reshape(-1, 4), axis=0)) <= 5
    assert len(np.unique(last(hard_alpha=False)[0][..., 3])) > 2
    with pytest.raises(PokediffError, match="raw"):
        settings(raw=True, palette="4")


# ------------------------------------------------------------------------------------------------------- the folder


def test_the_seed_is_random_printed_and_part_of_the_folder(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = settings(out=".", seed=None, prompt=("A blue, water turtle!",), num_images_per_prompt=1)
    first, second = (sample(replace(config, out=None)) for _ in range(2))
    seeds = [facts(out)["settings"]["seed"] for out in (first, second)]
    assert seeds[0] != seeds[1]
    assert [out.as_posix() for out in (first, second)] == [f"outputs/a-blue-water-turtle-{seed}" for seed in seeds]
    assert f"seed {seeds[1]}: {second}" in capsys.readouterr().out
    assert drawn(first)[0].tobytes() != drawn(second)[0].tobytes()


def test_the_same_seed_again_gets_a_folder_of_its_own(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(settings(seed=7, num_images_per_prompt=1), out=None)
    first = sample(config)
    before = content(first)
    second = sample(replace(config, sampling=replace(config.sampling, guidance_scale=3.0)))
    assert second.name == f"{first.name}-2"
    assert content(first) == before


def test_prompts_that_do_not_work_are_told_and_drawn(settings, capsys):
    prompts = ("a red creature", "una tartaruga azzurra", *(f"a red squirtle {n}" for n in "abcdef"), "a cat " * 60)
    sample(settings(prompt=prompts, num_images_per_prompt=1))
    said = capsys.readouterr().err.splitlines()
    notes = [line for line in said if line.startswith("note: ")]
    assert "few words of 'una tartaruga azzurra' are known" in notes[0]
    assert notes[-1] == "note: and 3 more prompts like these"
    assert len(notes) == 6
    assert not any("UserWarning" in line for line in said)


@pytest.mark.parametrize(("scale", "told"), [(1.0, True), (2.0, False)])
def test_a_negative_prompt_without_guidance_is_told(settings, capsys, scale, told):
    config = settings(num_images_per_prompt=1)
    sample(replace(config, sampling=replace(config.sampling, negative_prompt="red", guidance_scale=scale)))
    assert ("the negative prompt has no effect without guidance" in capsys.readouterr().err) is told


def test_names_of_folders():
    assert slug("火のドラゴン") != slug("水の亀")
    assert slug("Ein grüner Käfer (klein)") == "ein-grüner-käfer-klein"
    assert slug("../../etc") == "etc"
    assert slug("🐢") == "sample"
    assert len(slug("a very " * 30)) <= 40


@pytest.mark.slow
def test_an_earlier_drawing_is_replaced_whole_and_nothing_else(settings, capsys):
    out = sample(settings(save_frames=2, animations=("gif", "apng")))
    (out / "mine.png").write_bytes(b"kept")
    (out / "frames" / "notes.txt").write_bytes(b"kept")
    assert "replaced" not in capsys.readouterr().out
    sample(settings(num_images_per_prompt=1))
    assert f"the earlier drawing in {out} is replaced" in capsys.readouterr().out
    large = {"large/0000.png", "large/0001.png"}
    own = {"0000.png", "0001.png", "grid.png", "sample.json"} | large
    assert set(content(out)) == own | {"mine.png", "frames/notes.txt"}


@pytest.mark.parametrize("name", ["0000.png", "grid.png", "sample.json", "large/0001.png"])
def test_files_of_others_are_never_replaced(settings, tmp_path, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    words = "was not written by an earlier drawing" if name == "sample.json" else "holds other files"
    with pytest.raises(PokediffError, match=words) as error:
        sample(settings())
    assert "\n" not in str(error.value)
    assert content(tmp_path / "out") == {name: b"mine"}


def test_a_sample_json_cannot_name_files_of_others(tmp_path):
    names = ["0000.png", "../0001.png", "/etc/passwd", "frames/../../x.png", "notes.txt", 7]
    (tmp_path / "sample.json").write_text(json.dumps({"files": names[:5]}))
    assert listed_files(tmp_path) == ["0000.png"]
    (tmp_path / "sample.json").write_text(json.dumps({"files": names}))
    assert listed_files(tmp_path) == []


@pytest.mark.parametrize("failing", ["draw", "write_picture"])
def test_ctrl_c_in_the_first_batch_keeps_what_is_done(settings, tmp_path, monkeypatch, failing):
    module = sampling if failing == "draw" else sheets
    whole, calls = getattr(module, failing), []

    def interrupted(*args):
        calls.append(1)
        if failing == "draw" or len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(module, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(settings())
    if failing == "draw":
        assert not (tmp_path / "out").exists()
    else:
        names = {"0000.png", "0001.png", "large/0000.png", "large/0001.png", "grid.png", "sample.json"}
        assert set(content(tmp_path / "out")) == names
        assert len(facts(tmp_path / "out")["pictures"]) == 2


def test_ctrl_c_later_keeps_the_batches_before(settings, tmp_path, monkeypatch):
    whole, calls = sampling.draw, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(sampling, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(settings(batch_size=3))
    assert len(drawn(tmp_path / "out")) == len(facts(tmp_path / "out")["pictures"]) == 3


# ------------------------------------------------------------------------------------------------- the same pictures


@pytest.mark.slow
def test_sample_json_draws_the_same_pictures_again(settings, tmp_path):
    first = sample(settings("a", seed=None, guidance_interval=(0.1, 5.0), sampler="euler_a", exact=True))
    again = read_settings(first / "sample.json")
    assert again.seed is not None
    assert again.out is None
    second = sample(replace(again, out=str(tmp_path / "b"), batch_size=1))
    for name in ("0000.png", "0003.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_resolved_settings_are_stored(settings):
    stored = facts(sample(settings(precision="auto", num_inference_steps=None)))["settings"]
    assert stored["hard_alpha"] is None  # by the prompt of each picture
    assert stored["sampling"]["precision"] in ("bf16", "fp32")
    assert stored["sampling"]["num_inference_steps"] == 6
    assert stored["sampling"]["guidance_scale"] == 1.5


def test_weights_are_told_apart(tiny_checkpoint, tiny_pipe, tmp_path):
    assert weights_sha256(tiny_checkpoint) == weights_sha256(tiny_checkpoint)
    part = tmp_path / "part"
    Cascade({"upscaler-64": tiny_pipe.cascade["upscaler-64"]}).save_pretrained(part / "cascade")
    write_part_index(part, os.path.relpath(tiny_checkpoint, part))
    assert weights_sha256(part) != weights_sha256(tiny_checkpoint)


def test_prompts_from_a_file(settings, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na red creature\n\n  a blue creature \n", encoding="utf-8-sig")
    out = sample(settings(prompt=(), prompts_file=str(file), num_images_per_prompt=1))
    assert [row["prompt"] for row in facts(out)["pictures"]] == ["a red creature", "a blue creature"]
    assert facts(out)["settings"]["prompts_file"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, "no prompt"),
        ({"prompts_file": "none.txt"}, "not found"),
        ({"checkpoint": "checkpoints/none"}, "no checkpoint"),
        ({"background": "octarine"}, "not a colour"),
        ({"device": "abacus"}, "not available"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": __file__}, "not a picture"),
        ({"palette": "nowhere.hex"}, "nowhere.hex"),
        ({"prompt": ("one",), "num_images_per_prompt": 1, "interpolate": 4}, "two prompts"),
        ({"size": 128}, "draws 32, 64 px"),
        ({"fast": True}, "no few-step"),
    ],
)
def test_mistakes_are_named_and_leave_no_folder(settings, tmp_path, changes, words):
    with pytest.raises(PokediffError, match=words):
        sample(settings(**changes))
    assert not (tmp_path / "out").exists()


def test_settings_from_something_else(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(PokediffError, match=r"not a sample\.json"):
        read_settings(tmp_path / "x.json")


# ------------------------------------------------------------------- img2img, inpainting, interpolation, variations


@pytest.mark.slow
def test_an_interpolation_ends_at_the_pictures_of_its_prompts(settings, tmp_path):
    ends = drawn(sample(settings("a", num_images_per_prompt=1, seed=3, exact=True)))
    out = sample(settings("b", num_images_per_prompt=1, seed=3, exact=True, interpolate=5, batch_size=2))
    between = drawn(out)
    assert len(between) == 5
    np.testing.assert_array_equal(between[0], ends[0])
    np.testing.assert_array_equal(between[-1], ends[1])
    assert (between[2] != ends[0]).any()
    with Image.open(out / "interpolation.gif") as clip:
        assert clip.n_frames == 8  # there and back, no end twice
    assert [row["share"] for row in facts(out)["pictures"]] == [0, 0.25, 0.5, 0.75, 1]
    again = drawn(sample(replace(read_settings(out / "sample.json"), out=str(tmp_path / "c"))))
    np.testing.assert_array_equal(again, between)


def test_one_prompt_is_interpolated_between_its_seeds(settings):
    out = sample(settings(prompt=("a red creature",), num_images_per_prompt=3, interpolate=3))
    assert len(drawn(out)) == 5  # three ends, one between each two


def test_variations_are_nearer_the_smaller_they_are(settings):
    def spread(amount: float) -> float:
        config = settings(str(amount), prompt=("a red creature",), num_images_per_prompt=4, variation=amount)
        first, *others = drawn(sample(replace(config, clean=False)))
        return float(np.mean([np.abs(other.astype(int) - first).mean() for other in others]))

    assert 0 < spread(0.05) < spread(0.9)


@pytest.fixture
def image(tmp_path):
    """An opaque picture of 64 px, and a mask that is white in its upper half."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "in.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return pixels


@pytest.mark.slow
def test_img2img_keeps_more_the_weaker_and_inpainting_keeps_the_rest(settings, image, tmp_path):
    options = dict(prompt=("a red creature",), image=str(tmp_path / "in.png"), num_images_per_prompt=1, size=64)
    (weak,) = drawn(sample(settings("weak", strength=0.34, **options)))
    (strong,) = drawn(sample(settings("strong", strength=1.0, **options)))
    assert np.abs(weak.astype(int) - image).mean() < np.abs(strong.astype(int) - image).mean()
    (filled,) = drawn(sample(settings("mask", mask=str(tmp_path / "mask.png"), **options)))
    np.testing.assert_array_equal(filled[32:], image[32:])
    assert (filled[:32] != image[:32]).any()


def test_the_input_of_img2img_lies_beside_the_drawing(settings, image, tmp_path):
    first = sample(settings("a", image=str(tmp_path / "in.png")))
    (tmp_path / "in.png").unlink()
    again = read_settings(first / "sample.json")
    assert again.image == (first / "image.png").as_posix()
    second = sample(replace(again, out=str(tmp_path / "b")))
    assert (first / "0003.png").read_bytes() == (second / "0003.png").read_bytes()


def test_the_input_of_img2img_is_never_replaced(settings):
    out = sample(settings(save_frames=1, animations=("gif",)))
    before = content(out)
    pictures = ("0000.png", "denoising.gif", "frames/0000/00-x.png")
    for name, words in (*((name, "would overwrite its input") for name in pictures), ("missing.png", "No such file")):
        with pytest.raises(PokediffError, match=words):
            sample(settings(image=str(out / name)))
        assert content(out) == before


def test_a_mask_of_another_shape_is_refused(settings, tmp_path):
    Image.new("RGBA", (20, 20)).save(tmp_path / "in.png")
    Image.new("L", (10, 20)).save(tmp_path / "mask.png")
    with pytest.raises(PokediffError, match="10x20 px, the image 20x20"):
        sample(settings(image=str(tmp_path / "in.png"), mask=str(tmp_path / "mask.png")))


def test_palette_and_hard_alpha_hold_for_the_pictures_and_the_last_frame(settings):
    out = sample(settings(palette="4", hard_alpha=True, save_frames=2))
    for art in drawn(out):
        assert set(np.unique(art[..., 3])) <= {0, 255}
        assert len(np.unique(art[art[..., 3] > 0][:, :3], axis=0)) <= 4
    np.testing.assert_array_equal(picture(out / "frames/0001/01-x0.png"), picture(out / "0001.png"))


# ------------------------------------------------------------------------------------------------------- attribution


def test_the_colour_is_the_word_that_changes_most(tiny_pipe):
    found = word_influence(tiny_pipe, "a red creature", 1, Sampling(precision="fp32"))
    assert found.words == ("a", "red", "creature")
    assert list(found.sigmas) == sorted(found.sigmas, reverse=True)
    assert found.maps.shape == (3, len(found.sigmas), 32, 32)
    assert found.x0.shape == (len(found.sigmas), 32, 32, 4)
    assert found.picture.shape == (64, 64, 4)
    np.testing.assert_allclose(found.shares.sum(0), 1, rtol=1e-5)
    assert found.shares[:, 0].argmax() == 1
    with pytest.raises(PokediffError, match="1 to 24 words"):
        word_influence(tiny_pipe, "!", 1)
