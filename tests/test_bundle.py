"""Bundles: what they answer, what they weigh, what damages them, and that a fresh process needs nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfm_fast
from sfm_fast import Bundle
from sfm_fast.backbones.load import load_backbone
from sfm_fast.backbones.record import save_weights
from sfm_fast.bundle import bundle as bundle_module
from sfm_fast.bundle import folder as bundle_folder
from sfm_fast.bundle.parts import fit
from sfm_fast.cli import common
from sfm_fast.cli import main as cli
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ArraySource
from sfm_fast.errors import InputError
from sfm_fast.evaluation.heads import Classifier, Projector, compose
from sfm_fast.synthetic import SyntheticSet

PAGE = Path(__file__).parents[1] / "docs" / "bundle.md"


@pytest.fixture(scope="module")
def vit():
    return load_backbone()


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False, img_size=32).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    """Another backbone, in colour and of another input size."""
    return load_backbone("test_vit", tiny_checkpoint, image_size=32)


@pytest.fixture(scope="module")
def test_data():
    source = open_dataset("embedded", "test")
    return source.images[:150].float() / 255, source.labels[:150]


@pytest.fixture(scope="module")
def classifier(vit):
    """The nearest class mean as a linear map, (2 m_c x - |m_c|^2) / 10, around the common mean."""
    train = open_dataset("embedded", "train")
    features = vit.features(train.images[:400].float() / 255)
    means = torch.stack([features[train.labels[:400] == c].mean(0) for c in range(10)])
    weight = (means - means.mean(0)) / 5
    bias = -(means - means.mean(0)).square().sum(1) / 10 - weight @ means.mean(0)
    metadata = {"backbone": vit.describe(), "images": 6000, "test_top1": 0.75, "test_data": "embedded/test"}
    return Classifier(weight, bias, train.class_names, metadata)


@pytest.fixture(scope="module")
def synthetic(vit, classifier):
    """The first real image of each class, with a metadata of a run."""
    train = open_dataset("embedded", "train")
    first = [int((train.labels == c).nonzero()[0]) for c in range(10)]
    noise = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(0)) / 100
    images = (train.images[first].float() / 255 + noise).clamp(0, 1)
    metadata = {"backbone": vit.describe(), "config": {"method": "sfm"}, "steps_done": 3}
    return SyntheticSet(images, torch.arange(10), train.class_names, metadata)


@pytest.fixture(scope="module")
def same(synthetic, classifier, vit):
    return Bundle.create(synthetic, classifier, vit)


@pytest.fixture(scope="module")
def joined(synthetic, classifier, vit, tiny):
    return Bundle.create(synthetic, classifier, vit, tiny, views=4)


def files_of(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- what it answers -------------------------------------------------------------------------------------------------


def test_it_classifies_as_the_classifier_does(same, classifier, vit, test_data, tmp_path):
    images, labels = test_data
    same.save(tmp_path / "b", dtype="fp32")
    bundle = Bundle.load(tmp_path / "b")
    expected = classifier(vit.features(images)).softmax(1)
    torch.testing.assert_close(bundle.probabilities(images), expected, rtol=1e-5, atol=1e-6)
    answers = bundle.classify(images, top=3)
    right = [answer[0][0] == bundle.class_names[label] for answer, label in zip(answers, labels.tolist(), strict=True)]
    assert sum(right) / len(right) > 0.65
    for answer, row in zip(answers, expected, strict=True):
        assert [name for name, _ in answer] == [bundle.class_names[i] for i in row.topk(3).indices]
        assert [value for _, value in answer] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


def test_the_projector_stands_between(joined, classifier, tiny, test_data, tmp_path):
    images = test_data[0][:20]
    assert (tiny.resize, tiny.input_size) == (34, 32)
    larger = torch.nn.functional.interpolate(images, (34, 34), mode="bicubic", antialias=True).clamp(0, 1)
    features = tiny.features(larger[..., 1:33, 1:33])
    expected = (features @ joined.projector.weight.T + joined.projector.bias) @ classifier.weight.T + classifier.bias
    torch.testing.assert_close(joined.probabilities(images), expected.softmax(1), rtol=1e-3, atol=1e-4)
    joined.save(tmp_path / "b", dtype="fp32")
    bundle = Bundle.load(tmp_path / "b", backbone=tiny)
    torch.testing.assert_close(bundle.probabilities(images), joined.probabilities(images))


def test_the_projector_is_fitted_on_the_same_views_of_the_images_as_stored(joined, tiny, vit):
    from sfm_fast.evaluation.projector import fit_projector
    from sfm_fast.features.compute import view_features

    stored = joined.synthetic.images
    options = dict(seed=0, augmentation=sfm_fast.Augmentation(min_area=0.08, noise=False))
    x, y = (view_features(model, stored, 4, **options) for model in (tiny, vit))
    again = fit_projector(x, y)
    torch.testing.assert_close(joined.projector.weight, again.weight)
    residual = y - again(x)
    assert residual.square().mean() < (y - y.mean((0, 1))).square().mean()


def test_blends_are_asked_for(synthetic, classifier, vit, tiny, joined):
    from sfm_fast.evaluation.projector import fit_projector
    from sfm_fast.features.compute import view_features

    plain = Bundle.create(synthetic, classifier, vit, tiny, views=4, min_area=0.5)
    options = dict(seed=0, augmentation=sfm_fast.Augmentation(min_area=0.5, noise=False))
    x, y = (view_features(model, plain.synthetic.images, 4, **options) for model in (tiny, vit))
    torch.testing.assert_close(plain.projector.weight, fit_projector(x, y).weight)
    mixed = Bundle.create(synthetic, classifier, vit, tiny, views=4, min_area=0.5, blends=True)
    assert not torch.allclose(plain.projector.weight, mixed.projector.weight)
    for bundle, wanted in ((plain, (False, 0.5)), (mixed, (True, 0.5)), (joined, (False, 0.08))):
        made = bundle.made["projector"]
        assert (made["blends"], made["min_area"]) == wanted


def test_a_batch_equals_its_photos_one_by_one(same, test_data, tmp_path):
    images = test_data[0][:5]
    whole = same.probabilities(images, batch_size=2)
    torch.testing.assert_close(whole, torch.cat([same.probabilities(image) for image in images]))
    paths = []
    for index, image in enumerate(images):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(paths[-1])
    torch.testing.assert_close(same.probabilities(map(str, paths), batch_size=2), whole)
    (one,) = same.classify([paths[0]])
    assert same.classify(paths[0]) == one
    mixed = [paths[0], Image.open(paths[1]), images[2], (images[3, 0] * 255).round().byte().numpy(), images[4, 0]]
    torch.testing.assert_close(same.probabilities(mixed), whole)
    assert same.classify([]) == []
    assert len(same.classify(paths[0], top=99)) == 10


def picture(mode: str) -> Image.Image:
    """The same grey ramp, 60 x 40, in another mode."""
    grey = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "P with transparency":
        image = Image.fromarray(grey).convert("P")
        image.info["transparency"] = bytes(range(256))
        return image
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "P with transparency", "I;16"])
def test_photos_of_every_mode(mode, same, tmp_path):
    path = tmp_path / "photo.png"
    image = picture(mode)
    image.save(path, transparency=image.info.get("transparency"))
    grey = picture("L")
    torch.testing.assert_close(same.probabilities(path), same.probabilities(grey), rtol=0, atol=0.02)
    torch.testing.assert_close(same.probabilities(image), same.probabilities(grey), rtol=0, atol=0.02)


def test_a_grey_bundle_shows_colour_photos_in_grey_to_a_colour_backbone(joined):
    colours = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    image = Image.fromarray(colours)
    torch.testing.assert_close(joined.probabilities(image), joined.probabilities(image.convert("L")))


def test_exif_turns_a_photo(same, tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 270 degrees to see it upright
    path = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    torch.testing.assert_close(same.probabilities(path), same.probabilities(upright))


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


@pytest.mark.filterwarnings("error")
def test_arrays_as_other_packages_give_them(same):
    colours = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    image = Image.fromarray(colours)
    wanted = same.probabilities(colours)
    deep = colours.astype(np.uint16) * 257
    several = [np.ascontiguousarray(colours[..., ::-1])[..., ::-1], np.asarray(image), deep, deep.astype(">u2")]
    for given in (*several, torch.from_numpy(deep), torch.from_numpy(deep).permute(2, 0, 1)[None]):
        torch.testing.assert_close(same.probabilities(given), wanted)
    deep_grey = same.probabilities(deep[..., 0])
    torch.testing.assert_close(deep_grey, same.probabilities(Image.fromarray(deep[..., 0])), rtol=0, atol=0.02)
    strip = np.zeros((2, 100), np.uint8)  # just short enough
    torch.testing.assert_close(same.probabilities(strip), same.probabilities(Image.fromarray(strip)))


BAD_PHOTOS = {
    "folder": (lambda folder: folder, ": is a folder; give image files"),
    "missing": (lambda folder: folder / "none.png", "none.png: no such file"),
    "no image": (lambda folder: __file__, "unreadable image"),
    "channels": (lambda folder: torch.rand(2, 4, 28, 28), "4 channels"),
    "range": (lambda folder: torch.rand(28, 28) * 300, "0..255 or floats in 0..1"),
    "nan": (
        lambda folder: [torch.rand(28, 28), torch.full((28, 28), torch.nan)],
        "photo 1: pixels must be uint8 in 0..255 or floats in 0..1, got torch.float32 from nan",
    ),
    "number": (lambda folder: [3], "photo 0: must be a path"),
    "nothing": (lambda folder: 3, "photos must be paths"),
    "la": (lambda folder: [picture("LA").convert("La")], "photo 0: unreadable image (conversion"),
    "objects": (lambda folder: np.full((9, 9), "x", object), "photo 0: unreadable image (an array of object"),
    "text": (lambda folder: np.full((9, 9), "x"), "photo 0: unreadable image (an array of <U1"),
    "complex": (lambda folder: np.ones((9, 9), complex), "photo 0: unreadable image (an array of complex128"),
    "complex tensors": (lambda folder: torch.ones(2, 1, 9, 9, dtype=torch.cfloat), "photos: pixels must be uint8"),
    "int": (lambda folder: np.ones((9, 9), int), "photo 0: pixels must be uint8"),
    "strip": (
        lambda folder: saved(Image.new("RGB", (1, 60000)), folder / "strip.png"),
        "strip.png: an image of 1 x 60000",
    ),
    "array strip": (lambda folder: np.zeros((2, 101), np.uint8), "photo 0: an image of 101 x 2 pixels"),
    "empty": (lambda folder: np.zeros((0, 9), np.uint8), "photo 0: an image must have pixels"),
    "float file": (lambda folder: Image.fromarray(np.zeros((9, 9), np.float32)), "photo 0: image mode 'F'"),
}


@pytest.mark.parametrize("name", BAD_PHOTOS)
def test_bad_photos_are_named(name, same, tmp_path):
    make, message = BAD_PHOTOS[name]
    with pytest.raises(InputError, match=re.escape(message)):
        same.classify(make(tmp_path))


def test_arguments_of_classify(same):
    with pytest.raises(InputError, match="top must be at least 1"):
        same.classify(torch.rand(28, 28), top=0)
    with pytest.raises(InputError, match="batch_size"):
        same.classify(torch.rand(28, 28), batch_size=0)


# --- what lies in the folder -----------------------------------------------------------------------------------------


def test_the_round_trip(joined, synthetic, vit, tiny, tmp_path):
    joined.save(tmp_path / "new" / "b")
    folder = tmp_path / "new" / "b"
    assert files_of(folder) == {
        "bundle.json", "README.md", "images.safetensors", "classifier.safetensors", "projector.safetensors",
    }  # fmt: skip
    bundle = Bundle.load(folder)
    assert bundle.class_names == synthetic.class_names
    assert (bundle.phi, bundle.psi) == (joined.phi, joined.psi)
    assert bundle.accuracy == {}
    assert bundle.projector.metadata["solver"] == "ridge"
    assert bundle.classifier.metadata["backbone"]["name"] == "fashion_vit"
    again = bundle.synthetic
    assert (again.images - synthetic.images).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(again.labels, synthetic.labels)
    assert again.metadata == synthetic.metadata
    bundle.save(tmp_path / "copy")
    assert Bundle.load(tmp_path / "copy").size_report() == bundle.size_report()
    assert (
        Bundle.create(again, bundle.classifier, vit, tiny, views=4).projector.in_features == 64
    )  # for another psi later
    # Its parts are ordinary files.
    assert Classifier.load(folder / "classifier.safetensors").metadata["backbone"] == joined.phi
    Projector.load(folder / "projector.safetensors")


def test_no_projector_where_psi_is_phi(same, tmp_path):
    same.save(tmp_path / "b")
    assert files_of(tmp_path / "b") == {"bundle.json", "README.md", "images.safetensors", "classifier.safetensors"}
    assert Bundle.load(tmp_path / "b").projector is None


def test_folded_answers_the_same(joined, classifier, tiny, test_data, tmp_path):
    joined.save(tmp_path / "f", dtype="fp32", folded=True)
    assert files_of(tmp_path / "f") == {"bundle.json", "README.md", "classifier.safetensors"}
    folded = Bundle.load(tmp_path / "f", backbone=tiny)
    torch.testing.assert_close(folded.classifier.weight, compose(classifier, joined.projector).weight)
    images = test_data[0][:50]
    torch.testing.assert_close(folded.probabilities(images), joined.probabilities(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="folded"):
        folded.synthetic  # noqa: B018
    folded.save(tmp_path / "again", dtype="fp32", folded=True)
    assert Bundle.load(tmp_path / "again", backbone=tiny).folded


def test_bf16_answers_nearly_the_same_in_half_the_bytes(same, vit, test_data, tmp_path):
    images = test_data[0]
    found = {}
    for dtype in ("fp32", "bf16"):
        same.save(tmp_path / dtype, dtype=dtype)
        found[dtype] = Bundle.load(tmp_path / dtype, backbone=vit)
    exact, rounded = (found[dtype].probabilities(images) for dtype in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.97
    weight = found["bf16"].classifier.weight
    assert torch.equal(weight, weight.bfloat16().float())
    small, large = (found[dtype].size_report()[1]["bytes"] for dtype in ("bf16", "fp32"))
    assert large - small == pytest.approx(2 * weight.numel(), abs=8)


def test_the_size_report_counts_the_files(joined, tmp_path):
    with pytest.raises(InputError, match="save the bundle first"):
        replace(joined, sizes=[]).size_report()
    joined.save(tmp_path / "b")
    rows = {row["what"]: row for row in joined.size_report()}
    assert rows["total"]["bytes"] == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert rows["projector"]["bytes"] == (tmp_path / "b" / "projector.safetensors").stat().st_size
    assert rows["projector"]["detail"] == "192 x 64, bf16"
    texts = sum((tmp_path / "b" / name).stat().st_size for name in ("bundle.json", "README.md"))
    assert rows["names and configuration"]["bytes"] == texts
    assert rows["training images (not inside)"]["bytes"] == 6000 * 28 * 28
    stored = json.loads((tmp_path / "b" / "bundle.json").read_text())["sizes"]
    assert stored == joined.size_report() == Bundle.load(tmp_path / "b").size_report()


def test_the_training_images_are_left_out_where_unknown(synthetic, classifier, vit, tmp_path):
    plain = Classifier(classifier.weight, classifier.bias, classifier.class_names)
    bundle = Bundle.create(synthetic, plain, vit)
    bundle.save(tmp_path / "b")
    assert bundle.size_report()[-1]["what"] == "total"
    assert bundle.accuracy == {}


def test_its_readme_says_what_it_is_and_its_snippet_runs(
    joined, tiny_checkpoint, test_data, tmp_path, monkeypatch, capsys
):
    joined.save(tmp_path / "this" / "folder", with_backbone=True)
    page = (tmp_path / "this" / "folder" / "README.md").read_text()
    for wanted in (
        "T-shirt/top",
        "`test_vit`",
        "`fashion_vit`",
        "Its weights are inside",
    ):
        assert wanted in page
    Image.fromarray((test_data[0][0, 0] * 255).byte().numpy()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("[('")


# --- how accurate it is ------------------------------------------------------------------------------------------------


ALONE = "(Its classifier on fashion_vit's own features: 75.0 % on embedded/test"


def test_another_accuracy_is_not_given_for_its_own(joined, same, vit, tmp_path):
    lower = f"Accuracy of this bundle: not measured. {ALONE}; through the projector it is lower.)"
    smaller = replace(same, psi=vit.describe() | {"input_size": 14}, accuracy={})  # the same weights, other photos
    for bundle in (joined, joined.fold(), smaller):
        assert bundle.accuracy_text() == lower
    wanted = "Accuracy: 75.0 % on embedded/test, measured when its classifier was trained."
    for bundle in (same, same.fold()):
        assert bundle.accuracy_text() == wanted
    unknown = replace(same, made={**same.made, "classifier": {}})
    assert unknown.accuracy_text() == "Accuracy of this bundle: not measured."
    joined.save(tmp_path / "b", folded=True)
    assert lower in (tmp_path / "b" / "README.md").read_text()


def small_test_set(count=150, names=None):
    source = open_dataset("embedded", "test")
    images = source.images[:count, 0].numpy()
    return ArraySource("a test set", images, source.labels[:count].numpy(), names or source.class_names)


@pytest.mark.parametrize("name", ["same", "joined"])
def test_its_accuracy_is_that_of_its_answers(name, tiny, vit, test_data, tmp_path, request):
    bundle = replace(request.getfixturevalue(name), accuracy={})
    found = bundle.evaluate(small_test_set(), batch_size=64)
    right = (bundle.probabilities(test_data[0]).argmax(1) == test_data[1]).double().mean().item()
    assert found == {"top1": right, "images": 150}
    bundle.save(tmp_path / "b", dtype="fp32")
    loaded = Bundle.load(tmp_path / "b", backbone=vit if name == "same" else tiny)
    assert loaded.accuracy == {"a test set": found}
    line = f"Accuracy of this bundle: {100 * right:.1f} % on a test set, 150 images."
    assert loaded.accuracy_text() == (line if name == "same" else f"{line} {ALONE}.)")
    assert loaded.accuracy_text() in (tmp_path / "b" / "README.md").read_text()


def test_as_stored_is_what_load_reads(joined, tiny, tmp_path):
    for folded in (False, True):
        joined.save(tmp_path / "b", folded=folded)
        loaded, stored = Bundle.load(tmp_path / "b", backbone=tiny), joined.as_stored(folded=folded)
        assert torch.equal(loaded.classifier.weight, stored.classifier.weight)
        assert loaded.folded == stored.folded
        assert folded or torch.equal(loaded.projector.weight, stored.projector.weight)


def test_a_test_set_of_other_classes_is_refused(same):
    names = [str(c) for c in range(10)]
    with pytest.raises(InputError, match="a test set: its 10 classes are not the bundle's 10"):
        same.evaluate(small_test_set(5, names))
    with pytest.raises(InputError, match="a test set: holds no images"):
        same.evaluate(small_test_set(0))
    with pytest.raises(InputError, match="batch_size"):
        same.evaluate(small_test_set(5), batch_size=0)


# --- the backbone ----------------------------------------------------------------------------------------------------


def test_another_backbone_is_refused(same, joined, vit, tiny, tmp_path):
    same.save(tmp_path / "b")
    with pytest.raises(InputError, match=f"'fashion_vit' with weights {vit.fingerprint}, but 'test_vit' here has"):
        Bundle.load(tmp_path / "b", backbone=tiny)
    with pytest.raises(InputError, match="an input size of 28"):
        Bundle.load(tmp_path / "b", backbone=replace(vit, input_size=56))


def test_other_weights_by_the_same_name_are_refused(joined, tiny_checkpoint, test_data, tmp_path):
    import timm

    joined.save(tmp_path / "b")
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False, img_size=32).state_dict(), other)
    with pytest.raises(InputError, match="made for 'test_vit' with weights"):
        Bundle.load(tmp_path / "b", checkpoint=other).classify(test_data[0])
    assert Bundle.load(tmp_path / "b", checkpoint=tiny_checkpoint).classify(test_data[0][0])


def test_the_preprocessing_is_the_recorded_one(joined, tiny, test_data, tmp_path):
    """A name alone doesn't fix it: timm's defaults change, and a user may have set others."""
    odd = replace(tiny, mean=tiny.mean + 0.2, resize=40)
    bundle = replace(joined, psi=odd.describe(), _backbone=odd)
    bundle.save(tmp_path / "b", with_backbone=True)
    loaded = Bundle.load(tmp_path / "b")
    torch.testing.assert_close(loaded.backbone.mean, odd.mean)
    assert loaded.backbone.resize == 40
    images = test_data[0][:3]
    assert not torch.allclose(loaded.probabilities(images), joined.probabilities(images), atol=1e-3)


def test_stored_weights_stay_unless_told_otherwise(joined, tmp_path):
    joined.save(tmp_path / "b", with_backbone=True)
    weights = (tmp_path / "b" / "backbone.safetensors").read_bytes()
    bundle = Bundle.load(tmp_path / "b")
    bundle.save(tmp_path / "b")  # onto itself
    bundle.save(tmp_path / "folded", folded=True)
    for name in ("b", "folded"):
        assert (tmp_path / name / "backbone.safetensors").read_bytes() == weights
        assert Bundle.load(tmp_path / name).classify(torch.rand(28, 28))
    bundle.save(tmp_path / "b", folded=True, with_backbone=False)
    assert files_of(tmp_path / "b") == {"bundle.json", "README.md", "classifier.safetensors"}
    assert len(bundle.synthetic.images) == 10  # read before their file went


def test_its_readme_says_where_the_weights_are(same, joined, tmp_path):
    for bundle, wanted in ((same, "they come with the package"), (joined, "timm downloads them")):
        bundle.save(tmp_path / "b")
        assert f"Its weights are not inside: {wanted}" in (tmp_path / "b" / "README.md").read_text()


FRESH = """
import socket, sys
def offline(*args, **kwargs): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = offline
import torch
torch.set_num_threads(1)
from sfm_fast import Bundle
bundle = Bundle.load(sys.argv[1])
answer = bundle.classify(sys.argv[2])
training = ("sfm_fast.data.datasets", "sfm_fast.distill.distiller", "sfm_fast.evaluation.evaluator", "sfm_fast.evaluation.projector")
print([name for name in training if name in sys.modules], answer)
"""


def test_a_fresh_process_needs_the_folder_alone(joined, test_data, tmp_path):
    joined.save(tmp_path / "b", with_backbone=True)
    photo = tmp_path / "photo.png"
    Image.fromarray((test_data[0][0, 0] * 255).round().byte().numpy()).save(photo)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing")}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "b"), str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[] {Bundle.load(tmp_path / 'b').classify(photo)}"


@pytest.mark.parametrize("name", ["vit", "tiny"])
def test_stored_weights_are_the_same_model(name, tmp_path, request):
    backbone = request.getfixturevalue(name)
    save_weights(tmp_path / "w.safetensors", backbone)
    again = load_backbone(backbone.name, tmp_path / "w.safetensors", image_size=backbone.input_size)
    assert again.fingerprint == backbone.fingerprint
    if name == "vit":  # it came in float16, so it goes in float16
        assert (tmp_path / "w.safetensors").stat().st_size < 2.3 * sum(p.numel() for p in backbone.model.parameters())


def test_weights_that_would_come_back_as_another_model_are_refused(tiny_checkpoint, tmp_path):
    rounded = load_backbone("test_vit", tiny_checkpoint, image_size=32, precision="bf16")
    with pytest.raises(InputError, match="from fp32 alone"):
        save_weights(tmp_path / "w.safetensors", rounded)
    other = load_backbone("test_vit", tiny_checkpoint, image_size=32)
    other.model.blocks[0].attn.num_heads = 4 if other.model.blocks[0].attn.num_heads != 4 else 2
    other.model.blocks[0].attn.head_dim = 64 // other.model.blocks[0].attn.num_heads
    other.model.blocks[0].attn.scale = 10.0  # the same weights, another function
    with pytest.raises(InputError, match="comes back as another"):
        save_weights(tmp_path / "w.safetensors", replace(other, run=lambda x: other.model(x) + 1))
    with pytest.raises(InputError, match="without the network"):
        save_weights(tmp_path / "w.safetensors", replace(other, name="hf-hub:someone/model"))


# --- parts that don't belong together --------------------------------------------------------------------------------


def test_parts_of_different_making_are_refused(synthetic, classifier, vit, tiny):
    with pytest.raises(InputError, match="synthetic: made with 'fashion_vit'"):
        Bundle.create(synthetic, classifier, tiny)
    foreign = replace(classifier, metadata={"backbone": tiny.describe()})
    with pytest.raises(InputError, match="classifier: made with 'test_vit'"):
        Bundle.create(synthetic, foreign, vit)
    smaller = {"backbone": vit.describe() | {"input_size": 14}}
    wanted = "made with 'fashion_vit' (input size 14), phi is 'fashion_vit' (input size 28)"
    with pytest.raises(InputError, match=re.escape(f"classifier: {wanted}")):
        Bundle.create(synthetic, replace(classifier, metadata=smaller), vit)
    with pytest.raises(InputError, match=re.escape(f"synthetic: {wanted}")):
        Bundle.create(replace(synthetic, metadata=smaller), classifier, vit)
    names = ["Sack" if name == "Bag" else name for name in classifier.class_names]
    with pytest.raises(InputError, match="differ in \\['Bag', 'Sack'\\]"):
        Bundle.create(synthetic, replace(classifier, class_names=names), vit)
    with pytest.raises(InputError, match="takes 5 features"):
        Bundle.create(synthetic, Classifier(torch.ones(10, 5), torch.ones(10), classifier.class_names), vit)
    with pytest.raises(InputError, match="wanted 64 of test_vit to 192 of fashion_vit"):
        Bundle.create(synthetic, classifier, vit, tiny, Projector(torch.ones(192, 9), torch.ones(192)))
    with pytest.raises(InputError, match="fitted for psi 'fashion_vit'"):
        Bundle.create(
            synthetic, classifier, vit, tiny, Projector(torch.ones(192, 64), torch.ones(192), {"psi": vit.describe()})
        )
    wide = {"psi": tiny.describe() | {"input_size": 64}}
    with pytest.raises(
        InputError, match=r"fitted for psi 'test_vit' \(input size 64\), psi is 'test_vit' \(input size 32"
    ):
        Bundle.create(synthetic, classifier, vit, tiny, Projector(torch.ones(192, 64), torch.ones(192), wide))
    with pytest.raises(InputError, match="left out where psi is phi"):
        Bundle.create(synthetic, classifier, vit, vit, Projector(torch.eye(192), torch.ones(192)))
    named = replace(vit, name="fashion_vit_quickgelu")  # the same weights in another network
    for other in (named, replace(vit, resize=32), replace(vit, mean=vit.mean + 0.1)):
        bundle = Bundle.create(synthetic, classifier, vit, other, views=3)
        assert bundle.projector is not None
        assert "not measured" in bundle.accuracy_text()
    assert Bundle.create(synthetic, classifier, vit, replace(vit)).projector is None
    with pytest.raises(InputError, match="views must be at least 1"):
        Bundle.create(synthetic, classifier, vit, tiny, views=0)
    with pytest.raises(InputError, match=r"min_area must be in \(0, 1\], got 2"):
        Bundle.create(synthetic, classifier, vit, tiny, min_area=2)


def test_a_given_projector_is_taken(synthetic, classifier, vit, tiny):
    projector = Projector(torch.randn(192, 64), torch.randn(192))
    assert torch.equal(Bundle.create(synthetic, classifier, vit, tiny, projector).projector.weight, projector.weight)


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)


def edit(**values):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


DAMAGE = {
    "classifier missing": ("classifier.safetensors", Path.unlink, "classifier.safetensors: missing"),
    "projector missing": ("projector.safetensors", Path.unlink, "projector.safetensors: missing"),
    "classifier cut": ("classifier.safetensors", cut, "classifier.safetensors: damaged"),
    "a bit flipped": ("projector.safetensors", flip, "projector.safetensors: damaged"),
    "config missing": ("bundle.json", Path.unlink, "no bundle here"),
    "config cut": ("bundle.json", cut, "bundle.json: damaged"),
    "config empty": ("bundle.json", lambda path: path.write_text("[]"), "bundle.json: not of a bundle"),
    "other config": ("bundle.json", edit(file_format="other/1"), "bundle.json: not of a bundle"),
    "future": ("bundle.json", edit(file_format="sfm_fast.bundle/2", sfm_fast="9.1"), "format 2, made by sfm_fast 9.1"),
    "no names": ("bundle.json", edit(class_names=None), "damaged bundle (class_names is None)"),
    "channels": ("bundle.json", edit(channels=2), "damaged bundle (channels is 2)"),
    "no backbone": ("bundle.json", edit(evaluating_backbone={"name": "x"}), "evaluating_backbone has no fingerprint"),
    "accuracy": ("bundle.json", edit(accuracy={"x": 0.9}), "damaged bundle (accuracy: x is 0.9)"),
    "no files": ("bundle.json", edit(files={}), "names no classifier.safetensors"),
    "other names": ("bundle.json", edit(class_names=["a"] * 10), "don't fit together"),
    "deep": ("bundle.json", lambda path: path.write_text("[" * 100_000), "bundle.json: damaged bundle"),
    "format": ("bundle.json", edit(file_format="sfm_fast.bundle/²"), "damaged bundle (file_format is "),
    "infinite": ("bundle.json", edit(sfm_fast=float("inf")), "damaged bundle (Infinity is no number"),
    "names": ("bundle.json", edit(class_names=[1] * 10), "damaged bundle (class_names is [1"),
    "made": ("bundle.json", edit(made={"classifier": 3}), "damaged bundle (made: classifier is 3"),
    "made projector": ("bundle.json", edit(made={"projector": [1]}), "damaged bundle (made: projector is [1]"),
    "made synthetic": ("bundle.json", edit(made={"synthetic": "x"}), "damaged bundle (made: synthetic is 'x'"),
    "made top1": ("bundle.json", edit(made={"classifier": {"test_top1": "x"}}), "made: classifier: test_top1 is 'x'"),
    "sizes": ("bundle.json", edit(sizes=[1]), "damaged bundle (sizes[0] is 1)"),
    "accuracies": ("bundle.json", edit(accuracy={"a": "b"}), "damaged bundle (accuracy: a is 'b')"),
    "top1": ("bundle.json", edit(accuracy={"a": {"top1": "b", "images": 1}}), "accuracy: a: top1 is 'b'"),
}

BACKBONE_DAMAGE = {
    "input_size": "28", "resize": 0, "num_features": True, "mean": "0.5", "std": [0.5, 0.5], "name": ["x"], "fingerprint": None,
}  # fmt: skip


@pytest.mark.parametrize("role", ["distilling_backbone", "evaluating_backbone"])
@pytest.mark.parametrize("key", BACKBONE_DAMAGE)
def test_a_damaged_record_of_a_backbone_is_named(key, role, same, tmp_path):
    same.save(tmp_path / "b")
    path = tmp_path / "b" / "bundle.json"
    edit(**{role: same.phi | {key: BACKBONE_DAMAGE[key]}})(path)
    with pytest.raises(InputError, match=rf"bundle\.json: damaged bundle \({role}: .*{key}"):
        Bundle.load(tmp_path / "b")


def test_a_mean_of_another_length_is_named(same, vit, tmp_path):
    same.save(tmp_path / "b")
    edit(evaluating_backbone=same.psi | {"mean": [0.5] * 3, "std": [0.5] * 3})(tmp_path / "b" / "bundle.json")
    wanted = "bundle.json: damaged bundle (evaluating_backbone: mean has 3 numbers, 'fashion_vit' wants 1)"
    with pytest.raises(InputError, match=re.escape(wanted)):
        Bundle.load(tmp_path / "b", backbone=vit)
    with pytest.raises(InputError, match=re.escape(wanted)):
        Bundle.load(tmp_path / "b").classify(torch.rand(28, 28))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, joined, tmp_path):
    file, harm, message = DAMAGE[name]
    joined.save(tmp_path / "b")
    harm(tmp_path / "b" / file)
    with pytest.raises(InputError, match=re.escape(message)):
        Bundle.load(tmp_path / "b")


def test_damaged_images_and_weights_are_named_when_they_are_read(joined, tmp_path):
    joined.save(tmp_path / "b", with_backbone=True)
    for file in ("images.safetensors", "backbone.safetensors"):
        flip(tmp_path / "b" / file)
    bundle = Bundle.load(tmp_path / "b")
    with pytest.raises(InputError, match=r"images.safetensors: damaged"):
        bundle.synthetic  # noqa: B018
    with pytest.raises(InputError, match=r"backbone.safetensors: damaged"):
        bundle.classify(torch.rand(28, 28))


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no bundle here"):
        Bundle.load(tmp_path / "none")


# --- writing over something ------------------------------------------------------------------------------------------


def test_a_bundle_is_replaced_and_nothing_else(same, joined, tmp_path):
    joined.save(tmp_path / "b")
    same.save(tmp_path / "b")
    assert files_of(tmp_path / "b") == {"bundle.json", "README.md", "images.safetensors", "classifier.safetensors"}
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'notes.txt' in it is no part"):
        same.save(tmp_path / "b")
    other = tmp_path / "other"
    other.mkdir()
    same.save(other)  # empty: fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "bundle.json").write_text("{}")
    with pytest.raises(InputError, match="holds other files"):
        same.save(tmp_path / "thesis")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        same.save(tmp_path / "file")
    with pytest.raises(InputError, match="empty name"):
        same.save("")
    with pytest.raises(InputError, match="can't write in"):
        same.save(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="dtype must be one of bf16, fp32"):
        same.save(tmp_path / "b", dtype="int4")
    assert (tmp_path / "thesis" / "bundle.json").read_text() == "{}"
    assert files_of(tmp_path) == {"b", "other", "thesis", "file"}


@pytest.mark.parametrize("before", ["nothing", "empty", "bundle"])
@pytest.mark.parametrize("what", ["folder", "file", "link", "bundle with more"])
def test_what_lies_beside_is_never_touched(what, before, same, tmp_path):
    place, old = tmp_path / "b", tmp_path / ".b.old"
    if before == "empty":
        place.mkdir()
    elif before == "bundle":
        same.save(place)
    if what == "file":
        old.write_text("mine")
    elif what == "link":
        same.save(tmp_path / "other")
        old.symlink_to(tmp_path / "other")
    else:
        same.save(old) if what == "bundle with more" else old.mkdir()
        (old / "mine.txt").write_text("mine")
    found = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"\.b\.old lies beside, where a bundle is kept .* move that away"):
        same.save(place)
    assert sorted(tmp_path.rglob("*")) == found


def test_a_folder_named_as_a_part_is_no_part(same, tmp_path):
    same.save(tmp_path / "b")
    page = tmp_path / "b" / "README.md"
    page.unlink()
    page.mkdir()
    (page / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'README.md' in it is no part"):
        same.save(tmp_path / "b")
    assert (page / "mine.txt").read_text() == "mine"


def test_the_old_bundle_beside_is_kept_while_nothing_better_is_there(same, tmp_path):
    same.save(tmp_path / ".b.old")
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt), bundle_folder.replaced_folder(tmp_path / "b"):
        raise KeyboardInterrupt
    assert files_of(tmp_path) == {"b"}
    assert Bundle.load(tmp_path / "b").class_names == same.class_names
    same.save(tmp_path / ".b.old")
    same.save(tmp_path / "b")
    assert files_of(tmp_path) == {"b"}


def test_a_link_stays_a_link(same, tmp_path):
    same.save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    same.save(tmp_path / "link", dtype="fp32")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "bundle.json").read_text())["dtype"] == "fp32"


def test_an_interrupted_save_leaves_the_old_bundle_whole(same, joined, tmp_path, monkeypatch):
    same.save(tmp_path / "b")
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}

    def unharmed() -> bool:
        now = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
        return now == before and files_of(tmp_path) == {"b"}

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "write_texts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            joined.save(tmp_path / "b")
    assert unharmed()

    rename = os.replace

    def fail_at_the_last(source, target):
        if str(source).endswith(".tmp") and Path(source).is_dir():
            raise OSError(5, "input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(bundle_folder.os, "replace", fail_at_the_last)
        with pytest.raises(InputError, match="input/output error"):
            joined.save(tmp_path / "b")
    assert unharmed()

    # Killed between the two renames: the old one lies beside, load says where, and the next save starts from it.
    (tmp_path / "b").rename(tmp_path / ".b.old")
    with pytest.raises(InputError, match=r"left the old one in .*\.b\.old"):
        Bundle.load(tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "write_texts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            joined.save(tmp_path / "b")
    assert unharmed()
    joined.save(tmp_path / "b")
    assert files_of(tmp_path) == {"b"}
    assert Bundle.load(tmp_path / "b").projector is not None


# --- commands, and the page ------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch, synthetic, classifier, test_data):
    """What the page's commands find in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sfm").mkdir(parents=True)
    synthetic.save(tmp_path / "runs" / "sfm" / "synthetic.safetensors")
    classifier.save(tmp_path / "classifier.safetensors")
    Image.fromarray((test_data[0][0, 0] * 255).byte().numpy()).save(tmp_path / "photo.jpg")
    return tmp_path


def call(capsys, *argv):
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


BUNDLE = ["bundle", "runs/sfm", "--classifier", "classifier.safetensors", "--out", "b", "--quiet"]


def test_the_commands(workplace, capsys, tiny_checkpoint):
    other = ["--eval-backbone", "test_vit", "--eval-checkpoint", tiny_checkpoint, "--eval-image-size", 32, "--views", 3]
    code, out, _ = call(capsys, *BUNDLE, *other, "--with-backbone", "--json", "r.json")
    assert code == 0
    result = json.loads((workplace / "r.json").read_text())
    assert result["evaluating_backbone"]["name"] == "test_vit"
    assert result["sizes"] == Bundle.load("b").size_report()
    assert f"| {result['sizes'][-2]['bytes']:,} |".replace("| ", "") in out
    assert re.search(r"^\| part +\| +bytes \| +what \|$", out, re.MULTILINE)
    assert "Accuracy of this bundle: not measured." in out
    code, out, _ = call(capsys, "classify", "b", "photo.jpg", "--top", "2", "--json", "-")
    assert code == 0
    row = json.loads(out)["rows"][0]
    assert row["photo"] == "photo.jpg"
    assert [(c["name"], c["probability"]) for c in row["classes"]] == Bundle.load("b").classify("photo.jpg", top=2)
    code, out, _ = call(capsys, "classify", "b", "photo.jpg")
    assert out.count(" %") == 5


@pytest.mark.parametrize("command", ["bundle", "classify"])
def test_help_has_defaults_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"sfm-fast {command}" in out[out.index("example:") :]
    assert "(default: " in out


MISTAKES = {
    "out holds files": ([*BUNDLE[:-3], "--out", "."], "--out .: holds other files"),
    "views": ([*BUNDLE, "--views", "0"], "--views must be at least 1"),
    "seed": ([*BUNDLE, "--seed", "-1"], "--seed must be in [0, 2**63), got -1"),
    "json inside": (
        [*BUNDLE[:-3], "--out", "whole", "--json", "whole/r.json"],
        "--json whole/r.json: lies in --out, which holds nothing but the bundle",
    ),
    "no run": (["bundle", "runs/none", *BUNDLE[2:]], "no such file"),
    "no classifier": (["bundle", "runs/sfm", "--classifier", "none", "--out", "b"], "none: no such file"),
    "no photo": (["classify", "whole", "none.jpg"], "none.jpg: no such file"),
    "no bundle": (["classify", "none", "photo.jpg"], "no bundle here"),
    "folder": (["classify", "whole", "runs"], "runs: is a folder; give image files"),
    "min_area": ([*BUNDLE, "--min-area", "0"], "--min-area must be in (0, 1], got 0.0"),
    "test data": ([*BUNDLE, "--test-data", "none"], "'none' is no folder or .tar file here"),
    "bundle of a bundle": (
        ["bundle", "whole", *BUNDLE[2:]],
        "whole is a bundle; wanted a folder of `sfm-fast distill`",
    ),
    "eval of a bundle": (["eval", "whole"], "From Python: bundle.synthetic holds its images"),
    "top": (["classify", "whole", "photo.jpg", "--top", "0"], "--top"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(name, workplace, capsys, same):
    argv, message = MISTAKES[name]
    same.save("whole")
    before = files_of(workplace)
    code, _, err = call(capsys, *argv)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert files_of(workplace) == before


def test_the_command_measures_what_it_writes(workplace, capsys, tiny_checkpoint, test_data):
    for label, image in zip(test_data[1][:60].tolist(), test_data[0], strict=False):
        folder = workplace / "data" / "test" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(folder / f"{len(files_of(folder))}.png")
    numbered = Classifier.load("classifier.safetensors")
    names = [str(c) for c in range(10)]
    replace(numbered, class_names=names).save("classifier.safetensors")
    images = SyntheticSet.load("runs/sfm")
    replace(images, class_names=names).save("runs/sfm/synthetic.safetensors")
    other = ["--eval-backbone", "test_vit", "--eval-checkpoint", tiny_checkpoint, "--eval-image-size", 32, "--views", 3]
    test = ["--test-data", "data", "--workers", 0, "--blends", "--min-area", 0.3, "--with-backbone", "--json", "-"]
    code, out, err = call(capsys, *BUNDLE, *other, *test)
    assert code == 0, err
    result = json.loads(out)
    bundle = Bundle.load("b")
    paths = sorted((workplace / "data" / "test").glob("*/*.png"))
    right = [
        answer[0][0] == path.parent.name for answer, path in zip(bundle.classify(paths, top=1), paths, strict=True)
    ]
    (found,) = result["accuracy"].values()
    assert found == {"top1": pytest.approx(sum(right) / 60), "images": 60}
    assert bundle.accuracy == result["accuracy"]
    assert bundle.made["projector"]["min_area"] == 0.3
    assert bundle.made["projector"]["blends"] is True
    assert f"{100 * found['top1']:.1f} % on data/test, 60 images" in (workplace / "b" / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], None),
        (["--eval-checkpoint", "b"], ("fashion_vit", "b", 224)),
        (["--eval-image-size", "56"], ("fashion_vit", "a", 56)),
        (["--eval-backbone", "x"], ("x", None, None)),
        (["--eval-backbone", "x", "--eval-checkpoint", "b", "--eval-image-size", "56"], ("x", "b", 56)),
    ],
)
def test_the_evaluating_backbone_of_bundle_and_eval(given, wanted, monkeypatch):
    def load(name, checkpoint, *, image_size, device, precision):
        return name, checkpoint, image_size

    monkeypatch.setattr(common, "load_backbone", load)
    own = ["--image-size", "224", "--checkpoint", "a", *given]
    for argv in (["bundle", "run", "--classifier", "c", "--out", "o"], ["eval", "run"]):
        assert common.open_evaluating_backbone(cli.parser().parse_args([*argv, *own])) == wanted


def test_a_run_of_another_backbone_is_refused(workplace, capsys, tiny_checkpoint):
    argv = [*BUNDLE, "--backbone", "test_vit", "--checkpoint", tiny_checkpoint, "--image-size", 32]
    code, _, err = call(capsys, *argv)
    assert code == 1
    assert "synthetic: made with 'fashion_vit'" in err


def test_the_page_is_true(workplace, capsys, monkeypatch):
    monkeypatch.setattr(bundle_module, "fit", lambda *args, **options: fit(*args, **{**options, "views": 3}))  # quicker
    page = PAGE.read_text()
    commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].strip().splitlines()
    assert [line.split()[1] for line in commands] == ["classifier", "bundle", "classify"]
    arguments = [shlex.split(line, comments=True)[1:] for line in commands]
    cli.parser().parse_args(arguments[0])  # training is tested elsewhere
    for argv in arguments[1:]:
        assert call(capsys, *argv)[0] == 0
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, {})
    name, probability = re.search(r"\[\('([^']+)', ([0-9.]+)\)", capsys.readouterr().out).groups()
    assert name in open_dataset("embedded", "test").class_names
    assert 0 < float(probability) <= 1
    for option in set(re.findall(r"`(--[a-z-]+)", page)):
        assert any(
            option in text
            for text in (Path(cli.__file__).with_name(f"{c}.py").read_text() for c in ("bundle", "classify", "common"))
        )
