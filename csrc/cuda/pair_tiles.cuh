// The first pair kernel: cosines of a block of class pairs. It writes their sum to the workspace in float64, and u and
// w (each pair's weights in the gradient) to two matrices of a fixed size.
#pragma once

#include "tensor_core.cuh"

namespace sfm {

constexpr int PAIR_DEPTH = 16;              // columns (dims, or classes in the gradient) of a pipeline stage
constexpr int PAIR_PITCH = PAIR_DEPTH + 4;  // of its rows in shared memory: 20 g + t uses every bank once
constexpr int PAIR_STAGES = 3;
constexpr int PAIR_TILE_COLUMNS = 64;

// Row sums of a^2, b^2 and a b; a, b have rows of `stride` floats, a multiple of 4, 16-byte aligned. For HIGH the sums
// are those of the rows rounded to TF32: the Gram form is then exact for the rounded rows.
struct PairRows {
  const float* a;
  const float* b;
  const float* square_a;
  const float* square_b;
  const float* own;
  const int64_t* groups;
  int64_t stride;
  const float* scale;  // of b relative to a, for `pair_gram`
};

// Rows [row, row + rows) x classes [column, column + columns) of the pair matrix.
struct PairBlock {
  int64_t row, column;
  int rows, columns;
  bool symmetric;  // pairs row < column only; they count twice and are also written transposed
  float smallest;  // square of the length below which a pair is dropped
  float* u;        // (rows, pitch), or null: no gradient is asked for
  float* w;
  float* u_mirror;  // (columns, pitch); the same as u and w in a block on the diagonal
  float* w_mirror;
  int pitch;
  double* partials;  // (tiles,): added to
};

template <int WARP_ROWS>
struct PairTile {
  static constexpr int ROWS = 32 * WARP_ROWS, THREADS = 64 * WARP_ROWS;      // WARP_ROWS x 2 warps, 32 x 32 pairs each
  static constexpr int STAGE = 2 * (ROWS + PAIR_TILE_COLUMNS) * PAIR_PITCH;  // floats
  static constexpr int SHARED = PAIR_STAGES * STAGE * int(sizeof(float));
};

struct PairValue {
  float cosine, u, w;
};
// 1 / sqrt to about the last bit: the approximation, with an error of at most 2 units, and one step of Newton's method.
__device__ __forceinline__ float inverse_root(float square) {
  const float root = rsqrtf(square);
  return root * (1.5f - 0.5f * (square * root) * root);
}
__device__ __forceinline__ PairValue pair_value(float numerator, float square_f, float square_g, float smallest) {
  if (square_f < smallest || square_g < smallest) return {numerator * 0.f, 0.f, 0.f};  // times 0, not 0: NaN stays NaN
  const float inverse_g = inverse_root(square_g), u = inverse_root(square_f) * inverse_g, cosine = numerator * u;
  return {cosine, u, cosine * inverse_g * inverse_g};
}

// Copies columns [k, k + PAIR_DEPTH) of ROWS rows, the first at `matrix`; rows past `count` and columns past `stride`
// become zero. TURN: chunks of 16 bytes are permuted by `turned`.
template <int ROWS, int THREADS, int PITCH = PAIR_PITCH, bool TURN = false>
__device__ __forceinline__ void stage_rows(float* to, const float* matrix, int64_t stride, int count, int k) {
  constexpr int CHUNKS = PAIR_DEPTH / 4, STEP = THREADS / CHUNKS;  // rows of one sweep of the block
  static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "the same number of copies for every thread");
  const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 4;
  const float* from = matrix + row * stride + k + column;
#pragma unroll
  for (int part = 0; part < ROWS; part += STEP) {
    const bool inside = row + part < count && k + column < stride;
    const int place = TURN ? column ^ (4 * (row / 2 % 4)) : column;
    copy_async16(to + (row + part) * PITCH + place, inside ? from : matrix, inside ? 16 : 0);
    from += STEP * stride;
  }
}

struct PairSums {
  float gram_a[2][4][4], gram_b[2][4][4], cross[2][4][4];  // a_i.a_j, b_i.b_j, a_i.b_j + b_i.a_j
};

// Cosines, u and w of a tile from the sums of its products. NEGATIVE: writes -u, and takes the sums of `pair_gram`.
template <bool HIGH, int WARP_ROWS, bool NEGATIVE>
__device__ __forceinline__ void finish_pairs(const PairRows& rows, const PairBlock& block, const PairSums& sums,
                                             unsigned char* shared_bytes, float scale) {
  constexpr int ROWS = 32 * WARP_ROWS;
  const int tile_row = blockIdx.y * ROWS, tile_column = blockIdx.x * PAIR_TILE_COLUMNS;
  const int64_t row0 = block.row + tile_row, column0 = block.column + tile_column;  // classes
  const int row_count = block.rows - tile_row, column_count = block.columns - tile_column;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;

  // Element e = (m * 4 + n) * 4 + c of lane (group, member).
  const auto row_of = [&](int e, int lane_group) { return warp_row + e / 16 * 16 + e % 4 / 2 * 8 + lane_group; };
  const auto column_of = [&](int e, int lane_member) { return warp_column + e / 4 % 4 * 8 + lane_member * 2 + e % 2; };
  const int64_t ahead =
      row0 - column0;  // column == row + diagonal is a class with itself; far from it, any large number will do
  const int diagonal = int(ahead > (1 << 24) ? 1 << 24 : ahead < -(1 << 24) ? -(1 << 24) : ahead);
  const auto write = [&](int row, int column, float u, float w, bool mirrored) {
    if (block.u == nullptr) return;
    const int at = (tile_row + row) * block.pitch + tile_column + column;
    if constexpr (NEGATIVE) u = -u;
    block.u[at] = u, block.w[at] = w;
    if (mirrored) {
      const int mirror = (tile_column + column) * block.pitch + tile_row + row;
      block.u_mirror[mirror] = u, block.w_mirror[mirror] = w;
    }
  };
  constexpr float CLOSE = HIGH ? 1.f / 32 : NEGATIVE ? 1.f / 64 : 1.f / 256;
  double sum = 0;
  unsigned close = 0;  // elements whose Gram form cancels
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    const int row = row_of(e, group), column = column_of(e, member);
    if (row >= row_count || column >= column_count || (block.symmetric && column < row + diagonal)) continue;
    const int64_t i = row0 + row, j = column0 + column;
    if (column == row + diagonal || (rows.groups != nullptr && rows.groups[i] == rows.groups[j])) {
      write(row, column, 0.f, 0.f, block.symmetric && column != row + diagonal);
      continue;
    }
    const float squares_a = rows.square_a[i] + rows.square_a[j], squares_b = rows.square_b[i] + rows.square_b[j];
    const float square_f = squares_a - 2 * sums.gram_a[e / 16][e / 4 % 4][e % 4],
                square_g = squares_b - 2 * sums.gram_b[e / 16][e / 4 % 4][e % 4];
    bool cancels = square_f < CLOSE * squares_a || square_g < CLOSE * squares_b;
    if constexpr (NEGATIVE) {  // the numerator is a difference of squares: also if f and g differ much in length
      const float lengths = squares_a / scale + squares_b * scale;
      cancels = cancels || lengths * lengths > 4 / (CLOSE * CLOSE) * (square_f * square_g);
    }
    if (cancels) {
      close |= 1u << e;
      continue;
    }
    const PairValue value =
        pair_value(rows.own[i] + rows.own[j] - sums.cross[e / 16][e / 4 % 4][e % 4], square_f, square_g, block.smallest);
    sum += value.cosine;
    write(row, column, value.u, value.w, block.symmetric);
  }

  // Close pairs: from differences, one pair after the other by the whole warp.
  for (unsigned lanes = __ballot_sync(ALL_LANES, close != 0); lanes != 0;
       lanes = __ballot_sync(ALL_LANES, close != 0)) {
    const int owner = __ffs(lanes) - 1, e = __ffs(__shfl_sync(ALL_LANES, close, owner)) - 1;
    const int row = row_of(e, owner / 4), column = column_of(e, owner % 4);
    const float* const left_a = rows.a + (row0 + row) * rows.stride;
    const float* const left_b = rows.b + (row0 + row) * rows.stride;
    const float* const right_a = rows.a + (column0 + column) * rows.stride;
    const float* const right_b = rows.b + (column0 + column) * rows.stride;
    float numerator = 0.f, square_f = 0.f, square_g = 0.f;
    for (int64_t at = lane * 4; at < rows.stride; at += 128) {
      float la[4], lb[4], ra[4], rb[4];
      load<4>(left_a + at, la), load<4>(left_b + at, lb), load<4>(right_a + at, ra), load<4>(right_b + at, rb);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float f = ra[k] - la[k], g = rb[k] - lb[k];
        numerator += f * g, square_f += f * f, square_g += g * g;
      }
    }
    numerator = warp_sum(numerator), square_f = warp_sum(square_f), square_g = warp_sum(square_g);
    if (lane == owner) {
      const PairValue value = pair_value(numerator, square_f, square_g, block.smallest);
      sum += value.cosine;
      write(row, column, value.u, value.w, block.symmetric);
      close &= close - 1;
    }
  }

  sum = warp_sum(sum);
  __syncthreads();  // every warp is done with the stages
  double* const warp_sums = reinterpret_cast<double*>(shared_bytes);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int other = 1; other < 2 * WARP_ROWS; ++other) sum += warp_sums[other];
    block.partials[blockIdx.y * gridDim.x + blockIdx.x] += block.symmetric ? 2 * sum : sum;
  }
}

template <bool HIGH, int WARP_ROWS>
__global__ void __launch_bounds__(PairTile<WARP_ROWS>::THREADS, WARP_ROWS == 2 ? 2 : 1)
    pair_tiles(PairRows rows, PairBlock block) {
  using Tile = PairTile<WARP_ROWS>;
  SFM_SHARED(shared_bytes);
  float* const shared = reinterpret_cast<float*>(shared_bytes);
  const int tile_row = blockIdx.y * Tile::ROWS, tile_column = blockIdx.x * PAIR_TILE_COLUMNS;
  const int64_t row0 = block.row + tile_row, column0 = block.column + tile_column;  // classes
  if (block.symmetric && column0 + PAIR_TILE_COLUMNS <= row0) return;               // below the diagonal
  const int row_count = block.rows - tile_row, column_count = block.columns - tile_column;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;

  const auto stage = [&](int index) {
    float* to = shared + index % PAIR_STAGES * Tile::STAGE;
    const int k = index * PAIR_DEPTH;
    stage_rows<Tile::ROWS, Tile::THREADS>(to, rows.a + row0 * rows.stride, rows.stride, row_count, k);
    stage_rows<Tile::ROWS, Tile::THREADS>(to + Tile::ROWS * PAIR_PITCH, rows.b + row0 * rows.stride, rows.stride,
                                          row_count, k);
    to += 2 * Tile::ROWS * PAIR_PITCH;
    stage_rows<PAIR_TILE_COLUMNS, Tile::THREADS>(to, rows.a + column0 * rows.stride, rows.stride, column_count, k);
    stage_rows<PAIR_TILE_COLUMNS, Tile::THREADS>(to + PAIR_TILE_COLUMNS * PAIR_PITCH, rows.b + column0 * rows.stride,
                                                 rows.stride, column_count, k);
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
    const float* from = shared + step % PAIR_STAGES * Tile::STAGE;
    const float* row_a = from + warp_row * PAIR_PITCH;
    const float* row_b = row_a + Tile::ROWS * PAIR_PITCH;
    const float* column_a = from + (2 * Tile::ROWS + warp_column) * PAIR_PITCH;
    const float* column_b = column_a + PAIR_TILE_COLUMNS * PAIR_PITCH;
#pragma unroll
    for (int k = 0; k < PAIR_DEPTH; k += 8) {
      Fragment<HIGH, 4> left_a[2], left_b[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_a<HIGH>(left_a[m], row_a + m * 16 * PAIR_PITCH + k, PAIR_PITCH, group, member);
        load_a<HIGH>(left_b[m], row_b + m * 16 * PAIR_PITCH + k, PAIR_PITCH, group, member);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Fragment<HIGH, 2> right_a, right_b;
        load_b_columns<HIGH>(right_a, column_a + n * 8 * PAIR_PITCH + k, PAIR_PITCH, group, member);
        load_b_columns<HIGH>(right_b, column_b + n * 8 * PAIR_PITCH + k, PAIR_PITCH, group, member);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<HIGH>(sums.gram_a[m][n], left_a[m], right_a);
          multiply<HIGH>(sums.gram_b[m][n], left_b[m], right_b);
          multiply<HIGH>(sums.cross[m][n], left_a[m], right_b);
          multiply<HIGH>(sums.cross[m][n], left_b[m], right_a);
        }
      }
    }
  }
  finish_pairs<HIGH, WARP_ROWS, false>(rows, block, sums, shared_bytes, 1.f);
}

}  // namespace sfm
