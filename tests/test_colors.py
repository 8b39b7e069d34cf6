from __future__ import annotations

import numpy as np
import pytest
from conftest import COLORS, draw_creature

from pokediff.data.colors import (
    COLOR_ANCHORS,
    color_name,
    color_shares,
    cut_backdrop,
    figure_mask,
    is_typical,
    main_colors,
    to_lab,
)
from pokediff.data.images import fit_square, read_image, unpremultiply


@pytest.mark.parametrize("color", list(COLORS))
def test_a_creature_has_the_colour_it_was_drawn_with(color):
    shares = color_shares(draw_creature(COLORS[color], "round"))
    assert next(iter(shares)) == color
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert main_colors(draw_creature(COLORS[color], "round")) == (color,)


def test_colours_of_two_halves_and_of_nothing():
    rgba = draw_creature(COLORS["red"], "square")
    rgba[20:][rgba[20:, :, 3] > 0] = (*COLORS["blue"], 255)
    assert set(main_colors(rgba)) == {"red", "blue"}
    assert main_colors(np.zeros((8, 8, 4), np.uint8)) == ()


@pytest.mark.slow
def test_measured_colours_agree_with_people_on_real_pictures(shared):
    from pokediff.data.records import read_records

    folder = shared / "data" / "pokemon"
    records = [r for r in read_records(folder) if r.style == "dream-world" and not r.shiny and not r.form][::6]
    small = [unpremultiply(fit_square(read_image((folder / r.file_name).read_bytes()), 64)) for r in records]
    agree = [record.color in main_colors(picture) for record, picture in zip(records, small, strict=True)]
    assert np.mean(agree) > 0.7  # the Pokédex has no orange and names one colour only


def test_a_plain_backdrop_is_no_colour_of_the_creature():
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[8:24, 8:24, :3] = (220, 30, 30)
    rgba[14:18, 14:18, :3] = 255  # a white belly, not connected to the backdrop
    assert main_colors(rgba) == ("red",)
    assert figure_mask(rgba).sum() == 256
    assert main_colors(np.full((8, 8, 4), 255, np.uint8)) == ("white",)  # nothing but backdrop: say what it is


def test_a_scene_that_fills_the_picture_is_all_figure():
    rng = np.random.default_rng(0)
    scene = np.dstack([rng.integers(0, 256, (16, 16, 3)), np.full((16, 16), 255)]).astype(np.uint8)
    assert figure_mask(scene).all()
    np.testing.assert_array_equal(cut_backdrop(scene), scene)


def test_the_backdrop_is_cut_and_transparent_pictures_stay():
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[8:24, 8:24, :3] = (220, 30, 30)
    cut = cut_backdrop(rgba)
    assert (cut[..., 3] > 0).sum() == 256
    assert (cut[:8] == 0).all()
    creature = draw_creature(COLORS["red"], "round")
    assert cut_backdrop(creature) is creature


def test_names_of_single_colours():
    assert color_name((220, 40, 40)) == "red"
    assert color_name((0, 0, 0)) == "black"
    for name, anchors in COLOR_ANCHORS.items():  # an anchor has its own name (the table has steps of 8 levels)
        first = bytes.fromhex(anchors.split()[0])
        assert color_name(first) == name
    assert is_typical((255, 0, 0))
    assert not is_typical((236, 84, 36))  # between red and orange


def test_lab_of_known_colours():
    lab = to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8))
    np.testing.assert_allclose(lab, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.3)
