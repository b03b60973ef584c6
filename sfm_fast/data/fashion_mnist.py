"""Fashion-MNIST: the embedded subset, and a reader of the original IDX files.

Data: Xiao, Rasul and Vollgraf, "Fashion-MNIST" (arXiv 1708.07747), MIT licence, (c) 2017 Zalando SE.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import InputError
from ..files import expand

if TYPE_CHECKING:  # `find_folder` is used before torch and NumPy are needed
    import numpy as np

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = 0.286, 0.353  # of all training pixels on a 0..1 scale
ENVIRONMENT_VARIABLE = "SFM_FAST_FASHION_MNIST"
SEARCHED_FOLDERS = (
    "/usr/share/datasets/fashion-mnist",  # Debian: apt install dataset-fashion-mnist
    "data/FashionMNIST/raw",  # torchvision.datasets.FashionMNIST("data", download=True)
    "~/.cache/sfm_fast/FashionMNIST/raw",
)
EMBEDDED_FILE = Path(__file__).parent / "assets" / "fashion_mnist_subset.npz"

Split = Literal["train", "test"]
_PREFIX = {"train": "train", "test": "t10k"}
_MAGIC_IMAGES, _MAGIC_LABELS = 2051, 2049


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of bytes (gzip-compressed or not): images (N, H, W) or labels (N,), uint8.

    Raises ``ValueError`` if it is no IDX file, or its length doesn't match its header.
    """
    import numpy as np

    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(data) < 8:
        raise ValueError(f"{path}: {len(data)} bytes are too few for an IDX header")
    magic = struct.unpack(">i", data[:4])[0]
    dims = {_MAGIC_IMAGES: 3, _MAGIC_LABELS: 1}.get(magic)
    if dims is None:
        raise ValueError(
            f"{path}: IDX magic number {magic}, expected {_MAGIC_IMAGES} (images) or {_MAGIC_LABELS} (labels)"
        )
    header = 4 + 4 * dims
    shape = struct.unpack(f">{dims}i", data[4:header])
    if min(shape) < 0 or len(data) - header != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path}: header says {shape}, but {len(data) - header} bytes follow it")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape).copy()


def find_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the four IDX files of the full data set.

    Searches only ``folder`` if given, else ``$SFM_FAST_FASHION_MNIST`` and `SEARCHED_FOLDERS`.
    Raises ``FileNotFoundError`` that lists the searched folders and how to get the data.
    """
    if folder is not None:
        places = [expand(folder, "folder")]
    else:
        named = os.environ.get(ENVIRONMENT_VARIABLE)
        places = [expand(named, f"${ENVIRONMENT_VARIABLE}")] if named else []
        for usual in SEARCHED_FOLDERS:
            with contextlib.suppress(InputError):  # there may be no home folder
                places.append(expand(usual, "folder"))
    for place in places:
        if _idx_file(place, "train", "images-idx3-ubyte", must_exist=False) is not None:
            return place
    raise FileNotFoundError(
        f"no full Fashion-MNIST in {', '.join(map(str, places))}; get it with `apt install dataset-fashion-mnist`, or "
        f"torchvision.datasets.FashionMNIST('data', download=True), or set {ENVIRONMENT_VARIABLE}"
    )


def _idx_file(folder: Path, split: Split, kind: str, must_exist: bool = True) -> Path | None:
    for suffix in ("", ".gz"):
        path = folder / f"{_PREFIX[split]}-{kind}{suffix}"
        if path.is_file():
            return path
    if must_exist:
        raise FileNotFoundError(f"{folder}: {_PREFIX[split]}-{kind}[.gz] is missing")
    return None


def load_full(split: Split, folder: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The full data set: images (60000 or 10000, 28, 28) uint8 and labels (N,) int64."""
    import numpy as np

    place = find_folder(folder)
    images_file, labels_file = (_idx_file(place, split, kind) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    assert images_file is not None
    assert labels_file is not None
    images, labels = read_idx(images_file), read_idx(labels_file).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{place}: {len(images)} {split} images but {len(labels)} labels")
    return images, labels


def load_embedded(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The subset included in the package: images (N, 28, 28) uint8 and labels (N,) int64, balanced over 10 classes."""
    import numpy as np

    with np.load(EMBEDDED_FILE, allow_pickle=False) as archive:
        return archive[f"{split}_images"], archive[f"{split}_labels"].astype(np.int64)
