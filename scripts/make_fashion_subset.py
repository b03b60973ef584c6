"""Write the embedded subset of Fashion-MNIST: the first images of every class, in the order of the original files.

python scripts/make_fashion_subset.py --out sfm_fast/data/assets/fashion_mnist_subset.npz
"""

from __future__ import annotations

import argparse

import numpy as np

from sfm_fast.data import fashion_mnist


def first_per_class(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.sort(
        np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(fashion_mnist.CLASS_NAMES))])
    )
    return images[chosen], labels[chosen].astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", default=None, help="folder of the IDX files")
    parser.add_argument("--train", type=int, default=600, help="training images a class")
    parser.add_argument("--test", type=int, default=250, help="test images a class")
    args = parser.parse_args()
    arrays = {}
    for split, count in (("train", args.train), ("test", args.test)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = first_per_class(
            *fashion_mnist.load_full(split, args.data), count
        )
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()
