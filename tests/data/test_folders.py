"""Which files of a folder or archive are the images of a split: the rules of docs/data.md, one by one."""

from __future__ import annotations

import multiprocessing
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tests_data import everything

from sfm_fast import InputError
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.layout import kind_of_split


def write(root, *places, each=2, ending=".png", colour=False):
    for number, place in enumerate(places):  # ``each`` images in every one
        folder = root / place
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(each):
            shape = (9, 9, 3) if colour else (9, 9)
            values = np.random.default_rng(100 * number + index).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index}{ending}")
    return root


def pack(folder, archive):
    with tarfile.open(archive, "w") as file:
        for child in sorted(folder.iterdir()):
            file.add(child, arcname=child.name)
    return archive


def read(root, split="train", **options):
    return open_dataset(str(root), split, workers=0, **options)


def classes(root, split="train"):
    source = read(root, split)
    return dict(zip(source.class_names, source.counts(), strict=True))


SPLITS = {
    "Train": "train", "Training": "train", "train_images": "train", "TrainSet": "train", "seg_train": "train", "train2017": "train",
    "ILSVRC2012_img_train": "train", "trainset": "train", "my-training-data": "train", "Test": "test", "TESTING": "test",
    "test-images": "test", "asl_alphabet_test": "test", "valid": "val", "Validation": "val", "val2017": "val", "eval": "val",
    "trainer": None, "restrain": None, "contest": None, "latest": None, "medieval": None, "train_test": None, "cats": None,
    "validators": None, "images": None, "dev": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), SPLITS.items())
def test_names_of_splits(name, kind):
    assert kind_of_split(name) == kind


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("Training", "Testing"), ("train_images", "test_images"), ("train", "valid"),
        ("train", "val"), ("TRAIN", "Validation"), ("seg_train/seg_train", "seg_test/seg_test"), ("data/train", "data/test"),
    ],
)  # fmt: skip
def test_splits_of_any_name_are_read_apart(tmp_path, train, test):
    write(tmp_path / "d", f"{train}/a", f"{train}/b")
    write(tmp_path / "d", f"{test}/a", f"{test}/b", each=3)
    for root in (tmp_path / "d", pack(tmp_path / "d", tmp_path / "d.tar")):
        assert classes(root) == {"a": 2, "b": 2}
        assert classes(root, "test") == {"a": 3, "b": 3}


def test_test_goes_before_val_and_each_can_be_named(tmp_path):
    for number, split in enumerate(("train", "valid", "test", "extra"), start=1):
        write(tmp_path, f"{split}/a", f"{split}/b", each=number)
    assert classes(tmp_path, "test")["a"] == 3
    for name in ("val", "validation", "valid"):
        assert classes(tmp_path, name)["a"] == 2
    assert classes(tmp_path, "extra")["a"] == 4
    with pytest.raises(InputError, match=r"no holdout split \(it holds 'extra', 'test', 'train', 'valid'\)"):
        read(tmp_path, "holdout")


@pytest.mark.parametrize("names", [("bus", "train", "truck"), ("control", "test", "other"), ("bus", "training", "van")])
def test_a_class_may_be_called_like_a_split(tmp_path, names):
    write(tmp_path / "d", *(f"train/{name}" for name in names), *(f"test/{name}" for name in names))
    expected = dict.fromkeys(sorted(names), 2)
    assert classes(tmp_path / "d") == classes(tmp_path / "d", "test") == expected
    assert classes(tmp_path / "d" / "train") == expected
    assert classes(pack(tmp_path / "d" / "train", tmp_path / "train.tar")) == expected


def test_the_class_is_the_first_folder_whatever_is_below(tmp_path):
    write(
        tmp_path,
        "train/bus",
        "train/train/freight",
        "train/train/passenger/old",
        "train/truck",
        "test/bus",
        "test/truck",
    )
    assert classes(tmp_path) == {"bus": 2, "train": 4, "truck": 2}


def test_what_can_be_read_in_two_ways_is_refused(tmp_path):
    write(tmp_path / "a", "bus", "truck", "train/freight", "train/passenger")
    with pytest.raises(InputError, match="'train' may be a split, or a class like 'bus', 'truck'"):
        read(tmp_path / "a")
    write(tmp_path / "b", "train", "test")
    with pytest.raises(InputError, match=r"images of 'test', 'train' must be in class folders, test/CLASS"):
        read(tmp_path / "b")
    write(tmp_path / "c", "Train/a", "Train/b", "train_images/a", "train_images/b", "test/a", "test/b")
    with pytest.raises(InputError, match="'Train', 'train_images' could all be the train split"):
        read(tmp_path / "c")
    assert classes(tmp_path / "c", "train_images") == {"a": 2, "b": 2}


def test_a_folder_around_everything_is_looked_through(tmp_path):
    write(tmp_path / "zip", "set/v1/train/a", "set/v1/train/b", "set/v1/test/a", "set/v1/test/b")
    assert classes(tmp_path / "zip") == {"a": 2, "b": 2}
    write(tmp_path / "only", "test/a", "test/b")
    with pytest.raises(InputError, match="no train split"):
        read(tmp_path / "only")
    assert classes(tmp_path / "only", "test") == {"a": 2, "b": 2}


def test_hidden_names_do_not_count(tmp_path):
    write(
        tmp_path / "d",
        "train/a",
        "train/b",
        "train/.ipynb_checkpoints",
        "train/a/.ipynb_checkpoints",
        "train/__MACOSX/a",
        ".git/x",
    )
    (tmp_path / "d/train/a/._0.png").write_bytes(b"resource fork")
    (tmp_path / "d/train/.DS_Store").write_bytes(b"x")
    for root in (tmp_path / "d", pack(tmp_path / "d", tmp_path / "d.tar")):
        assert classes(root) == {"a": 2, "b": 2}
    assert "left out: hidden: 5" in read(tmp_path / "d").told


@pytest.mark.parametrize("ending", [".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".PNG", ".Jpg", ".jfif", ".jp2"])
def test_formats(tmp_path, ending):
    write(tmp_path / "d", "train/a", "train/b")
    write(tmp_path / "d", "train/a", "train/b", each=3, ending=ending if ending != ".PNG" else "x.PNG")
    for root in (tmp_path / "d", pack(tmp_path / "d" / "train", tmp_path / "train.tar")):
        assert classes(root) == {"a": 5, "b": 5}
        assert everything(read(root))[0].shape == (10, 3, 8, 8)


def test_what_is_read_and_what_is_not_is_told(tmp_path):
    write(tmp_path, "train/a", "train/b")
    write(tmp_path, "train/b", each=3, ending=".webp")
    for name in ("a/notes.txt", "a/more.TXT", "b/README", "loose.png"):
        (tmp_path / "train" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    told = read(tmp_path).told
    wanted = "7 images (4 .png, 3 .webp) of 2 classes (2 to 5 per class), in colour (4 of 7 sampled images are grey)"
    assert wanted in told
    assert told.endswith(
        "left out: in no class folder: 1, not images (.txt): 2, not images (no ending): 1, pipes or devices: 1"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (root / "train/c").mkdir(parents=True), "train/c: this class folder holds no images$"),
        (
            lambda root: [(root / "train/c").mkdir(), (root / "train/c/a.heic").write_bytes(b"x")],
            r"train/c: this class folder holds no images \(not images \(.heic\): 1\)",
        ),
        (lambda root: os.symlink(root / "nowhere", root / "train/a/l.png"), r"l\.png: a broken link"),
    ],
)
def test_what_is_wrong_in_a_class(tmp_path, make, message):
    write(tmp_path, "train/a", "train/b")
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_folders_without_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no images$"):
        read(tmp_path / "empty")
    write(tmp_path, "flat", each=3)
    with pytest.raises(InputError, match="3 images are directly in it, but they must be in class folders"):
        read(tmp_path / "flat")
    (tmp_path / "empty" / "x.csv").write_text("1")
    with pytest.raises(InputError, match=r"holds no images; left out: not images \(.csv\): 1"):
        read(tmp_path / "empty")


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "real", "cats", "dogs")
    (tmp_path / "train").mkdir()
    for name in ("cats", "dogs"):
        os.symlink(tmp_path / "real" / name, tmp_path / "train" / name)
    os.symlink(tmp_path / "train", tmp_path / "real" / "cats" / "again")
    os.symlink(tmp_path / "real" / "cats", tmp_path / "real" / "cats" / "self")
    source = read(tmp_path / "train")
    assert source.counts() == [2, 2]
    assert "links to an enclosing folder: 2" in source.told


def test_classes_are_in_the_order_people_expect(tmp_path):
    write(tmp_path, *(f"train/{name}" for name in ("c10", "c2", "C1", "²", "0007", "7")), each=1)
    assert read(tmp_path).class_names == ["0007", "7", "C1", "c2", "c10", "²"]


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path / "d", f"train/{name}", "train/b")
    for root in (tmp_path / "d", pack(tmp_path / "d" / "train", tmp_path / "train.tar")):
        source = read(root)
        assert sorted(source.class_names) == sorted([name, "b"])
        assert len(everything(source)[1]) == 4
        assert len(source.fingerprint()) == 16


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked(tmp_path, method):
    write(tmp_path / "d", "train/a", "train/b", each=4)
    archive = pack(tmp_path / "d" / "train", tmp_path / "train.tar")
    expected, _ = everything(read(tmp_path / "d"))
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        for root in (tmp_path / "d", archive):
            found, _ = everything(open_dataset(str(root), "train", workers=1))
            assert torch.equal(found, expected)
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_one_colour_image_makes_a_coloured_data_set_and_moves_nobody(tmp_path):
    write(tmp_path / "colour", "train/a", "train/b", "test/a", "test/b", each=5, colour=True)
    before, _ = everything(read(tmp_path / "colour"))
    first = tmp_path / "colour" / "train" / "a" / "0.png"
    Image.open(first).convert("L").save(first)
    source = read(tmp_path / "colour")
    assert source.channels == source.exact_channels == 3
    assert "in colour (1 of 10 sampled images are grey)" in source.told
    assert torch.equal(everything(source)[0][1:], before[1:])
    write(tmp_path / "grey", "train/a", "train/b", each=5)
    assert read(tmp_path / "grey").channels == 1
    # A guess decides what is distilled, never how a feature is computed.
    assert read(tmp_path / "grey").exact_channels == 3
    assert read(tmp_path / "grey", channels=1).exact_channels == 1


def test_archives_beside_each_other(tmp_path):
    write(tmp_path / "d", "train/a", "train/b", "test/a", "test/b", each=1)
    pack(tmp_path / "d" / "train", tmp_path / "my_train.tar")
    pack(tmp_path / "d" / "test", tmp_path / "my_val.tar")
    assert classes(tmp_path / "my_train.tar", "test") == {"a": 1, "b": 1}
    pack(tmp_path / "d" / "test", tmp_path / "test.tar")
    pack(tmp_path / "d" / "test", tmp_path / "test2.tar")
    with pytest.raises(InputError, match=r"test\.tar, test2\.tar could all be the test split"):
        read(tmp_path / "my_train.tar", "test")


def test_links_in_archives(tmp_path):
    write(tmp_path / "d", "a", "b", each=1)
    os.link(tmp_path / "d/a/0.png", tmp_path / "d/b/hard.png")
    os.symlink("../a/0.png", tmp_path / "d/b/soft.png")
    assert classes(pack(tmp_path / "d", tmp_path / "train.tar")) == {"a": 1, "b": 3}
    os.symlink("../nowhere.png", tmp_path / "d/b/broken.png")
    with pytest.raises(InputError, match=r"b/broken\.png is a link whose target isn't in the archive"):
        read(pack(tmp_path / "d", tmp_path / "train.tar"))


def test_an_archive_is_whole_or_an_error_wherever_it_is_damaged(tmp_path):
    write(tmp_path / "d", "a", "b", "c", each=3)
    whole = pack(tmp_path / "d", tmp_path / "train.tar").read_bytes()
    with tarfile.open(tmp_path / "train.tar") as archive:
        members = archive.getmembers()
    cuts = [len(whole) // 2, members[-1].offset_data + 5, members[-1].offset, members[4].offset]
    damaged = [whole[:cut] for cut in cuts]
    for member in members:  # a header, or the first bytes of an image
        damaged.append(whole[: member.offset] + b"x" * 200 + whole[member.offset + 200 :])
        if member.isfile():
            damaged.append(whole[: member.offset_data] + b"x" * 60 + whole[member.offset_data + 60 :])
    damaged += [whole + whole, b"", whole[: members[0].offset + 100]]
    for number, data in enumerate(damaged):
        (tmp_path / "train.tar").write_bytes(data)
        with pytest.raises(InputError, match=r"train\.tar") as caught:
            everything(read(tmp_path / "train.tar"))
        assert "\n" not in str(caught.value), number


@pytest.mark.parametrize("name", ["d.zip", "d.tar.gz", "d.tgz"])
def test_compressed_archives_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="is compressed: unpack it"):
        read(tmp_path / name)


def test_a_fingerprint_is_of_the_contents(tmp_path):
    write(tmp_path / "d", "train/a", "train/b", each=3)
    first = read(tmp_path / "d").fingerprint()
    os.rename(tmp_path / "d", tmp_path / "elsewhere")
    root = tmp_path / "elsewhere"
    assert read(root).fingerprint() == first
    assert read(pack(root / "train", tmp_path / "train.tar")).fingerprint() == first
    (root / "train/a/0.png").write_bytes((root / "train/b/0.png").read_bytes())
    second = read(root).fingerprint()
    assert second != first
    os.rename(root / "train/b", root / "train/c")
    assert read(root).fingerprint() not in (first, second)


def test_the_folder_that_is_named_may_be_a_split_itself(tmp_path, monkeypatch):
    for name in ("test", "Val", "train_images", "my_test"):
        write(tmp_path / name, "a", "b")
    assert classes(tmp_path / "test", "test") == classes(tmp_path / "Val", "test") == {"a": 2, "b": 2}
    assert classes(tmp_path / "train_images") == {"a": 2, "b": 2}
    with pytest.raises(InputError, match=r"test: no train split \(by its own name it is a test split\)"):
        read(tmp_path / "test")
    # A word in a longer name decides nothing; either way training and test images are never the same.
    assert classes(tmp_path / "my_test") == {"a": 2, "b": 2}
    with pytest.raises(InputError, match="no test split"):
        read(tmp_path / "my_test", "test")
    monkeypatch.chdir(tmp_path / "test")
    assert classes(".", "test") == {"a": 2, "b": 2}
    with pytest.raises(InputError, match="no train split"):
        read(".")


def test_splits_inside_of_classes_are_refused(tmp_path):
    write(tmp_path / "d", "a/train", "a/test", "b/train", "b/test")
    wanted = r"its class folders contain splits \(a/test\), but the layout must be train/CLASS"
    with pytest.raises(InputError, match=wanted):
        read(tmp_path / "d")
    write(tmp_path / "e", "train/a/old", "train/b/train", "train/b/test")
    assert classes(tmp_path / "e") == {"a": 2, "b": 4}


def test_another_split_beside_the_training_images(tmp_path):
    for name in ("holdout", "eval"):
        write(tmp_path / name, "train/a", "train/b", f"{name}/a", f"{name}/b", each=1)
        write(tmp_path / name, f"{name}/a", each=3)
        assert classes(tmp_path / name) == {"a": 1, "b": 1}
        assert classes(tmp_path / name, name) == {"a": 3, "b": 1}
    assert classes(tmp_path / "eval", "test") == {"a": 3, "b": 1}


def test_a_split_of_one_class_is_not_looked_through(tmp_path):
    write(tmp_path, "train/cat/1", "train/cat/2", "train/dog/1", "test/cat/1", "test/cat/2")
    assert classes(tmp_path) == {"cat": 4, "dog": 2}
    assert classes(tmp_path, "test") == {"cat": 4}
    write(tmp_path / "images", "train/images/a", "train/images/b")
    assert classes(tmp_path / "images") == {"a": 2, "b": 2}


def test_an_empty_class_in_an_archive_is_named(tmp_path):
    write(tmp_path / "d", "a", "b")
    (tmp_path / "d" / "c").mkdir()
    with pytest.raises(InputError, match=r"train\.tar/c: this class folder holds no images"):
        read(pack(tmp_path / "d", tmp_path / "train.tar"))


def test_links_to_folders_in_archives_are_named(tmp_path):
    write(tmp_path / "d", "a", "b")
    os.symlink("a", tmp_path / "d" / "c")
    archive = pack(tmp_path / "d", tmp_path / "train.tar")
    with pytest.raises(InputError, match="c is a link to a folder; pack the archive with links followed"):
        read(archive)
    with tarfile.open(archive, "w") as file:  # without entries of the folders themselves
        for name in ("a/0.png", "b/0.png", "c"):
            file.add(tmp_path / "d" / name, arcname=name)
    with pytest.raises(InputError, match="c is a link to a folder"):
        read(archive)


def test_links_to_nothing_that_are_no_images(tmp_path):
    write(tmp_path / "d", "train/a", "train/b")
    for name in ("a/README", "a/.hidden.png", "notes.txt"):
        os.symlink("nowhere", tmp_path / "d" / "train" / name)
    for root in (tmp_path / "d", pack(tmp_path / "d" / "train", tmp_path / "train.tar")):
        assert classes(root) == {"a": 2, "b": 2}
        assert "broken links: 2" in read(root).told


def test_very_deep_folders(tmp_path):
    deep = "/".join(["x"] * 150)
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        file.addfile(tarfile.TarInfo(f"a/{deep}/0.png"))
    with pytest.raises(InputError, match="more than 100 folders deep"):
        read(tmp_path / "train.tar")
    write(tmp_path / "d", f"train/a/{deep}", "train/b")
    with pytest.raises(InputError, match="more than 100 deep"):
        read(tmp_path / "d")
