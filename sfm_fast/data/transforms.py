"""Converts images of any kind and size to a backbone's input: resize, centre crop, channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .decoder import as_mode, plain

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
MOST_ASPECT = (
    50  # limit of the aspect ratio: with the shorter side resized to 224, 1 x 60000 pixels would take gigabytes
)


@dataclass(frozen=True)
class ImageTransform:
    """Resize the shorter side to ``resize`` (bicubic, antialiased) and crop the centre to ``crop`` x ``crop``; 0..1 floats."""

    resize: int
    crop: int
    channels: int

    def __call__(self, image: Any) -> Tensor:
        """A PIL image, or an array or tensor (uint8, uint16 or float 0..1; HW, HWC or CHW) -> (channels, crop, crop) float32."""
        return to_floats(self.pixels(image))

    def pixels(self, image: Any) -> Tensor:
        """Like a call, but uint8 for a PIL image, so that worker processes send a quarter of the bytes."""
        if hasattr(image, "convert"):
            return self._pil(image)
        array = image if isinstance(image, Tensor) else _as_tensor(np.asarray(image))
        if array.ndim == 2:
            array = array.unsqueeze(0)
        elif array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
            array = array.permute(2, 0, 1)
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise InputError(f"an image must be HW, HWC or CHW with 1 or 3 channels, got shape {tuple(array.shape)}")
        return self.batch(array.unsqueeze(0))[0]

    def _pil(self, image: Any) -> Tensor:
        from PIL import Image

        _check_shape(*image.size)
        image = as_mode(plain(image), "L" if self.channels == 1 else "RGB")
        width, height = image.size
        scale = self.resize / min(width, height)
        target = (max(self.resize, round(width * scale)), max(self.resize, round(height * scale)))
        if target != image.size:
            image = image.resize(target, Image.Resampling.BICUBIC)
        left, top = (target[0] - self.crop) // 2, (target[1] - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return torch.from_numpy(np.array(image)).view(self.crop, self.crop, self.channels).permute(2, 0, 1)

    def batch(self, images: Tensor) -> Tensor:
        """(N, channels, H, W) uint8, uint16 or float 0..1 -> (N, self.channels, crop, crop) float32."""
        if 0 in images.shape:
            raise InputError(f"an image must have pixels, got shape {tuple(images.shape[1:])}")
        _check_shape(images.shape[3], images.shape[2])
        if images.is_complex():
            raise _wrong_pixels(images.dtype)
        if images.dtype == torch.uint16:  # the upper 8 bits, as for PIL images
            images = (images.int() >> 8).byte()
        if images.dtype == torch.uint8:
            images = to_floats(images)
        elif not (
            images.is_floating_point() and images.min() >= -1e-3 and images.max() <= 1 + 1e-3
        ):  # also true for NaN
            raise _wrong_pixels(f"{images.dtype} from {images.min()} to {images.max()}")
        images = images.float()
        images = match_channels(images, self.channels)
        height, width = images.shape[2:]
        scale = self.resize / min(width, height)
        target = (max(self.resize, round(height * scale)), max(self.resize, round(width * scale)))
        if target != (height, width):
            images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (target[0] - self.crop) // 2, (target[1] - self.crop) // 2
        return images[:, :, top : top + self.crop, left : left + self.crop]


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1; floats are returned unchanged."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def match_channels(images: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey by luminance: (N, 1 or 3, H, W) -> (N, channels, H, W)."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    if images.shape[1] == 3 and channels == 1:
        return torch.einsum(
            "nchw,c->nhw", images, torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
        ).unsqueeze(1)
    raise InputError(f"images with {images.shape[1]} channels can't be converted to {channels}")


def _as_tensor(array: np.ndarray) -> Tensor:
    """A copy of the array with native byte order and strides that torch supports."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"unreadable image (an array of {array.dtype}, but it must be of uint8 or floats)")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _wrong_pixels(got: object) -> InputError:
    return InputError(f"pixels must be uint8 in 0..255 or floats in 0..1, got {got}")


def _check_shape(width: int, height: int) -> None:
    if not 0 < max(width, height) <= MOST_ASPECT * min(width, height):
        raise InputError(
            f"an image of {width} x {height} pixels is too long: its sides must be at most {MOST_ASPECT} to 1; crop it"
        )
