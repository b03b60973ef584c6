// The backward of the rendering: the adjoint of every level's enlargement from one read of the gradient and the images.
//
// A block takes a strip of 16 rows of one image (fewer for large canvases), and a thread one column of it with its
// gradients in registers. For each level, sums down the columns, weighted as the texel rows were read, go to shared
// memory; then each row is summed, with as many lanes per texel as its footprint is wide. Neighbouring strips share
// texel rows: their partial sums go to the workspace, and a second kernel adds them from the top strip to the bottom
// one. There are no floating-point atomics.
#pragma once

#include "render_plan.cuh"

namespace sfm {
namespace {

template <int C>
using StripPixels = float[STRIP_PIXELS][C];  // pixel n of a thread is in row n % ROWS of its column n / ROWS

// Gradient before the sigmoid, of the pixels of this thread; 0 outside the image.
template <int C, int COLUMNS, typename T>
__device__ __forceinline__ void read_strip(const T* __restrict__ grad, const T* __restrict__ images, int row, int size,
                                           StripPixels<C>& g) {
  constexpr int ROWS = STRIP_PIXELS / COLUMNS, PART = sizeof(T) == 4 ? STRIP_PIXELS / 2 : STRIP_PIXELS / 4;
#pragma unroll 1  // a loop over parts: the loads of all pixels at once would need more registers than there are
  for (int start = 0; start < STRIP_PIXELS; start += PART) {
#pragma unroll
    for (int n = 0; n < STRIP_PIXELS - PART; ++n) {
#pragma unroll
      for (int c = 0; c < C; ++c) g[n][c] = g[n + PART][c];
    }
#pragma unroll
    for (int n = 0; n < PART; ++n) {
      const int p = row + (start + n) % ROWS, column = threadIdx.x + (start + n) / ROWS * blockDim.x;
      const bool inside = p < size && column < size;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int at = (c * size + p) * size + column;
        const float upstream = inside ? to_float(grad[at]) : 0.f, y = inside ? to_float(images[at]) : 0.f;
        g[STRIP_PIXELS - PART + n][c] = upstream * (2.f * y * (1.f - y));
      }
    }
  }
}

// Sums down the columns of this thread, one row of `to` per texel row, channels `span` rows apart. Row r of the strip
// adds to one texel row and, with weight |taps[r]|, to the next one; the sign tells if its texel row is one after that
// of row r - 1.
template <int C, int COLUMNS>
__device__ __forceinline__ void sum_columns(const StripPixels<C>& g, const float* taps, const TexelRows& rows, int size,
                                            int span, int pitch, float* to) {
  constexpr int ROWS = STRIP_PIXELS / COLUMNS;
#pragma unroll
  for (int u = 0; u < COLUMNS; ++u) {
    const int column = threadIdx.x + u * blockDim.x;
    if (column >= size) continue;
    float* at = to + skewed(column);
    float above[C] = {}, below[C] = {};
    int index = rows.first;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float tap = taps[r], lower = fabsf(tap);
      if (__float_as_uint(tap) >> 31) {
#pragma unroll
        for (int c = 0; c < C; ++c) at[c * span * pitch] = above[c], above[c] = below[c], below[c] = 0.f;
        at += pitch, ++index;
      }
#pragma unroll
      for (int c = 0; c < C; ++c)
        above[c] += (1.f - lower) * g[u * ROWS + r][c], below[c] += lower * g[u * ROWS + r][c];
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (index < rows.last)
        at[c * span * pitch] = above[c], at[(c * span + 1) * pitch] = below[c];
      else
        at[c * span * pitch] = above[c] + below[c];  // past the last texel, both taps are that texel
    }
  }
}

// Sums of the rows of `from` over the footprint of each texel, to the gradient or, if strips share the row, to `edges`.
template <int C>
__device__ __forceinline__ void sum_rows(const StripPlan& plan, int k, const TexelRows& rows, const float* from,
                                         float* __restrict__ gradient, float* __restrict__ edges) {
  const int side = plan.side[k], size = plan.size, lanes = plan.lanes[k], pitch = plan.pitch(), threads = blockDim.x;
  const int turned = (threadIdx.x + 64 * k) % threads;  // a coarse level uses a warp or two, different ones each time
  const int slots = threads / lanes, slot = turned / lanes, lane = turned % lanes;
  const int width = side < slots ? side : slots, parallel = slots / width, row = slot / width;
  const int count = rows.last - rows.first + 1;
  const float scale = 1.f / float(2 * size);
  for (int start = 0; start < side; start += width) {
    const int j = start + slot % width;
    const bool busy = row < parallel && j < side;
    const Footprint footprint(busy ? j : 0, side, size);
    const int begin = footprint.first + lane, stop = busy ? footprint.stop : 0;
    float weight[FOOTPRINT_WEIGHTS];
#pragma unroll
    for (int t = 0; t < FOOTPRINT_WEIGHTS; ++t) weight[t] = texel_weight(begin + t * lanes, j, side, size, scale);
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
#pragma unroll 1  // the pixels of the strip hold half of the registers
      for (int above = 0; above < count; above += parallel) {
        const int i = above + row;
        const float* at = from + (c * plan.span[k] + i) * pitch;
        float sum = 0.f;
        if (i < count) {
#pragma unroll
          for (int t = 0; t < FOOTPRINT_WEIGHTS; ++t) {
            const int column = begin + t * lanes;
            if (column < stop) sum += weight[t] * at[skewed(column)];
          }
#pragma unroll 1
          for (int column = begin + FOOTPRINT_WEIGHTS * lanes; column < stop; column += lanes)
            sum += texel_weight(column, j, side, size, scale) * at[skewed(column)];
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        if (!busy || lane != 0 || i >= count) continue;
        const int edge = plan.strips > 1 ? rows.edge(rows.first + i) : -1;
        if (edge < 0)
          gradient[plan.offset[k] + (c * side + rows.first + i) * side + j] = sum;
        else
          edges[(c * EDGE_ROWS + edge) * plan.texel_rows + plan.first_row[k] + j] = sum;
      }
    }
  }
}

template <typename T, int C, int COLUMNS>
__global__ void __launch_bounds__(STRIP_THREADS, 1)
    render_strips(const T* __restrict__ grad, const T* __restrict__ images, const StripPlan plan,
                  float* __restrict__ gradients, float* __restrict__ partials) {
  constexpr int ROWS = STRIP_PIXELS / COLUMNS;
  SFM_SHARED(memory);
  TexelRows* const bounds = reinterpret_cast<TexelRows*>(memory);
  float* const taps = reinterpret_cast<float*>(bounds + plan.count);
  float* const sums = taps + plan.count * ROWS;
  const int size = plan.size, strip = blockIdx.x % plan.strips, row = strip * ROWS, pitch = plan.pitch();
  const int64_t image = blockIdx.x / plan.strips;
  float* const gradient = gradients + image * plan.texels;
  float* const edges = partials + int64_t(blockIdx.x) * plan.edge_values();

  StripPixels<C> g = {};
  for (int t = threadIdx.x; t < plan.count * ROWS; t += blockDim.x) {
    const int p = row + t % ROWS, side = plan.side[t / ROWS];
    const Walk walk(p < size ? p : size - 1, side, size), before(p > 0 && p < size ? p - 1 : p, side, size);
    const bool moves = t % ROWS > 0 && p < size && walk.index() != before.index();
    taps[t] = moves ? -walk.weight() : walk.weight();
    if (t % ROWS == 0) bounds[t / ROWS] = TexelRows(row, ROWS, side, size);
  }
  const int64_t skip = image * C * size * size;
  read_strip<C, COLUMNS>(grad + skip, images + skip, row, size, g);
  if constexpr (C == 3) {
#pragma unroll
    for (int n = 0; n < STRIP_PIXELS; ++n) {
      const float value[C] = {g[n][0], g[n][1], g[n][2]};
#pragma unroll
      for (int c = 0; c < C; ++c) g[n][c] = color(0, c) * value[0] + color(1, c) * value[1] + color(2, c) * value[2];
    }
  }
  for (int k = 0; k < plan.count; ++k) {
    if (plan.side[k] != size) continue;
#pragma unroll
    for (int n = 0; n < STRIP_PIXELS; ++n) {
      const int p = row + n % ROWS, column = threadIdx.x + n / ROWS * blockDim.x;
      if (p >= size || column >= size) continue;
#pragma unroll
      for (int c = 0; c < C; ++c) gradient[plan.offset[k] + (c * size + p) * size + column] = g[n][c];
    }
  }
  for (int start = 0, stop; start < plan.count; start = stop) {
    stop = plan.group_stop[start];
    __syncthreads();  // the taps are ready, and the previous group is done with the sums
    for (int k = start; k < stop; ++k) {
      if (plan.side[k] == size) continue;
      sum_columns<C, COLUMNS>(g, taps + k * ROWS, bounds[k], size, plan.span[k], pitch, sums + plan.sums[k] * pitch);
    }
    __syncthreads();
    for (int k = start; k < stop; ++k) {
      if (plan.side[k] == size) continue;
      sum_rows<C>(plan, k, bounds[k], sums + plan.sums[k] * pitch, gradient, edges);
    }
  }
}

// Texel rows to which several strips contribute: one warp per row of one level, all channels.
__global__ void __launch_bounds__(THREADS, RESIDENT)
    render_edges(const StripPlan plan, int blocks, const float* __restrict__ partials, float* __restrict__ gradients) {
  const int64_t image = blockIdx.x / blocks;
  const int unit = blockIdx.x % blocks * WARPS + threadIdx.x / 32, size = plan.size;
  if (unit >= plan.texel_rows) return;
  int k = plan.count - 1;
  while (plan.side[k] == size || plan.first_row[k] > unit) --k;
  const int side = plan.side[k], i = unit - plan.first_row[k];
  const Footprint footprint(i, side, size);
  const int first = footprint.first / plan.rows, last = (footprint.stop - 1) / plan.rows;
  if (TexelRows(first * plan.rows, plan.rows, side, size).edge(i) < 0) return;
  const float* const edges = partials + image * plan.strips * plan.edge_values() + plan.first_row[k];
  float* const to = gradients + image * plan.texels + plan.offset[k] + int64_t(i) * side;
  for (int item = threadIdx.x % 32; item < plan.channels * side; item += 32) {
    const int c = item / side, j = item % side;
    float sum = 0.f;
    for (int strip = first; strip <= last; ++strip) {
      const int edge = TexelRows(strip * plan.rows, plan.rows, side, size).edge(i);
      sum += edges[int64_t(strip) * plan.edge_values() + (c * EDGE_ROWS + edge) * plan.texel_rows + j];
    }
    to[int64_t(c) * side * side + j] = sum;
  }
}

template <typename T, int C, int COLUMNS>
cudaError_t run_strips(const void* grad, const void* rendered, const StripPlan& plan, int64_t images, float* gradient,
                       float* partials, cudaStream_t stream) {
  const int blocks = int(divide_up(plan.texel_rows, WARPS));
  if (images * plan.strips > MAX_BLOCKS || images * blocks > MAX_BLOCKS) return cudaErrorInvalidValue;
  const T *const from = static_cast<const T*>(grad), *const y = static_cast<const T*>(rendered);
  const auto kernel = render_strips<T, C, COLUMNS>;
  SFM_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
  SFM_LAUNCH(kernel, dim3(unsigned(images * plan.strips)), dim3(unsigned(plan.threads)), size_t(plan.shared), stream,
             from, y, plan, gradient, partials);
  SFM_RETURN_IF_ERROR(cudaGetLastError());
  if (plan.strips == 1 || plan.texel_rows == 0) return cudaSuccess;
  SFM_LAUNCH(render_edges, dim3(unsigned(images * blocks)), dim3(THREADS), 0, stream, plan, blocks, partials, gradient);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sfm
