"""The operations as torch sees them: schemas, fake kernels, autograd, compile, export, autocast, torch.func, threads, caching."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import definitions
import pytest
import torch
from cases.images import IMAGE_CASES
from cases.losses import LOSS_CASES
from definitions import NAMES, value_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from image_definitions import KERNELS

import sfm_fast
from sfm_fast import checks
from sfm_fast.ops import library
from sfm_fast.ops.augment import view_arguments
from sfm_fast.ops.schemas import SCHEMAS
from sfm_fast.ops.segments import segments_of
from sfm_fast.reference import flow_alignment as reference

ROOT = Path(__file__).resolve().parents[2]


def inputs(dtype=torch.float32):
    return next(case for case in LOSS_CASES if case.name == "labelled").make(dtype)


def image_arguments(name, dtype):
    image_inputs = next(case for case in IMAGE_CASES if case.name == "rows-of-flat-buffer").make()
    levels, rows, canvas, views = image_inputs.levels, image_inputs.rows, image_inputs.canvas, image_inputs.views
    images, sides = image_inputs.images.to(dtype), [level.shape[-1] for level in levels]
    grad = torch.randn(len(views.boxes), len(views.std), views.size, views.size).to(dtype)
    return {
        "render": (levels, rows, canvas, dtype),
        "render_backward": (torch.randn_like(images), images, sides),
        "augment": (images, *view_arguments(views), dtype),
        "augment_backward": (grad, views.boxes, views.std, *images.shape, dtype),
        "render_augment": (levels, rows, canvas, *view_arguments(views), dtype),
        "render_augment_backward": (grad, levels, rows, canvas, views.boxes, views.std),
    }[name]


def arguments(name, dtype):
    """One call of every operation."""
    if "render" in name or "augment" in name:
        return image_arguments(name, dtype)
    features, centers, labels = inputs(dtype)
    order, offsets, _ = segments_of(labels, len(labels), 10, labels.device)
    centers, shift = centers - centers.mean(0), centers.mean(0)
    if name == "class_means":
        return features, order, offsets, shift
    if name == "class_means_backward":
        return centers, order, offsets, len(features), dtype
    if name == "flow_alignment":
        return features, order, offsets, centers, shift, 0.01 * torch.randn(64), reference.ANCHORED, 1e-8, 1.0, 0.1
    if name == "flow_alignment_backward":
        rows, columns = torch.randn(2, 1), torch.randn(2, 64)
        return torch.tensor(1.5), features, order, offsets, centers, shift, rows, columns
    return centers, centers + torch.randn(10, 64), None, 0, 10, 1e-8, True, False


@pytest.mark.parametrize("prefix", ["", "triton_"])
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(prefix, name, dtype):
    if prefix and (dtype != torch.float32 or name == "pair_alignment"):
        pytest.skip("interpreted Triton is slow")
    operation = getattr(torch.ops.sfm_fast, prefix + name).default
    torch.library.opcheck(operation, arguments(name, dtype))


def test_opcheck_with_gradients():
    features, order, offsets, *rest = arguments("flow_alignment", torch.float32)
    torch.library.opcheck(torch.ops.sfm_fast.flow_alignment.default, (features.requires_grad_(), order, offsets, *rest))
    a, b, *rest = arguments("pair_alignment", torch.float32)
    torch.library.opcheck(torch.ops.sfm_fast.pair_alignment.default, (a, b.requires_grad_(), *rest))
    features, order, offsets, shift = arguments("class_means", torch.float32)
    torch.library.opcheck(torch.ops.sfm_fast.class_means.default, (features.requires_grad_(), order, offsets, shift))
    images, *rest = arguments("augment", torch.float32)
    torch.library.opcheck(torch.ops.sfm_fast.augment.default, (images.requires_grad_(), *rest))
    for name in ("render", "render_augment"):
        levels, *rest = arguments(name, torch.float32)
        leaves = [level.detach().requires_grad_() for level in levels]
        torch.library.opcheck(getattr(torch.ops.sfm_fast, name).default, (leaves, *rest))


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_the_same_everywhere(name):
    for prefix in ("", "triton_"):
        schema = str(getattr(torch.ops.sfm_fast, prefix + name).default._schema)
        assert schema == f"sfm_fast::{prefix}{name}{SCHEMAS[name]}"


def test_numbers_are_the_same_in_cpp_and_python():
    text = (Path(__file__).parents[2] / "csrc" / "kinds.h").read_text()
    kinds = re.search(r"enum Kind : int \{ (.*) \};", text)
    assert kinds is not None
    assert [entry.split(" = ") for entry in kinds[1].split(", ")] == [
        ["GLOBAL_COSINE", str(reference.GLOBAL)],
        ["CLASS_COSINE", str(reference.CLASS)],
        ["FLOW_MSE", str(reference.FLOW_MSE)],
        ["PAIR_MSE", str(reference.PAIR_MSE)],
        ["DECOUPLED_MSE", str(reference.DECOUPLED)],
        ["ANCHORED_COSINE", str(reference.ANCHORED)],
    ]
    for name in ("MOST_PIXELS", "MOST_LEVELS", "MOST_CHANNELS"):
        number = re.search(rf"constexpr int {name} = ([0-9<\s]+);", text)
        assert number is not None
        assert eval(number[1]) == getattr(checks, name)  # such as "1 << 14"


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_the_largest_side_is_the_same_on_every_backend(backend):
    """16 384 pixels are allowed; one more is refused, by the argument's name, before a backend is chosen."""
    level, none = torch.rand(1, 1, 4, 4), torch.empty(0, dtype=torch.int64)
    assert sfm_fast.render([level], 2**14, rows=none, backend=backend).shape == (0, 1, 2**14, 2**14)
    with pytest.raises(sfm_fast.InputError, match="size must be 1 to 16384 pixels, got 16385"):
        sfm_fast.render([level], 2**14 + 1, rows=none, backend=backend)
    tall = torch.rand(1, 1, 2**14, 1)
    one = torch.ones(1)
    views = sfm_fast.Views(torch.tensor([[0.0, 1.0, 2**14 - 1.0, 1.0]]), torch.tensor([-1]), 1, 0 * one, one)
    assert sfm_fast.augment(tall, views, backend=backend).item() == tall[0, 0, -1, 0]
    with pytest.raises(sfm_fast.InputError, match="at most 16384 pixels"):
        sfm_fast.augment(torch.rand(1, 1, 2**14 + 1, 1), views, backend=backend)


@pytest.mark.parametrize("alignment", NAMES)
@pytest.mark.parametrize("labelled", [False, True])
def test_compile_without_graph_breaks(alignment, labelled):
    features, centers, labels = inputs()
    if not labelled:
        features, labels = features[:10], None
    module = definitions.module(centers, alignment=alignment)
    torch.compiler.reset()  # all modules share the code of `forward`, which is compiled again a few times only
    compiled = torch.compile(module, fullgraph=True)
    eager_loss, eager_gradient = value_and_gradient(lambda z: module(z, labels), features)
    loss, gradient = value_and_gradient(lambda z: compiled(z, labels), features)
    torch.testing.assert_close(loss, eager_loss)
    torch.testing.assert_close(gradient, eager_gradient, rtol=1e-5, atol=1e-8)


def test_compiled_functions_and_labels_that_cannot_be_checked():
    features, centers, labels = inputs()

    @torch.compile(fullgraph=True)
    def losses(features, labels):
        return (
            sfm_fast.flow_alignment_loss(features, centers, labels),
            sfm_fast.decoupled_flow_loss(features, centers, labels, alpha=0.5),
        )

    first, second = losses(features, labels)
    torch.testing.assert_close(first, sfm_fast.flow_alignment_loss(features, centers, labels))
    torch.testing.assert_close(second, sfm_fast.decoupled_flow_loss(features, centers, labels, alpha=0.5))
    for bad in (labels.clamp_max(8), labels + 1, labels - 1):
        loss, gradient = value_and_gradient(lambda z, bad=bad: losses(z, bad)[0], features)
        assert loss.isnan()
        assert gradient.shape == features.shape


@pytest.mark.parametrize("alignment", NAMES)
def test_export(alignment):
    features, centers, labels = inputs()
    module = definitions.module(centers, alignment=alignment)
    program = torch.export.export(module, (features, labels))
    torch.testing.assert_close(program.module()(features, labels), module(features, labels))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("alignment", NAMES)
def test_autocast_keeps_float32(alignment, backend):
    features, centers, labels = inputs()
    module = definitions.module(centers, alignment=alignment, backend=backend)
    plain = module(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(features, labels), plain)
        low = (features.requires_grad_() * 1.0).bfloat16()
        assert module(low, labels).dtype == torch.float32


@pytest.mark.parametrize("alignment", ["global", "class", "anchored", "anchored-lengths"])
def test_torch_func(alignment):
    features, centers, _ = inputs()
    module = definitions.module(centers, alignment=alignment)
    batch = torch.stack([features[:10], features[10:20]])
    one_by_one = torch.stack([module(z) for z in batch])
    torch.testing.assert_close(torch.func.vmap(module)(batch), one_by_one)
    gradient = torch.func.grad(module)(batch[0])
    torch.testing.assert_close(gradient, value_and_gradient(module, batch[0])[1], rtol=1e-4, atol=1e-7)


def test_torch_func_and_pairs_is_a_clear_error():
    module = sfm_fast.FlowAlignmentLoss(torch.randn(5, 3), alignment="pair")
    with pytest.raises(sfm_fast.InputError, match=r"torch\.func"):
        torch.func.vmap(module)(torch.randn(2, 5, 3))


@pytest.mark.parametrize("kind", [kind for kind in definitions.KINDS if kind != ("pair", "cosine")], ids=str)
@pytest.mark.parametrize("labelled", [False, True])
def test_double_backward_equals_plain_torch(kind, labelled):
    features, centers, labels = inputs()
    if not labelled:
        features, labels = features[:10], None

    def second(backend):
        leaf = features.clone().requires_grad_()
        loss = definitions.loss(leaf, centers, labels, alignment=kind[0], metric=kind[1], backend=backend)
        (gradient,) = torch.autograd.grad(loss * leaf.sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    expected = second("torch")
    assert (second("cpu") - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("alignment", NAMES)
def test_same_bits_on_every_run_and_thread_count(alignment):
    generator = torch.Generator().manual_seed(0)
    centers, features = torch.randn(600, 200, generator=generator), torch.randn(1500, 200, generator=generator)
    labels = torch.cat([torch.arange(600), torch.randint(0, 600, (900,), generator=generator)])
    module = definitions.module(centers, alignment=alignment, backend="cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(lambda z: module(z, labels), features))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("alignment", NAMES)
def test_no_uninitialised_memory_is_read_or_left(alignment):
    features, centers, labels = inputs()
    expected = value_and_gradient(lambda z: definitions.loss(z, centers, labels, alignment=alignment), features)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        loss, gradient = value_and_gradient(
            lambda z: definitions.loss(z, centers, labels, alignment=alignment), features
        )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 40),
    dim=st.integers(2, 70),  # in one dimension the gradient is zero, and what comes out is rounding
    row_step=st.integers(1, 3),
    column_step=st.integers(1, 3),
    offset=st.integers(0, 5),
    extra=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    alignment=st.sampled_from(NAMES),
    transposed=st.booleans(),
)
def test_any_shape_and_stride(classes, dim, row_step, column_step, offset, extra, dtype, alignment, transposed):
    generator = torch.Generator().manual_seed(classes * 100 + dim)
    items = classes + extra
    shape = (dim * column_step, items * row_step) if transposed else (items * row_step, dim * column_step)
    flat = torch.randn(shape[0] * shape[1] + offset, generator=generator).to(dtype)[offset:].view(shape)
    features = flat.T[::row_step, ::column_step] if transposed else flat[::row_step, ::column_step]
    centers = torch.randn(classes, dim, generator=generator)
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (extra,), generator=generator)])

    def run(backend, z):
        return value_and_gradient(
            lambda x: definitions.loss(x, centers, labels, alignment=alignment, backend=backend), z
        )

    (loss, gradient), (plain, plain_gradient) = run("cpu", features), run("torch", features)
    exact, exact_gradient = run("torch", features.double())
    assert (loss - exact).abs() <= 2 * (plain - exact).abs() + 2e-6
    # In one or two dimensions classes may lie arbitrarily close: plain torch's own error tells how hard the case is.
    theirs, ours = (plain_gradient - exact_gradient).abs().max(), (gradient - exact_gradient).abs().max()
    assert ours <= 3 * theirs + (1e-5 + torch.finfo(dtype).eps) * exact_gradient.abs().max().clamp_min(1e-2)


def test_fake_tensors_know_shapes_and_dtypes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        features = torch.empty(21_841, 64, dtype=torch.bfloat16, requires_grad=True)
        for alignment in NAMES:
            module = definitions.module(torch.empty(21_841, 64), alignment=alignment)
            loss = module(features)
            (gradient,) = torch.autograd.grad(loss, features)
            assert (loss.dtype, loss.shape) == (torch.float32, ())
            assert (gradient.dtype, gradient.shape) == (torch.bfloat16, (21_841, 64))


def test_explain_names_every_backend():
    choice = sfm_fast.explain(torch.zeros(3, 4))
    assert choice.backend == "cpu"
    assert set(choice.reasons) == {"torch", "cpu", "triton", "cuda"}
    assert "float64" in sfm_fast.explain(torch.zeros(3, 4, dtype=torch.float64)).reasons["cpu"]
    assert sfm_fast.explain(torch.zeros(3, 4), backend="torch").backend == "torch"
    assert "runs on" in sfm_fast.explain(torch.zeros(3, 4, device="meta")).reasons["cpu"]


BROKEN = """
import shutil, sys, warnings
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
for file in (root / "sfm_fast").glob("_C*.so"):
    file.unlink()
if sys.argv[2] == "broken":
    (root / "sfm_fast" / "_C.abi3.so").write_bytes(b"not a library")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, sfm_fast
    assert sfm_fast.__file__.startswith(str(root)), sfm_fast.__file__
    features = torch.randn(4, 3, requires_grad=True)
    sfm_fast.flow_alignment_loss(features, torch.randn(4, 3), alignment="pair").backward()
    choice = sfm_fast.explain(features)
mine = [str(w.message) for w in caught if "sfm_fast" in str(w.message)]
print(choice)
assert choice.backend == "torch"
assert len(mine) == (sys.argv[2] == "broken"), mine
"""


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_without_the_library_plain_torch_runs(tmp_path, state):
    shutil.copytree(
        ROOT / "sfm_fast", tmp_path / "sfm_fast", ignore=shutil.ignore_patterns("assets", "__pycache__", "kernels")
    )
    shutil.copytree(ROOT / "kernels", tmp_path / "sfm_fast" / "kernels")
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path), state], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert ("can't be loaded" if state == "broken" else "was not built") in done.stdout


@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_older_instruction_sets(isa):
    """Accuracy again, in a process that may use less of the machine."""
    environment = {**os.environ, "SFM_FAST_CPU_ISA": isa}
    selection = "not triton and (blocks_of_any_size or edge_words or same_numbers or any_shape_and_box or "
    selection += "(kernels_are_as_accurate and (odd or wide or labelled or common or zoomed or reduced or tall)))"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/ops/test_flow_alignment.py",
            "tests/ops/test_pair_alignment.py",
            "tests/ops/test_render.py",
            "tests/ops/test_augment.py",
            "tests/ops/test_render_augment.py",
            "tests/ops/test_image_ops.py",
            "tests/ops/test_philox.py",
            "-k",
            selection,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


def test_library_problems_are_known():
    assert "cpu" not in library.problems, library.problems
    assert "triton" not in library.problems
