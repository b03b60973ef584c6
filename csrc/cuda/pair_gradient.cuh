// The second pair kernel: gradient rows from a block of u and w,
//   gradient_k += 2 [a_k sum_i u_ki - sum_i u_ki a_i - b_k sum_i w_ki + sum_i w_ki b_i], i over the block's columns.
#pragma once

#include "pair_tiles.cuh"

namespace sfm {

// One side of a block of the pair matrix; blockIdx.z chooses the side.
struct GradientSide {
  const float* u;  // (rows, pitch)
  const float* w;
  int64_t row, column;  // first class of the rows and of the columns
  int rows, columns;
  float* gradient;  // of the first row; (rows, dims)
  bool first;       // overwrites the gradient
};
struct GradientSides {
  GradientSide side[2];
};

template <int WARP_ROWS>
struct GradientTile {
  static constexpr int ROWS = 32 * WARP_ROWS, THREADS = 64 * WARP_ROWS;   // WARP_ROWS x 2 warps
  static constexpr int WARP_DIMS = 16 * WARP_ROWS, DIMS = 2 * WARP_DIMS;  // 64 x 64 or 128 x 128
  static constexpr int PITCH = DIMS + 8;                                  // 8 t + g uses every bank once
  static constexpr int STAGE = 2 * (ROWS * PAIR_PITCH + PAIR_DEPTH * PITCH);
  static constexpr int SHARED = PAIR_STAGES * STAGE * int(sizeof(float));
};

// Rows [k, k + PAIR_DEPTH) of columns [first, first + DIMS); rows past `count` and columns past `stride` become zero.
template <typename Tile>
__device__ __forceinline__ void stage_classes(float* to, const float* matrix, int64_t stride, int64_t base, int count,
                                              int k, int first) {
  constexpr int CHUNKS = Tile::DIMS / 4;
  static_assert(PAIR_DEPTH * CHUNKS % Tile::THREADS == 0, "the same number of copies for every thread");
#pragma unroll
  for (int part = 0; part < PAIR_DEPTH * CHUNKS / Tile::THREADS; ++part) {
    const int row = (threadIdx.x + part * Tile::THREADS) / CHUNKS,
              column = (threadIdx.x + part * Tile::THREADS) % CHUNKS * 4;
    const bool inside = k + row < count && first + column < stride;
    copy_async16(to + row * Tile::PITCH + column, inside ? matrix + (base + k + row) * stride + first + column : matrix,
                 inside ? 16 : 0);
  }
}
// Columns [k, k + PAIR_DEPTH) of the tile's rows of u or w; elements past `rows` and `columns` become zero.
template <int WARP_ROWS>
__device__ __forceinline__ void stage_pairs(float* to, const float* matrix, int pitch, int first, int rows, int columns,
                                            int k) {
  using Tile = GradientTile<WARP_ROWS>;
  constexpr int CHUNKS = PAIR_DEPTH / 4;
#pragma unroll
  for (int part = 0; part < Tile::ROWS * CHUNKS / Tile::THREADS; ++part) {
    const int row = (threadIdx.x + part * Tile::THREADS) / CHUNKS,
              column = (threadIdx.x + part * Tile::THREADS) % CHUNKS * 4;
    const int left = first + row < rows ? columns - (k + column) : 0, bytes = left >= 4 ? 16 : left > 0 ? left * 4 : 0;
    copy_async16(to + row * PAIR_PITCH + column,
                 bytes > 0 ? matrix + int64_t(first + row) * pitch + k + column : matrix, bytes);
  }
}

template <bool HIGH, int WARP_ROWS>
__global__ void __launch_bounds__(GradientTile<WARP_ROWS>::THREADS)
    pair_gradient(PairRows rows, GradientSides sides, int pitch, int dims) {
  using Tile = GradientTile<WARP_ROWS>;
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
    stage_pairs<WARP_ROWS>(to, side.u, pitch, tile_row, side.rows, side.columns, k);
    stage_pairs<WARP_ROWS>(to + Tile::ROWS * PAIR_PITCH, side.w, pitch, tile_row, side.rows, side.columns, k);
    to += 2 * Tile::ROWS * PAIR_PITCH;
    stage_classes<Tile>(to, rows.a, rows.stride, side.column, side.columns, k, tile_column);
    stage_classes<Tile>(to + PAIR_DEPTH * Tile::PITCH, rows.b, rows.stride, side.column, side.columns, k,
                             tile_column);
  };

  float total[2][COLUMNS][4] = {};           // sum_i w_ki b_i - u_ki a_i
  float sum_u[2][2] = {}, sum_w[2][2] = {};  // of this lane's share of rows group and group + 8
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
    const float* from = shared + step % PAIR_STAGES * Tile::STAGE;
    const float* pair_u = from + warp_row * PAIR_PITCH;
    const float* pair_w = pair_u + Tile::ROWS * PAIR_PITCH;
    const float* class_a = from + 2 * Tile::ROWS * PAIR_PITCH + warp_column;
    const float* class_b = class_a + PAIR_DEPTH * Tile::PITCH;
#pragma unroll
    for (int k = 0; k < PAIR_DEPTH; k += 8) {
      Fragment<HIGH, 4> left_u[2], left_w[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int at = (m * 16 + group + c % 2 * 8) * PAIR_PITCH + k + member + c / 2 * 4;
          left_u[m].set(c, -pair_u[at]);
          left_w[m].set(c, pair_w[at]);
          // HIGH: the sum of the rounded values, since equal rows would not cancel otherwise.
          sum_u[m][c % 2] += HIGH ? -left_u[m].high[c] : pair_u[at];
          sum_w[m][c % 2] += HIGH ? left_w[m].high[c] : pair_w[at];
        }
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        Fragment<HIGH, 2> right_a, right_b;
        load_b_rows<HIGH>(right_a, class_a + k * Tile::PITCH + n * 8, Tile::PITCH, group, member);
        load_b_rows<HIGH>(right_b, class_b + k * Tile::PITCH + n * 8, Tile::PITCH, group, member);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<HIGH>(total[m][n], left_u[m], right_a);
          multiply<HIGH>(total[m][n], left_w[m], right_b);
        }
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
          const float a = HIGH ? round_tf32(own_a[column]) : own_a[column],
                      b = HIGH ? round_tf32(own_b[column]) : own_b[column];
          const float value = 2 * (a * u - b * w + total[m][n][half * 2 + c]);
          out[column] = side.first ? value : out[column] + value;
        }
      }
    }
  }
}

}  // namespace sfm
