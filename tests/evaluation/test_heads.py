"""Classifier and projector: what they compute, and their files."""

from __future__ import annotations

import pytest
import torch

from sfm_fast import InputError
from sfm_fast.evaluation.heads import Classifier, Projector, compose
from sfm_fast.files import load_tensors, save_tensors


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classifier() -> Classifier:
    return Classifier(numbers(3, 5), numbers(3, seed=1), ["a", "b", "ü"], {"test_top1": 0.5, "test_data": None})


def test_a_map_computes_what_a_linear_layer_does():
    head, x = classifier(), numbers(7, 5, seed=2)
    torch.testing.assert_close(head(x), torch.nn.functional.linear(x, head.weight, head.bias))
    assert (head.in_features, head.out_features, head.parameters) == (5, 3, 18)


def test_bytes_are_those_of_the_numbers():
    head = classifier()
    assert head.nbytes() == head.weight.nbytes + head.bias.nbytes == 72
    assert head.nbytes(torch.float16) == head.weight.half().nbytes + head.bias.half().nbytes == 36


def test_composition_is_one_map_after_the_other():
    outer, inner, x = classifier(), Projector(numbers(5, 4, seed=3), numbers(5, seed=4)), numbers(9, 4, seed=5)
    both = compose(outer, inner)
    torch.testing.assert_close(both(x), outer(inner(x)), rtol=1e-5, atol=1e-5)
    assert (both.in_features, both.out_features) == (4, 3)


@pytest.mark.parametrize("head", [classifier(), Projector(numbers(5, 4), numbers(5), {"solver": "ridge"})])
def test_a_file_gives_back_what_was_saved(head, tmp_path):
    path = tmp_path / "head.safetensors"
    head.save(path)
    loaded = type(head).load(path)
    assert torch.equal(loaded.weight, head.weight)
    assert torch.equal(loaded.bias, head.bias)
    assert loaded.metadata == head.metadata
    assert getattr(loaded, "class_names", None) == getattr(head, "class_names", None)
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]


def test_the_two_kinds_are_not_mixed_up(tmp_path):
    path = tmp_path / "head.safetensors"
    classifier().save(path)
    with pytest.raises(InputError, match="no projector of this package"):
        Projector.load(path)
    Projector(numbers(3, 5), numbers(3)).save(path)
    with pytest.raises(InputError, match="no classifier of this package"):
        Classifier.load(path)


DAMAGED = {
    "transposed bias": ({"bias": torch.zeros(5)}, {}),
    "flat weight": ({"weight": torch.zeros(15)}, {}),
    "NaN": ({"bias": torch.tensor([0.0, float("nan"), 0.0])}, {}),
    "too few names": ({}, {"class_names": ["a"]}),
    "names of another type": ({}, {"class_names": "abc"}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name, tmp_path):
    path = tmp_path / "head.safetensors"
    classifier().save(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors | DAMAGED[name][0], metadata | DAMAGED[name][1])
    with pytest.raises(InputError, match=r"head\.safetensors: damaged classifier"):
        Classifier.load(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(InputError, match="no such file"):
        Classifier.load(path)
    classifier().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        Classifier.load(path)
    save_tensors(path, {"weight": numbers(3, 5)}, {"file_format": "sfm_fast.classifier/1"})
    with pytest.raises(InputError, match="no classifier"):
        Classifier.load(path)


@pytest.mark.parametrize("key", ["format", "file_format", "class_names"])
def test_metadata_with_keys_of_the_file_are_refused(key, tmp_path):
    for head in (classifier(), Projector(numbers(5, 4), numbers(5))):
        head.metadata = {key: "mine", "other": 1}
        if key == "class_names" and isinstance(head, Projector):
            head.save(tmp_path / "head.safetensors")  # it has none itself
            assert Projector.load(tmp_path / "head.safetensors").metadata == head.metadata
            continue
        with pytest.raises(InputError, match=f"metadata must not have the reserved keys {key}"):
            head.save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
