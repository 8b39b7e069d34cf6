from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
import torch
from conftest import COLORS, draw_creature
from PIL import Image

from pokediff.data import images
from pokediff.data.images import (
    BadImage,
    composite,
    encode_png,
    enlarge,
    fit_square,
    from_model,
    grid,
    is_pixel_art,
    pairs,
    premultiply,
    read_image,
    save_animation,
    to_model,
    unpremultiply,
)
from pokediff.errors import PokediffError

RED_ON_CLEAR = draw_creature(COLORS["red"], "round")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_transparent_formats_keep_their_transparency(kind):
    data = saved(Image.fromarray(RED_ON_CLEAR), kind, **({"lossless": True} if kind == "WEBP" else {}))
    rgba = read_image(data)
    np.testing.assert_array_equal(rgba[..., 3], RED_ON_CLEAR[..., 3])
    np.testing.assert_array_equal(premultiply(rgba)[..., :3], premultiply(RED_ON_CLEAR)[..., :3])


def test_modes_and_depths():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode in ("L", "LA", "P", "RGB", "1", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        rgba = read_image(saved(grey.convert(mode), kind))
        assert rgba.shape == (16, 16, 4)
        assert (rgba[..., 3] == 255).all()
        if mode not in ("1", "CMYK"):
            assert abs(rgba[..., 0].astype(int) - np.asarray(grey).astype(int)).max() <= 3
    deep = Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
    rgba = read_image(saved(deep, "PNG"))
    assert rgba[0, 0, 0] == 0
    assert rgba[-1, -1, 0] == 255
    assert abs(int(rgba[8, 0, 0]) - 128) <= 1  # scaled, not clipped


def test_palette_with_a_transparent_entry():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    rgba = read_image(saved(image, "PNG", transparency=0))
    assert rgba[..., 3].tolist() == [[0, 255], [255, 0]]


def deep_png(color: int, rows: list[list[tuple[int, ...]]], clear: tuple[int, ...]) -> bytes:
    """A PNG of 16 bits a channel with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + b"".join(struct.pack(f">{len(p)}H", *p) for p in row) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 16, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(clear)}H", *clear)), (b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


def test_a_transparent_colour_of_16_bits_stays_transparent():
    grey = read_image(deep_png(0, [[(0,), (1000,), (65535,)]], (1000,)))
    assert grey.tolist() == [[[0, 0, 0, 255], [4, 4, 4, 0], [255, 255, 255, 255]]]
    color = read_image(deep_png(2, [[(0, 0, 0), (1000, 2000, 3000)]], (1000, 2000, 3000)))
    assert color[..., 3].tolist() == [[255, 0]]


def test_a_large_picture_is_decoded_small_and_looks_the_same():
    shape = np.zeros((900, 1200, 4), np.uint8)
    shape[100:700, 300:800] = 200, 40, 90, 255
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 95})):
        image = Image.fromarray(shape).convert("RGBA" if kind == "PNG" else "RGB")
        data = saved(image, kind, **options)
        small, whole = read_image(data, side=128), read_image(data)
        assert whole.shape == (900, 1200, 4)
        assert 128 <= max(small.shape[:2]) < 256
        difference = fit_square(small, 32).astype(int) - fit_square(whole, 32)
        assert abs(difference).mean() < 1
    assert read_image(data, side=1024).shape == (900, 1200, 4)  # not below the side


def test_no_reader_that_runs_other_programs_is_used():
    with pytest.raises(BadImage, match="not a picture"):
        read_image(saved(Image.new("RGB", (8, 8)), "EPS"))


def test_a_cut_a_false_and_a_huge_picture_are_refused():
    data = encode_png(RED_ON_CLEAR)
    with pytest.raises(BadImage, match="not a whole picture"):
        read_image(data[: len(data) // 2])
    with pytest.raises(BadImage, match="not a picture"):
        read_image(b"<html>Just a moment</html>")
    with pytest.raises(BadImage, match="more than"):
        read_image(data, max_pixels=100)


def test_encoding_the_same_pixels_gives_the_same_bytes():
    assert encode_png(RED_ON_CLEAR) == encode_png(read_image(encode_png(RED_ON_CLEAR)))


def test_premultiplied_and_back():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (32, 32, 4)).astype(np.uint8)
    rgba[..., 3] = np.maximum(rgba[..., 3], 200)
    assert abs(unpremultiply(premultiply(rgba)).astype(int) - rgba.astype(int)).max() <= 1
    assert (unpremultiply(np.zeros((2, 2, 4), np.uint8)) == 0).all()


def test_shrinking_averages_and_never_bleeds_from_transparent_pixels():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., 1] = 255  # a green that nobody sees
    rgba[:, :31] = (255, 0, 0, 255)
    small = unpremultiply(fit_square(rgba, 32))
    visible = small[..., 3] > 0
    assert (small[visible][:, 1] == 0).all()
    assert (small[visible][:, 0] >= 254).all()
    assert small[0, 15, 3] == 128  # half covered


def test_pixel_art_is_enlarged_by_whole_factors_without_new_colours():
    sprite = draw_creature(COLORS["blue"], "square", size=20)
    assert is_pixel_art(sprite)
    big = unpremultiply(fit_square(sprite, 64))
    np.testing.assert_array_equal(big[2:62, 2:62], enlarge(sprite, 3))
    assert (big[:2] == 0).all()
    assert {tuple(c) for c in big.reshape(-1, 4)} == {tuple(c) for c in sprite.reshape(-1, 4)}


def test_other_pictures_are_padded_to_a_square_and_stay_whole():
    wide = np.full((10, 30, 4), 255, np.uint8)
    wide[..., 2] = np.arange(30) * 8  # too soft for pixel art? its colours are few, its edge is hard
    square = fit_square(wide, 16)
    assert square.shape == (16, 16, 4)
    assert (square[:5, :, 3] == 0).all()
    assert (square[7:9, :, 3] == 255).all()
    soft = np.zeros((10, 10, 4), np.uint8)
    soft[2:8, 2:8] = (200, 100, 0, 120)
    enlarged = fit_square(soft, 32)
    assert (enlarged[..., :3] <= enlarged[..., 3:]).all()  # a premultiplied colour never exceeds its alpha


@pytest.mark.parametrize("channels", ["rgba", "rgb", "grey"])
def test_model_space_and_back(channels):
    rgba = np.stack([RED_ON_CLEAR, draw_creature(COLORS["green"], "square")])
    x = to_model(torch.from_numpy(premultiply(rgba)), channels)
    assert x.shape == (2, images.CHANNELS[channels], 40, 40)
    assert x.min() >= -1
    assert x.max() <= 1
    back = from_model(x)
    if channels == "rgba":
        np.testing.assert_array_equal(back, rgba)
    elif channels == "rgb":
        np.testing.assert_array_equal(back[..., :3], composite(rgba))
    else:
        luma = composite(rgba) @ np.array([0.299, 0.587, 0.114])
        assert abs(back[..., 0] - luma).max() <= 1
    assert from_model(torch.full((1, 4, 2, 2), 7.0)).max() == 255  # clipped, not wrapped


def test_a_colour_brighter_than_its_alpha_is_cut():
    x = torch.full((1, 4, 1, 1), 1.0)
    x[:, 3] = 0.0  # alpha one half, colour full
    assert from_model(x)[0, 0, 0].tolist() == [255, 255, 255, 128]


def test_composite_and_colour_names():
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
    assert composite(rgba, "white").tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert composite(rgba, "#102030")[0, 1].tolist() == [16, 32, 48]
    with pytest.raises(PokediffError, match="not a colour"):
        composite(rgba, "octarine")


def test_grid_places_pictures_row_by_row():
    pictures = np.zeros((5, 2, 2, 4), np.uint8)
    for index in range(5):
        pictures[index] = index + 1
    sheet = grid(pictures, columns=3, gap=1)
    assert sheet.shape == (5, 8, 4)
    assert sheet[0, 0, 0] == 1
    assert sheet[0, 6, 0] == 3
    assert sheet[3, 3, 0] == 5
    assert sheet[2].max() == 0


def test_pairs_put_every_real_picture_above_its_drawn_one():
    real = np.zeros((5, 2, 2, 4), np.uint8)
    real[...] = np.arange(1, 6)[:, None, None, None]
    sheet = grid(pairs(real, real + 10, columns=3), columns=3, gap=0)[::2, ::2, 0]  # a number for each picture
    assert sheet.tolist() == [[1, 2, 3], [11, 12, 13], [4, 5, 0], [14, 15, 0]]


@pytest.mark.parametrize("name", ["gif", "png", "apng", "mp4"])
def test_animations_open_and_hold_their_last_frame(tmp_path, name):
    if name == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((32, 33, 3), (40 * index, 90, 200 - 40 * index), np.uint8) for index in range(5)]
    path = tmp_path / f"show.{name}"
    save_animation(path, frames, seconds=1.0, hold=2.0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file left
    if name == "mp4":
        video = cv2.VideoCapture(str(path))
        count, fps = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), video.get(cv2.CAP_PROP_FPS)
        assert 2.8 < count / fps < 3.3
        assert int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") in (b"avc1", b"h264")
        good, first = video.read()
        assert good
        assert abs(cv2.cvtColor(first, cv2.COLOR_BGR2RGB)[16, 16].astype(int) - frames[0][0, 0]).max() < 12
        return
    with Image.open(path) as image:
        assert image.n_frames == 5
        durations = []
        for index in range(5):
            image.seek(index)
            durations.append(image.info["duration"])
        assert durations[:4] == [200] * 4
        assert durations[4] == 2200
        assert abs(np.asarray(image.convert("RGB"))[0, 0].astype(int) - frames[4][0, 0]).max() <= 4


def test_mp4_without_its_extra_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(PokediffError, match=r'pip install "pokediff\[mp4\]"'):
        save_animation(tmp_path / "a.mp4", [np.zeros((4, 4, 3), np.uint8)])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_animation_is_refused(tmp_path):
    with pytest.raises(PokediffError, match=r"\.gif"):
        save_animation(tmp_path / "a.avi", [np.zeros((4, 4, 3), np.uint8)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_a_photo_with_exif_escapes_as_another_error():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a long description of the picture"
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(buffer, "JPEG", exif=exif.tobytes())
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(buffer.getvalue())
        for place in rng.integers(0, 200, 3):
            data[place] = rng.integers(256)
        with contextlib.suppress(BadImage):
            read_image(bytes(data))


def test_faint_alpha_is_kept():
    faint = torch.full((1, 4, 1, 3), -1.0)
    faint[0, 3, 0] = torch.tensor([1, 2, 3]) / 127.5 - 1
    assert from_model(faint)[0, ..., 3].tolist() == [[1, 2, 3]]


def test_opaque_pixel_art_fills_the_square_rather_than_getting_a_frame():
    digit = np.zeros((28, 28, 4), np.uint8)
    digit[..., 3] = 255
    digit[10:20, 10:12, :3] = 255
    fitted = fit_square(digit, 32)
    assert fitted[..., 3].min() == 255
    assert fitted[..., 0].max() > 200
    assert fit_square(digit, 64)[0, 0, 3] == 0  # twice as large, and framed
