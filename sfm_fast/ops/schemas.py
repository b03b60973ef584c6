"""The operations' signatures and numbers, the same text as in ``csrc/ops.cpp`` (a test compares the two).

``order`` (N,) and ``offsets`` (C+1,), int64, group labelled features by class: class c owns the items
``order[offsets[c] : offsets[c + 1]]``. Both are None where the features are the C class means already.
"""

from __future__ import annotations

SCHEMAS = {
    "class_means": "(Tensor features, Tensor? order, Tensor? offsets, Tensor shift) -> Tensor",
    "class_means_backward": (
        "(Tensor grad, Tensor? order, Tensor? offsets, SymInt num_items, ScalarType dtype) -> Tensor"
    ),
    "flow_alignment": (
        "(Tensor features, Tensor? order, Tensor? offsets, Tensor centers, Tensor shift, int kind, float eps, "
        "float alpha) -> (Tensor, Tensor, Tensor)"
    ),
    "flow_alignment_backward": (
        "(Tensor grad_output, Tensor features, Tensor? order, Tensor? offsets, Tensor centers, Tensor shift, "
        "Tensor rows, Tensor columns) -> Tensor"
    ),
    "pair_alignment": (
        "(Tensor a, Tensor b, Tensor? groups, SymInt row_start, SymInt row_stop, float eps, bool need_gradient, "
        "bool high) -> (Tensor, Tensor)"
    ),
}
