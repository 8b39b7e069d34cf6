from __future__ import annotations

import numpy as np
import pytest

from pokediff.drawing.pixelart import (
    FAINT,
    LAB_STEPS,
    _to_lab,
    apply_palette,
    finish,
    harden,
    is_pixel_prompt,
    pick_palette,
    read_palette,
    remove_faint,
    remove_specks,
)
from pokediff.errors import PokediffError


def creature(size: int = 32) -> np.ndarray:
    """A disc in two noisy colours with a soft edge, and two specks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    rgb = np.where((x > 0)[..., None], [200, 40, 40], [40, 60, 200]) + rng.integers(-12, 13, (size, size, 3))
    alpha = np.clip((size * 0.35 - np.hypot(x, y)) * 128 + 128, 0, 255)[..., None]
    picture = np.concatenate([rgb, alpha], axis=-1).astype(np.uint8)
    picture[picture[..., 3] == 0] = 0
    picture[1, 1] = picture[1, size - 2] = [90, 90, 90, 200]
    return picture


def test_specks_go_and_the_figure_stays_whole():
    before = creature()
    after = remove_specks(before)
    assert after[1, 1, 3] == after[1, 30, 3] == 0
    figure = np.s_[4:28, 4:28]
    np.testing.assert_array_equal(after[figure], before[figure])


def test_a_small_picture_of_one_island_is_left_alone_and_so_is_an_empty_one():
    dot = np.zeros((32, 32, 4), np.uint8)
    dot[5, 5] = 255
    np.testing.assert_array_equal(remove_specks(dot), dot)
    empty = np.zeros((32, 32, 4), np.uint8)
    np.testing.assert_array_equal(remove_specks(empty), empty)


@pytest.mark.parametrize(("width", "stays"), [(8, True), (4, False)])
def test_a_flame_beside_the_body_stays_and_a_splinter_goes(width, stays):
    """24 and 12 pixels beside a body of 420: 6 and 3 %."""
    picture = creature()
    loose = np.s_[0:3, 16 - width // 2 : 16 + width // 2, 3]
    picture[loose] = 255
    assert (remove_specks(picture)[loose] == (255 if stays else 0)).all()


def test_faint_pixels_go_only_when_cleaning():
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[2:6, 2:6] = [10, 20, 30, 255]
    picture[1, 2:6] = [[200, 0, 0, alpha] for alpha in (1, 2, 3, 4)]
    assert FAINT == 3
    assert remove_faint(picture)[1, 2:6].tolist() == [[0, 0, 0, 0]] * 2 + [[200, 0, 0, 3], [200, 0, 0, 4]]
    np.testing.assert_array_equal(finish(picture)[1], remove_faint(picture)[1])
    np.testing.assert_array_equal(finish(picture, clean=False), picture)


def test_hard_alpha_is_all_or_nothing():
    hard = harden(creature())
    assert set(np.unique(hard[..., 3])) == {0, 255}
    assert (hard[hard[..., 3] == 0] == 0).all()


def test_a_palette_of_two_finds_the_two_colours():
    picture = creature()
    palette = pick_palette(picture, 3)
    for color in ([200, 40, 40], [40, 60, 200]):
        assert np.abs(palette.astype(int) - color).max(1).min() < 12
    assert len(np.unique(apply_palette(picture, palette)[picture[..., 3] > 0][:, :3], axis=0)) <= 3
    np.testing.assert_array_equal(pick_palette(picture, 3), palette)


def test_a_palette_depends_on_neither_chance_nor_the_order_of_pixels():
    picture = creature()
    shuffled = np.random.default_rng(1).permutation(picture.reshape(-1, 4)).reshape(picture.shape)
    for colors in (2, 6, 14, 64):
        np.testing.assert_array_equal(pick_palette(picture, colors), pick_palette(shuffled, colors))


def test_a_small_eye_keeps_its_colour():
    y, x = np.mgrid[:64, :64]
    picture = np.dstack([x, 120 + x + y // 2, 2 * y, np.full_like(x, 255)]).clip(0, 255).astype(np.uint8)
    picture[20:22, 20:23, :3] = [230, 20, 40]
    eye = apply_palette(picture, pick_palette(picture, 8))[20:22, 20:23, :3].astype(int)
    assert np.abs(eye - [230, 20, 40]).max() < 30


def test_lab_is_in_whole_steps():
    lab = _to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8))
    np.testing.assert_array_equal(lab, lab.round())
    np.testing.assert_allclose(lab / LAB_STEPS, [[100, 0, 0], [0, 0, 0], [53.23, 80.11, 67.22]], atol=0.01)


def test_few_colours_are_kept_as_they_are():
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:4] = [255, 0, 0, 255]
    picture[4:] = [0, 255, 0, 255]
    np.testing.assert_array_equal(finish(picture, palette=16), picture)


@pytest.mark.parametrize("colors", [2, 8, 16])
def test_never_more_colours_than_wanted(colors):
    done = finish(creature(), palette=colors, hard_alpha=True)
    assert len(np.unique(done[done[..., 3] > 0][:, :3], axis=0)) <= colors


def test_palettes_of_files(tmp_path):
    (tmp_path / "a.hex").write_text("ff0000\n#00ff00\n\n0000ff\n")
    (tmp_path / "b.gpl").write_text(
        "GIMP Palette\nName: three\nColumns: 3\n# a comment\n255 0 0\tred\n  0 255 0 green\n0 0 255\n"
    )
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for name in ("a.hex", "b.gpl"):
        palette = read_palette(str(tmp_path / name))
        assert palette.tolist() == expected
        done = finish(creature(), palette=palette)
        assert {tuple(c) for c in done[done[..., 3] > 0][:, :3].tolist()} <= {tuple(c) for c in expected}
    assert read_palette("16") == 16


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.hex", "ff00", "is not a colour"),
        ("x.hex", "", "has 0 colours"),
        ("x.gpl", "255 0 0\n", "first line"),
        ("x.gpl", "GIMP Palette\nred green blue\n", "is not a colour"),
        ("x.txt", "ff0000", "a .gpl or .hex file"),
    ],
)
def test_bad_palette_files_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(PokediffError, match=words):
        read_palette(str(tmp_path / name))


@pytest.mark.parametrize("text", ["1", "300", "no-such.hex"])
def test_bad_numbers_and_missing_files_are_named(text):
    with pytest.raises(PokediffError, match="palette"):
        read_palette(text)


def test_pixel_prompts():
    for prompt in ("pixel sprite of a cat", "a red dragon, pixel art", "Pixel tiles of water", "a tiny pixel-art owl"):
        assert is_pixel_prompt(prompt)
    for prompt in ("", "flat emoji of a cat", "a pixelated cat", "official artwork of a blue creature"):
        assert not is_pixel_prompt(prompt)
