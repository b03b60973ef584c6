"""A share of the training images held out as the test split: the same images for every command, and other data than the whole split."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest
import torch
from tests_data import everything, write_image_folder

from sfm_fast import InputError, open_dataset
from sfm_fast.cli import main as cli
from sfm_fast.data.transforms import ImageTransform

GREY = ImageTransform(28, 28, 1)


@pytest.fixture
def folder(tmp_path):
    """A folder of class folders without splits: 6 cats and 6 dogs."""
    shutil.move(write_image_folder(tmp_path / "both", per_class=6) / "train", tmp_path / "pets")
    return tmp_path / "pets"


def names(source):
    return [entry.name for entry in source.dataset.split.entries]


def test_the_embedded_images_are_divided_by_class():
    whole = open_dataset("embedded", "train")
    train, test = (open_dataset("embedded", split, hold_out=0.1) for split in ("train", "test"))
    assert train.counts() == [540] * 10
    assert test.counts() == [60] * 10
    images = torch.cat([everything(part, GREY)[0] for part in (train, test)]).flatten(1)
    assert torch.equal(images.unique(dim=0), everything(whole, GREY)[0].flatten(1).unique(dim=0))
    assert len({source.fingerprint() for source in (whole, train, test)}) == 3
    assert "10 % held out by seed 0" in train.name
    assert "10 % held out by seed 0" in test.name
    assert train.take([0, 5], GREY)[0].shape == (2, 1, 28, 28)


def test_a_folder_is_divided_by_seed_alone(folder):
    whole = open_dataset(str(folder), "train")
    train, test = (open_dataset(str(folder), split, hold_out=0.3, hold_out_seed=1) for split in ("train", "test"))
    assert (train.counts(), test.counts()) == ([4, 4], [2, 2])
    assert sorted(names(train) + names(test)) == names(whole)
    assert names(test) == names(open_dataset(str(folder), "test", hold_out=0.3, hold_out_seed=1))
    others = {tuple(names(open_dataset(str(folder), "test", hold_out=0.3, hold_out_seed=seed))) for seed in range(8)}
    assert len(others) > 4
    assert len({source.fingerprint() for source in (whole, train, test)}) == 3
    assert "12 images" in whole.told
    assert "8 images" in train.told
    assert len(everything(train)[1]) == 8


def test_an_archive_is_divided_like_its_folder(folder):
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, ".")
    held = [open_dataset(str(path), "test", hold_out=0.3) for path in (folder, folder.with_suffix(".tar"))]
    assert names(held[0]) == names(held[1])
    assert torch.equal(everything(held[0])[0], everything(held[1])[0])


def test_both_splits_get_an_image_of_every_class(folder):
    for share, counts in ((0.01, [1, 1]), (0.99, [5, 5])):
        assert open_dataset(str(folder), "test", hold_out=share).counts() == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_out": 1}, r"hold_out must be in \[0, 1\), got 1"),
        ({"hold_out": -0.1}, r"hold_out must be in \[0, 1\), got -0.1"),
        ({"hold_out": 0.1, "hold_out_seed": -1}, "hold_out_seed must be at least 0, got -1"),
        ({"hold_out": 0.1, "split": "val"}, "split must be 'train' or 'test' with hold_out, got 'val'"),
        (
            {"hold_out": 0.1, "spec": "hfds/some"},
            "hold_out is for folders, archives and Fashion-MNIST, got 'hfds/some'",
        ),
    ],
)
def test_what_cannot_be_held_out(folder, options, message):
    with pytest.raises(InputError, match=message):
        open_dataset(**{"spec": str(folder), "split": "train"} | options)


def test_a_class_with_one_image(folder):
    for image in sorted((folder / "cat").iterdir())[1:]:
        image.unlink()
    with pytest.raises(InputError, match="at least 2 images of every class, but 'cat' has 1"):
        open_dataset(str(folder), "train", hold_out=0.1)


def test_whether_there_is_a_test_split(folder, tmp_path):
    assert "no test split (it holds 'cat', 'dog')" in open_dataset(str(folder), "train").no_test
    assert open_dataset(str(tmp_path / "both"), "test").no_test == ""
    assert open_dataset(str(folder), "train", hold_out=0.1).no_test == ""
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(folder, ".")
    assert open_dataset(str(tmp_path / "train.tar"), "train").no_test == ""
    (tmp_path / "test.tar").unlink()
    assert "no test split in its folder" in open_dataset(str(tmp_path / "train.tar"), "train").no_test


def test_the_commands_agree(folder, tmp_path, capsys):
    """Without a test split it is said how to get one; with one held out all commands agree, and whole statistics are refused."""

    def call(*words):
        code = cli.main([*map(str, words), "--quiet"])
        return code, *capsys.readouterr()

    data, held = ["--data", folder], ["--hold-out", "0.3", "--hold-out-seed", "2"]
    whole, part, run = tmp_path / "whole.safetensors", tmp_path / "part.safetensors", tmp_path / "run"
    code, out, _ = call("stats", *data, "--out", whole)
    assert code == 0
    assert "no test images for `sfm-fast eval` yet" in out
    assert "--hold-out 0.1" in out
    code, out, _ = call("stats", *data, *held, "--out", part)
    assert code == 0
    assert "no test images" not in out
    small = ["distill", *data, *held, "--steps", "2", "--grow-every", "1", "--out", run]
    code, _, err = call(*small, "--stats", whole)
    assert code == 1
    assert "made of 12 images" in err
    code, _, err = call(*small[:-4], "--hold-out-seed", "3", *small[-4:], "--stats", part)
    assert code == 1
    assert "other images of the same classes" in err
    assert call(*small, "--stats", part)[0] == 0
    fit = ["--seeds", "1", "--epochs", "2", "--views", "2", "--references", "full", "--json", tmp_path / "eval.json"]
    assert call("eval", run, *data, *held, *fit)[0] == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["data"] == f"{folder}, the 30 % held out by seed 2"
    code, _, err = call("eval", run, *data, *fit)
    assert code == 1
    assert (
        "no test split (it holds 'cat', 'dog'); add a folder test beside train, name another split with --test-split"
        in err
    )
    assert "--hold-out 0.1" in err
    code, _, err = call("classifier", *data, "--out", tmp_path / "classifier.safetensors")
    assert code == 1
    assert "--hold-out 0.1" in err
