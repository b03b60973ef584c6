// The pair kernel with three Gram products, which may replace `pair_tiles` after both are measured on a GPU.
//
// With s = a + scale b: a_i.b_j + b_i.a_j = (s_i.s_j - a_i.a_j - scale^2 b_i.b_j) / scale, one product fewer. A `scale`
// that makes the rows of a and b about equally long keeps that difference from cancelling.
#pragma once

#include "pair_tiles.cuh"

namespace sfm {

template <int WARP_ROWS>
struct GramTile {
  static constexpr int ROWS = 32 * WARP_ROWS, THREADS = 64 * WARP_ROWS;      // WARP_ROWS x 2 warps, 32 x 32 pairs each
  static constexpr int STAGE = 2 * (ROWS + PAIR_TILE_COLUMNS) * PAIR_DEPTH;  // floats
  static constexpr int SHARED = PAIR_STAGES * STAGE * int(sizeof(float));
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// In rows of PAIR_DEPTH floats in shared memory, the 16-byte chunks are permuted by the row index, so that the same
// chunk of eight rows is in different banks.
__device__ __forceinline__ int turned(int row, int chunk) { return row * PAIR_DEPTH + 4 * (chunk ^ (row / 2 % 4)); }

// Columns [k, k + 8) of 16 rows, as the tensor cores take their left side.
__device__ __forceinline__ void load_left(float (&to)[4], const float* tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(to, tile + turned(row + lane % 16, k / 4 + lane / 16));
}
// The same for 16 rows as the right sides (columns) of two products: registers 0 and 1, 2 and 3.
__device__ __forceinline__ void load_right(float (&to)[4], const float* tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(to, tile + turned(row + lane / 16 * 8 + lane % 8, k / 4 + lane / 8 % 2));
}

// Value k of a, of b and of s = a + scale b.
template <bool HIGH, int N>
__device__ __forceinline__ void set_three(Split<HIGH, N>& a, Split<HIGH, N>& b, Split<HIGH, N>& s, int k, float one,
                                          float other, float scale) {
  const float sum = fmaf(scale, other, one);
  a.set(k, HIGH ? nearest_tf32(one) : one);
  b.set(k, HIGH ? nearest_tf32(other) : other);
  s.set(k, HIGH ? nearest_tf32(sum) : sum);
}

template <bool HIGH, int WARP_ROWS>
__global__ void __launch_bounds__(GramTile<WARP_ROWS>::THREADS, WARP_ROWS == 2 ? 2 : 1)
    pair_gram(PairRows rows, PairBlock block) {
  using Tile = GramTile<WARP_ROWS>;
  SFM_SHARED(shared_bytes);
  float* const shared = reinterpret_cast<float*>(shared_bytes);
  const int tile_row = blockIdx.y * Tile::ROWS, tile_column = blockIdx.x * PAIR_TILE_COLUMNS;
  const int64_t row0 = block.row + tile_row, column0 = block.column + tile_column;  // classes
  if (block.symmetric && column0 + PAIR_TILE_COLUMNS <= row0) return;               // below the diagonal
  const int row_count = block.rows - tile_row, column_count = block.columns - tile_column;
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  const float scale = *rows.scale;

  const auto stage = [&](int index) {
    float* to = shared + index % PAIR_STAGES * Tile::STAGE;
    const int k = index * PAIR_DEPTH;
    const auto put = [&](auto count, const float* matrix, int64_t first, int left) {
      constexpr int COUNT = decltype(count)::value;
      stage_rows<COUNT, Tile::THREADS, PAIR_DEPTH, true>(to, matrix + first * rows.stride, rows.stride, left, k);
      to += COUNT * PAIR_DEPTH;
    };
    put(Count<Tile::ROWS>{}, rows.a, row0, row_count);
    put(Count<Tile::ROWS>{}, rows.b, row0, row_count);
    put(Count<PAIR_TILE_COLUMNS>{}, rows.a, column0, column_count);
    put(Count<PAIR_TILE_COLUMNS>{}, rows.b, column0, column_count);
  };

  PairSums sums = {};
  const int steps = int((rows.stride + PAIR_DEPTH - 1) / PAIR_DEPTH);
#pragma unroll
  for (int s = 0; s < PAIR_STAGES - 1; ++s) {
    if (s < steps) stage(s);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<PAIR_STAGES - 2>();
    __syncthreads();
    if (step + PAIR_STAGES - 1 < steps) stage(step + PAIR_STAGES - 1);
    commit_copies();
    const float* const row_a = shared + step % PAIR_STAGES * Tile::STAGE + warp_row * PAIR_DEPTH;
    const float* const row_b = row_a + Tile::ROWS * PAIR_DEPTH;
    const float* const column_a = shared + step % PAIR_STAGES * Tile::STAGE + (2 * Tile::ROWS + warp_column) * PAIR_DEPTH;
    const float* const column_b = column_a + PAIR_TILE_COLUMNS * PAIR_DEPTH;
#pragma unroll (HIGH ? 2 : 1)  // three products: unrolled, the loads of both halves would need registers at the same time
    for (int k = 0; k < PAIR_DEPTH; k += 8) {
      Split<HIGH, 4> a[2], b[2], s[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float one[4], other[4];
        load_left(one, row_a, m * 16, k), load_left(other, row_b, m * 16, k);
#pragma unroll
        for (int c = 0; c < 4; ++c) set_three(a[m], b[m], s[m], c, one[c], other[c], scale);
      }
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        float one[4], other[4];
        load_right(one, column_a, n * 8, k), load_right(other, column_b, n * 8, k);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          Split<HIGH, 2> c, d, t;
#pragma unroll
          for (int e = 0; e < 2; ++e) set_three(c, d, t, e, one[2 * part + e], other[2 * part + e], scale);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            add_product<HIGH>(sums.gram_a[m][n + part], a[m], c);
            add_product<HIGH>(sums.gram_b[m][n + part], b[m], d);
            add_product<HIGH>(sums.cross[m][n + part], s[m], t);
          }
        }
      }
    }
  }
  // From the Gram matrix of s to cross terms, as `finish_pairs` takes them.
  const float inverse = 1.f / scale;
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    const int m = e / 16, n = e / 4 % 4, c = e % 4;
    const float rest = sums.cross[m][n][c] - sums.gram_a[m][n][c];
    sums.cross[m][n][c] = fmaf(-scale * scale, sums.gram_b[m][n][c], rest) * inverse;
  }
  finish_pairs<HIGH, WARP_ROWS, true>(rows, block, sums, shared_bytes, scale);
}

}  // namespace sfm
