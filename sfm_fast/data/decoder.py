"""The one way from an image file, or an image of Pillow's, to upright grey or colour pixels of 8 bits."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import InputError, require_package

# Drawings, films and containers of science: Pillow knows the endings and reads no pixels, or needs another program for it.
_NO_PHOTOS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_ORIENTATION = 0x0112  # a tag of EXIF
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")


def endings() -> frozenset[str]:
    """Endings of the files that Pillow reads here, in lower case and with their dot; plug-ins that are loaded count."""
    require_package("PIL", "reading images", "distill")
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in _NO_PHOTOS)


@functools.cache
def _formats() -> tuple[str, ...]:
    """What files are taken for, whatever they are called: the usual ones first."""
    from PIL import Image

    Image.init()
    usual = ("JPEG", "PNG", "WEBP")
    return (*usual, *(kind for kind in Image.OPEN if kind not in _NO_PHOTOS and kind not in usual))


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Any:
    """The first frame of an image file as `plain` has it. Raises ``InputError`` that says why it can't be read."""
    from PIL import ImageFile

    # Some packages switch this on for everybody: half a photo would then pass as a whole one.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with _opened(file) as image:
            return plain(image)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def header_is_grey(file: str | os.PathLike[str] | IO[bytes]) -> bool:
    """`is_grey` of an image file, without decoding it. Raises ``InputError`` that says why it can't be read."""
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
    """A Pillow image turned as its EXIF orientation says, in mode "L" where it is grey and "RGB" where it isn't.

    16 bits a channel keep their upper 8. Transparency is left out: the colours that the file stores count. Raises ``InputError``
    for pixels without a fixed range.
    """
    from PIL import Image, ImageOps

    try:
        _load(image)
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        with contextlib.suppress(Exception):  # EXIF data that can't be read turn nothing; the pixels may be sound
            if image.getexif().get(_ORIENTATION, 1) != 1:  # which saves a copy of most
                image = ImageOps.exif_transpose(image)
        if deep:  # convert("L") would clip 16 bits to white
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise InputError(f"image mode {image.mode!r} has no fixed range; store it with 8 or 16 bits a channel")
        if image.mode in ("P", "PA"):
            # Through RGBA: a palette's transparent entries may be bytes, which convert("RGB") warns about or misreads.
            return image.convert("RGBA").convert("L" if is_grey(image) else "RGB")
        return as_mode(image, "L" if is_grey(image) else "RGB")
    except InputError:
        raise
    except Exception as error:  # an image opened lazily is decoded here; some modes have no way to RGB
        raise InputError(f"unreadable image ({error})") from error


def _load(image: Any) -> None:
    """Decode, but not by mapping the file into memory: Pillow then cuts the rows of TIFFs that are turned at the wrong places."""
    name = getattr(image, "filename", "")
    if name:
        image.filename = ""
    try:
        image.load()
    finally:
        if name:
            image.filename = name


def as_mode(image: Any, mode: str) -> Any:
    """``image`` in ``mode``, itself where it is in it."""
    return image if image.mode == mode else image.convert(mode)


def is_grey(image: Any) -> bool:
    """Whether a Pillow image can hold no colour, by its mode, or its palette; nothing is decoded."""
    if image.mode in ("P", "PA"):
        palette = image.getpalette("RGB")
        colours = np.array(palette or [], dtype=np.uint8).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")
