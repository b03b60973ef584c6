"""What a bundle answers: names and probabilities of photos of every kind, and its accuracy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfm_fast
from sfm_fast import Bundle
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ArraySource
from sfm_fast.errors import InputError


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
    assert lower in Bundle.load(tmp_path / "b").readme()


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
    assert loaded.accuracy_text() in loaded.readme()


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
