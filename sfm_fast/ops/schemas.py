"""The operations' signatures, the same text as in ``csrc/ops.cpp`` (a test compares the two).

``order`` (N,) and ``offsets`` (C+1,), int64, group labelled features by class: class c has the items
``order[offsets[c] : offsets[c + 1]]``. Both are None if the features are the C class means.
"""

from __future__ import annotations

SCHEMAS = {
    "class_means": "(Tensor features, Tensor? order, Tensor? offsets, Tensor shift) -> Tensor",
    "class_means_backward": (
        "(Tensor grad, Tensor? order, Tensor? offsets, SymInt num_items, ScalarType dtype) -> Tensor"
    ),
    "flow_alignment": (
        "(Tensor features, Tensor? order, Tensor? offsets, Tensor centers, Tensor shift, Tensor? anchor, int kind, "
        "float eps, float weight, float delta) -> (Tensor, Tensor, Tensor)"
    ),
    "flow_alignment_backward": (
        "(Tensor grad_output, Tensor features, Tensor? order, Tensor? offsets, Tensor centers, Tensor shift, "
        "Tensor rows, Tensor columns) -> Tensor"
    ),
    "pair_alignment": (
        "(Tensor a, Tensor b, Tensor? groups, SymInt row_start, SymInt row_stop, float eps, bool need_gradient, "
        "bool high) -> (Tensor, Tensor)"
    ),
    "render": "(Tensor[] levels, Tensor? rows, SymInt size, ScalarType dtype) -> Tensor",
    "render_backward": "(Tensor grad, Tensor images, SymInt[] sides) -> Tensor",
    "augment": (
        "(Tensor images, Tensor boxes, Tensor noise_items, SymInt size, Tensor mean, Tensor std, float noise_mean, "
        "float noise_std, int seed, SymInt step, int stream, ScalarType dtype) -> Tensor"
    ),
    "augment_backward": (
        "(Tensor grad, Tensor boxes, Tensor std, SymInt images, SymInt channels, SymInt height, SymInt width, "
        "ScalarType dtype) -> Tensor"
    ),
    "render_augment": (
        "(Tensor[] levels, Tensor? rows, SymInt canvas, Tensor boxes, Tensor noise_items, SymInt size, Tensor mean, "
        "Tensor std, float noise_mean, float noise_std, int seed, SymInt step, int stream, ScalarType dtype) -> Tensor"
    ),
    "render_augment_backward": (
        "(Tensor grad, Tensor[] levels, Tensor? rows, SymInt canvas, Tensor boxes, Tensor std) -> Tensor"
    ),
}
