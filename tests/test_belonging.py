"""Statistics, data sets, backbones and runs that don't belong together: known by their contents, not by how they are spelled."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tests_data import labelled

from sfm_fast import ClassStatistics, InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.checks import told_differences
from sfm_fast.cli.main import main
from sfm_fast.data.datasets import open_dataset
from sfm_fast.distill.build import make_distiller
from sfm_fast.distill.config import DistillConfig
from sfm_fast.evaluation.evaluator import Evaluator, ProbeConfig
from sfm_fast.features.compute import class_statistics
from sfm_fast.synthetic import SyntheticSet


def write(root, classes=("ant", "bee", "cow"), counts=(4, 4, 4), seed=0):
    """Grey train and test images, each class with its own bright rows."""
    for split in ("train", "test"):
        for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng([seed, split == "test", label, index])
                values = rng.integers(0, 120, (28, 28), dtype=np.uint8)
                values[8 * label : 8 * label + 8] = 230
                Image.fromarray(values).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def stats(data):
    path = data.parent / "s.safetensors"
    assert main(["stats", "--data", str(data), "--workers", "0", "--out", str(path), "--quiet"]) == 0
    return path


def distill(*words):
    return main(["distill", "--steps", "1", "--quiet", "--workers", "0", *map(str, words)])


def test_the_data_set_that_statistics_were_made_of(data, stats, tmp_path, capsys):
    assert distill("--stats", stats, "--out", tmp_path / "alone") == 0
    assert distill("--stats", stats, "--data", data, "--out", tmp_path / "with") == 0
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    assert distill("--stats", stats, "--data", moved, "--out", tmp_path / "moved") == 0
    others = {
        "names": (write(tmp_path / "n", ("ant", "bee", "dog")), r"made of .*train' with 3 classes, .* has 3 \(they differ in \['cow', 'dog'\]\)"),
        "classes": (write(tmp_path / "c", ("ant", "bee"), (4, 4)), r"with 3 classes, .* has 2"),
        "counts": (write(tmp_path / "m", counts=(4, 4, 5)), "made of 12 images, .* has 13"),
        "images": (write(tmp_path / "i", seed=1), "holds other images of the same classes"),
    }  # fmt: skip
    capsys.readouterr()
    for name, (other, message) in others.items():
        assert distill("--stats", stats, "--data", other, "--out", tmp_path / name) == 1
        error = capsys.readouterr().err
        assert not (tmp_path / name).exists()
        assert re.search(message, error), error
        assert str(stats) in error
        assert error.count("\n") == 1
    assert distill("--stats", stats, "--data", "embedded", "--out", tmp_path / "e") == 1


def test_statistics_of_another_split_are_compared_with_that_split(data, tmp_path):
    path = tmp_path / "t.safetensors"
    assert main(["stats", "--data", str(data), "--split", "test", "--workers", "0", "--out", str(path), "--quiet"]) == 0
    assert distill("--stats", path, "--data", data, "--out", tmp_path / "run") == 0


def test_statistics_from_python_are_checked_too(data, tmp_path):
    backbone, source = load_backbone(), open_dataset(str(data), "train", workers=0)
    made = class_statistics(source, backbone, progress=False)
    make_distiller(DistillConfig.paper(steps=1), backbone, source, made)
    with pytest.raises(InputError, match=r"statistics: made of .* with 3 classes, embedded/train has 10"):
        make_distiller(DistillConfig.paper(steps=1), backbone, open_dataset("embedded", "train"), made)
    bare = ClassStatistics(3, backbone.num_features)
    bare.update(*labelled(9, backbone.num_features, 3))
    make_distiller(DistillConfig.paper(steps=1), backbone, source, bare)  # says nothing of its origin


def test_statistics_of_a_backbone_at_another_size(tmp_path):
    weights = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    source = open_dataset(str(write(tmp_path / "d")), "train", workers=0)
    small, large = (load_backbone("test_resnet", weights, image_size=size) for size in (32, 64))
    made = class_statistics(source, small, progress=False)
    assert small.fingerprint == large.fingerprint
    with pytest.raises(
        InputError,
        match=r"statistics: made with 'test_resnet' \(input size 32\), but the backbone is 'test_resnet' \(input size 64\)",
    ):
        make_distiller(DistillConfig.paper(steps=1), large, None, made)
    made.save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"s\.safetensors: made with 'test_resnet' \(input size 32\)"):
        make_distiller(DistillConfig.paper(steps=1), large, None, tmp_path / "s.safetensors")
    made.provenance["backbone"]["mean"] = [0.1, 0.1, 0.1]
    with pytest.raises(InputError, match=r"made with 'test_resnet' \(mean \[0.1"):
        make_distiller(DistillConfig.paper(steps=1), small, None, made)


def test_lgm_goes_on_with_the_same_images_wherever_they_are(data, tmp_path, capsys, monkeypatch):
    run, first = tmp_path / "run", shutil.copytree(data, tmp_path / "first")

    def lgm(where, steps):
        words = ["--method", "lgm", "--views", "2", "--data", str(where), "--out", str(run)]
        return distill(*words, "--steps", steps, *(["--resume"] if steps > 1 else []))

    assert lgm(first, 1) == 0
    monkeypatch.chdir(tmp_path)
    assert lgm("first", 2) == 0
    os.rename(first, tmp_path / "second")
    assert lgm("second", 3) == 0
    victim = tmp_path / "second" / "train" / "ant" / "0.png"
    shutil.copy(tmp_path / "second" / "train" / "cow" / "0.png", victim)
    capsys.readouterr()
    assert lgm("second", 4) == 1
    assert "the run has another data ('12 images of 3 classes, " in capsys.readouterr().err


def test_long_tails(tmp_path, capsys):
    """One class of two images beside one of 60, everywhere a command counts images of a class."""
    data = write(tmp_path / "d", counts=(60, 2, 12))
    run, result = tmp_path / "run", tmp_path / "r.json"
    words = ["--data", str(data), "--workers", "0", "--quiet"]
    with pytest.warns(RuntimeWarning, match=r"fewer images than 10 centres .*\(class 1 \('bee'\) has 2\)"):
        assert distill("--ipc", "10", *words, "--out", run) == 0
    assert main(["classifier", *words, "--out", str(tmp_path / "c.safetensors")]) == 0
    evaluate = ["eval", str(run), *words, "--seeds", "1", "--epochs", "2", "--views", "2", "--json", str(result)]
    every = "full,random-real,nearest-real,neighbour-real,class-means"
    assert main([*evaluate, "--mode", "probe", "--references", every]) == 0
    found = json.loads(result.read_text())
    assert {"full", "sfm", "neighbour-real"} <= {row["images"] for row in found["rows"]}
    assert "class 1 ('bee') has 2 images" in {row["images"]: row["reason"] for row in found["left_out"]}["random-real"]
    # Every class too small: said before any feature is computed.
    assert distill("--ipc", "61", *words, "--out", tmp_path / "more") == 1
    assert "the largest class has 60 images, too few for 61 k-means centres" in capsys.readouterr().err


def test_centres_of_a_small_class_are_its_images():
    features, labels = labelled(40, 4, 2)
    keep = (labels == 0) | (torch.arange(40) >= 36)
    statistics = ClassStatistics(2, 4, clusters=5)
    statistics.update(features[keep], labels[keep])
    with pytest.warns(RuntimeWarning, match="fewer images than 5 centres"):
        centers = statistics.cluster_centers
    own = features[keep & (labels == 1)]
    assert torch.equal(centers[1], own[torch.arange(5) % len(own)])


def test_a_class_without_images_is_named_before_the_pass():
    source = open_dataset("embedded", "train")
    source.labels = source.labels.clamp(max=8)
    source.batches = lambda *_: pytest.fail("read")
    with pytest.raises(InputError, match=r"class 9 \('Ankle boot'\) has no images"):
        class_statistics(source, load_backbone(), progress=False)


def test_images_of_another_size_or_other_classes_are_not_evaluated(tmp_path):
    weights = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    data = write(tmp_path / "d")
    options = ["--data", str(data), "--workers", "0", "--backbone", "test_resnet", "--checkpoint", str(weights)]
    assert distill(*options, "--image-size", "32", "--out", tmp_path / "run") == 0
    synthetic = SyntheticSet.load(tmp_path / "run")
    test = open_dataset(str(data), "test", workers=0)
    config = ProbeConfig(seeds=1, epochs=1, views=1)
    large = Evaluator(load_backbone("test_resnet", weights, image_size=64), test, config=config, progress=False)
    with pytest.raises(
        InputError, match=r"synthetic: distilled on 'test_resnet' \(input size 32\), but the distilling backbone is"
    ):
        large.evaluate_synthetic(synthetic)
    same = Evaluator(load_backbone("test_resnet", weights, image_size=32), test, config=config, progress=False)
    same.evaluate_synthetic(synthetic)
    with pytest.raises(InputError, match=r"synthetic: its 3 classes are not the test set's 3 \(they differ in order\)"):
        same.evaluate_synthetic(replace(synthetic, class_names=synthetic.class_names[::-1]))
    evaluate = [
        "eval",
        str(tmp_path / "run"),
        *options,
        "--references",
        "",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--views",
        "1",
        "--quiet",
    ]
    assert main([*evaluate, "--image-size", "64"]) == 1
    assert main([*evaluate, "--image-size", "32"]) == 0


def test_what_tells_class_names_apart():
    many = [f"c{number:03d}" for number in range(30)]
    assert told_differences(many, [*many[:-1], "other"]) == "they differ in ['c029', 'other']"
    assert told_differences(many, many[::-1]) == "they differ in order"
    assert r"Unicode form of 'cafe\u0301', 'caf\xe9'" in told_differences(["b", "cafe\u0301"], ["b", "caf\xe9"])


def test_statistics_of_another_precision_are_told(data, stats, tmp_path):
    made = ClassStatistics.load(stats)
    made.provenance["backbone"]["precision"] = "bf16"
    with pytest.warns(RuntimeWarning, match="computed in bf16, but the backbone runs in fp32"):
        make_distiller(DistillConfig.paper(steps=1), load_backbone(), None, made)


def test_paths_of_options_and_what_json_replaces(data, stats, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        main(["stats", "--data", str(data), "--workers", "0", "--quiet", "--out", "~/s.st", "--json", "~/s.json"]) == 0
    )
    assert (tmp_path / "s.st").is_file()
    assert json.loads((tmp_path / "s.json").read_text())["class_names"] == ["ant", "bee", "cow"]
    image = data / "train" / "ant" / "0.png"
    before = image.read_bytes()
    words = ["stats", "--data", str(data), "--workers", "0", "--quiet", "--out", str(tmp_path / "t.st")]
    assert main([*words, "--json", str(image)]) == 1
    assert "exists and is no JSON file" in capsys.readouterr().err
    assert image.read_bytes() == before
    assert main([*words, "--json", str(tmp_path / "s.json")]) == 0
    assert main([*words, "--json", "/dev/full"]) == 1
    assert "/dev/full: can't be written (No space left on device)" in capsys.readouterr().err
