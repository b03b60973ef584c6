"""Items in the forms that data sets give: read as what they mean, or named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests_data import everything

from sfm_fast import InputError
from sfm_fast.data.sources import from_iterable
from sfm_fast.data.transforms import ImageTransform

NAMES = ["ant", "bee", "cow"]
TRANSFORM = ImageTransform(8, 8, 1)
IMAGES = [np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8) for i in range(7)]
LABELS = [i % 3 for i in range(7)]
EXPECTED = torch.stack([torch.from_numpy(image)[None].float() / 255 for image in IMAGES])


class Plain(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.from_numpy(IMAGES[index])[None].float() / 255, LABELS[index]


class Table(Plain):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"pixel_values": image, "labels": label, "id": index}


ONE_HOT = torch.eye(3)
FORMS = {
    "tuples": list(zip(IMAGES, LABELS, strict=True)),
    "lists": [[image, label] for image, label in zip(IMAGES, LABELS, strict=True)],
    "triples": [(image, label, "more") for image, label in zip(IMAGES, LABELS, strict=True)],
    "arrays of one": [(image, np.array([label])) for image, label in zip(IMAGES, LABELS, strict=True)],
    "tensors of one": [(image, torch.tensor([[label]])) for image, label in zip(IMAGES, LABELS, strict=True)],
    "NumPy numbers": [(image, np.int16(label)) for image, label in zip(IMAGES, LABELS, strict=True)],
    "one-hot tensors": [(image, ONE_HOT[label]) for image, label in zip(IMAGES, LABELS, strict=True)],
    "one-hot arrays": [
        (image, ONE_HOT[label].numpy().astype(int)) for image, label in zip(IMAGES, LABELS, strict=True)
    ],
    "one-hot lists": [(image, ONE_HOT[label].tolist()) for image, label in zip(IMAGES, LABELS, strict=True)],
    "names": [(image, NAMES[label]) for image, label in zip(IMAGES, LABELS, strict=True)],
    "tables": [{"image": image, "label": label} for image, label in zip(IMAGES, LABELS, strict=True)],
    "tables of other words": [{"img": i, "target": y, "idx": 3} for i, y in zip(IMAGES, LABELS, strict=True)],
    "tables with one label of its own name": [
        {"image": i, "fine_label": y} for i, y in zip(IMAGES, LABELS, strict=True)
    ],
    "PIL images": [(Image.fromarray(image), label) for image, label in zip(IMAGES, LABELS, strict=True)],
    "data set": Plain(),
    "data set of tables": Table(),
    "loader": torch.utils.data.DataLoader(Plain(), 3),
    "loader of tables": torch.utils.data.DataLoader(Table(), 3),
    "loader that shuffles": torch.utils.data.DataLoader(Plain(), 3, shuffle=True, drop_last=True),
    "loader with workers": torch.utils.data.DataLoader(Plain(), 3, num_workers=1),
    "loader of lists": torch.utils.data.DataLoader(
        list(zip(map(Image.fromarray, IMAGES), LABELS, strict=True)),
        3,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
    ),
    "loader of single items": torch.utils.data.DataLoader(Plain(), None),
    "loader with one-hot labels": torch.utils.data.DataLoader(
        [(torch.from_numpy(image)[None].float() / 255, ONE_HOT[y]) for image, y in zip(IMAGES, LABELS, strict=True)], 2
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [False, True])
def test_forms(form, streamed):
    data = FORMS[form]
    if streamed:
        data = (item for item in data)
    elif isinstance(data, list):
        assert len(from_iterable(data, NAMES, 1)) == 7
    source = from_iterable(data, NAMES, 1)
    if streamed and form == "loader that shuffles":
        pytest.skip("a generator over it can't be put in order")
    images, labels = everything(source, TRANSFORM)
    torch.testing.assert_close(images, EXPECTED)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize("form", ["loader", "loader that shuffles", "data set", "tuples"])
def test_lengths_and_second_passes(form):
    source = from_iterable(FORMS[form], NAMES, 1)
    assert len(source) == 7
    assert torch.equal(everything(source, TRANSFORM)[0], everything(source, TRANSFORM)[0])
    images, labels = source.take([5, 0], TRANSFORM)
    torch.testing.assert_close(images, EXPECTED[[5, 0]])
    assert labels.tolist() == [2, 0]


def test_loaders_that_draw_are_refused():
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 7, 7)
    for options in ({"sampler": weighted, "batch_size": 2}, {"batch_sampler": [[0, 1], [2, 3]]}):
        with pytest.raises(InputError, match=r"may draw other images in every pass; give its data set"):
            from_iterable(torch.utils.data.DataLoader(Plain(), **options), NAMES, 1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((IMAGES[0], torch.tensor([0.4, 0.6, 0.0])), r"one class, got a mixture or several \(0.4, 0.6, 0…\)"),
        ((IMAGES[0], np.array([1, 1, 0])), "a mixture or several"),
        ((IMAGES[0], torch.zeros(3)), "a mixture or several"),
        ((IMAGES[0], torch.eye(5)[0]), "got 5 numbers for 3 classes"),
        ((IMAGES[0], -1), r"must be a class number, got -1 \(data without labels\?\)"),
        ((IMAGES[0], 3), "must be below 3, the number of classes, got 3"),
        ((IMAGES[0], torch.tensor(300)), "must be below 3, the number of classes, got 300"),
        ((IMAGES[0], 1.5), "must be an integer, got 1.5"),
        ((IMAGES[0], "dog"), "one of the class names, got 'dog'"),
        ((IMAGES[0], np.array([])), "must be an integer"),
        ((IMAGES[0],), r"must be \(image, label\) or a mapping with 'image' and 'label', got a tuple of 1"),
        (IMAGES[0], "got a numpy.ndarray"),
        ({"image": IMAGES[0], "fine_label": 0, "coarse_label": 0}, "must have one label, got the keys image, fine_label, coarse_label"),
        ({"picture": IMAGES[0], "label": 0}, "must have one image, got the keys picture, label"),
        (("nowhere.png", 0), "no such file"),
        ((b"no image", 0), "unreadable image"),
        (({"bytes": None, "path": None}, 0), "no such file|is a folder"),
        ((np.full((8, 8), 3.0, np.float32), 0), "floats in 0..1"),
        ((np.full((8, 8), np.nan, np.float32), 0), "floats in 0..1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("road", ["list", "stream", "worker"])
def test_what_an_item_may_not_be(item, message, road):
    data = [(IMAGES[1], 1), (IMAGES[2], 2), item, (IMAGES[2], 2)]
    source = from_iterable(data if road != "stream" else iter(data), NAMES, 1)
    if road == "worker":
        if item is not IMAGES[0]:
            pytest.skip("the same code as of a list")
        source.workers = 1
    with pytest.raises(InputError, match=rf"item 2: .*({message})") as caught:
        everything(source, TRANSFORM)
    assert "\n" not in str(caught.value)


def test_batches_in_lists():
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor(LABELS[:6])
    for data in (
        [(images[:4], labels[:4]), (images[4:], labels[4:])],
        iter([(images[:5], labels[:5]), (images[5:], 2)]),
    ):
        found, classes = everything(from_iterable(data, NAMES, 1), TRANSFORM)
        torch.testing.assert_close(found, images)
        assert classes.tolist() == LABELS[:6]


@pytest.mark.parametrize(
    ("label", "number"), [(2.0, 2), (np.float32(1), 1), (torch.tensor(2.0), 2), (np.bool_(True), 1), (True, 1)]
)
def test_numbers_of_other_types(label, number):
    assert everything(from_iterable([(IMAGES[0], label)], NAMES, 1), TRANSFORM)[1].tolist() == [number]


def test_a_batch_sampler_is_looked_into():
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 7, 7)
    some = torch.utils.data.SubsetRandomSampler([0, 1, 2])
    for sampler in (weighted, some):
        batches = torch.utils.data.BatchSampler(sampler, 3, False)
        with pytest.raises(InputError, match="may draw other images in every pass"):
            from_iterable(torch.utils.data.DataLoader(Plain(), batch_sampler=batches), NAMES, 1)
    shuffled = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(Plain()), 3, True)
    images, _ = everything(
        from_iterable(torch.utils.data.DataLoader(Plain(), batch_sampler=shuffled), NAMES, 1), TRANSFORM
    )
    torch.testing.assert_close(images, EXPECTED)


class Streamed(torch.utils.data.IterableDataset):
    def __len__(self):
        return 7

    def __iter__(self):
        return iter(Plain()[index] for index in range(7))


def test_iterable_data_sets():
    for data in (Streamed(), torch.utils.data.DataLoader(Streamed(), 3)):
        images, _ = everything(from_iterable(data, NAMES, 1), TRANSFORM)
        torch.testing.assert_close(images, EXPECTED)
    with pytest.raises(InputError, match="drop_last leaves images out"):
        from_iterable(torch.utils.data.DataLoader(Streamed(), 3, drop_last=True), NAMES, 1)


def test_images_that_require_gradients():
    leaf = torch.rand(1, 8, 8, requires_grad=True)
    images, _ = everything(from_iterable([(leaf, 0)], NAMES, 1), TRANSFORM)
    assert torch.equal(images[0], leaf.detach())


@pytest.mark.parametrize("data", [None, 5, {"image": IMAGES, "label": LABELS}])
def test_what_is_no_data(data):
    with pytest.raises(InputError, match="data must be a data set or an iterable"):
        from_iterable(data, NAMES, 1)


@pytest.mark.parametrize("names", [None, 3, "abc", [1, 2], ["a", "a", "b"]])
def test_what_are_no_class_names(names):
    with pytest.raises(InputError, match="class_names must"):
        from_iterable([(IMAGES[0], 0)], names, 1)


def test_a_batch_of_other_lengths_is_named():
    with pytest.raises(InputError, match="a batch must have as many labels as images, got 2 for 3"):
        everything(from_iterable(iter([(torch.rand(3, 1, 8, 8), torch.tensor([0, 1]))]), NAMES, 1), TRANSFORM)


def test_a_data_set_that_raises_is_named():
    class Broken(Plain):
        def __getitem__(self, index):
            if index == 4:
                raise KeyError("gone\nwith a second line")
            return super().__getitem__(index)

    for data in (Broken(), (Broken()[i] for i in range(7))):
        with pytest.raises(InputError, match=r"item 4: can't be read .KeyError: .*gone"):
            everything(from_iterable(data, NAMES, 1), TRANSFORM)


def test_fingerprints_of_data_sets():
    pairs = list(zip(IMAGES, LABELS, strict=True))
    one = from_iterable(pairs, NAMES, 1).fingerprint()
    assert len(one) == 16
    assert from_iterable(list(pairs), NAMES, 1).fingerprint() == one
    others = [
        from_iterable(pairs[:-1], NAMES, 1),
        from_iterable(pairs, ["ant", "bee", "dog"], 1),
        from_iterable([*pairs[:3], (IMAGES[0], 0), *pairs[4:]], NAMES, 1),
    ]
    assert len({one, *(source.fingerprint() for source in others)}) == 4

    class Random(Plain):
        def __getitem__(self, index):
            return torch.rand(1, 8, 8), LABELS[index]

    assert from_iterable(Random(), NAMES, 1).fingerprint() == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's half-made loader
def test_no_worker_processes_to_be_had(monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    source = from_iterable(list(zip(IMAGES, LABELS, strict=True)), NAMES, 1)
    source.workers = 2
    monkeypatch.setattr(torch.multiprocessing, "Queue", refuse)
    with pytest.warns(RuntimeWarning, match="this process reads the images"):
        images, _ = everything(source, TRANSFORM)
    torch.testing.assert_close(images, EXPECTED)


class Dying(Plain):
    def __getitem__(self, index):
        import os

        if index == 5 and torch.utils.data.get_worker_info() is not None:
            os._exit(9)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_an_error_and_no_wait():
    source = from_iterable(Dying(), NAMES, 1)
    source.workers = 1
    with pytest.raises(InputError, match="a process that reads images died"):
        everything(source, TRANSFORM)
