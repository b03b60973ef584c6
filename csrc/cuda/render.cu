// Images from pyramid levels, and the backward: each reads its inputs once and writes its result once.
//
// Forward: a thread computes 4 columns of 4 rows of all channels, because the colour matrix needs the channels
// together. It adds one level after the other: the finest with 16-byte loads; of every other level a thread needs a few
// texels, which its neighbours also need, so that they come from the L1 cache.
#include "render_gradient.cuh"

namespace sfm {
namespace {

constexpr int RENDER_ROWS = 4;  // per thread

template <int C>
using RenderSums = float[RENDER_ROWS][C][QUAD];

// The level that has the images' size.
template <int C>
__device__ __forceinline__ void add_finest(const float* __restrict__ level, int size, int row, int column, bool wide,
                                            RenderSums<C>& sum) {
#pragma unroll
  for (int r = 0; r < RENDER_ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (row + r >= size) break;
      const float* from = level + (c * size + row + r) * size + column;
      if (wide) {
        float value[QUAD];
        load<QUAD>(from, value);
#pragma unroll
        for (int k = 0; k < QUAD; ++k) sum[r][c][k] += value[k];
      } else {
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
          if (column + k < size) sum[r][c][k] += from[k];
        }
      }
    }
  }
}

// A smaller level. 4 neighbouring columns or rows together read TAPS neighbouring texels. Reading all of them without
// branches, with a weight of 0 for the unused ones, is faster than reading 2 texels for each column or row.
template <int TAPS, int C>
__device__ __forceinline__ void add_level(const float* __restrict__ level, int side, int size, int row, int column,
                                          RenderSums<C>& sum) {
  const auto weights = [&](int p, int& base, float (&weight)[QUAD][TAPS]) {
    Walk walk(p, side, size);
    base = walk.index();
#pragma unroll
    for (int k = 0; k < QUAD; ++k, walk.next()) {
      const int shift = TAPS == 2 ? 0 : walk.index() - base;
      const float second = walk.weight();
#pragma unroll
      for (int t = 0; t < TAPS; ++t) weight[k][t] = t == shift ? 1.f - second : t == shift + 1 ? second : 0.f;
    }
  };
  int left, top;
  float across[QUAD][TAPS], down[RENDER_ROWS][TAPS];
  weights(column, left, across);
  weights(row, top, down);
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < TAPS; ++i) {
      const float* from = level + (c * side + (top + i < side ? top + i : side - 1)) * side;
      float texel[TAPS];
#pragma unroll
      for (int t = 0; t < TAPS; ++t) texel[t] = from[left + t < side ? left + t : side - 1];
#pragma unroll
      for (int k = 0; k < QUAD; ++k) {
        float value = across[k][0] * texel[0];
#pragma unroll
        for (int t = 1; t < TAPS; ++t) value += across[k][t] * texel[t];
#pragma unroll
        for (int r = 0; r < RENDER_ROWS; ++r) sum[r][c][k] += down[r][i] * value;
      }
    }
  }
}

// Whether a level's texel centres are all between quads, never inside one.
__device__ __forceinline__ bool between_quads(int side, int size) { return size % (2 * QUAD * side) == 0; }

// Such a level is bilinear in each quad: four coefficients, of 1, column, row and column * row, counted from the quad's
// first pixel. The coefficients of all such levels are added up before any pixel is computed.
template <int C>
using QuadForm = float[C][4];

template <int C>
__device__ __forceinline__ void add_form(const float* __restrict__ level, int side, int size, int row, int column,
                                         QuadForm<C>& form) {
  const Walk across(column, side, size), down(row, side, size);
  const int left = across.index(), top = down.index();
  // Before the first texel's centre and past the last one's, both taps are that texel, so the slope is 0.
  const int right = across.low < 0 || left + 1 >= side ? 0 : 1, below = down.low < 0 || top + 1 >= side ? 0 : side;
  const float x = across.weight(), y = down.weight(), step = float(side) / float(size);
  const float* from = level + top * side + left;
#pragma unroll
  for (int c = 0; c < C; ++c, from += side * side) {
    const float slope = from[right] - from[0], lower_slope = from[below + right] - from[below];
    const float upper = from[0] + x * slope, fall = from[below] + x * lower_slope - upper;
    const float bend = step * (lower_slope - slope);
    form[c][0] += upper + y * fall;
    form[c][1] += step * slope + y * bend;
    form[c][2] += step * fall;
    form[c][3] += step * bend;
  }
}

// A level of more than a quarter of the size whose texel centres aren't between quads: 2 x 2 texels for every value.
template <int C>
__device__ __forceinline__ void add_fine_level(const float* __restrict__ level, int side, int size, int row, int column,
                                               RenderSums<C>& sum) {
  Walk down(row, side, size);
#pragma unroll 1  // unrolled, the loads of all rows would need registers at once; instead the sums rotate
  for (int r = 0; r < RENDER_ROWS; ++r, down.next()) {
    const int i = down.index() < side ? down.index() : side - 1, below = i + 1 < side ? side : 0;
    const float lower = down.weight();
    Walk across(column, side, size);
#pragma unroll
    for (int k = 0; k < QUAD; ++k, across.next()) {
      const int j = across.index() < side ? across.index() : side - 1, right = j + 1 < side ? 1 : 0;
      const float second = across.weight();
      const float* from = level + i * side + j;
#pragma unroll
      for (int c = 0; c < C; ++c, from += side * side) {
        const float above = (1.f - second) * from[0] + second * from[right], first = sum[0][c][k];
#pragma unroll
        for (int other = 1; other < RENDER_ROWS; ++other) sum[other - 1][c][k] = sum[other][c][k];
        sum[RENDER_ROWS - 1][c][k] =
            first + (1.f - lower) * above + lower * ((1.f - second) * from[below] + second * from[below + right]);
      }
    }
  }
}

template <typename T, int C, bool QUADS>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    render_images(const Levels levels, const int64_t* __restrict__ rows, int size, int tiles, int finest,
                  bool wide_level, bool wide, T* __restrict__ images) {
  const int64_t image = blockIdx.x / tiles, source = rows == nullptr ? image : rows[image];
  const int groups = (size + QUAD - 1) / QUAD, item = int(blockIdx.x % tiles * blockDim.x + threadIdx.x);
  const int row = item / groups * RENDER_ROWS, column = item % groups * QUAD;
  if (row >= size) return;
  RenderSums<C> sum = {};
  if constexpr (QUADS) {  // before the pixels' sums, since both at once need too many registers
    QuadForm<C> form = {};
    for (int k = 0; k < levels.count; ++k) {
      const int side = levels.side[k];
      if (!between_quads(side, size)) continue;
      add_form<C>(levels.data[k] + source * levels.stride[k], side, size, row, column, form);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int r = 0; r < RENDER_ROWS; ++r) {
        const float start = form[c][0] + float(r) * form[c][2], slope = form[c][1] + float(r) * form[c][3];
#pragma unroll
        for (int k = 0; k < QUAD; ++k) sum[r][c][k] = start + float(k) * slope;
      }
    }
  }
  if (finest >= 0) {
    const float* level = levels.data[finest] + source * levels.stride[finest];
    add_finest<C>(level, size, row, column, wide_level, sum);
  }
  for (int k = levels.count - 1; k >= 0; --k) {
    const int side = levels.side[k];
    if (k == finest || (QUADS && between_quads(side, size))) continue;
    const float* level = levels.data[k] + source * levels.stride[k];
    if (!QUADS && between_quads(side, size)) {
      add_level<2, C>(level, side, size, row, column, sum);
    } else if (4 * side <= size) {
      add_level<3, C>(level, side, size, row, column, sum);
    } else {
      add_fine_level<C>(level, side, size, row, column, sum);
    }
  }
#pragma unroll
  for (int r = 0; r < RENDER_ROWS; ++r) {
    if (row + r >= size) break;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float value[QUAD];
#pragma unroll
      for (int k = 0; k < QUAD; ++k) {
        float mixed = sum[r][c][k];
        if constexpr (C == 3) {
          mixed = color(c, 0) * sum[r][0][k] + color(c, 1) * sum[r][1][k] + color(c, 2) * sum[r][2][k];
        }
        value[k] = __fdividef(1.f, 1.f + expf(-2.f * mixed));  // expf gives infinity, 1 / infinity gives 0
      }
      store_quad(images + ((image * C + c) * size + row + r) * size + column, value, wide, size - column);
    }
  }
}

template <typename T, int C, bool QUADS>
cudaError_t render_forward(const Levels& levels, const int64_t* rows, int64_t images, int size, void* out,
                           cudaStream_t stream) {
  const int64_t items = divide_up(size, QUAD) * divide_up(size, RENDER_ROWS);
  const int threads = int(items < THREADS ? round_up(items, 32) : THREADS), tiles = int(divide_up(items, threads));
  if (images * tiles > MAX_BLOCKS) return cudaErrorInvalidValue;
  int finest = levels.count - 1;
  while (finest >= 0 && levels.side[finest] != size) --finest;
  const bool wide_level =
      finest >= 0 && aligned16(levels.data[finest]) && levels.stride[finest] % QUAD == 0 && size % QUAD == 0;
  const bool wide = size % QUAD == 0 && aligned_quad<T>(out);
  T* const to = static_cast<T*>(out);
  const auto kernel = render_images<T, C, QUADS>;
  SFM_LAUNCH(kernel, dim3(unsigned(images * tiles)), dim3(unsigned(threads)), 0, stream, levels, rows, size, tiles,
             finest, wide_level, wide, to);
  return cudaGetLastError();
}

}  // namespace

cudaError_t render(const Levels& levels, const int64_t* rows, int64_t images, int channels, int size, Dtype dtype,
                   void* out, bool quads, cudaStream_t stream) {
  if (images == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = channels == 3 ? (quads ? render_forward<T, 3, true> : render_forward<T, 3, false>)
                                   : (quads ? render_forward<T, 1, true> : render_forward<T, 1, false>);
    return run(levels, rows, images, size, out, stream);
  });
}

size_t render_backward_workspace_bytes(const Sides& sides, int64_t images, int channels, int size) {
  return size_t(StripPlan(sides, channels, size).partials(images) * sizeof(float));
}

cudaError_t render_backward(const void* grad, const void* rendered, Dtype dtype, const Sides& sides, int64_t images,
                            int channels, int size, float* gradient, void* workspace, cudaStream_t stream) {
  if (images == 0) return cudaSuccess;
  const StripPlan plan(sides, channels, size);
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = plan.columns == 1
                         ? (channels == 3 ? run_strips<T, 3, 1> : run_strips<T, 1, 1>)
                         : (channels == 3 ? run_strips<T, 3, WIDE_COLUMNS> : run_strips<T, 1, WIDE_COLUMNS>);
    return run(grad, rendered, plan, images, gradient, static_cast<float*>(workspace), stream);
  });
}

}  // namespace sfm
