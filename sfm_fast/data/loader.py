"""Reads batches of a data set's items in worker processes, without /dev/shm and with any start method, and reports their errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, reason_of
from .samples import read_sample
from .transforms import ImageTransform, to_floats


class ReadItems(torch.utils.data.Dataset):
    """Items ``indices`` of a data set as (pixels, class number), or as the error message of an item that can't be read."""

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int],
        transform: ImageTransform,
        describe: Callable[[int], str],
        class_names: Sequence[str],
    ) -> None:
        self.dataset, self.indices, self.transform, self.describe = dataset, indices, transform, describe
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int] | str:
        index = int(self.indices[place])
        try:
            return read_sample(self.dataset[index], self.transform, self.class_names)
        except Exception as error:  # a data set may raise any exception
            return str(unreadable(self.describe(index), error))


def unreadable(where: str, error: Exception) -> InputError:
    """The error for the item ``where``, in one line."""
    reason = str(error) if isinstance(error, InputError) else f"can't be read ({type(error).__name__}: {error})"
    return InputError(f"{where}: {reason}")


def _collate(samples: list[tuple[Tensor, int] | str]) -> tuple[np.ndarray, np.ndarray] | str:
    """Batches as arrays: tensors would be sent through /dev/shm, which has only 64 MB in containers; arrays go through a pipe."""
    for sample in samples:
        if isinstance(sample, str):
            return sample
    pairs = [sample for sample in samples if not isinstance(sample, str)]
    images = [image for image, _ in pairs]
    if any(image.dtype != torch.uint8 for image in images):
        images = [to_floats(image) for image in images]
    return torch.stack(images).numpy(), np.array([label for _, label in pairs], dtype=np.int64)


def read_batches(view: ReadItems, batch_size: int, workers: int, name: str) -> Iterator[Any]:
    """The view's batches, read by ``workers`` processes, or by this process if they can't be started."""

    def loader(workers: int) -> Iterator[Any]:
        return iter(torch.utils.data.DataLoader(view, batch_size, num_workers=workers, collate_fn=_collate))

    try:
        batches = loader(workers)
    except OSError as error:  # the system has no semaphores, or allows no more processes
        warnings.warn(
            f"{name}: worker processes can't be started ({error.strerror}); this process reads the images",
            RuntimeWarning,
            stacklevel=2,
        )
        batches = loader(0)
    try:
        yield from batches
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise InputError(
            f"{name}: a process that reads images died ({reason_of(error)}), perhaps out of memory; use fewer (--workers 0: none)"
        ) from error
