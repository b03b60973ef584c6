"""`prepare_frozen`: the same features and image gradients, less memory, and parts that don't fit left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from sfm_fast.backbones import freeze, load_backbone, prepare_frozen, shape_of_backbone
from sfm_fast.backbones.frozen_layers import Affine, FrozenConv2d
from sfm_fast.backbones.prepare import full_float32
from sfm_fast.errors import InputError

# One of each structure: norms after convolutions, also with padding as in TensorFlow; norms first; LayerScale; linear layers with batch norm.
MODELS = {
    "resnet10t": 64,
    "resnetv2_18": 64,
    "tf_efficientnet_lite0": 64,
    "mobilenetv3_small_050": 64,
    "regnety_002": 64,
    "densenet121": 32,
    "convnext_atto": 64,
    "levit_128s": 224,
    "test_vit4": 160,
    "deit3_small_patch16_224": 224,
    "eva02_tiny_patch14_224": 224,
    "beit_base_patch16_224": 224,
    "nf_regnet_b0": 64,
}


def made(name: str) -> nn.Module:
    """A timm model in float64, of two blocks if it is a transformer, whose norms and scales all matter."""
    torch.manual_seed(0)
    few = {"depth": 2} if name.startswith(("deit", "eva", "beit")) else {}
    model: nn.Module = timm.create_model(name, num_classes=0, **few).double().eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    for name, value in model.named_parameters():
        if value.ndim == 1 and "bias" not in name:
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1:
            value.normal_(0, 0.1)
    return model


def features_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    features = model(images)
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    return features.detach(), torch.autograd.grad((features * weights).sum(), images)[0]


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Memory kept for the backward pass, without weights."""
    weights = {value.data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(images)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_features_and_gradients_are_equal_in_float64(name: str) -> None:
    model, size = made(name), MODELS[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    prepared, record = prepare_frozen(model, size)
    assert prepared is not model, str(record)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(features_and_gradient(prepared, images), features_and_gradient(model, images), strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert saved_bytes(prepared, images) <= saved_bytes(model, images)
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_what_is_folded() -> None:
    def done(name: str) -> dict[str, int]:
        return dict(prepare_frozen(made(name), MODELS[name])[1].done)

    assert done("tf_efficientnet_lite0")["batch norms folded into convolutions"] == 49
    assert done("levit_128s")["batch norms folded into linear layers"] > 10
    assert done("deit3_small_patch16_224") == {
        "layer scales folded": 4,
        "layer norms folded into linear layers": 4,
        "convolutions that keep no input": 1,
    }
    assert done("convnext_atto")["layer scales folded"] == 12
    assert "batch norms, as one multiplication and addition" in prepare_frozen(made("densenet121"), 32)[1].left


def test_convolutional_nets_keep_less_than_half() -> None:
    model = made("tf_efficientnet_lite0").float().to(memory_format=torch.channels_last)
    prepared, _ = prepare_frozen(model, 64)
    images = torch.randn(4, 3, 64, 64, requires_grad=True)
    assert saved_bytes(prepared, images) < 0.5 * saved_bytes(model, images)


class Net(nn.Module):
    """A convolution and a batch norm, joined by ``how``."""

    def __init__(self, how: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.how(self, images).mean((2, 3))


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x: net.norm(net.conv(x)) + net.conv(x),  # the weight is used twice
        lambda net, x: (lambda y: net.norm(y) + y)(net.conv(x)),  # the result is used twice
        lambda net, x: net.norm(net.conv(x).relu_()),  # written in between
        lambda net, x: net.norm(net.norm(net.conv(x))),  # the norm is used twice
        lambda net, x: net.norm(torch.conv2d(x, net.conv.weight - net.conv.weight.mean(), net.conv.bias, padding=1)),
    ],
)
def test_what_does_not_fit_is_left_alone(how: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(how).double().eval().requires_grad_(False)
    prepared, record = prepare_frozen(model, 16)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(features_and_gradient(prepared, images), features_and_gradient(model, images), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert "batch norms folded into convolutions" not in record.done
    assert record.left


def test_parametrised_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.norm(net.conv(x)))
    nn.utils.parametrizations.weight_norm(model.conv)
    model = model.double().eval().requires_grad_(False)
    prepared, record = prepare_frozen(model, 16)
    assert "batch norms folded into convolutions" not in record.done
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(prepared(images), model(images))


def test_a_model_that_would_differ_or_fail_is_returned_as_it_is() -> None:
    class Reads(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.conv.weight.detach().numpy().mean()

    model = Reads(lambda net, x: net.norm(net.conv(x))).double().eval().requires_grad_(False)
    prepared, record = prepare_frozen(model, 16)
    assert prepared is model
    assert "can't be observed" in str(record)

    class Counts(Net):
        def forward(self, images: Tensor) -> Tensor:  # does something else once the norm is gone
            return super().forward(images) + isinstance(self.norm, nn.BatchNorm2d)

    model = Counts(lambda net, x: net.norm(net.conv(x))).double().eval().requires_grad_(False)
    prepared, record = prepare_frozen(model, 16)
    assert prepared is model
    assert "would differ" in str(record)


def test_the_features_are_compared_in_full_float32() -> None:
    """Whatever the process allows; afterwards its settings are as they were, also after an error."""
    backends = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)

    def settings() -> list[str]:
        return [place.fp32_precision for place in places]

    seen = []

    class Looks(Net):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(settings())
            return super().forward(images)

    model = Looks(lambda net, x: net.norm(net.conv(x))).eval().requires_grad_(False)
    before = settings()
    try:
        backends.fp32_precision = "ieee"
        followed = settings()
        backends.fp32_precision = "none"
        for general, matmul in (("none", "none"), ("none", "tf32"), ("tf32", "ieee"), ("ieee", "tf32")):
            backends.fp32_precision, backends.cuda.matmul.fp32_precision = general, matmul
            now = settings()
            prepared, _ = prepare_frozen(model, 16)
            assert prepared is not model
            assert seen[-2:] == [["ieee"] * 4] * 2
            assert settings() == now
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert settings() == now
        backends.fp32_precision = backends.cuda.matmul.fp32_precision = "none"
        assert settings() == before
        backends.fp32_precision = "ieee"  # what followed it still does
        assert settings() == followed
    finally:
        backends.fp32_precision = backends.cuda.matmul.fp32_precision = "none"
    assert settings() == before


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 2}, {"groups": 4}, {"dilation": 2}, {"bias": False}])
def test_frozen_convolution(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, **options).double().requires_grad_(False)
    frozen = copy.deepcopy(plain)
    frozen.__class__ = FrozenConv2d
    images = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    for form in (
        images,
        images.to(memory_format=torch.channels_last),
        images[:, :, ::2],
        images[:1].expand(2, -1, -1, -1),
    ):
        x = form.detach().requires_grad_()
        before = x.detach().clone()
        for _ in range(2):
            ours, theirs = features_and_gradient(frozen, x), features_and_gradient(plain, x)
            assert torch.equal(ours[0], theirs[0])
            assert torch.allclose(ours[1], theirs[1], rtol=1e-13, atol=1e-13)
        assert torch.equal(x, before)
    assert torch.autograd.gradcheck(frozen, images.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(frozen, images.detach().requires_grad_())
    frozen.requires_grad_(True)  # then it is an ordinary one
    frozen(images).sum().backward()
    assert frozen.weight.grad is not None


def test_affine_is_batch_norm() -> None:
    norm = nn.BatchNorm2d(5).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    affine = Affine(scale.detach(), (norm.bias - norm.running_mean * scale).detach())
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    assert torch.allclose(affine(x), norm(x))
    assert torch.allclose(Affine(torch.ones(5), torch.zeros(5))(torch.ones(3, 5)), torch.ones(3, 5))


def test_backbones_are_prepared_and_say_so() -> None:
    ours, plain = load_backbone("fashion_cnn"), load_backbone("fashion_cnn", prepare=False)
    assert ours.prepared
    assert not plain.prepared
    assert ours.describe() | {"prepared": 0} == plain.describe()
    assert ours.fingerprint == plain.fingerprint
    assert ours.identity == plain.identity
    images = torch.rand(4, ours.in_channels, ours.input_size, ours.input_size)
    assert torch.allclose(ours.features(images), plain.features(images), rtol=1e-4, atol=1e-5)
    again = ours.unprepared()
    assert not again.prepared
    assert torch.equal(again.features(images), plain.features(images))
    assert plain.unprepared() is plain


def test_a_backbone_of_a_model_keeps_the_model() -> None:
    model = made("resnet10t").float()
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    images = torch.rand(2, 3, 64, 64)
    plain = freeze("mine", copy.deepcopy(model), config, device=torch.device("cpu"), prepare=False)
    ours = freeze("mine", model, config, device=torch.device("cpu"))
    assert ours.prepared
    assert torch.equal(ours.unprepared().features(images), plain.features(images))
    low = freeze("mine", model, config, device=torch.device("cpu"), precision="bf16")
    assert {value.dtype for value in low.unprepared().model.parameters()} == {torch.bfloat16}


def test_prepared_shapes_have_the_structure_of_prepared_backbones() -> None:
    for name in ("fashion_cnn", "fashion_vit"):
        shape, backbone = shape_of_backbone(name), load_backbone(name)
        values, weights = shape.model.state_dict(), backbone.model.state_dict()
        assert {key: value.shape for key, value in values.items()} == {
            key: value.shape for key, value in weights.items()
        }
    assert not shape_of_backbone("fashion_cnn", prepare=False).prepared


def test_original_of_a_copy_without_one() -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="prepare=False"):
        replace(load_backbone("fashion_cnn"), original=None).unprepared()
