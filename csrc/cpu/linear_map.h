// Linear maps along one axis with two neighbouring taps per output: bilinear upsampling of a level, the crop of a view.
//
// All resampling here is (rows map) x (columns map), so rendering and augmenting need only `apply` on rows and weighted
// sums of rows; the gradient is the transposed map, in gather form and so in a fixed order.
#pragma once

#include "simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace sfm_fast {

// Floats per vector of the chosen instruction set.
inline int lanes() { return isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 4; }

constexpr int MOST_LANES = 16;

// Scratch rows start after `PAD` floats, so that tap -1 and whole vectors past the end may be read.
constexpr int PAD = 16;
inline int64_t padded(int64_t count) { return (count + MOST_LANES - 1) / MOST_LANES * MOST_LANES + 4 * PAD; }

// out[j] = w0[j] in[index[j]] + w1[j] in[index[j] + 1], index in -2..inputs; a tap outside 0..inputs-1 has weight 0.
struct LinearMap {
  int inputs = 0, outputs = 0;
  bool identity = false;
  std::vector<int32_t> index;
  std::vector<float> w0, w1;
  // For `apply`: the first tap of each vector of outputs and the others relative to it.
  bool shuffles = true;
  std::vector<int32_t> base, relative;
  // The transposed map: input i sums taps[offset[i] + t] * out[start[i] + t], t < offset[i + 1] - offset[i].
  std::vector<int32_t> start, offset;
  std::vector<float> taps;
  int first = 0, last = -1;  // inputs with any tap

  void finish(bool need_adjoint) {
    for (int j = 0; j < outputs; ++j) {
      if (w0[j] == 0.0f && w1[j] == 0.0f) continue;
      const int low = std::max(index[j], 0), high = std::min(index[j] + 1, inputs - 1);
      if (last < first) first = low, last = high;
      first = std::min(first, low), last = std::max(last, high);
    }
    if (need_adjoint) transpose();
    const int width = lanes();
    for (int j = 0; j < outputs; j += width) {
      const int stop = std::min(j + width, outputs);
      const auto [low, high] = std::minmax_element(index.begin() + j, index.begin() + stop);
      base.push_back(*low);
      if (*high - *low >= 2 * width) shuffles = false;
      for (int k = j; k < j + width; ++k) relative.push_back(k < stop ? index[k] - *low : 0);
    }
    w0.resize(padded(outputs)), w1.resize(padded(outputs));
  }

 private:
  // Outputs that read the same input are neighbours, since every map here is monotonic.
  void transpose() {
    std::vector<int32_t> end(inputs, 0);
    start.assign(inputs, outputs);
    const auto each = [&](const auto& visit) {
      for (int j = 0; j < outputs; ++j) {
        if (w0[j] != 0.0f) visit(index[j], j, w0[j]);
        if (w1[j] != 0.0f) visit(index[j] + 1, j, w1[j]);
      }
    };
    each([&](int i, int j, float) { start[i] = std::min(start[i], j), end[i] = std::max(end[i], j + 1); });
    offset.assign(inputs + 1, 0);
    for (int i = 0; i < inputs; ++i) offset[i + 1] = offset[i] + std::max(end[i] - start[i], 0);
    taps.assign(offset[inputs], 0.0f);
    each([&](int i, int j, float weight) { taps[offset[i] + j - start[i]] = weight; });
  }
};

// Bilinear upsampling `side` -> `size`, align_corners=False, in integers, so that every backend has the same weights.
inline LinearMap upsampling(int side, int size, bool need_adjoint) {
  LinearMap map;
  map.inputs = side, map.outputs = size, map.identity = side == size;
  map.index.resize(size), map.w0.resize(size), map.w1.resize(size);
  for (int p = 0; p < size; ++p) {
    const int64_t n = std::max<int64_t>((2 * int64_t(p) + 1) * side - size, 0), i = n / (2 * int64_t(size));
    const float weight = static_cast<float>(n - i * 2 * size) / static_cast<float>(2 * int64_t(size));
    map.index[p] = static_cast<int32_t>(i);
    map.w1[p] = i + 1 < side ? weight : 0.0f;
    map.w0[p] = 1.0f - map.w1[p];
  }
  map.finish(need_adjoint);
  return map;
}

// Sampling at coordinates fma(j, step, origin), bilinear, zeros outside: one axis of a view's box.
inline LinearMap sampling(float origin, float step, int inputs, int outputs, bool need_adjoint) {
  LinearMap map;
  map.inputs = inputs, map.outputs = outputs;
  map.index.resize(outputs), map.w0.resize(outputs), map.w1.resize(outputs);
  for (int j = 0; j < outputs; ++j) {
    const float x = std::fma(static_cast<float>(j), step, origin);
    if (!(x > -1.0f && x < static_cast<float>(inputs))) {  // NaN too
      map.index[j] = x > 0.0f ? inputs : -2;  // both taps read the zeros around a row
      continue;
    }
    const float low = std::floor(x);
    map.index[j] = static_cast<int32_t>(low);
    if (low >= 0) map.w0[j] = 1.0f - (x - low);
    if (low + 1 < static_cast<float>(inputs)) map.w1[j] = x - low;
  }
  map.finish(need_adjoint);
  return map;
}

// out[begin .. end) of the map, in whole vectors. `in` is padded as described at PAD, with zeros at -2, -1, inputs, inputs + 1,
// since NaN times a weight of 0 is NaN.
template <int W>
SFM_INLINE void apply(const LinearMap& map, const float* in, float* out, int begin, int end) {
  using ints = typename Simd<W>::ints;
  using loose_ints __attribute__((aligned(4), may_alias)) = ints;
  if (!map.shuffles) {
    for (int j = begin; j < end; ++j) {
      const float* tap = in + map.index[j];
      out[j] = map.w0[j] * tap[0] + map.w1[j] * tap[1];
    }
    return;
  }
  for (int j = begin / W * W; j < end; j += W) {
    const float* tap = in + map.base[j / W];
    const ints at = *reinterpret_cast<const loose_ints*>(map.relative.data() + j);
    const auto low = __builtin_shuffle(load<W>(tap), load<W>(tap + W), at);
    const auto high = __builtin_shuffle(load<W>(tap + 1), load<W>(tap + 1 + W), at);
    store<W>(out + j, load<W>(map.w0.data() + j) * low + load<W>(map.w1.data() + j) * high);
  }
}

// in[i] = sum over the outputs j that read input i of weight * out[j], for i in [begin, end).
template <int W>
SFM_INLINE void apply_transposed(const LinearMap& map, const float* out, float* in, int begin, int end) {
  for (int i = begin; i < end; ++i) {
    const float *weight = map.taps.data() + map.offset[i], *value = out + map.start[i];
    const int count = map.offset[i + 1] - map.offset[i];
    float total = 0;
    int t = 0;
    if (count >= 2 * W) {
      auto partial = load<W>(weight) * load<W>(value);
      for (t = W; t + W <= count; t += W) partial += load<W>(weight + t) * load<W>(value + t);
      total = sum<W>(partial);
    }
    for (; t < count; ++t) total += weight[t] * value[t];
    in[i] = total;
  }
}

}  // namespace sfm_fast
