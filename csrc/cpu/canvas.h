// Shared by `render` and `render_augment`: the canvas rows of a synthetic image from its pyramid levels, one after the other.
//
// A level's row is stretched to the canvas width once and kept while canvas rows lie between it and the next one, so nothing of the
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

  int64_t floats() const {  // per image
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
  for (int i = 0; i < W; ++i) x[i] = x[i] > high[i] ? high[i] : x[i] < low[i] ? low[i] : x[i];  // NaN stays NaN
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
  std::vector<float> source;             // one level row with padding around it
  std::vector<std::array<int, 2>> held;  // level row in each of the two slots, or -1

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
    for (int c = 0; c < channels; ++c) {  // whole vectors may have been written past the picture, where zeros are needed
      for (int x = size; x < (end + W - 1) / W * W; ++x) out[c * width + PAD + x] = 0.0f;
    }
  }
};

}  // namespace sfm_fast
