"""Features are computed once, found again for the same data and backbone alone, and never taken from a bad file."""

from __future__ import annotations

import multiprocessing
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfm_fast import InputError
from sfm_fast.backbones.load import load_backbone
from sfm_fast.data.sources import ArraySource, from_iterable
from sfm_fast.features import cache as module
from sfm_fast.features.cache import FeatureCache
from sfm_fast.features.compute import dataset_features
from sfm_fast.files import load_tensors, save_tensors

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


@pytest.fixture
def computed(monkeypatch):
    """Names of the data sets whose features were computed, in order."""
    names = []

    def count(source, backbone, **options):
        names.append(source.name)
        return dataset_features(source, backbone, **options)

    monkeypatch.setattr(module, "dataset_features", count)
    return names


def pictures(count: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % 3


def source(count: int = 40, seed: int = 0, name: str = "some/train", names: list[str] = NAMES) -> ArraySource:
    return ArraySource(name, *pictures(count, seed), names)


def get(cache, some, backbone):
    return cache.features(some, backbone, batch_size=16, progress=False)


def test_computed_once_and_read_by_the_next(backbone, computed, tmp_path):
    cache = FeatureCache(tmp_path / "new" / "folder")
    features, labels = get(cache, source(), backbone)
    torch.testing.assert_close(
        features, backbone.features(torch.from_numpy(pictures()[0]).unsqueeze(1) / 255.0), rtol=1e-4, atol=1e-4
    )
    assert features.shape == (40, 192)
    assert labels.tolist() == pictures()[1].tolist()
    again = get(FeatureCache(tmp_path / "new" / "folder"), source(), backbone)
    assert torch.equal(again[0], features)
    assert torch.equal(again[1], labels)
    assert get(cache, source(), backbone)[0] is features
    assert computed == ["some/train"]


def test_memory_alone_writes_nothing(backbone, computed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache(None)
    assert get(cache, source(), backbone)[0] is get(cache, source(), backbone)[0]
    assert len(computed) == 1
    assert not list(tmp_path.iterdir())


def other_label() -> ArraySource:
    images, labels = pictures()
    labels[-1] = (labels[-1] + 1) % 3
    return ArraySource("some/train", images, labels, NAMES)


OTHERS = {
    "name": lambda: source(name="some/test"),
    "number of images": lambda: source(39),
    "pixels": lambda: source(seed=1),
    "a label": other_label,
    "class names": lambda: source(names=["a", "b", "d"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_data_has_other_features(what, backbone, computed, tmp_path):
    get(FeatureCache(tmp_path), source(), backbone)
    get(FeatureCache(tmp_path), OTHERS[what](), backbone)
    assert len(computed) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_another_backbone_has_other_features(backbone, computed, tmp_path):
    cache = FeatureCache(tmp_path)
    get(cache, source(), backbone)
    others = [
        replace(backbone, fingerprint="0123456789abcdef"),
        replace(backbone, precision="bf16", run=lambda views: backbone.model(views.float())),
        replace(backbone, resize=32),
        replace(backbone, mean=backbone.mean + 0.1),
    ]
    for other in others:
        get(cache, source(), other)
    assert len(computed) == 1 + len(others) == len(list(tmp_path.iterdir()))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def rewritten(**change):
    def damage(path):
        tensors, metadata = load_tensors(path)
        save_tensors(path, tensors | change, metadata)

    return damage


def foreign(path):
    save_tensors(path, {"features": torch.zeros(40, 192), "labels": torch.zeros(40).long()}, {})


def zeroed(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-4000] + bytes(3000) + whole[-1000:])


DAMAGES = {
    "zeroed": (zeroed, "its tensors differ from those that were written"),
    "truncated": (truncated, "damaged"),
    "text": (lambda path: path.write_text("no tensors"), "damaged"),
    "foreign": (foreign, "match its name"),
    "not finite": (rewritten(features=torch.full((40, 192), float("nan"))), "finite"),
    "too few rows": (rewritten(features=torch.zeros(39, 192), labels=torch.zeros(39).long()), "got 39 of"),
    "wide": (rewritten(features=torch.zeros(40, 191)), "192 features per item like the backbone, got 191"),
    "labels": (rewritten(labels=torch.full((40,), 3)), r"0\.\.2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_file_is_replaced_with_a_warning(name, backbone, computed, tmp_path):
    features, _ = get(FeatureCache(tmp_path), source(), backbone)
    (path,) = tmp_path.iterdir()
    damage, says = DAMAGES[name]
    damage(path)
    with pytest.warns(UserWarning, match=f"are recomputed.*{says}"):
        mended, _ = get(FeatureCache(tmp_path), source(), backbone)
    torch.testing.assert_close(mended, features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get(FeatureCache(tmp_path), source(), backbone)
    assert len(computed) == 2


def test_files_without_a_digest_are_read(backbone, computed, tmp_path):
    features, _ = get(FeatureCache(tmp_path), source(), backbone)
    (path,) = tmp_path.iterdir()
    tensors, metadata = load_tensors(path)
    assert len(metadata.pop("sha256")) == 64
    save_tensors(path, tensors, metadata)
    assert torch.equal(get(FeatureCache(tmp_path), source(), backbone)[0], features)
    assert len(computed) == 1


def test_a_full_disk_costs_the_cache_alone(backbone, tmp_path, monkeypatch):
    def full(*_):
        raise InputError("the disk is full")

    monkeypatch.setattr(module, "save_tensors", full)
    with pytest.warns(UserWarning, match="aren't cached: the disk is full"):
        features, _ = get(FeatureCache(tmp_path), source(), backbone)
    assert features.shape == (40, 192)


class Stream:
    """Images one after the other, without an index."""

    def __init__(self, seed: int):
        self.images, self.labels = pictures(8, seed)

    def __iter__(self):
        return iter(zip(self.images, self.labels.tolist(), strict=True))


def test_nameless_streams_are_known_as_objects(backbone, computed, tmp_path):
    cache = FeatureCache(tmp_path)
    one, two = from_iterable(Stream(0), NAMES, 1), from_iterable(Stream(1), NAMES, 1)
    first = get(cache, one, backbone)
    assert not torch.equal(first[0], get(cache, two, backbone)[0])
    assert get(cache, one, backbone)[0] is first[0]
    assert len(computed) == 2
    assert not list(tmp_path.iterdir())


def test_a_named_stream_with_a_length_is_known_by_them(backbone, computed, tmp_path):
    class Sized(Stream):
        def __len__(self):
            return len(self.images)

    for _ in range(2):
        stream = from_iterable(Sized(0), NAMES, 1)
        stream.name = "shards/train"
        get(FeatureCache(tmp_path), stream, backbone)
    assert computed == ["shards/train"]


def _write_often(folder, seed):
    key = {"images": 2000}
    for _ in range(30):
        module._write(folder / "f.safetensors", key, (torch.full((2000, 64), seed), torch.zeros(2000).long()))


def test_two_writers_leave_a_whole_file(tmp_path, backbone):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(tmp_path, float(seed))) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    small = replace(backbone, num_features=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a half-written file would be one
        while any(writer.is_alive() for writer in writers) or not seen:
            found = module._read(tmp_path / "f.safetensors", {"images": 2000}, 1, small)
            if found is not None:
                seen |= set(found[0].unique().tolist())
                assert len(found[0].unique()) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {1.0, 2.0}
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_folder_that_can_not_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="the folder can't be created"):
            FeatureCache(place)
    with pytest.raises(InputError, match="empty name"):
        FeatureCache("")
