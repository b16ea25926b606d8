"""Decoding of pictures, or of parts of them, into arrays."""

import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from flaxnets.data.crops import Box
from flaxnets.errors import InputError

# Importing these plugins registers them; FORMATS keeps Pillow from trying any others.
KINDS = (JpegImageFile, PngImageFile, WebPImageFile, BmpImageFile)
FORMATS = [str(kind.format) for kind in KINDS]
MODES = {1: "L", 3: "RGB"}  # Pillow's names, by the number of channels

# Decoding a JPEG at 1/2, 1/4 or 1/8 of its size is faster. It is done if it leaves at least this
# many pixels a side for each pixel of the result; 2 is hardly visible (Pillow, `reducing_gap`).
PIXELS_FOR_ONE = 2.0
JPEG_PIXELS, JPEG_END = 0xDA, b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The seven passes of an interlaced PNG: first column and row, column step and row step.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
MOST_DECOMPRESSED = 2**20  # bytes at a time
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open a JPEG, PNG, WebP or BMP picture, reading no more than its header.

    Raises:
      ValueError: the picture has another format; the message is the reason, in one line.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except Exception as error:
        raise ValueError(_reason(error)) from error


def check_picture(data: bytes) -> str:
    """Check that a picture can be decoded to its end with nothing missing; return its Pillow mode.

    This is stricter than `decode_crop`, which accepts a PNG with fewer rows than its header says
    and a JPEG padded with zeros. A JPEG that was cut and then properly terminated goes undetected.

    Raises:
      ValueError: the picture cannot be read or is incomplete; see `decode_crop`.
    """
    image = open_image(io.BytesIO(data))
    mode = image.mode
    # Even at a reduced size, a JPEG is read to its end.
    _decode(image, 3, (1, 1))
    if image.format == PngImageFile.format:
        _check_pixels(data)
    elif image.format in (JpegImageFile.format, "MPO"):  # two JPEGs, as some phones take them
        _check_end(data)
    return mode


def decode_crop(
    data: bytes,
    channels: int,
    height: int,
    width: int,
    draw: Callable[[int, int], Box],
    mirrored: bool = False,
) -> np.ndarray:
    """Decode one part of a picture, upright and resized: uint8 `(height, width, channels)`.

    Big JPEGs are decoded only to the detail that is needed. Resampling is bilinear with
    antialiasing. Opacity is dropped, and the colours stored under it stay, as in torchvision's
    loader. Channels of 16 bits are reduced to 8. An animation yields its first picture.

    Args:
      data: content of a JPEG, PNG, WebP or BMP file.
      channels: 1 or 3.
      draw: chooses the part, given the picture's width and height.
      mirrored: mirror the result left to right.

    Raises:
      ValueError: the picture cannot be read to its end; the message is the reason, in one line.
    """
    image = open_image(io.BytesIO(data))
    whole_width, whole_height = image.size
    if _is_sideways(_orientation(image)):
        whole_width, whole_height = whole_height, whole_width
    box = left, top, right, bottom = draw(whole_width, whole_height)
    scale = PIXELS_FOR_ONE * max(width / (right - left), height / (bottom - top))
    image = _decode(image, channels, (scale * whole_width, scale * whole_height))
    if image.size != (whole_width, whole_height):
        x, y = image.width / whole_width, image.height / whole_height
        box = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return _cut(image, box, height, width, mirrored)


def _decode(
    image: Image.Image, channels: int, at_least: tuple[float, float] | None = None
) -> Image.Image:
    """Decode a picture, upright; a JPEG may be smaller, but has this width and height at least."""
    if channels not in MODES:
        raise InputError(f"pictures are read with 1 or 3 channels, not {channels}")
    orientation = _orientation(image)
    try:
        if at_least:
            width, height = map(math.ceil, at_least)
            image.draft(None, (height, width) if _is_sideways(orientation) else (width, height))
        image.load()
        image = _converted(image, MODES[channels])
    except Exception as error:
        raise ValueError(_reason(error)) from error
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _check_end(jpeg: bytes) -> None:
    """Refuse a JPEG without an end marker after its pixels, such as half a download padded with
    zeros. Pillow would fill in the missing pixels."""
    position = 2
    while jpeg[position : position + 1] == b"\xff" and jpeg[position + 1] != JPEG_PIXELS:
        filled = jpeg[position + 1] == 0xFF
        position += 1 if filled else 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
    if jpeg.find(JPEG_END, position) < 0:
        raise ValueError("it ends before its last pixel")


def _check_pixels(png: bytes) -> None:
    """Refuse a PNG whose compressed pixels are damaged, or fewer than its header says.

    Pillow accepts pixel data that ends early but cleanly, and ignores its checksum.
    """
    try:
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    except (KeyError, struct.error) as error:
        raise ValueError("its header is damaged") from error
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * bits // 8))
    found, position, stream = 0, len(PNG_SIGNATURE), zlib.decompressobj()
    try:
        while position + 8 <= len(png) and not stream.eof:
            length, kind = struct.unpack(">I4s", png[position : position + 8])
            if kind == b"IDAT":
                rest = png[position + 8 : position + 8 + length]
                while rest and not stream.eof:
                    found += len(stream.decompress(rest, MOST_DECOMPRESSED))
                    rest = stream.unconsumed_tail
            position += 12 + length
        found += len(stream.flush())
    except zlib.error as error:
        raise ValueError(f"its pixels are damaged ({error})") from error
    if found < expected:
        raise ValueError(f"it has only {100 * found // expected} % of its pixels")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the picture itself may still be good
        return 1


def _is_sideways(orientation: int) -> bool:
    return orientation in (5, 6, 7, 8)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would make everything above 255 white.
        image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct conversion warns
    return image if image.mode == mode else image.convert(mode)


def _cut(
    image: Image.Image, box: Box, height: int, width: int, mirrored: bool = False
) -> np.ndarray:
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    array = np.array(image)
    return array if array.ndim == 3 else array[..., None]


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a JPEG, PNG, WebP or BMP picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
