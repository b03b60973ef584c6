"""Real images: the embedded set, IDX files, folders, timm's data sets, iterables, and what is wrong with them."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from tests_data import everything, write_image_folder

from sfm_fast import InputError
from sfm_fast.data import fashion_mnist
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ArraySource, from_iterable
from sfm_fast.data.transforms import ImageTransform, match_channels

TRANSFORM = ImageTransform(8, 8, 3)


def test_embedded_set_is_what_it_says():
    for split, count in (("train", 600), ("test", 250)):
        images, labels = fashion_mnist.load_embedded(split)
        assert images.shape == (10 * count, 28, 28)
        assert images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [count] * 10
    assert fashion_mnist.EMBEDDED_FILE.stat().st_size <= 4_000_000


def write_idx(folder, prefix, images, labels, compress):
    opener, suffix = (gzip.open, ".gz") if compress else (open, "")
    with opener(folder / f"{prefix}-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
    with opener(folder / f"{prefix}-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())


@pytest.mark.parametrize("compress", [False, True])
def test_full_set_from_idx_files(tmp_path, compress):
    images, labels = (
        np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28),
        np.array([3, 9], np.uint8),
    )
    write_idx(tmp_path, "train", images, labels, compress)
    source = open_dataset(f"fashion-mnist:{tmp_path}", "train")
    pixels, their_labels = everything(source, ImageTransform(28, 28, 1))
    assert torch.equal(pixels, torch.from_numpy(images).unsqueeze(1).float() / 255)
    assert their_labels.tolist() == [3, 9]


def test_idx_files_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match="no full Fashion-MNIST"):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")
    images, labels = np.zeros((2, 28, 28), np.uint8), np.array([3, 9], np.uint8)
    write_idx(tmp_path, "train", images, labels, True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged gzip"):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 2, 28, 28))
    with pytest.raises(InputError, match="0 bytes follow"):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")


def test_image_folder(tmp_path):
    source = open_dataset(str(write_image_folder(tmp_path)), "train", workers=0)
    assert source.class_names == ["cat", "dog"]
    assert source.channels == 3
    images, labels = everything(source)
    assert images.shape == (8, 3, 8, 8)
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert images[0, 0].mean() < images[-1, 0].mean()
    taken, taken_labels = source.take([7, 0], TRANSFORM)
    assert torch.equal(taken, images[[7, 0]])
    assert taken_labels.tolist() == [1, 0]


def test_workers_give_the_same_images(tmp_path):
    root = str(write_image_folder(tmp_path))
    one, two = (everything(open_dataset(root, "train", workers=workers)) for workers in (0, 2))
    assert torch.equal(one[0], two[0])


def test_grey_folder_is_seen_as_grey(tmp_path):
    assert open_dataset(str(write_image_folder(tmp_path, grey=True)), "train", workers=0).channels == 1


def test_folder_without_splits_is_a_train_split(tmp_path):
    root = write_image_folder(tmp_path)
    assert len(open_dataset(str(root / "train"), "train", workers=0)) == 8
    with pytest.raises(InputError, match="no test split"):
        open_dataset(str(root / "train"), "test")


def test_tar_archive(tmp_path):
    import tarfile

    root = write_image_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(root / "train", arcname=".")
    source = open_dataset(str(tmp_path / "train.tar"), "train", workers=0)
    assert len(source) == 8
    assert sorted(everything(source)[1].tolist()) == [0] * 4 + [1] * 4
    assert torch.equal(
        everything(open_dataset(str(tmp_path / "train.tar"), "train", workers=2))[0], everything(source)[0]
    )
    with pytest.raises(InputError, match="no test split in its folder"):
        open_dataset(str(tmp_path / "train.tar"), "test")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "no image"])
def test_unreadable_image_is_named(tmp_path, damage, workers):
    root = write_image_folder(tmp_path)
    victim = root / "train" / "dog" / "2.png"
    victim.write_bytes(victim.read_bytes()[:200] if damage == "truncated" else b"hello")
    with pytest.raises(InputError, match=r"dog/2\.png.*unreadable") as caught:
        everything(open_dataset(str(root), "train", workers=workers))
    assert "\n" not in str(caught.value)


def test_iterables():
    rng = np.random.default_rng(0)
    pairs = [(Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)), i % 2) for i in range(5)]
    images, labels = everything(from_iterable(pairs, ["a", "b"]))
    assert images.shape == (5, 3, 8, 8)
    assert labels.tolist() == [0, 1, 0, 1, 0]

    class Again:
        def __iter__(self):
            return iter(pairs)

    source = from_iterable(Again(), ["a", "b"])
    assert torch.equal(everything(source)[0], images)
    assert torch.equal(source.take([4, 1], TRANSFORM)[0], images[[4, 1]])
    assert not source.random_access
    once = from_iterable((pair for pair in pairs), ["a", "b"])
    assert torch.equal(everything(once)[0], images)
    with pytest.raises(InputError, match="second pass"):
        everything(once)


def test_arrays_tensors_and_pil_images_agree():
    grey = np.random.default_rng(0).integers(0, 255, (9, 9), dtype=np.uint8)
    transform = ImageTransform(9, 7, 1)
    expected = torch.from_numpy(grey[1:8, 1:8]).unsqueeze(0).float() / 255
    for image in (
        grey,
        torch.from_numpy(grey),
        Image.fromarray(grey),
        grey[..., None],
        torch.from_numpy(grey).unsqueeze(0),
        grey.astype(np.float32) / 255,
    ):
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="an image must be"):
        transform(np.zeros((5, 5, 4), np.uint8))


def test_resize_and_crop_of_arrays_is_close_to_pillow():
    smooth = np.linspace(0, 255, 30)[:, None] * np.linspace(0.2, 1, 44)[None, :]
    image = smooth.astype(np.uint8)
    transform = ImageTransform(16, 12, 1)
    assert (transform(image) - transform(Image.fromarray(image))).abs().max() < 0.02


def test_match_channels():
    colour = torch.rand(2, 3, 4, 4)
    assert match_channels(colour, 3) is colour
    torch.testing.assert_close(
        match_channels(colour, 1)[:, 0], 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]
    )
    assert match_channels(colour[:, :1], 3).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("nowhere", "train", "no existing folder"),
        ("embedded", "val", "split must be"),
        ("", "train", "empty name"),
        ("torch/nothing", "train", "needs the folder of its files"),
    ],
)
def test_bad_specs(spec, split, message):
    with pytest.raises(InputError, match=message):
        open_dataset(spec, split)


def test_bad_arrays():
    with pytest.raises(InputError, match="uint8"):
        ArraySource("x", np.zeros((2, 4, 4), np.float32), np.zeros(2), ["a"])
    with pytest.raises(InputError, match="labels must be as many as images, 2"):
        ArraySource("x", np.zeros((2, 4, 4), np.uint8), np.zeros(3), ["a"])


def test_empty_class_folder_is_named(tmp_path):
    root = write_image_folder(tmp_path)
    (root / "train" / "bird").mkdir()
    (root / "train" / "bird" / "notes.txt").write_text("none yet")
    with pytest.raises(InputError, match=r"train/bird: this class folder holds no images"):
        open_dataset(str(root), "train")


def test_an_archive_with_both_splits(tmp_path):
    import tarfile

    root = write_image_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        archive.add(root, arcname=".")
    for split in ("train", "test"):
        images, labels = everything(open_dataset(str(tmp_path / "whole.tar"), split, workers=0))
        there, labels_there = everything(open_dataset(str(root), split, workers=0))
        assert torch.equal(images, there)
        assert torch.equal(labels, labels_there)


def test_sixteen_bit_images_keep_their_greys(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = ImageTransform(8, 8, 1)(Image.open(tmp_path / "deep.png"))
    torch.testing.assert_close(pixels[0], torch.from_numpy(values.astype(np.float32) / 65535), rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.full((8, 8), 200.0, np.float32), 0, "floats in 0..1"),
        (np.zeros((8, 8), np.int64), 0, "pixels must be uint8"),
        (np.zeros((0, 8), np.uint8), 0, "must have pixels"),
        (None, 0, "unreadable image"),
        (np.zeros((8, 8), np.uint8), 1.7, "label must be an integer"),
        (np.zeros((8, 8), np.uint8), None, "label must be an integer"),
        (np.zeros((8, 8), np.uint8), -1, "label must be a class number"),
    ],
)
def test_wrong_items_are_named(image, label, message):
    with pytest.raises(InputError, match=rf"item 0: .*{message}"):
        everything(from_iterable([(image, label)], ["a", "b"], channels=1), ImageTransform(8, 8, 1))
