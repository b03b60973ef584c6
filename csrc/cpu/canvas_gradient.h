// From the gradients of canvas rows to those of all pyramid levels: the transpose of canvas.h, in gather form.
#pragma once

#include "canvas.h"

namespace sfm_fast {

// Takes gradients of canvas rows, top to bottom, and writes those of the levels: the transpose of RowRenderer.
template <int W>
struct RowCollector {
  const Pyramid* pyramid;
  int64_t width;
  std::vector<float> sums;               // levels x 2 rows x channels x width: the sums of rows i, i + 1 so far
  std::vector<int> current, pending;     // level row of the first of the two, and how many of them are not yet written
  std::vector<int> written;              // rows of the level that are complete
  std::vector<int64_t> offset;           // of each level in an image's gradient
  float* target = nullptr;

  SFM_INLINE explicit RowCollector(const Pyramid& all)
      : pyramid(&all),
        width(padded(all.size)),
        sums(2 * all.maps.size() * all.channels * width),
        current(all.maps.size()),
        pending(all.maps.size()),
        written(all.maps.size()) {
    int64_t total = 0;
    for (const LinearMap& map : all.maps) {
      offset.push_back(total);
      total += int64_t(all.channels) * map.inputs * map.inputs;
    }
  }

  SFM_INLINE float* place(size_t k, int which, int c) {
    return sums.data() + ((2 * k + which) * pyramid->channels + c) * width;
  }

  SFM_INLINE void start(float* gradient) {
    target = gradient;
    std::fill(pending.begin(), pending.end(), 0);
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(written.begin(), written.end(), 0);
  }

  SFM_INLINE void zero_rows(size_t k, int end) {
    const int side = pyramid->maps[k].inputs;
    for (int c = 0; c < pyramid->channels && written[k] < end; ++c) {
      float* rows = target + offset[k] + int64_t(c) * side * side;
      std::fill(rows + int64_t(written[k]) * side, rows + int64_t(end) * side, 0.0f);
    }
    written[k] = std::max(written[k], end);
  }

  // Level row `current` of level k is complete.
  SFM_INLINE void flush(size_t k) {
    const LinearMap& map = pyramid->maps[k];
    const int side = map.inputs, row = current[k];
    zero_rows(k, row);
    for (int c = 0; c < pyramid->channels; ++c)
      apply_transposed<W>(map, place(k, 0, c), target + offset[k] + (int64_t(c) * side + row) * side, 0, side);
    written[k] = row + 1;
    std::copy_n(place(k, 1, 0), pyramid->channels * width, place(k, 0, 0));
    std::fill_n(place(k, 1, 0), pyramid->channels * width, 0.0f);
    pending[k] = row + 1 < side ? pending[k] - 1 : 0;
    current[k] = row + 1;
  }

  // gradient[c * width + x] with respect to the sums before the colour mix, zero outside the columns of the picture.
  SFM_INLINE void row(int p, const float* gradient) {
    const int channels = pyramid->channels, size = pyramid->size;
    for (size_t k = 0; k < pyramid->maps.size(); ++k) {
      const LinearMap& map = pyramid->maps[k];
      if (map.identity) {
        zero_rows(k, p);
        for (int c = 0; c < channels; ++c)
          std::memcpy(
              target + offset[k] + (int64_t(c) * size + p) * size, gradient + c * width, size * sizeof(float));
        written[k] = p + 1;
        continue;
      }
      const int first = map.index[p];
      while (pending[k] && current[k] < first) flush(k);
      current[k] = first, pending[k] = 2;
      const float w0 = map.w0[p], w1 = map.w1[p];
      float *above = place(k, 0, 0), *below = place(k, 1, 0);
      for (int64_t x = 0; x < channels * width; x += W) {
        const auto value = load<W>(gradient + x);
        store<W>(above + x, load<W>(above + x) + w0 * value);
        store<W>(below + x, load<W>(below + x) + w1 * value);
      }
    }
  }

  SFM_INLINE void finish() {
    for (size_t k = 0; k < pyramid->maps.size(); ++k) {
      while (pending[k]) flush(k);
      zero_rows(k, pyramid->maps[k].inputs);
    }
  }
};

// In place: dL/d(picture row) -> dL/d(sums before the colour mix), for x in [begin, end) in whole vectors.
// `picture` has `width` floats a channel and begins at PAD.
template <int W>
SFM_INLINE void through_sigmoid_and_color(
    const float* picture, float* gradient, int channels, int64_t width, int begin, int end) {
  using vec = typename Simd<W>::vec;
  for (int x = begin / W * W; x < end; x += W) {
    vec g[3];
    for (int c = 0; c < channels; ++c) {
      const vec y = load<W>(picture + c * width + PAD + x);
      g[c] = load<W>(gradient + c * width + x) * (2.0f * y * (1.0f - y));
    }
    for (int c = 0; c < channels; ++c) {
      const vec mixed = channels == 3 ? COLOR[0][c] * g[0] + COLOR[1][c] * g[1] + COLOR[2][c] * g[2] : g[c];
      store<W>(gradient + c * width + x, mixed);
    }
  }
}

}  // namespace sfm_fast
