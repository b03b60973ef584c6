// Numbers that every backend must agree on; tests/test_ops.py compares them with the Python package's.
#pragma once

namespace sfm {
// `kind` of flow_alignment; sfm_fast/reference/flow_alignment.py says what each computes.
enum Kind : int { GLOBAL_COSINE = 0, CLASS_COSINE = 1, FLOW_MSE = 2, PAIR_MSE = 3, DECOUPLED_MSE = 4, ANCHORED_COSINE = 5 };

// The other losses are of differences between classes, so they need two.
constexpr int fewest_classes(int kind, double weight) {
  return kind == ANCHORED_COSINE || (kind == DECOUPLED_MSE && weight == 1) ? 1 : 2;
}

constexpr int MOST_PIXELS = 1 << 14;  // the largest side of an image, a canvas or a view
constexpr int MOST_LEVELS = 16;       // of a pyramid
constexpr int MOST_CHANNELS = 16;     // of a view

// Size of the canvases that render_augment fills at once on a GPU: they fit in the L2 cache. Tests make it smaller.
#ifndef SFM_CANVAS_BYTES
#define SFM_CANVAS_BYTES (26 << 20)
#endif
constexpr long long CANVAS_BYTES = SFM_CANVAS_BYTES;
}  // namespace sfm
