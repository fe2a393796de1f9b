"""Reader of pictures, from a file to upright 8-bit RGB; both stages and all commands use it.

Black becomes 0 and white 255. The scale follows from the file's format, mode and bits a sample, never from its pixel
values, so that a dark picture stays dark. Kinds of pictures that do not state black and white, such as floats, are
refused.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

# Default of DATA.MAX_PIXELS.
MAX_PIXELS = 89_000_000

ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Modes that PIL converts to RGB with black at 0 and white at 255. Transparency is dropped, the colours below it stay.
_EIGHT_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
# Formats whose 16-bit grey is unsigned and uses all its bits. Its mode in PIL is "I" for a PGM that PIL scales.
_SIXTEEN_BIT = ("PNG", "TIFF", "JPEG2000", "PPM")
# Formats for which PIL starts another program.
_PROGRAMS = ("EPS", "WMF")
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF's tags


class PictureError(ValueError):
    """A picture or its labels cannot be used; the message is one line that names the file."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error again with the worker's traceback as its message, which ends with the
        # original message.
        message = super().__str__().rpartition(f"\n{PictureError.__module__}.{PictureError.__name__}: ")[2]
        return " ".join(message.strip().splitlines())


class RefusedError(OSError):
    """An undamaged picture is not read; the message has the rule and the remedy."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error with a file into a :class:`PictureError` that names the file."""
    try:
        yield
    except PictureError:
        raise
    except RefusedError as error:
        raise PictureError(f"{os.fspath(path)}: {error}") from error
    except Exception as error:  # Damaged files make decoders raise anything: OSError, SyntaxError, struct.error, ...
        remedy = "repair the file, or take it out of the data set"
        raise PictureError(f"{os.fspath(path)}: {describe(error)}; {remedy}") from error


def describe(error: Exception) -> str:
    """Return in one line why a picture cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a picture"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def read_image(file: str | os.PathLike[str] | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette and CMYK pictures are converted; 16-bit samples keep their high byte.

    Args:
        file: a path, or an open file.
        max_pixels: ``DATA.MAX_PIXELS``; a larger picture is refused before it is decoded.

    Raises:
        PictureError: the file cannot be read, is not a picture, too large, damaged, or of a kind whose black and white
            are not known; the message names it.
    """
    if isinstance(file, str | os.PathLike):
        with naming(file), open(file, "rb") as opened:
            return upright_rgb(open_picture(opened, max_pixels))
    with naming(getattr(file, "name", "the picture")):
        return upright_rgb(open_picture(file, max_pixels))


def open_picture(file: IO[bytes], max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Read a picture's header; its pixels are not decoded yet.

    Args:
        file: an open file.
        max_pixels: refuse a larger picture; None for no limit. PIL's own limit does not apply.

    Raises:
        OSError: it is not a picture.
        RefusedError: it is too large, or of a kind that is not supported.
    """
    try:
        with _pils_limit_lifted():
            opened = Image.open(file)
    except UnidentifiedImageError as error:
        raise OSError("PIL cannot identify it as a picture") from error
    width, height = opened.size
    if max_pixels is not None and width * height > max_pixels:
        more = f"{width} x {height} pixels are more than DATA.MAX_PIXELS {max_pixels}"
        raise RefusedError(f"{more}; raise it, or scale the picture down")
    _refuse(opened)
    return opened


def _refuse(opened: Image.Image) -> None:
    """Raise RefusedError for a kind of picture whose black and white are not certain."""
    kind = f"{opened.format} picture of mode {opened.mode}"
    if opened.format in _PROGRAMS:
        raise RefusedError(f"{kind}: reading it needs another program; save it as PNG")
    if opened.mode not in _EIGHT_BIT and not (_is_deep_grey(opened) and opened.format in _SIXTEEN_BIT):
        raise RefusedError(f"{kind}: its values of black and white are not known; save it as PNG with 8 or 16 bits")
    if set(_tiff(opened, _SAMPLE_FORMAT, (1,))) != {1}:
        raise RefusedError(f"{kind}, signed samples: its values of black and white are not known; save it unsigned")


def _is_deep_grey(opened: Image.Image) -> bool:
    return opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))


def _tiff(opened: Image.Image, tag: int, default: Any) -> Any:
    return opened.tag_v2.get(tag, default) if opened.format == "TIFF" else default  # type: ignore[attr-defined]


def orientation(opened: Image.Image) -> Any:
    """Return the EXIF orientation of a picture that is not decoded yet; in some files it is not a number."""
    if opened.format == "TIFF":  # PIL turns it when decoding, and states the upright size.
        return None
    if opened.format == "PNG" and "exif" not in opened.info:
        opened.load()  # EXIF may come after the pixels; an error in these is raised here.
    try:
        return opened.getexif().get(ORIENTATION)
    except Exception:  # Damaged EXIF: the picture is taken as it is stored, as by Detectron2.
        return None


def turn(opened: Image.Image) -> Image.Transpose | None:
    """Return how PIL turns a picture upright; None if it is upright."""
    return _TURNS.get(orientation(opened))


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Return width and height of a picture as it stands upright."""
    width, height = opened.size
    return (height, width) if orientation(opened) in (5, 6, 7, 8) else (width, height)


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return width and height of the upright picture in a file, from its header.

    Raises:
        OSError: the file does not exist or is not a picture that can be read.
    """
    try:
        with open(path, "rb") as file:
            opened = open_picture(file, max_pixels=None)
            if opened.format == "PNG" and opened.width * opened.height > MAX_PIXELS:
                return opened.size  # finding the EXIF might mean decoding it all
            return upright_size(opened)
    except OSError:
        raise
    except Exception as error:
        raise OSError(describe(error)) from error


def upright_rgb(opened: Image.Image) -> Image.Image:
    """Decode an opened picture, and return it upright as 8-bit RGB.

    Raises:
        OSError: it is damaged.
    """
    return _upright(opened, _rgb)


def upright_grey(opened: Image.Image) -> Image.Image:
    """Decode an opened label image, and return it upright as 8-bit grey.

    Raises:
        OSError: it is damaged.
    """
    return _upright(opened, lambda image: image.convert("L"))


def _upright(opened: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    how = turn(opened)
    with _pils_limit_lifted():
        opened.load()
    image = convert(opened)
    return image if how is None else image.transpose(how)


def _rgb(opened: Image.Image) -> Image.Image:
    image = _high_byte(opened) if _is_deep_grey(opened) else opened
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    image.info.pop("transparency", None)  # PIL would look for a colour to replace it, and warn
    return image.convert("RGB")


def _high_byte(opened: Image.Image) -> Image.Image:
    bits = _tiff(opened, _BITS, (16,))[0]
    pixels = (np.asarray(opened) >> (bits - 8)).astype(np.uint8)
    # PIL inverts pictures in which 0 is white, except those of 16 bits.
    return Image.fromarray(pixels if _tiff(opened, _PHOTOMETRIC, 1) else 255 - pixels)


_lifting = threading.Lock()
_lifted: list[int | None] = []  # PIL's limit as each active reader found it; all but the first are None


@contextlib.contextmanager
def _pils_limit_lifted() -> Iterator[None]:
    """Lift PIL's limit, because ``DATA.MAX_PIXELS`` is the limit; the last active reader restores it."""
    with _lifting:
        _lifted.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lifting:
            if len(_lifted) == 1:
                Image.MAX_IMAGE_PIXELS = _lifted[0]
            _lifted.pop()
