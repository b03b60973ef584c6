// A synthetic image as a stream of canvas rows, from its pyramid levels and back: what `render` and `render_augment` share.
//
// A level's row is stretched to the canvas once and kept as long as canvas rows lie between it and the next one, so nothing of the
// size of an image is ever stored.
#pragma once

#include "linear_map.h"
#include "rows.h"

#include <array>

namespace sfm_fast {

// The fixed colour decorrelation, divided by its largest column norm (sfm_fast/reference/render.py).
constexpr float COLOR[3][3] = {
    {0.562828577f, 0.194825277f, 0.043294506f},
    {0.58447583f, 0.0f, -0.108236265f},
    {0.58447583f, -0.194825277f, 0.0649417589f}};

struct Pyramid {
  std::vector<const float*> data;
  std::vector<int64_t> stride;  // floats from image to image
  std::vector<LinearMap> maps;  // level -> canvas, the same for rows and columns
  const int64_t* rows;          // which images, or null for all of them
  int64_t images;
  int channels, size;

  int64_t floats() const {  // of one image
    int64_t total = 0;
    for (const LinearMap& map : maps) total += int64_t(channels) * map.inputs * map.inputs;
    return total;
  }
  const float* level(size_t k, int64_t m) const { return data[k] + (rows ? rows[m] : m) * stride[k]; }
};

template <int W>
SFM_INLINE typename Simd<W>::vec exponential(typename Simd<W>::vec x) {  // Cephes' expf
  using ints = typename Simd<W>::ints;
  using vec = typename Simd<W>::vec;
  const vec low = vec{} - 87.0f, high = vec{} + 88.0f;
  for (int i = 0; i < W; ++i) x[i] = x[i] > high[i] ? high[i] : x[i] < low[i] ? low[i] : x[i];  // nan stays
  const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  const ints bits = (reinterpret_cast<ints>(shifted) - reinterpret_cast<ints>(magic) + 127) << 23;
  return (p * r * r + r + 1.0f) * reinterpret_cast<vec>(bits);
}

// Renders canvas rows of one image, top to bottom.
template <int W>
struct RowRenderer {
  const Pyramid* pyramid;
  int64_t image = 0;
  int64_t width;
  std::vector<float> stretched;          // levels x 2 rows x channels x width
  std::vector<float> source;             // one level row with room around it
  std::vector<std::array<int, 2>> held;  // level row in each of the two places, or -1

  SFM_INLINE explicit RowRenderer(const Pyramid& all)
      : pyramid(&all),
        width(padded(all.size)),
        stretched(2 * all.maps.size() * all.channels * width),
        source(padded(all.size)),
        held(all.maps.size()) {}

  SFM_INLINE void start(int64_t m) {
    image = m;
    for (auto& pair : held) pair = {-1, -1};
  }

  SFM_INLINE float* place(size_t k, int which, int c) {
    return stretched.data() + ((2 * k + which) * pyramid->channels + c) * width;
  }

  SFM_INLINE void stretch(size_t k, int row, int which, int begin, int end) {
    const LinearMap& map = pyramid->maps[k];
    const int side = map.inputs;
    for (int c = 0; c < pyramid->channels; ++c) {
      const float* from = pyramid->level(k, image) + (int64_t(c) * side + row) * side;
      float* room = source.data() + PAD;
      std::memcpy(room, from, side * sizeof(float));
      room[side] = 0.0f;
      apply<W>(map, room, place(k, which, c), begin, end);
    }
    held[k][which] = row;
  }

  // out[c * width + PAD + x] for x in [begin, end) (rounded to whole vectors): canvas row p in 0..1. begin and end stay the same from
  // `start` on.
  SFM_INLINE void row(int p, int begin, int end, float* out) {
    using vec = typename Simd<W>::vec;
    const size_t levels = pyramid->maps.size();
    const int channels = pyramid->channels, size = pyramid->size;
    begin = begin / W * W;
    const float* upper[64];
    const float* lower[64];
    float weight[64];
    size_t smooth = 0;
    const float* finest = nullptr;
    for (size_t k = 0; k < levels; ++k) {
      const LinearMap& map = pyramid->maps[k];
      if (map.identity && !finest) {
        finest = pyramid->level(k, image) + int64_t(p) * size;
        continue;
      }
      const int first = map.index[p], second = std::min(first + 1, map.inputs - 1);
      if (held[k][0] != first && held[k][1] == first) {
        std::swap_ranges(place(k, 0, 0), place(k, 1, 0), place(k, 1, 0));
        std::swap(held[k][0], held[k][1]);
      }
      if (held[k][0] != first) stretch(k, first, 0, begin, end);
      if (held[k][1] != second) stretch(k, second, 1, begin, end);
      upper[smooth] = place(k, 0, 0), lower[smooth] = place(k, 1, 0), weight[smooth++] = map.w1[p];
    }
    for (int x = begin; x < end; x += W) {
      vec sums[3];
      for (int c = 0; c < channels; ++c) {
        vec total{};
        if (finest) {
          const float* from = finest + int64_t(c) * size * size + x;
          total = x + W <= size ? load<W>(from) : load_partial<W>(from, size - x);
        }
        for (size_t k = 0; k < smooth; ++k) {
          const vec top = load<W>(upper[k] + c * width + x);
          total += top + weight[k] * (load<W>(lower[k] + c * width + x) - top);
        }
        sums[c] = total;
      }
      for (int c = 0; c < channels; ++c) {
        const vec mixed =
            channels == 3 ? COLOR[c][0] * sums[0] + COLOR[c][1] * sums[1] + COLOR[c][2] * sums[2] : sums[c];
        store<W>(out + c * width + PAD + x, 1.0f / (1.0f + exponential<W>(-2.0f * mixed)));
      }
    }
    for (int c = 0; c < channels; ++c) {  // whole vectors may have gone past the picture, where zeros must stay
      for (int x = size; x < (end + W - 1) / W * W; ++x) out[c * width + PAD + x] = 0.0f;
    }
  }
};

// Takes gradients of canvas rows, top to bottom, and writes those of the levels: the transpose of RowRenderer.
template <int W>
struct RowCollector {
  const Pyramid* pyramid;
  int64_t width;
  std::vector<float> sums;               // levels x 2 rows x channels x width: what the rows i, i + 1 have got so far
  std::vector<int> current, pending;     // level row of the first of the two, and how many of them wait to be written
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

  // gradient[c * width + x] with respect to the sums before the colour mix, zero outside the columns that count.
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
