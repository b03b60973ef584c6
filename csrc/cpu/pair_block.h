// One block of the matrix of class pairs: the weights u and w from products of differences, then their products with the rows.
#pragma once

#include "rows.h"

#include <utility>

namespace sfm_fast {

constexpr int64_t kBlock = 192;  // rows and columns of a block: three float32 tiles of 144 KiB stay in a 1 MiB L2 cache
constexpr int64_t kDepth = 128;  // features at a time: a packed panel of 2 x 32 columns is 32 KiB, two thirds of an L1 cache

struct PairProblem {
  const float* a;
  const float* b;
  const int64_t* groups;
  int64_t classes;
  int64_t dim;
  float eps;
};

// Scratch memory of one thread: three tiles (stride, stride), a packed panel, sums over rows and columns. Not initialised.
struct BlockScratch {
  BlockScratch(const Tensor& like, int64_t block)
      : stride((block + 31) / 32 * 32),
        tile((stride + 16) * stride),  // 16 rows more: a register tile may read rows beyond the last and discard them
        // A tensor, so that torch's memory statistics include it.
        memory(torch::stable::new_empty(like, {3 * tile + 64 * std::max(kDepth, stride) + 6 * stride})) {
    float* next = memory.mutable_data_ptr<float>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    u = take(tile), w = take(tile), g = take(tile);
    packed = take(64 * std::max(kDepth, stride));
    row_u = take(stride), row_w = take(stride), column_u = take(stride), column_w = take(stride);
    lengths = take(2 * stride);
  }
  int64_t stride, tile;
  Tensor memory;
  float *u, *w, *g, *packed, *row_u, *row_w, *column_u, *column_w, *lengths;
};

// Register tiles: `kRows` x `kVectors` accumulators of each kind must fit the instruction set's 32 (W = 16) or 16 registers.
template <int W>
struct Tiling {
  static constexpr int kPairRows = 4, kPairVectors = W == 16 ? 2 : 1;
  static constexpr int kProductRows = W == 16 ? 12 : 6, kProductVectors = 2;
};

// packed[(k * 2 + matrix) * columns + j] = matrix[j0 + j][k0 + k], zero beyond j1: 4 x 4 at a time through registers.
template <int Columns>
SFM_INLINE void pack_transposed(const float* source, int64_t stride, int64_t count, int64_t depth, int matrix, float* packed) {
  typedef float quad __attribute__((vector_size(16)));
  typedef float loose __attribute__((vector_size(16), aligned(4), may_alias));
  for (int64_t j = 0; j < Columns; j += 4) {
    int64_t k = 0;
    float* out = packed + matrix * Columns + j;
    if (j + 4 <= count)
      for (; k + 4 <= depth; k += 4) {
        const float* p = source + j * stride + k;
        const quad r0 = *reinterpret_cast<const loose*>(p), r1 = *reinterpret_cast<const loose*>(p + stride);
        const quad r2 = *reinterpret_cast<const loose*>(p + 2 * stride), r3 = *reinterpret_cast<const loose*>(p + 3 * stride);
        const quad low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
        const quad low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5), high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
        *reinterpret_cast<loose*>(out + k * 2 * Columns) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
        *reinterpret_cast<loose*>(out + (k + 1) * 2 * Columns) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
        *reinterpret_cast<loose*>(out + (k + 2) * 2 * Columns) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
        *reinterpret_cast<loose*>(out + (k + 3) * 2 * Columns) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
      }
    for (; k < depth; ++k)
      for (int64_t r = 0; r < 4; ++r) out[k * 2 * Columns + r] = j + r < count ? source[(j + r) * stride + k] : 0.0f;
  }
}

// Adds, over `depth` features, f.g, f.f and g.g of Rows x (Vectors * W) pairs to three tiles (or sets them when `first`).
template <int W, int Rows, int Vectors>
SFM_INLINE void add_differences(
    const float* const* a_rows, const float* const* b_rows, const float* packed, int64_t depth, bool first, float* fg_tile,
    float* ff_tile, float* gg_tile, int64_t stride) {
  using vec = typename Simd<W>::vec;
  constexpr int kColumns = Vectors * W;
  vec fg[Rows][Vectors] = {}, ff[Rows][Vectors] = {}, gg[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const float* line = packed + k * 2 * kColumns;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const vec f = load<W>(line + v * W) - a_rows[r][k];
        const vec g = load<W>(line + kColumns + v * W) - b_rows[r][k];
        fg[r][v] += f * g;
        ff[r][v] += f * f;
        gg[r][v] += g * g;
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      const int64_t at = r * stride + v * W;
      store<W>(fg_tile + at, first ? fg[r][v] : fg[r][v] + load<W>(fg_tile + at));
      store<W>(ff_tile + at, first ? ff[r][v] : ff[r][v] + load<W>(ff_tile + at));
      store<W>(gg_tile + at, first ? gg[r][v] : gg[r][v] + load<W>(gg_tile + at));
    }
}

// In: f.g, f.f, g.g of row i against columns [j0, j1), in u, w, g. Out: u, -w, row and column sums; returns the sum of cosines.
template <int W>
SFM_INLINE double finish_weights(
    const PairProblem& problem, BlockScratch& s, int64_t i, int64_t local, int64_t j0, int64_t count, int64_t padded) {
  float *u = s.u + local * s.stride, *w = s.w + local * s.stride, *gg = s.g + local * s.stride;
  float *f_length = s.lengths, *g_length = f_length + s.stride;
  const float eps = problem.eps;
  for (int64_t j = 0; j < padded; ++j) {
    f_length[j] = std::sqrt(w[j]);
    g_length[j] = std::sqrt(gg[j]);
  }
  for (int64_t j = 0; j < padded; ++j) {
    const bool dropped = (f_length[j] < eps) | (g_length[j] < eps);
    const float inverse = dropped ? 0.0f : 1.0f / (f_length[j] * g_length[j]);
    // 0 for dropped pairs, but NaN for NaN, infinity and squares that overflow float32.
    const float cosine = u[j] * inverse + (f_length[j] + g_length[j]) * 0.0f;
    const float square = dropped ? 1.0f : gg[j];
    u[j] = inverse;
    w[j] = -cosine / square;
    gg[j] = cosine;
  }
  const auto leave_out = [&](int64_t j) { u[j] = w[j] = gg[j] = 0.0f; };
  for (int64_t j = count; j < padded; ++j) leave_out(j);
  if (i >= j0 && i < j0 + count) leave_out(i - j0);
  if (problem.groups)
    for (int64_t j = 0; j < count; ++j)
      if (problem.groups[i] == problem.groups[j0 + j]) leave_out(j);
  typename Simd<W>::vec u_sum = {}, w_sum = {}, cosine_sum = {};
  float *column_u = s.column_u, *column_w = s.column_w;
  for (int64_t j = 0; j < padded; j += W) {
    const auto uj = load<W>(u + j), wj = load<W>(w + j);
    u_sum += uj;
    w_sum += wj;
    cosine_sum += load<W>(gg + j);
    store<W>(column_u + j, load<W>(column_u + j) + uj);
    store<W>(column_w + j, load<W>(column_w + j) + wj);
  }
  s.row_u[local] = sum<W>(u_sum);
  s.row_w[local] = sum<W>(w_sum);
  return sum<W>(cosine_sum);
}

template <int W>
SFM_INLINE void block_weights_kernel(
    const PairProblem& problem, BlockScratch& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double& cosine) {
  constexpr int kRows = Tiling<W>::kPairRows, kVectors = Tiling<W>::kPairVectors, kColumns = kVectors * W;
  const int64_t dim = problem.dim, count = j1 - j0, padded = (count + kColumns - 1) / kColumns * kColumns;
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, dim - k0);
    for (int64_t j = 0; j < padded; j += kColumns) {
      float* packed = s.packed;
      const int64_t from = (j0 + j) * dim + k0;
      pack_transposed<kColumns>(problem.a + from, dim, count - j, depth, 0, packed);
      pack_transposed<kColumns>(problem.b + from, dim, count - j, depth, 1, packed);
      for (int64_t i = i0; i < i1; i += kRows) {
        const float *a_rows[kRows], *b_rows[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = std::min(i + r, i1 - 1) * dim + k0;
          a_rows[r] = problem.a + row;
          b_rows[r] = problem.b + row;
        }
        const int64_t at = (i - i0) * s.stride + j;
        add_differences<W, kRows, kVectors>(a_rows, b_rows, packed, depth, k0 == 0, s.u + at, s.w + at, s.g + at, s.stride);
      }
    }
  }
  std::fill_n(s.column_u, s.stride, 0.0f);
  std::fill_n(s.column_w, s.stride, 0.0f);
  cosine = 0;
  for (int64_t i = i0; i < i1; ++i) cosine += finish_weights<W>(problem, s, i, i - i0, j0, count, padded);
}
SFM_DISPATCH(block_weights,
             (const PairProblem& problem, BlockScratch& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double& cosine),
             (problem, s, i0, i1, j0, j1, cosine))

// out[r][0..columns) += sum over k of weights[r * row_step + k * depth_step] * panel[k]: a small matrix product.
template <int W, int Rows, int Vectors>
SFM_INLINE void add_product(
    const float* weights, int64_t row_step, int64_t depth_step, const float* panel, int64_t depth, int64_t valid, float* out,
    int64_t stride, int64_t columns) {
  using vec = typename Simd<W>::vec;
  vec total[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec line[Vectors];
    for (int v = 0; v < Vectors; ++v) line[v] = load<W>(panel + k * Vectors * W + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float weight = weights[r * row_step + k * depth_step];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) total[r][v] += line[v] * weight;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (r >= valid) break;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* p = out + r * stride + v * W;
      const int64_t left = columns - v * W;
      if (left >= W)
        store<W>(p, load<W>(p) + total[r][v]);
      else if (left > 0)
        store_partial<W>(p, load_partial<W>(p, left) + total[r][v], left);
    }
  }
}

// out (rows of block k) += u @ a - w @ b over the rows i of the other block; `transposed` reads the transposed tile.
template <int W>
SFM_INLINE void block_gradient_kernel(
    const PairProblem& problem, BlockScratch& s, bool transposed, int64_t k0, int64_t k1, int64_t i0, int64_t i1, float* out) {
  constexpr int kRows = Tiling<W>::kProductRows, kVectors = Tiling<W>::kProductVectors, kColumns = kVectors * W;
  const int64_t dim = problem.dim, depth = i1 - i0;
  const int64_t row_step = transposed ? 1 : s.stride, depth_step = transposed ? s.stride : 1;
  for (int64_t d = 0; d < dim; d += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, dim - d);
    for (int matrix = 0; matrix < 2; ++matrix) {
      float* panel = s.packed;
      const float* source = (matrix ? problem.b : problem.a) + i0 * dim + d;
      for (int64_t i = 0; i < depth; ++i) {
        float* line = panel + i * kColumns;
        std::memcpy(line, source + i * dim, columns * sizeof(float));
        for (int64_t k = columns; k < kColumns; ++k) line[k] = 0.0f;
      }
      const float* tile = matrix ? s.w : s.u;
      for (int64_t k = 0; k < k1 - k0; k += kRows) {
        add_product<W, kRows, kVectors>(tile + k * row_step, row_step, depth_step, panel, depth, k1 - k0 - k, out + k * dim + d, dim, columns);
      }
    }
  }
}
SFM_DISPATCH(block_gradient,
             (const PairProblem& problem, BlockScratch& s, bool transposed, int64_t k0, int64_t k1, int64_t i0, int64_t i1, float* out),
             (problem, s, transposed, k0, k1, i0, i1, out))

// gradient_k = 2 (a_k sum u - b_k sum w - (u @ a - w @ b)); w_sum is already negative.
template <int W>
SFM_INLINE void finish_row_kernel(const float* a, const float* b, float u_sum, float w_sum, float* out, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) out[d] = 2.0f * (a[d] * u_sum + b[d] * w_sum - out[d]);
}
SFM_DISPATCH(finish_row, (const float* a, const float* b, float u_sum, float w_sum, float* out, int64_t dim), (a, b, u_sum, w_sum, out, dim))

}  // namespace sfm_fast
