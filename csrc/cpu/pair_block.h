// One block of the matrix of class pairs: the weights u and w from products of rows or of differences, then their products with the rows.
#pragma once

#include "rows.h"

#include <utility>

namespace sfm_fast {

constexpr int64_t kBlock = 128;  // rows and columns of a block: its tiles and packed rows, 408 KiB, stay in a 512 KiB L2 cache
constexpr int64_t kDepth = 128;  // features at a time: a packed panel of 3 x 16 columns (AVX2) is 24 KiB, three quarters of an L1 cache
constexpr int64_t kRowStep = kDepth + 16;  // of packed rows: rows 512 bytes apart would share few sets of an L1 cache

// Products give a pair's flows to float32's accuracy if the flows' squared lengths aren't small beside those of the rows, and
// if both flows are about equally long after scaling; the differences are multiplied for other pairs.
constexpr float kClose = 0.125f, kUneven = 64.0f;

struct PairProblem {
  const float* a;
  const float* b;
  const int64_t* groups;
  int64_t classes;
  int64_t dim;
  float eps;
  float scale;            // a power of two: rows of scale * b are about as long as those of a
  const float* lengths;   // (3, classes): squared lengths of the rows of a, scale * b and a + scale * b
};

// Scratch memory of one thread: three tiles (stride, stride), packed panels, sums over rows and columns. Not initialised.
struct BlockScratch {
  BlockScratch(const Tensor& like, int64_t block)
      : stride((block + 31) / 32 * 32 + 16),
        tile((stride + 16) * stride),  // 16 rows more: a register tile may read rows beyond the last and discard them
        row_panel((stride + 16) * kRowStep),
        // A tensor, so that torch's memory statistics include it.
        memory(torch::stable::new_empty(like, {3 * tile + 3 * row_panel + 96 * std::max(kDepth, stride) + 7 * stride})) {
    float* next = memory.mutable_data_ptr<float>();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    u = take(tile), w = take(tile), g = take(tile);
    rows = take(3 * row_panel);
    packed = take(96 * std::max(kDepth, stride));
    row_u = take(stride), row_w = take(stride), column_u = take(stride), column_w = take(stride);
    lengths = take(3 * stride);
  }
  int64_t stride, tile, row_panel;
  Tensor memory;
  float *u, *w, *g, *rows, *packed, *row_u, *row_w, *column_u, *column_w, *lengths;
  std::vector<uint8_t> again;  // parts of the block, kPairRows x W pairs, whose differences are multiplied
};

// Register tiles: `kRows` x `kVectors` accumulators of each kind must fit the instruction set's 32 (W = 16) or 16 registers.
template <int W>
struct Tiling {
  static constexpr int kPairRows = 4;
  static constexpr int kProductRows = W == 16 ? 12 : 6, kProductVectors = 2;
};

typedef float quad __attribute__((vector_size(16)));
typedef float loose_quad __attribute__((vector_size(16), aligned(4), may_alias));

// out[k * step + r] = r-th row's k-th number, for 4 x 4 of them.
SFM_INLINE void store_transposed(quad r0, quad r1, quad r2, quad r3, float* out, int64_t step) {
  const quad low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
  const quad low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5), high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  *reinterpret_cast<loose_quad*>(out) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  *reinterpret_cast<loose_quad*>(out + step) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  *reinterpret_cast<loose_quad*>(out + 2 * step) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  *reinterpret_cast<loose_quad*>(out + 3 * step) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// Transposes `Columns` rows of a, b and, if `Sum`, a + scale * b: packed[(k * Matrices + matrix) * Columns + j], zero from row `count` on.
template <int Columns, bool Sum>
SFM_INLINE void pack_columns(const float* a, const float* b, float scale, int64_t stride, int64_t count, int64_t depth, float* packed) {
  constexpr int kMatrices = Sum ? 3 : 2;
  constexpr int64_t kStep = kMatrices * Columns;
  for (int64_t j = 0; j < Columns; j += 4) {
    int64_t k = 0;
    if (j + 4 <= count)
      for (; k + 4 <= depth; k += 4) {
        const auto read = [&](const float* source, int r) __attribute__((always_inline)) {
          return quad(*reinterpret_cast<const loose_quad*>(source + (j + r) * stride + k));
        };
        const quad a0 = read(a, 0), a1 = read(a, 1), a2 = read(a, 2), a3 = read(a, 3);
        quad b0 = read(b, 0), b1 = read(b, 1), b2 = read(b, 2), b3 = read(b, 3);
        float* out = packed + k * kStep + j;
        if (Sum) b0 *= scale, b1 *= scale, b2 *= scale, b3 *= scale;
        store_transposed(a0, a1, a2, a3, out, kStep);
        store_transposed(b0, b1, b2, b3, out + Columns, kStep);
        if (Sum) store_transposed(a0 + b0, a1 + b1, a2 + b2, a3 + b3, out + 2 * Columns, kStep);
      }
    for (; k < depth; ++k)
      for (int64_t r = j; r < j + 4; ++r) {
        const float x = r < count ? a[r * stride + k] : 0.0f, y = r < count ? b[r * stride + k] : 0.0f;
        float* out = packed + k * kStep + r;
        out[0] = x;
        out[Columns] = Sum ? scale * y : y;
        if (Sum) out[2 * Columns] = x + scale * y;
      }
  }
}

// The products a.a, b.b and a.b of one row.
template <int W>
SFM_INLINE void row_products_kernel(const float* a, const float* b, int64_t dim, float* out, int64_t step) {
  typename Simd<W>::vec aa = {}, bb = {}, ab = {};
  for (int64_t d = 0; d < dim; d += W) {
    const int64_t left = dim - d;
    const auto x = left >= W ? load<W>(a + d) : load_partial<W>(a + d, left);
    const auto y = left >= W ? load<W>(b + d) : load_partial<W>(b + d, left);
    aa += x * x;
    bb += y * y;
    ab += x * y;
  }
  out[0] = sum<W>(aa);
  out[step] = sum<W>(bb);
  out[2 * step] = sum<W>(ab);
}
SFM_DISPATCH(row_products, (const float* a, const float* b, int64_t dim, float* out, int64_t step), (a, b, dim, out, step))

// out[r][0..columns) += sum over k of weights[r * row_step + k * depth_step] * panel[k * panel_step]: a small matrix product,
// here of one or of two pairs of matrices.
template <int W, int Rows, int Vectors>
struct Product {
  using vec = typename Simd<W>::vec;
  vec total[Rows][Vectors] = {};

  SFM_INLINE void add(const float* weights, int64_t row_step, int64_t depth_step, const float* panel, int64_t panel_step, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      vec line[Vectors];
      for (int v = 0; v < Vectors; ++v) line[v] = load<W>(panel + k * panel_step + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float weight = weights[r * row_step + k * depth_step];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) total[r][v] += line[v] * weight;
      }
    }
  }

  SFM_INLINE void write(float* out, int64_t stride, int64_t valid, int64_t columns, bool first) const {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      if (r >= valid) break;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* p = out + r * stride + v * W;
        const int64_t left = columns - v * W;
        if (left >= W)
          store<W>(p, first ? total[r][v] : load<W>(p) + total[r][v]);
        else if (left > 0)
          store_partial<W>(p, first ? total[r][v] : load_partial<W>(p, left) + total[r][v], left);
      }
    }
  }
};

// Adds, over `depth` features, f.g, f.f and g.g of Rows x W pairs to three tiles (or sets them when `first`).
template <int W, int Rows>
SFM_INLINE void add_differences(
    const float* const* a_rows, const float* const* b_rows, const float* packed, int64_t depth, bool first, float* fg_tile,
    float* ff_tile, float* gg_tile, int64_t stride) {
  using vec = typename Simd<W>::vec;
  vec fg[Rows] = {}, ff[Rows] = {}, gg[Rows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const vec a = load<W>(packed + k * 2 * W), b = load<W>(packed + k * 2 * W + W);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const vec f = a - a_rows[r][k], g = b - b_rows[r][k];
      fg[r] += f * g;
      ff[r] += f * f;
      gg[r] += g * g;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    float *x = fg_tile + r * stride, *y = ff_tile + r * stride, *z = gg_tile + r * stride;
    store<W>(x, first ? fg[r] : fg[r] + load<W>(x));
    store<W>(y, first ? ff[r] : ff[r] + load<W>(y));
    store<W>(z, first ? gg[r] : gg[r] + load<W>(z));
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

// The products a_i.a_j, b_i.b_j and s_i.s_j, s = a + b with b scaled, in the tiles u, w, g.
template <int W>
SFM_INLINE void block_products(
    const PairProblem& problem, BlockScratch& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool diagonal) {
  constexpr int kRows = Tiling<W>::kProductRows, kVectors = Tiling<W>::kProductVectors, kColumns = kVectors * W;
  const int64_t dim = problem.dim;
  float* const tiles[3] = {s.u, s.w, s.g};
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, dim - k0);
    for (int64_t i = i0; i < i1; ++i) {
      const float *a = problem.a + i * dim + k0, *b = problem.b + i * dim + k0;
      float *x = s.rows + (i - i0) * kRowStep, *y = x + s.row_panel, *z = y + s.row_panel;
      for (int64_t k = 0; k < depth; ++k) {
        const float scaled = problem.scale * b[k];
        x[k] = a[k];
        y[k] = scaled;
        z[k] = a[k] + scaled;
      }
    }
    for (int64_t j = j0; j < j1; j += kColumns) {
      const int64_t from = j * dim + k0;
      pack_columns<kColumns, true>(problem.a + from, problem.b + from, problem.scale, dim, j1 - j, depth, s.packed);
      for (int64_t i = i0; i < i1; i += kRows) {
        if (diagonal && j + kColumns <= i) break;  // below the diagonal: copied from above it
        for (int matrix = 0; matrix < 3; ++matrix) {
          const float *rows = s.rows + matrix * s.row_panel + (i - i0) * kRowStep, *panel = s.packed + matrix * kColumns;
          float* tile = tiles[matrix] + (i - i0) * s.stride + (j - j0);
          // Smaller register tiles at the edges, because many blocks have few rows and columns.
          const auto multiply = [&](auto product) __attribute__((always_inline)) {
            product.add(rows, kRowStep, 1, panel, 3 * kColumns, depth);
            product.write(tile, s.stride, kRows, kColumns, k0 == 0);
          };
          if (i1 - i > kRows / 2)
            j1 - j > W ? multiply(Product<W, kRows, kVectors>()) : multiply(Product<W, kRows, 1>());
          else
            j1 - j > W ? multiply(Product<W, kRows / 2, kVectors>()) : multiply(Product<W, kRows / 2, 1>());
        }
      }
    }
  }
}

// Row i of the tiles: products of rows become f.g, f.f and g.g. Marks parts with a pair that products don't give to full accuracy.
template <int W>
SFM_INLINE void products_to_flows(const PairProblem& problem, BlockScratch& s, int64_t i, int64_t i0, int64_t j0, int64_t count, int64_t from) {
  using vec = typename Simd<W>::vec;
  const int64_t local = i - i0, classes = problem.classes, parts = s.stride / W;
  const float *own = problem.lengths + i, *column = s.lengths;
  const float inverse = 1.0f / problem.scale, half = 0.5f * inverse, square = inverse * inverse;
  for (int64_t j = from / W * W; j < count; j += W) {
    float *u = s.u + local * s.stride + j, *w = s.w + local * s.stride + j, *g = s.g + local * s.stride + j;
    const vec a = own[0] + load<W>(column + j), b = own[classes] + load<W>(column + s.stride + j);
    const vec sums = own[2 * classes] + load<W>(column + 2 * s.stride + j);
    const vec ff = a - 2.0f * load<W>(u), gg = b - 2.0f * load<W>(w);
    const vec fg = (sums - 2.0f * load<W>(g)) - ff - gg;
    const auto good = (ff > kClose * a) & (gg > kClose * b) & (ff < kUneven * gg) & (gg < kUneven * ff) &
                      (fg - fg == 0.0f);  // false for what overflowed: a + b may be twice as long as a
    store<W>(u, half * fg);
    store<W>(w, ff);
    store<W>(g, square * gg);
    int all = -1;
    for (int64_t k = 0; k < W; ++k) all &= good[k];
    if (all) continue;
    for (int64_t k = 0; k < W; ++k)
      if (!good[k] && j + k < count && j0 + j + k != i && !(problem.groups && problem.groups[i] == problem.groups[j0 + j + k]))
        s.again[local / Tiling<W>::kPairRows * parts + j / W] = 1;
  }
}

// f.g, f.f and g.g of the marked parts of the block, from differences.
template <int W>
SFM_INLINE void block_differences(const PairProblem& problem, BlockScratch& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  constexpr int kRows = Tiling<W>::kPairRows;
  const int64_t dim = problem.dim, parts = s.stride / W, strips = (i1 - i0 + kRows - 1) / kRows;
  for (int64_t j = 0; j < j1 - j0; j += W) {
    bool any = false;
    for (int64_t strip = 0; strip < strips; ++strip) any |= s.again[strip * parts + j / W] != 0;
    if (!any) continue;
    for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
      const int64_t depth = std::min(kDepth, dim - k0), from = (j0 + j) * dim + k0;
      pack_columns<W, false>(problem.a + from, problem.b + from, 1.0f, dim, j1 - j0 - j, depth, s.packed);
      for (int64_t strip = 0; strip < strips; ++strip) {
        if (!s.again[strip * parts + j / W]) continue;
        const float *a_rows[kRows], *b_rows[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = std::min(i0 + strip * kRows + r, i1 - 1) * dim + k0;
          a_rows[r] = problem.a + row;
          b_rows[r] = problem.b + row;
        }
        const int64_t at = strip * kRows * s.stride + j;
        add_differences<W, kRows>(a_rows, b_rows, s.packed, depth, k0 == 0, s.u + at, s.w + at, s.g + at, s.stride);
      }
    }
  }
}

template <int W>
SFM_INLINE void block_weights_kernel(
    const PairProblem& problem, BlockScratch& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double& cosine) {
  constexpr int kColumns = Tiling<W>::kProductVectors * W;
  const int64_t count = j1 - j0, padded = (count + kColumns - 1) / kColumns * kColumns;
  const bool diagonal = i0 == j0 && i1 == j1;
  block_products<W>(problem, s, i0, i1, j0, j1, diagonal);
  for (int matrix = 0; matrix < 3; ++matrix)
    for (int64_t j = 0; j < padded; ++j)
      s.lengths[matrix * s.stride + j] = j < count ? problem.lengths[matrix * problem.classes + j0 + j] : 0.0f;
  s.again.assign((i1 - i0 + Tiling<W>::kPairRows) / Tiling<W>::kPairRows * (s.stride / W), 0);
  for (int64_t i = i0; i < i1; ++i) products_to_flows<W>(problem, s, i, i0, j0, count, diagonal ? i - i0 : 0);
  block_differences<W>(problem, s, i0, i1, j0, j1);
  if (diagonal)
    for (float* tile : {s.u, s.w, s.g})
      for (int64_t i = 1; i < count; ++i)
        for (int64_t j = 0; j < i; ++j) tile[i * s.stride + j] = tile[j * s.stride + i];
  std::fill_n(s.column_u, s.stride, 0.0f);
  std::fill_n(s.column_w, s.stride, 0.0f);
  cosine = 0;
  for (int64_t i = i0; i < i1; ++i) cosine += finish_weights<W>(problem, s, i, i - i0, j0, count, padded);
}
SFM_DISPATCH(block_weights,
             (const PairProblem& problem, BlockScratch& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double& cosine),
             (problem, s, i0, i1, j0, j1, cosine))

// out (rows of block k) += u @ a - w @ b over the rows i of the other block; `transposed` reads the transposed tile.
template <int W>
SFM_INLINE void block_gradient_kernel(
    const PairProblem& problem, BlockScratch& s, bool transposed, int64_t k0, int64_t k1, int64_t i0, int64_t i1, float* out) {
  constexpr int kRows = Tiling<W>::kProductRows, kVectors = Tiling<W>::kProductVectors, kColumns = kVectors * W;
  const int64_t dim = problem.dim, depth = i1 - i0;
  const int64_t row_step = transposed ? 1 : s.stride, depth_step = transposed ? s.stride : 1;
  float *a_panel = s.packed, *b_panel = a_panel + kColumns * depth;
  for (int64_t d = 0; d < dim; d += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, dim - d);
    for (int matrix = 0; matrix < 2; ++matrix) {
      const float* source = (matrix ? problem.b : problem.a) + i0 * dim + d;
      float* line = matrix ? b_panel : a_panel;
      for (int64_t i = 0; i < depth; ++i, line += kColumns, source += dim) {
        std::memcpy(line, source, columns * sizeof(float));
        for (int64_t k = columns; k < kColumns; ++k) line[k] = 0.0f;
      }
    }
    for (int64_t k = 0; k < k1 - k0; k += kRows) {
      const auto multiply = [&](auto product) __attribute__((always_inline)) {
        product.add(s.u + k * row_step, row_step, depth_step, a_panel, kColumns, depth);
        product.add(s.w + k * row_step, row_step, depth_step, b_panel, kColumns, depth);
        product.write(out + k * dim + d, dim, k1 - k0 - k, columns, false);
      };
      k1 - k0 - k > kRows / 2 ? multiply(Product<W, kRows, kVectors>()) : multiply(Product<W, kRows / 2, kVectors>());
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
