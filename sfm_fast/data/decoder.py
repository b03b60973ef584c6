"""Decodes image files and Pillow images to upright grey or colour images of 8 bits."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import InputError, require_package

# Vector graphics, films and scientific containers: Pillow knows their endings, but can't read pixels or needs another program to.
_NO_PHOTOS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_ORIENTATION = 0x0112  # EXIF tag
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")


def endings() -> frozenset[str]:
    """Endings of the files that this Pillow reads, with their dot and in lower case, including those of loaded plug-ins."""
    require_package("PIL", "reading images", "distill")
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in _NO_PHOTOS)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats to try for any file, whatever its ending; the most common first."""
    from PIL import Image

    Image.init()
    usual = ("JPEG", "PNG", "WEBP")
    return (*usual, *(kind for kind in Image.OPEN if kind not in _NO_PHOTOS and kind not in usual))


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Any:
    """The first frame of an image file, converted by `plain`. Raises ``InputError`` if it can't be read."""
    from PIL import ImageFile

    # Some packages switch this on globally; truncated photos would then be read without an error.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with _opened(file) as image:
            return plain(image)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def header_is_grey(file: str | os.PathLike[str] | IO[bytes]) -> bool:
    """`is_grey` of an image file, without decoding it. Raises ``InputError`` if it can't be read."""
    with _opened(file) as image:
        return is_grey(image)


@contextlib.contextmanager
def _opened(file: str | os.PathLike[str] | IO[bytes]) -> Iterator[Any]:
    require_package("PIL", "reading images", "distill")
    from PIL import Image

    if isinstance(file, (str, os.PathLike)):
        if Path(file).is_dir():
            raise InputError("is a folder; give image files")
        if not Path(file).is_file():
            raise InputError("no such file")
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(file, (str, os.PathLike)):
                file = stack.enter_context(open(file, "rb"))
            yield stack.enter_context(Image.open(file, formats=_formats()))
    except InputError:
        raise
    except Exception as error:  # Pillow raises half a dozen kinds on damaged files
        raise InputError(f"unreadable image ({error})") from error


def plain(image: Any) -> Any:
    """A Pillow image rotated by its EXIF orientation, in mode "L" if it is grey, else in mode "RGB".

    16 bits per channel are reduced to the upper 8. Transparency is ignored: the stored colours are used. Raises ``InputError``
    for pixels without a fixed range.
    """
    from PIL import Image, ImageOps

    try:
        _load(image)
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        with contextlib.suppress(Exception):  # unreadable EXIF data are ignored; the pixels may be valid
            if image.getexif().get(_ORIENTATION, 1) != 1:  # avoids a copy of most images
                image = ImageOps.exif_transpose(image)
        if deep:  # convert("L") would clip 16 bits to white
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise InputError(f"image mode {image.mode!r} has no fixed range; store it with 8 or 16 bits per channel")
        if image.mode in ("P", "PA"):
            # Via RGBA, because convert("RGB") warns about or misreads transparent palette entries given as bytes.
            return image.convert("RGBA").convert("L" if is_grey(image) else "RGB")
        return as_mode(image, "L" if is_grey(image) else "RGB")
    except InputError:
        raise
    except Exception as error:  # lazily opened images are decoded here; some modes can't be converted to RGB
        raise InputError(f"unreadable image ({error})") from error


def _load(image: Any) -> None:
    """Decode without memory-mapping the file, with which Pillow misreads the rows of rotated TIFFs."""
    name = getattr(image, "filename", "")
    if name:
        image.filename = ""
    try:
        image.load()
    finally:
        if name:
            image.filename = name


def as_mode(image: Any, mode: str) -> Any:
    """``image`` converted to ``mode``; unchanged if it has that mode."""
    return image if image.mode == mode else image.convert(mode)


def is_grey(image: Any) -> bool:
    """Whether a Pillow image can't contain colour, judged by its mode or palette without decoding it."""
    if image.mode in ("P", "PA"):
        palette = image.getpalette("RGB")
        colours = np.array(palette or [], dtype=np.uint8).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")
