"""Pixel formats, picture files, sizes, sheets and animations.

Three pixel formats, converted only here:

* *straight* RGBA, uint8 (H, W, 4): the format of files and of results;
* *premultiplied* RGBA, uint8 (H, W, 4), every colour multiplied by its alpha: the format for resizing, since the
  average of straight colours mixes the arbitrary colour of transparent pixels into the edges (Porter & Duff,
  "Compositing Digital Images", 1984);
* *model* space, float32 (N, C, H, W) in [-1, 1], C = 4 premultiplied RGBA, 3 RGB on white, 1 grey on white.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pokediff.errors import PokediffError

if TYPE_CHECKING:
    import torch

Channels = Literal["rgba", "rgb", "grey"]
CHANNELS: dict[Channels, int] = {"rgba": 4, "rgb": 3, "grey": 1}
# Raised by Pillow for broken files; the last three for broken EXIF and text blocks.
DECODER_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, struct.error, EOFError, TypeError)
MAX_PIXELS = 64_000_000  # a limit against decompression bombs
LARGE_PIXELS = 4_000_000  # larger pictures are decoded one at a time: each may take 12 bytes a pixel
ONE_LARGE: AbstractContextManager[Any] = threading.Lock()  # decoding.py shares one among its processes
# Formats that Pillow opens and that are no pictures to train on: pages, films, fields of weather; and its EPS reader
# runs another program on the file.
NO_PICTURES = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}
USUAL = {"PNG", "JPEG", "WEBP", "GIF"}  # tried first


class BadImage(PokediffError):
    """A picture that cannot be decoded, or that is larger than MAX_PIXELS."""


# ---------------------------------------------------------------------------------------------------------- files


@cache
def picture_formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats that `read_image` reads, and the suffixes of their files in lower case."""
    Image.init()
    formats = tuple(sorted(Image.OPEN.keys() - NO_PICTURES, key=lambda name: (name not in USUAL, name)))
    return formats, frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def read_image(data: bytes, max_pixels: int = MAX_PIXELS, side: int | None = None) -> np.ndarray:
    """Decode a picture file that Pillow reads, of any mode and depth, to straight RGBA, uint8 (H, W, 4).

    Of an animation, the first frame. With `side`, a picture is shrunk by a whole factor while its longer side stays at
    least that: a photograph then takes a fraction of the memory. Raises BadImage for bytes that are not a picture,
    truncated, or hold more than `max_pixels`.
    """
    try:
        with Image.open(BytesIO(data), formats=picture_formats()[0]) as file:
            if file.width * file.height > max_pixels:
                raise BadImage(f"{file.width}x{file.height} is more than {max_pixels:,} pixels")
            with ONE_LARGE if file.width * file.height > LARGE_PIXELS else nullcontext():
                if side:
                    file.draft(None, (side, side))  # a JPEG is decoded at a half, a quarter or an eighth
                image = ImageOps.exif_transpose(_eight_bits(file))
                if side and (factor := max(image.size) // side) > 1:
                    image = image.convert(_whole_mode(image)).reduce(factor)
                return np.array(image.convert("RGBA"))
    except UnidentifiedImageError:
        raise BadImage("not a picture") from None
    except DECODER_ERRORS as error:
        raise BadImage(f"not a whole picture ({error})") from None


def _eight_bits(file: Image.Image) -> Image.Image:
    """Numbers of more bits scaled to eight, where Pillow would clip them; a transparent colour of 16 bits stays one."""
    clear = file.info.get("transparency")
    if file.mode.startswith("I"):  # 16-bit grey
        deep = np.asarray(file, dtype=np.float64)
        grey = (deep.clip(0, 65535) / 257).round().astype(np.uint8)
        alpha = np.full_like(grey, 255) if clear is None else np.where(deep == clear, 0, 255).astype(np.uint8)
        image = Image.fromarray(np.dstack([grey, alpha]))  # LA
    elif file.mode == "F":
        values = np.nan_to_num(np.asarray(file))
        image = Image.fromarray((values * (255 if values.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
    else:
        if isinstance(clear, tuple) and max(clear) > 255:  # of 16-bit colours, which Pillow reads as their high bytes
            file.info["transparency"] = tuple(value >> 8 for value in clear)
        return file
    image.info = {key: value for key, value in file.info.items() if key != "transparency"}
    if exif := file.getexif():
        image.getexif().update(exif)
    return image


def _whole_mode(image: Image.Image) -> str:
    """The mode in which pixels can be averaged."""
    clear = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    return "RGBA" if clear else "L" if image.mode in ("1", "L") else "RGB"


def encode_png(rgba: np.ndarray, text: Mapping[str, object] | None = None) -> bytes:
    """Straight RGBA uint8 (H, W, 4) to PNG bytes, with text chunks; the same pixels always give the same bytes."""
    buffer, chunks = BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, str(value))
    Image.fromarray(rgba).save(buffer, "PNG", optimize=False, compress_level=6, pnginfo=chunks)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- sizes


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Straight to premultiplied RGBA, uint8 (..., 4)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return np.concatenate([(rgba[..., :3] * alpha + 127) // 255, alpha], axis=-1).astype(np.uint8)


def unpremultiply(rgba: np.ndarray) -> np.ndarray:
    """Premultiplied to straight RGBA, uint8 (..., 4); where alpha is 0, so is the colour."""
    alpha = rgba[..., 3:].astype(np.float32)
    color = np.divide(rgba[..., :3] * 255.0, alpha, out=np.zeros(rgba[..., :3].shape, np.float32), where=alpha > 0)
    return np.concatenate([color.round().clip(0, 255), alpha], axis=-1).astype(np.uint8)


def is_pixel_art(rgba: np.ndarray) -> bool:
    """Whether a picture has few colours and hard edges, so that resizing must not blur it."""
    alpha = rgba[..., 3]
    if ((alpha > 0) & (alpha < 255)).any():
        return False
    packed = rgba.astype(np.uint32) @ np.array([1, 256, 65536, 16777216], np.uint32)
    return len(np.unique(packed[alpha > 0])) <= 64


def fit_square(rgba: np.ndarray, size: int) -> np.ndarray:
    """Straight RGBA of any shape to a premultiplied uint8 (size, size, 4) square: whole, centred, padded.

    Shrinking averages areas. Pixel art is enlarged by a whole factor with NEAREST and padded, so that it keeps its
    grid; other pictures are enlarged bicubically, and so is an opaque one that would only get a frame.
    """
    pixels = premultiply(rgba)
    height, width = pixels.shape[:2]
    side = max(height, width)
    framed = size // side == 1 and pixels[..., 3].min() == 255
    if side < size and is_pixel_art(rgba) and not framed:
        return _pad_square(enlarge(pixels, size // side), size)
    pixels = _pad_square(pixels, side)
    if side != size:
        method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
        resized = cv2.resize(pixels.astype(np.float32), (size, size), interpolation=method).round().clip(0, 255)
        resized[..., :3] = np.minimum(resized[..., :3], resized[..., 3:])  # a colour never exceeds its alpha
        pixels = resized.astype(np.uint8)
    return pixels


def _pad_square(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if height == width == side:
        return pixels
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(pixels, ((top, side - height - top), (left, side - width - left), (0, 0)))


def enlarge(rgba: np.ndarray, factor: int) -> np.ndarray:
    """(..., H, W, C) to (..., factor*H, factor*W, C) with NEAREST: every pixel becomes a square of equal pixels."""
    return rgba.repeat(factor, axis=-3).repeat(factor, axis=-2)


def composite(rgba: np.ndarray, background: str | Sequence[int] = "white") -> np.ndarray:
    """Straight RGBA uint8 (..., 4) over one colour (a name, "#rrggbb" or three numbers 0..255), uint8 (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    under = np.array(parse_color(background), np.float32)
    return (rgba[..., :3] * alpha + under * (1 - alpha)).round().astype(np.uint8)


def parse_color(color: str | Sequence[int]) -> tuple[int, int, int]:
    """A CSS colour name, "#rrggbb" or three numbers to (r, g, b) 0..255. Raises PokediffError for anything else."""
    if not isinstance(color, str):
        r, g, b = color
        return r, g, b
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError:
        raise PokediffError(f"{color!r} is not a colour: use a name such as white, or #rrggbb") from None


# ---------------------------------------------------------------------------------------------------- model space


def to_model(premultiplied: torch.Tensor, channels: Channels) -> torch.Tensor:
    """Premultiplied uint8 (N, H, W, 4) to float32 (N, C, H, W) in [-1, 1]."""
    x = premultiplied.permute(0, 3, 1, 2).float() / 255  # (N, 4, H, W) in [0, 1]
    if channels != "rgba":
        x = x[:, :3] + (1 - x[:, 3:])  # over white; the colour is already multiplied by alpha
        if channels == "grey":
            weights = x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601 luma
            x = (x * weights).sum(1, keepdim=True)
    return (x * 2 - 1).contiguous()


def from_model(x: torch.Tensor) -> np.ndarray:
    """Float (N, C, H, W) in [-1, 1], C = 4, 3 or 1, to straight RGBA uint8 (N, H, W, 4).

    Values outside are clipped, and so is a premultiplied colour that exceeds its alpha.
    """
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] == 4:
        pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])
        return unpremultiply(pixels)
    rgb = np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    return np.concatenate([rgb, np.full_like(pixels[..., :1], 255)], axis=-1)


# ------------------------------------------------------------------------------------------------ sheets and animations


def grid(rgba: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """(N, H, W, 4) to one straight RGBA sheet, row by row, with `gap` transparent pixels between the pictures."""
    number, height, width, _ = rgba.shape
    columns = columns or max(1, round(number**0.5))
    rows = -(-number // columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for index, picture in enumerate(rgba):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def pairs(real: np.ndarray, drawn: np.ndarray, columns: int) -> np.ndarray:
    """Two arrays (N, H, W, 4) as one for `grid` with as many columns: rows of `real`, below each its row of `drawn`.

    Transparent pictures fill up the last two rows, so the result is (2M, H, W, 4), M a multiple of `columns`.
    """
    unfilled = np.stack([real, drawn])  # (2, N, H, W, 4)
    both = np.pad(unfilled, ((0, 0), (0, -len(real) % columns), *[(0, 0)] * 3))  # (2, M, H, W, 4)
    rows = both.reshape(2, -1, columns, *real.shape[1:]).swapaxes(0, 1)  # (M / columns, 2, columns, H, W, 4)
    return rows.reshape(-1, *real.shape[1:])


def can_write_mp4() -> bool:
    """Is imageio-ffmpeg installed (extra `mp4`)?"""
    return find_spec("imageio_ffmpeg") is not None


def save_animation(path: Path, frames: Sequence[np.ndarray], seconds: float = 3.0, hold: float = 1.5) -> None:
    """Write opaque frames, uint8 (H, W, 3), as GIF, APNG (.png, .apng) or MP4 (H.264), by the suffix of `path`.

    The frames take `seconds` in all, and the last one stays for `hold` more seconds. Raises PokediffError for another
    suffix, and for MP4 without imageio-ffmpeg.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        _save_frames(temporary, path.name, frames, seconds, hold)
        os.replace(temporary, path)
    except OSError:  # a full disk needs its space back
        temporary.unlink(missing_ok=True)
        raise


def _save_frames(temporary: Path, name: str, frames: Sequence[np.ndarray], seconds: float, hold: float) -> None:
    frame_ms = max(20, round(1000 * seconds / len(frames)))  # viewers show shorter frames for 100 ms
    if temporary.suffix == ".gif":
        _save_gif(temporary, frames, frame_ms, round(1000 * hold))
    elif temporary.suffix in (".png", ".apng"):
        durations = [frame_ms] * (len(frames) - 1) + [frame_ms + round(1000 * hold)]
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(temporary, "PNG", save_all=True, append_images=images[1:], duration=durations, loop=0)
    elif temporary.suffix == ".mp4":
        still = [frames[-1]] * round(1000 * hold / frame_ms)
        _save_mp4(temporary, [*frames, *still], 1000 / frame_ms)
    else:
        raise PokediffError(f"{name}: the suffix of an animation is .gif, .png, .apng or .mp4")


def _save_gif(path: Path, frames: Sequence[np.ndarray], frame_ms: int, hold_ms: int) -> None:
    # One palette for all frames, from a sample of them: with a palette a frame the colours flicker.
    sample = np.concatenate([frames[i] for i in np.linspace(0, len(frames) - 1, 8).astype(int)])
    palette = Image.fromarray(sample).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [frame_ms] * (len(images) - 1) + [frame_ms + hold_ms]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)


def _save_mp4(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise PokediffError('MP4 needs imageio-ffmpeg: pip install "pokediff[mp4]", or use .gif or .apng') from None
    height, width = (side - side % 2 for side in frames[0].shape[:2])  # yuv420p needs even sides
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2, quality=8
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame[:height, :width]))
    finally:
        writer.close()
