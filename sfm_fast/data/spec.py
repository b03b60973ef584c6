"""How data sets are named, and what is checked about a name before torch is imported and the data set is opened."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError, require_package
from ..files import expand
from ..options import check_options, option
from .fashion_mnist import find_folder

EMBEDDED = "embedded"
FULL_FASHION_MNIST = "fashion-mnist"
TIMM_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")
HELP = (
    f"'{EMBEDDED}' (a subset of Fashion-MNIST), '{FULL_FASHION_MNIST}[:FOLDER]' (all of it), a folder (train/CLASS/*, test/CLASS/*), "
    "train.tar (an archive of CLASS/*, with test.tar in the same folder), or a name for timm's create_dataset: hfds/…, wds/…, torch/…"
)
_COMPRESSED = (".zip", ".tgz", ".tbz2", ".txz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar")


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """A share of each class's training images that becomes the split "test" and is left out of "train"; 0: the data set's own splits."""

    hold_out: float = option(
        0.0,
        "share of each class's training images, such as 0.1, that split train leaves out and split test consists of, for a data set "
        "without test images; give it to all commands alike",
        metavar="SHARE",
        usual="0, the data set's own test split",
        within="[0, 1)",
    )
    hold_out_seed: int = option(0, "seed that chooses the images of --hold-out", metavar="N", least=0, most=2**64 - 1)

    def __post_init__(self) -> None:
        check_options(self)


def is_fashion_mnist(spec: str) -> bool:
    """Whether ``spec`` names Fashion-MNIST or its embedded subset."""
    return spec in (EMBEDDED, FULL_FASHION_MNIST) or spec.startswith(FULL_FASHION_MNIST + ":")


def check_spec(spec: str, split: str = "train", root: str | None = None, held: HoldOut = HoldOut()) -> None:
    """Raise ``InputError`` if there is nothing to open by the name ``spec``; what is there isn't read.

    Arguments as of `open_dataset`.
    """
    if not spec:
        raise InputError("data must be " + HELP + ", got an empty name")
    if held.hold_out and split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test' with hold_out, got {split!r}")
    if is_fashion_mnist(spec):
        if split not in ("train", "test"):
            raise InputError(f"split must be 'train' or 'test' for {spec}, got {split!r}")
        if spec != EMBEDDED:
            try:
                find_folder(spec.partition(":")[2] or None)
            except OSError as error:
                raise InputError(str(error)) from error
        return
    if spec.startswith(TIMM_PREFIXES):
        require_package("timm", f"the data set {spec!r}", "distill")
        if spec.startswith("torch/") and root is None:
            raise InputError(f"{spec}: needs the folder of its files (root, --data-root)")
        if held.hold_out:
            raise InputError(f"hold_out is for folders, archives and Fashion-MNIST, got {spec!r}: use its own splits")
        return
    path = expand(spec, "data")
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".tar"):
        return
    if path.is_file() and path.name.lower().endswith(_COMPRESSED):
        raise InputError(f"data: {spec!r} is compressed: unpack it into a folder, or into an uncompressed .tar")
    raise InputError(f"data: {spec!r} is no existing folder or .tar file; data must be {HELP}")
