"""The backbone of a bundle: recorded, stored with it, refused where it is another; and parts that don't belong together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfm_fast import Bundle
from sfm_fast.backbones.load import load_backbone
from sfm_fast.backbones.record import save_weights
from sfm_fast.errors import InputError
from sfm_fast.evaluation.heads import Classifier, Projector


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
    bundle = Bundle.load(tmp_path / "b")
    weights = bundle.backbone.fingerprint
    bundle.save(tmp_path / "b")  # onto itself
    bundle.save(tmp_path / "folded", folded=True)
    for name in ("b", "folded"):
        assert Bundle.load(tmp_path / name).backbone.fingerprint == weights
        assert Bundle.load(tmp_path / name).classify(torch.rand(28, 28))
    bundle.save(tmp_path / "b", folded=True, with_backbone=False)
    assert {row["what"] for row in bundle.size_report()} >= {"classifier", "total"}
    assert not {row["what"] for row in bundle.size_report()} & {"synthetic images", "projector", "backbone's weights"}
    assert len(bundle.synthetic.images) == 10  # it still has what its file hasn't


def test_its_readme_says_where_the_weights_are(same, joined, tmp_path):
    for bundle, wanted in ((same, "the package contains them"), (joined, "timm downloads them")):
        bundle.save(tmp_path / "b")
        assert f"Its weights are not included: {wanted}" in Bundle.load(tmp_path / "b").readme()


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


def test_a_fresh_process_needs_the_file_alone(joined, test_data, tmp_path):
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
    with pytest.raises(InputError, match="must be fp32 to store"):
        save_weights(tmp_path / "w.safetensors", rounded)
    other = load_backbone("test_vit", tiny_checkpoint, image_size=32)
    other.model.blocks[0].attn.num_heads = 4 if other.model.blocks[0].attn.num_heads != 4 else 2
    other.model.blocks[0].attn.head_dim = 64 // other.model.blocks[0].attn.num_heads
    other.model.blocks[0].attn.scale = 10.0  # the same weights, another function
    with pytest.raises(InputError, match="gives other features"):
        save_weights(tmp_path / "w.safetensors", replace(other, run=lambda x: other.model(x) + 1))
    with pytest.raises(InputError, match="without network access"):
        save_weights(tmp_path / "w.safetensors", replace(other, name="hf-hub:someone/model"))


def test_parts_of_different_making_are_refused(synthetic, classifier, vit, tiny):
    with pytest.raises(InputError, match="synthetic: made with 'fashion_vit'"):
        Bundle.create(synthetic, classifier, tiny)
    foreign = replace(classifier, metadata={"backbone": tiny.describe()})
    with pytest.raises(InputError, match="classifier: made with 'test_vit'"):
        Bundle.create(synthetic, foreign, vit)
    smaller = {"backbone": vit.describe() | {"input_size": 14}}
    wanted = "made with 'fashion_vit' (input size 14), but phi is 'fashion_vit' (input size 28)"
    with pytest.raises(InputError, match=re.escape(f"classifier: {wanted}")):
        Bundle.create(synthetic, replace(classifier, metadata=smaller), vit)
    with pytest.raises(InputError, match=re.escape(f"synthetic: {wanted}")):
        Bundle.create(replace(synthetic, metadata={"backbones": [smaller["backbone"]]}), classifier, vit)
    names = ["Sack" if name == "Bag" else name for name in classifier.class_names]
    with pytest.raises(InputError, match="differ in \\['Bag', 'Sack'\\]"):
        Bundle.create(synthetic, replace(classifier, class_names=names), vit)
    with pytest.raises(InputError, match="takes 5 features"):
        Bundle.create(synthetic, Classifier(torch.ones(10, 5), torch.ones(10), classifier.class_names), vit)
    with pytest.raises(InputError, match="must take the 64 features of test_vit and give the 192 of fashion_vit"):
        Bundle.create(synthetic, classifier, vit, tiny, Projector(torch.ones(192, 9), torch.ones(192)))
    with pytest.raises(InputError, match="fitted for psi 'fashion_vit'"):
        Bundle.create(
            synthetic, classifier, vit, tiny, Projector(torch.ones(192, 64), torch.ones(192), {"psi": vit.describe()})
        )
    wide = {"psi": tiny.describe() | {"input_size": 64}}
    with pytest.raises(
        InputError, match=r"fitted for psi 'test_vit' \(input size 64\), but psi is 'test_vit' \(input size 32"
    ):
        Bundle.create(synthetic, classifier, vit, tiny, Projector(torch.ones(192, 64), torch.ones(192), wide))
    with pytest.raises(InputError, match="None if psi is phi"):
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
