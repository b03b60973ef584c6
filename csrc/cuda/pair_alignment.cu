// Cosine alignment of every pair of classes: the sum and its gradient, with O(C * D) memory and a block of fixed size.
//
// The C x C pair matrix is divided into blocks of BLOCK_ROWS. For each block `pair_tiles` writes u and w of its pairs
// (and their transposes) to the workspace, and `pair_gradient` multiplies them by the classes. If all rows are asked
// for, blocks below the diagonal are skipped. Launches on a stream run one after the other, so the order of every sum
// is fixed.
#include <limits>
#include <type_traits>

#include "pair_update.cuh"

namespace sfm {
namespace {

constexpr int64_t BLOCK_ROWS = 2048, SMALL_BLOCK_ROWS = 1024;  // the small one's matrices fit in the L2 cache
constexpr int LARGE_TILE_BLOCKS = 264;  // larger tiles if they give at least two blocks for each of 132 multiprocessors

// Sums of squares, and copies of rows that aren't a multiple of 16 bytes; one warp per class. Zeroes the partial sums.
template <bool HIGH>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    pair_prepare(const float* __restrict__ a, const float* __restrict__ b, int64_t classes, int dims, int stride,
                 float* __restrict__ copy_a, float* __restrict__ copy_b, float* __restrict__ square_a,
                 float* __restrict__ square_b, float* __restrict__ own, double* __restrict__ partials,
                 int partial_count) {
  const int lane = threadIdx.x % 32;
  const int64_t c = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (blockIdx.x == 0) {
    for (int k = threadIdx.x; k < partial_count; k += THREADS) partials[k] = 0;
  }
  if (c >= classes) return;
  double sum_a = 0, sum_b = 0, sum_own = 0;
  for (int k = lane; k < stride; k += 32) {
    const float raw_a = k < dims ? a[c * dims + k] : 0.f, raw_b = k < dims ? b[c * dims + k] : 0.f;
    if (copy_a != nullptr) copy_a[c * stride + k] = raw_a, copy_b[c * stride + k] = raw_b;
    const double value_a = HIGH ? round_tf32(raw_a) : raw_a, value_b = HIGH ? round_tf32(raw_b) : raw_b;
    sum_a += value_a * value_a, sum_b += value_b * value_b, sum_own += value_a * value_b;
  }
  sum_a = warp_sum(sum_a), sum_b = warp_sum(sum_b), sum_own = warp_sum(sum_own);
  if (lane == 0) square_a[c] = float(sum_a), square_b[c] = float(sum_b), own[c] = float(sum_own);
}

// The power of two that scales rows of b to about the length of those of a, from a mean over a few classes that is the
// same in every block.
__device__ __forceinline__ float length_scale(const float* __restrict__ a, const float* __restrict__ b, int64_t classes,
                                              int dims, float* warp_values) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = classes * warp / WARPS;
  float square_a = 0.f, square_b = 0.f;
  for (int k = lane; k < dims; k += 32) {
    const float value_a = a[c * dims + k], value_b = b[c * dims + k];
    square_a += value_a * value_a, square_b += value_b * value_b;
  }
  square_a = warp_sum(square_a), square_b = warp_sum(square_b);
  const bool usable = square_a > 1e-30f && square_a < 1e30f && square_b > 1e-30f && square_b < 1e30f;
  if (lane == 0) warp_values[warp] = usable ? log2f(square_a / square_b) : 0.f;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < WARPS; ++w) sum += warp_values[w];
  return exp2f(rintf(sum / (2 * WARPS)));
}

// The inputs of `pair_gram`: the scale, sums of squares as its products compute them, own_i with
// own_i + own_j - (a_i.b_j + b_i.a_j) = f.g, copies of rows as above. One warp per class.
template <bool HIGH>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    gram_prepare(const float* __restrict__ a, const float* __restrict__ b, int64_t classes, int dims, int stride,
                 float* __restrict__ copy_a, float* __restrict__ copy_b, float* __restrict__ square_a,
                 float* __restrict__ square_b, float* __restrict__ own, float* __restrict__ scale_out,
                 double* __restrict__ partials, int partial_count) {
  SFM_SHARED(shared);
  const float scale = length_scale(a, b, classes, dims, reinterpret_cast<float*>(shared));
  const int lane = threadIdx.x % 32;
  const int64_t c = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (blockIdx.x == 0) {
    for (int k = threadIdx.x; k < partial_count; k += THREADS) partials[k] = 0;
    if (threadIdx.x == 0) *scale_out = scale;
  }
  if (c >= classes) return;
  double sum_a = 0, sum_b = 0, sum_s = 0;
  for (int k = lane; k < stride; k += 32) {
    const float value_a = k < dims ? a[c * dims + k] : 0.f, value_b = k < dims ? b[c * dims + k] : 0.f;
    if (copy_a != nullptr) copy_a[c * stride + k] = value_a, copy_b[c * stride + k] = value_b;
    sum_a += split_square<HIGH>(value_a), sum_b += split_square<HIGH>(value_b);
    sum_s += split_square<HIGH>(fmaf(scale, value_b, value_a));
  }
  sum_a = warp_sum(sum_a), sum_b = warp_sum(sum_b), sum_s = warp_sum(sum_s);
  if (lane != 0) return;
  square_a[c] = float(sum_a), square_b[c] = float(sum_b);
  own[c] = float((sum_s - sum_a - double(scale) * scale * sum_b) / (2 * double(scale)));
}

__global__ void __launch_bounds__(THREADS, RESIDENT)
    pair_finish(const double* __restrict__ partials, int partial_count, double* __restrict__ total) {
  SFM_SHARED(shared);
  double* const warp_sums = reinterpret_cast<double*>(shared);
  double sum = 0;
  for (int k = threadIdx.x; k < partial_count; k += THREADS) sum += partials[k];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WARPS; ++w) sum += warp_sums[w];
  *total = sum;
}

// The layout of the workspace, which depends only on the problem.
struct Plan {
  bool symmetric, copies;
  int64_t rows, stride, row_side, column_side, row_blocks, column_blocks;
  int partial_count;
  size_t squares, scale, copy, partials, matrices, bytes;  // offsets, and the total size

  explicit Plan(const PairProblem& problem) {
    rows = problem.row_stop - problem.row_start;
    symmetric = problem.row_start == 0 && problem.row_stop == problem.classes;
    copies = problem.dims % 4 != 0 || !aligned16(problem.a) || !aligned16(problem.b);
    stride = round_up(problem.dims, 4);
    const bool small = problem.gram && problem.classes > BLOCK_ROWS;
    const int64_t largest = problem.block_rows > 0 ? problem.block_rows : small ? SMALL_BLOCK_ROWS : BLOCK_ROWS;
    const auto side = [&](int64_t count) {  // blocks of about the same size
      const int64_t blocks = divide_up(count, largest), even = blocks > 0 ? round_up(divide_up(count, blocks), 128) : 4;
      return even < largest ? even : largest;
    };
    row_side = side(rows), column_side = side(problem.classes);
    row_blocks = divide_up(rows, row_side), column_blocks = divide_up(problem.classes, column_side);
    partial_count = int(divide_up(row_side, 64) * divide_up(column_side, PAIR_TILE_COLUMNS));
    const int matrix_count = !problem.need_gradient ? 0 : symmetric && row_blocks > 1 ? 4 : 2;
    squares = 0;
    scale = squares + size_t(round_up(3 * problem.classes * 4, 16));
    copy = scale + 16;
    partials = copy + (copies ? size_t(2 * problem.classes * stride * 4) : 0);
    matrices = partials + size_t(round_up(partial_count * 8, 16));
    bytes = matrices + size_t(matrix_count * row_side * column_side * 4);
  }
};

// Dynamic shared memory above 48 KiB must be requested.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <bool HIGH, bool GRAM, int WARP_ROWS>
cudaError_t launch_tiles(const PairRows& rows, const PairBlock& block, cudaStream_t stream) {
  using Tile = std::conditional_t<GRAM, GramTile<WARP_ROWS>, PairTile<WARP_ROWS>>;
  const auto kernel = [] {
    if constexpr (GRAM)
      return pair_gram<HIGH, WARP_ROWS>;
    else
      return pair_tiles<HIGH, WARP_ROWS>;
  }();
  SFM_RETURN_IF_ERROR(allow_shared(kernel, Tile::SHARED));
  const dim3 grid(unsigned(divide_up(block.columns, PAIR_TILE_COLUMNS)), unsigned(divide_up(block.rows, Tile::ROWS)));
  SFM_LAUNCH(kernel, grid, dim3(Tile::THREADS), Tile::SHARED, stream, rows, block);
  return cudaGetLastError();
}

template <bool HIGH, bool GRAM, int WARP_ROWS>
cudaError_t launch_gradient(const PairRows& rows, const GradientSides& sides, int side_count, int pitch, int dims,
                            cudaStream_t stream) {
  using Tile = std::conditional_t<GRAM, UpdateTile<WARP_ROWS>, GradientTile<WARP_ROWS>>;
  const auto kernel = [] {
    if constexpr (GRAM)
      return pair_update<HIGH, WARP_ROWS>;
    else
      return pair_gradient<HIGH, WARP_ROWS>;
  }();
  SFM_RETURN_IF_ERROR(allow_shared(kernel, Tile::SHARED));
  const int most = sides.side[0].rows > sides.side[1].rows ? sides.side[0].rows : sides.side[1].rows;
  const dim3 grid(unsigned(divide_up(dims, Tile::DIMS)), unsigned(divide_up(most, Tile::ROWS)), unsigned(side_count));
  SFM_LAUNCH(kernel, grid, dim3(Tile::THREADS), Tile::SHARED, stream, rows, sides, pitch, dims);
  return cudaGetLastError();
}

template <bool HIGH, bool GRAM>
cudaError_t run(const PairProblem& problem, const Plan& plan, double* total, float* gradient, char* workspace,
                int shared_limit, cudaStream_t stream) {
  const int dims = int(problem.dims);
  float* const squares = reinterpret_cast<float*>(workspace + plan.squares);
  float* const scale = reinterpret_cast<float*>(workspace + plan.scale);
  float* const copy_a = plan.copies ? reinterpret_cast<float*>(workspace + plan.copy) : nullptr;
  float* const copy_b = plan.copies ? copy_a + problem.classes * plan.stride : nullptr;
  double* const partials = reinterpret_cast<double*>(workspace + plan.partials);
  const PairRows rows{plan.copies ? copy_a : problem.a,
                      plan.copies ? copy_b : problem.b,
                      squares,
                      squares + problem.classes,
                      squares + 2 * problem.classes,
                      problem.groups,
                      plan.stride,
                      scale};
  const dim3 prepare_grid(unsigned(divide_up(problem.classes, WARPS)));
  if constexpr (GRAM) {
    const auto prepare = gram_prepare<HIGH>;
    SFM_LAUNCH(prepare, prepare_grid, dim3(THREADS), WARPS * sizeof(float), stream, problem.a, problem.b,
               problem.classes, dims, int(plan.stride), copy_a, copy_b, squares, squares + problem.classes,
               squares + 2 * problem.classes, scale, partials, plan.partial_count);
  } else {
    const auto prepare = pair_prepare<HIGH>;
    SFM_LAUNCH(prepare, prepare_grid, dim3(THREADS), 0, stream, problem.a, problem.b, problem.classes, dims,
               int(plan.stride), copy_a, copy_b, squares, squares + problem.classes, squares + 2 * problem.classes,
               partials, plan.partial_count);
  }
  SFM_RETURN_IF_ERROR(cudaGetLastError());

  const auto large_tiles = [&](int64_t blocks) {
    return problem.tile_size == 0 ? blocks >= LARGE_TILE_BLOCKS : problem.tile_size == 2;
  };
  float smallest = problem.eps * problem.eps;
  if (smallest == 0.f && problem.eps > 0.f) smallest = std::numeric_limits<float>::denorm_min();
  const int pitch = int(plan.column_side);
  const int64_t matrix = plan.row_side * plan.column_side;
  float* const u = problem.need_gradient ? reinterpret_cast<float*>(workspace + plan.matrices) : nullptr;
  for (int64_t row_block = 0; row_block < plan.row_blocks; ++row_block) {
    const int64_t row = row_block * plan.row_side;  // among the rows asked for
    const int row_count = int(plan.rows - row < plan.row_side ? plan.rows - row : plan.row_side);
    for (int64_t column_block = plan.symmetric ? row_block : 0; column_block < plan.column_blocks; ++column_block) {
      const int64_t column = column_block * plan.column_side, left = problem.classes - column;
      const int column_count = int(left < plan.column_side ? left : plan.column_side);
      const bool mirror = plan.symmetric && row_block != column_block;
      PairBlock block{};
      block.row = problem.row_start + row, block.column = column, block.rows = row_count, block.columns = column_count;
      block.symmetric = plan.symmetric, block.smallest = smallest, block.pitch = pitch, block.partials = partials;
      if (u != nullptr) {
        block.u = u, block.w = u + matrix;
        block.u_mirror = mirror ? u + 2 * matrix : u, block.w_mirror = mirror ? u + 3 * matrix : u + matrix;
      }
      const bool large = HIGH && large_tiles(divide_up(row_count, 128) * divide_up(column_count, PAIR_TILE_COLUMNS));
      if constexpr (HIGH) {
        if (large) SFM_RETURN_IF_ERROR((launch_tiles<HIGH, GRAM, 4>(rows, block, stream)));
      }
      if (!large) SFM_RETURN_IF_ERROR((launch_tiles<HIGH, GRAM, 2>(rows, block, stream)));
      if (!problem.need_gradient) continue;

      GradientSides sides{};
      sides.side[0] = {block.u,          block.w, block.row, column, row_count, column_count, gradient + row * dims,
                       column_block == 0};
      if (mirror) {
        sides.side[1] = {block.u_mirror, block.w_mirror,           column,        block.row, column_count,
                         row_count,      gradient + column * dims, row_block == 0};
      }
      const int side_count = mirror ? 2 : 1;
      const int most_shared = GRAM ? UpdateTile<4>::SHARED : GradientTile<4>::SHARED;
      const bool large_gradient = most_shared <= shared_limit &&
                                  large_tiles(side_count * divide_up(row_count, 128) * divide_up(dims, 128));
      SFM_RETURN_IF_ERROR((large_gradient ? launch_gradient<HIGH, GRAM, 4> : launch_gradient<HIGH, GRAM, 2>)(
          rows, sides, side_count, pitch, dims, stream));
    }
  }
  SFM_LAUNCH(pair_finish, dim3(1), dim3(THREADS), WARPS * sizeof(double), stream, partials, plan.partial_count, total);
  return cudaGetLastError();
}

}  // namespace

size_t pair_alignment_workspace_bytes(const PairProblem& problem) { return Plan(problem).bytes; }

cudaError_t pair_alignment(const PairProblem& problem, double* total, float* gradient, void* workspace,
                           cudaStream_t stream) {
  int device = 0, shared_limit = 0;
  SFM_RETURN_IF_ERROR(cudaGetDevice(&device));
  SFM_RETURN_IF_ERROR(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const Plan plan(problem);
  const auto chosen = problem.gram ? (problem.high ? run<true, true> : run<false, true>)
                                   : (problem.high ? run<true, false> : run<false, false>);
  return chosen(problem, plan, total, gradient, static_cast<char*>(workspace), shared_limit, stream);
}

}  // namespace sfm
