// The gradient kernel for `pair_gram`: like `pair_gradient`, but from -u and w, with wide reads of shared memory and
// sums that round.
#pragma once

#include "pair_gradient.cuh"
#include "pair_gram.cuh"

namespace sfm {

template <int WARP_ROWS>
struct UpdateTile {
  static constexpr int ROWS = 32 * WARP_ROWS, THREADS = 64 * WARP_ROWS;   // WARP_ROWS x 2 warps
  static constexpr int WARP_DIMS = 16 * WARP_ROWS, DIMS = 2 * WARP_DIMS;  // 64 x 64 or 128 x 128
  static constexpr int PITCH = DIMS + 8;  // 2 t + g uses every 16 bytes of the banks once
  static constexpr int STAGE = 2 * (ROWS * PAIR_DEPTH + PAIR_DEPTH * PITCH);
  static constexpr int SHARED = PAIR_STAGES * STAGE * int(sizeof(float));
};

// Columns [k, k + PAIR_DEPTH) of the tile's rows of u or w; elements past `rows` and `columns` become zero.
template <int WARP_ROWS>
__device__ __forceinline__ void stage_turned(float* to, const float* matrix, int pitch, int first, int rows,
                                              int columns, int k) {
  using Tile = UpdateTile<WARP_ROWS>;
  constexpr int CHUNKS = PAIR_DEPTH / 4;
#pragma unroll
  for (int part = 0; part < Tile::ROWS * CHUNKS / Tile::THREADS; ++part) {
    const int row = (threadIdx.x + part * Tile::THREADS) / CHUNKS, chunk = (threadIdx.x + part * Tile::THREADS) % CHUNKS;
    const int left = first + row < rows ? columns - (k + 4 * chunk) : 0, bytes = left >= 4 ? 16 : left > 0 ? left * 4 : 0;
    copy_async16(to + turned(row, chunk),
                 bytes > 0 ? matrix + int64_t(first + row) * pitch + k + 4 * chunk : matrix, bytes);
  }
}

template <bool HIGH, int WARP_ROWS>
__global__ void __launch_bounds__(UpdateTile<WARP_ROWS>::THREADS)
    pair_update(PairRows rows, GradientSides sides, int pitch, int dims) {
  using Tile = UpdateTile<WARP_ROWS>;
  constexpr int COLUMNS = Tile::WARP_DIMS / 8;
  SFM_SHARED(shared_bytes);
  float* const shared = reinterpret_cast<float*>(shared_bytes);
  const GradientSide side = blockIdx.z == 0 ? sides.side[0] : sides.side[1];
  const int tile_row = blockIdx.y * Tile::ROWS, tile_column = blockIdx.x * Tile::DIMS;
  if (tile_row >= side.rows) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * Tile::WARP_DIMS;

  const auto stage = [&](int index) {
    float* to = shared + index % PAIR_STAGES * Tile::STAGE;
    const int k = index * PAIR_DEPTH;
    stage_turned<WARP_ROWS>(to, side.u, pitch, tile_row, side.rows, side.columns, k);
    stage_turned<WARP_ROWS>(to + Tile::ROWS * PAIR_DEPTH, side.w, pitch, tile_row, side.rows, side.columns, k);
    to += 2 * Tile::ROWS * PAIR_DEPTH;
    stage_classes<Tile>(to, rows.a, rows.stride, side.column, side.columns, k, tile_column);
    stage_classes<Tile>(to + PAIR_DEPTH * Tile::PITCH, rows.b, rows.stride, side.column, side.columns, k, tile_column);
  };

  float total[2][COLUMNS][4] = {};           // sum_i w_ki b_i - u_ki a_i
  float sum_u[2][2] = {}, sum_w[2][2] = {};  // of -u and w, this lane's share of rows group and group + 8
  const int steps = (side.columns + PAIR_DEPTH - 1) / PAIR_DEPTH;
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
    const float* const from = shared + step % PAIR_STAGES * Tile::STAGE;
    const float* const pair_u = from + warp_row * PAIR_DEPTH;
    const float* const pair_w = pair_u + Tile::ROWS * PAIR_DEPTH;
    const float* const class_a = from + 2 * Tile::ROWS * PAIR_DEPTH + member * Tile::PITCH + warp_column + group;
    const float* const class_b = class_a + PAIR_DEPTH * Tile::PITCH;
#pragma unroll
    for (int k = 0; k < PAIR_DEPTH; k += 8) {
      Split<HIGH, 4> left_u[2], left_w[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float u[4], w[4];
        load_left(u, pair_u, m * 16, k), load_left(w, pair_w, m * 16, k);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          left_u[m].set(c, u[c]), left_w[m].set(c, w[c]);
          // HIGH: the sum of the truncated values, since equal rows would not cancel otherwise.
          sum_u[m][c % 2] += HIGH ? truncate_tf32(u[c]) : u[c];
          sum_w[m][c % 2] += HIGH ? truncate_tf32(w[c]) : w[c];
        }
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        Split<HIGH, 2> a, b;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          a.set(e, class_a[(k + 4 * e) * Tile::PITCH + 8 * n]), b.set(e, class_b[(k + 4 * e) * Tile::PITCH + 8 * n]);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) add_products<HIGH>(total[m][n], left_u[m], a, left_w[m], b);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float u = sum_u[m][half], w = sum_w[m][half];  // over the four lanes of the group
      u += __shfl_xor_sync(ALL_LANES, u, 1), w += __shfl_xor_sync(ALL_LANES, w, 1);
      u += __shfl_xor_sync(ALL_LANES, u, 2), w += __shfl_xor_sync(ALL_LANES, w, 2);
      const int row = tile_row + warp_row + m * 16 + half * 8 + group;
      if (row >= side.rows) continue;
      const float* const own_a = rows.a + (side.row + row) * rows.stride;
      const float* const own_b = rows.b + (side.row + row) * rows.stride;
      float* const out = side.gradient + int64_t(row) * dims;
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = tile_column + warp_column + n * 8 + member * 2 + c;
          if (column >= dims) continue;
          const float a = HIGH ? truncate_tf32(own_a[column]) : own_a[column],
                      b = HIGH ? truncate_tf32(own_b[column]) : own_b[column];
          const float value = 2 * (total[m][n][half * 2 + c] - (a * u + b * w));
          out[column] = side.first ? value : out[column] + value;
        }
      }
    }
  }
}

}  // namespace sfm
