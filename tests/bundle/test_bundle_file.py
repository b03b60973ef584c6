"""The file of a bundle: what is in it, what it weighs, what damages it, and what it is written over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from sfm_fast import Bundle, files
from sfm_fast.bundle import format
from sfm_fast.errors import InputError
from sfm_fast.evaluation.heads import Classifier, compose
from sfm_fast.synthetic import SyntheticSet


def files_of(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


TENSORS = {
    "images.pixels", "images.labels", "classifier.weight", "classifier.bias", "projector.weight", "projector.bias",
}  # fmt: skip


def names_of(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_the_round_trip(joined, synthetic, vit, tiny, tmp_path):
    path = tmp_path / "new" / "mine.safetensors"
    joined.save(path)
    assert names_of(path) == TENSORS
    assert files_of(tmp_path / "new") == {"mine.safetensors"}
    bundle = Bundle.load(path)
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
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()  # equal bundles are equal files
    assert Bundle.load(tmp_path / "copy").size_report() == bundle.size_report()
    assert (
        Bundle.create(again, bundle.classifier, vit, tiny, views=4).projector.in_features == 64
    )  # for another psi later
    with pytest.raises(InputError, match=r"must be an output folder of .*, got a bundle"):
        SyntheticSet.load(path)


def test_no_projector_where_psi_is_phi(same, tmp_path):
    same.save(tmp_path / "b")
    assert names_of(tmp_path / "b") == {name for name in TENSORS if not name.startswith("projector")}
    assert Bundle.load(tmp_path / "b").projector is None


def test_folded_answers_the_same(joined, classifier, tiny, test_data, tmp_path):
    joined.save(tmp_path / "f", dtype="fp32", folded=True)
    assert names_of(tmp_path / "f") == {"classifier.weight", "classifier.bias"}
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


def test_the_size_report_counts_the_file(joined, tmp_path):
    with pytest.raises(InputError, match="save the bundle first"):
        replace(joined, _stored=None).size_report()
    joined.save(tmp_path / "b")
    rows = {row["what"]: row for row in joined.size_report()}
    assert rows["total"]["bytes"] == (tmp_path / "b").stat().st_size
    inside = [row["bytes"] for what, row in rows.items() if what not in ("total", "training images (not inside)")]
    assert sum(inside) == rows["total"]["bytes"]
    assert rows["projector"]["bytes"] == 2 * 192 * 64 + 4 * 192
    assert rows["projector"]["detail"] == "192 x 64, bfloat16"
    assert rows["training images (not inside)"]["bytes"] == 6000 * 28 * 28
    assert joined.size_report() == Bundle.load(tmp_path / "b").size_report()


def test_the_training_images_are_left_out_where_unknown(synthetic, classifier, vit, tmp_path):
    plain = Classifier(classifier.weight, classifier.bias, classifier.class_names)
    bundle = Bundle.create(synthetic, plain, vit)
    bundle.save(tmp_path / "b")
    assert bundle.size_report()[-1]["what"] == "total"
    assert bundle.accuracy == {}


def test_its_readme_says_what_it_is_and_its_snippet_runs(joined, test_data, tmp_path, monkeypatch, capsys):
    joined.save(tmp_path / "this.safetensors", with_backbone=True)
    page = Bundle.load(tmp_path / "this.safetensors").readme()
    for wanted in (
        "T-shirt/top",
        "`test_vit`",
        "`fashion_vit`",
        "Its weights are included",
    ):
        assert wanted in page
    with safe_open(tmp_path / "this.safetensors", framework="pt") as file:  # as anyone finds it, without this package
        assert json.loads(file.metadata()["readme"]) == page
    Image.fromarray((test_data[0][0, 0] * 255).byte().numpy()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("[('")


def rewrite(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def take_apart(path: Path) -> tuple[dict, bytes]:
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(name):
    """Another bit in a tensor."""

    def change(path):
        header, data = take_apart(path)
        at = header[name]["data_offsets"][1] - 1
        rewrite(path, header, data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :])

    return change


def edit(**values):
    """Other values in the header; a text as it is, anything else as JSON."""

    def change(path):
        header, data = take_apart(path)
        header["__metadata__"] |= {key: json.dumps(value) for key, value in values.items()}
        rewrite(path, header, data)

    return change


def raw(key, text):
    def change(path):
        header, data = take_apart(path)
        header["__metadata__"][key] = text
        rewrite(path, header, data)

    return change


def without(part):
    """The tensors of a part left out, and the digest made anew: only its absence is to be noticed."""

    def change(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            kept = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(part)}  # noqa: SIM118
        metadata["sha256"] = json.dumps(format._digest(kept))
        save_file(kept, path, metadata)

    return change


DAMAGE = {
    "missing": (Path.unlink, "no bundle here"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no bundle here (it is a folder)"),
    "cut": (cut, "damaged or not a safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or not a safetensors file"),
    "no safetensors": (lambda path: path.write_text("[]"), "damaged or not a safetensors file"),
    "a bit of the projector": (flip("projector.weight"), "damaged bundle (its tensors differ from those"),
    "a bit of the images": (flip("images.pixels"), "damaged bundle (its tensors differ from those"),
    "no classifier": (without("classifier"), "damaged bundle (it has no classifier"),
    "no projector": (without("projector"), "don't fit together"),
    "no images": (without("images"), "damaged bundle (it has no synthetic images"),
    "other format": (edit(file_format="other/1"), "not a bundle of this package"),
    "future": (edit(file_format="sfm_fast.bundle/2", sfm_fast="9.1"), "has format 2, made by sfm_fast 9.1"),
    "no names": (edit(class_names=None), "damaged bundle (class_names is None)"),
    "channels": (edit(channels=2), "damaged bundle (channels is 2)"),
    "no backbone": (edit(evaluating_backbone={"name": "x"}), "evaluating_backbone has no fingerprint"),
    "accuracy": (edit(accuracy={"x": 0.9}), "damaged bundle (accuracy: x is 0.9)"),
    "other names": (edit(class_names=["a"] * 9), "don't fit together"),
    "deep": (raw("made", "[" * 100_000), "damaged bundle"),
    "format": (edit(file_format="sfm_fast.bundle/²"), "damaged bundle (its format is "),
    "infinite": (raw("sfm_fast", "Infinity"), "damaged bundle (Infinity is no valid number"),
    "names": (edit(class_names=[1] * 10), "damaged bundle (class_names is [1"),
    "made": (edit(made={"classifier": 3}), "damaged bundle (made: classifier is 3"),
    "made projector": (edit(made={"projector": [1]}), "damaged bundle (made: projector is [1]"),
    "made synthetic": (edit(made={"synthetic": "x"}), "damaged bundle (made: synthetic is 'x'"),
    "made top1": (edit(made={"classifier": {"test_top1": "x"}}), "made: classifier: test_top1 is 'x'"),
    "accuracies": (edit(accuracy={"a": "b"}), "damaged bundle (accuracy: a is 'b')"),
    "top1": (edit(accuracy={"a": {"top1": "b", "images": 1}}), "accuracy: a: top1 is 'b'"),
}

BACKBONE_DAMAGE = {
    "input_size": "28", "resize": 0, "num_features": True, "mean": "0.5", "std": [0.5, 0.5], "name": ["x"], "fingerprint": None,
}  # fmt: skip


@pytest.mark.parametrize("role", ["distilling_backbone", "evaluating_backbone"])
@pytest.mark.parametrize("key", BACKBONE_DAMAGE)
def test_a_damaged_record_of_a_backbone_is_named(key, role, same, tmp_path):
    same.save(tmp_path / "b")
    edit(**{role: same.phi | {key: BACKBONE_DAMAGE[key]}})(tmp_path / "b")
    with pytest.raises(InputError, match=rf"b: damaged bundle \({role}: .*{key}"):
        Bundle.load(tmp_path / "b")


def test_a_mean_of_another_length_is_named(same, vit, tmp_path):
    same.save(tmp_path / "b")
    edit(evaluating_backbone=same.psi | {"mean": [0.5] * 3, "std": [0.5] * 3})(tmp_path / "b")
    wanted = "b: damaged bundle (evaluating_backbone: mean has 3 numbers, but 'fashion_vit' needs 1)"
    with pytest.raises(InputError, match=re.escape(wanted)):
        Bundle.load(tmp_path / "b", backbone=vit)
    with pytest.raises(InputError, match=re.escape(wanted)):
        Bundle.load(tmp_path / "b").classify(torch.rand(28, 28))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, joined, tmp_path):
    harm, message = DAMAGE[name]
    joined.save(tmp_path / "b")
    harm(tmp_path / "b")
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        Bundle.load(tmp_path / "b")
    assert str(raised.value).startswith(str(tmp_path / "b"))


def test_damaged_weights_of_the_backbone_are_named(joined, tmp_path):
    joined.save(tmp_path / "b", with_backbone=True)
    flip(next(name for name in names_of(tmp_path / "b") if name.startswith("backbone.")))(tmp_path / "b")
    with pytest.raises(InputError, match=r"b: damaged bundle \(its tensors"):
        Bundle.load(tmp_path / "b")


# --- writing over something ------------------------------------------------------------------------------------------


def test_a_bundle_is_replaced_and_nothing_else(same, joined, classifier, tmp_path):
    joined.save(tmp_path / "b")
    same.save(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").projector is None
    (tmp_path / "folder").mkdir()
    (tmp_path / "thesis").write_text("{}")
    classifier.save(tmp_path / "classifier")
    for name in ("thesis", "classifier"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match="exists and is no bundle"):
            same.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(InputError, match="must be a file, got the folder"):
        same.save(tmp_path / "folder")
    with pytest.raises(InputError, match="empty name"):
        same.save("")
    with pytest.raises(InputError, match="no such folder"):
        same.save(tmp_path / "thesis" / "below")
    with pytest.raises(InputError, match="dtype must be one of bf16, fp32"):
        same.save(tmp_path / "b", dtype="int4")
    assert files_of(tmp_path) == {"b", "folder", "thesis", "classifier"}


def test_a_damaged_bundle_can_be_replaced(same, joined, tmp_path):
    joined.save(tmp_path / "b")
    flip("projector.weight")(tmp_path / "b")
    same.save(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").projector is None


def test_a_link_stays_a_link(same, tmp_path):
    same.save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    same.save(tmp_path / "link", dtype="fp32")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.load(tmp_path / "real").size_report()[1]["detail"].endswith("float32")


def test_an_interrupted_save_leaves_the_old_bundle_whole(same, joined, tmp_path, monkeypatch):
    same.save(tmp_path / "b")
    before = (tmp_path / "b").read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    def fail(*args):
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            joined.save(tmp_path / "b")
    assert files_of(tmp_path) == {"b"}
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(InputError, match="input/output error"):
            joined.save(tmp_path / "b")
    assert files_of(tmp_path) == {"b"}
    assert (tmp_path / "b").read_bytes() == before


KILLED = """
import os, sys
from sfm_fast import Bundle, files
bundle = Bundle.load(sys.argv[1])
files.os.fsync = lambda *args: os.kill(os.getpid(), 9)
bundle.save(sys.argv[1], dtype="fp32")
"""


def test_a_kill_leaves_nothing_that_blocks(same, tmp_path):
    """What a killed save leaves beside is in nobody's way: the old bundle is whole, and the next save needs nothing from anyone."""
    same.save(tmp_path / "b")
    before = (tmp_path / "b").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "b")], capture_output=True)
    assert done.returncode == -9
    assert (tmp_path / "b").read_bytes() == before
    same.save(tmp_path / "b", dtype="fp32")
    assert Bundle.load(tmp_path / "b").class_names == same.class_names
