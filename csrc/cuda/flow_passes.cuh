// Kernels of flow alignment's forward that read the features: one pass of sums, and one with a cosine per class.
#pragma once

#include "flow_totals.cuh"

namespace sfm {

// The row to subtract from the features before all sums. |sum of centred rows|^2 = sum of squares - C |mean|^2 cancels
// if features are far from `shift` and close together, so it is the first item (minus a_0 if t - a is summed). Any row
// would do, as long as m adds back its difference from the shift. The decoupled kind needs absolute values.
template <int VEC, typename T>
__device__ __forceinline__ void first_row(const Rows<T>& rows, const float* centers, const float* shift, int kind,
                                          int column, float (&origin)[VEC]) {
  // A class 0 without items has no row to read; its mean, and so the loss, is NaN for every choice of the row.
  if (kind == DECOUPLED_MSE || (rows.offsets != nullptr && rows.offsets[0] >= rows.offsets[1])) {
    return load<VEC>(shift + column, origin);
  }
  const int64_t row = rows.offsets == nullptr ? 0 : rows.order[rows.offsets[0]];
  load<VEC>(rows.data + row * rows.stride + column, origin);
  if (kind < FLOW_MSE) return;
  float a[VEC];
  load<VEC>(centers + column, a);
#pragma unroll
  for (int k = 0; k < VEC; ++k) origin[k] -= a[k];
}

// What blocks that finish themselves need besides their rows.
struct Finish {
  int stage;
  float eps, weight;
  float *loss, *factors, *columns;
};

// Whether this block is the last of `count` to arrive, for all its threads; the last one sees the others' writes.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned count, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u);
  __syncthreads();
  const bool last = *flag + 1 == count;
  __threadfence();
  return last;
}

// The last block of each tile of columns adds up the tile's chunks, and the last of those blocks computes the loss. A
// warp takes every eighth chunk.
template <int VEC>
__device__ __forceinline__ void finish_tile(const float* __restrict__ shift, int64_t classes, int dims,
                                            const Finish& finish, const Workspace& work, unsigned char* shared) {
  double* const parts = reinterpret_cast<double*>(shared);  // (2, WARPS, 32 * VEC)
  unsigned* const flag = reinterpret_cast<unsigned*>(parts + WARPS * 64 * VEC);
  const unsigned chunks = gridDim.y, tiles = gridDim.x;
  if (!last_to_arrive(work.arrived + blockIdx.x, chunks, flag)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = (blockIdx.x * 32 + lane) * VEC;
  double sum_t[VEC] = {}, sum_a[VEC] = {};
  if (first < dims) {
#pragma unroll 4
    for (unsigned chunk = warp; chunk < chunks; chunk += WARPS) {
      const float* from = work.sums + int64_t(chunk) * 2 * dims + first;
      float t[VEC], a[VEC];
      load<VEC>(from, t), load<VEC>(from + dims, a);
#pragma unroll
      for (int k = 0; k < VEC; ++k) sum_t[k] += t[k], sum_a[k] += a[k];
    }
  }
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    parts[warp * 32 * VEC + k * 32 + lane] = sum_t[k];
    parts[(WARPS + warp) * 32 * VEC + k * 32 + lane] = sum_a[k];
  }
  __syncthreads();
  double square = 0, cross = 0;
  for (int index = threadIdx.x; index < 32 * VEC; index += THREADS) {  // index = k * 32 + lane of a column
    const int column = (blockIdx.x * 32 + index % 32) * VEC + index / 32;
    if (column >= dims) continue;
    double t = parts[index], a = parts[WARPS * 32 * VEC + index];
    for (int w = 1; w < WARPS; ++w) t += parts[w * 32 * VEC + index], a += parts[(WARPS + w) * 32 * VEC + index];
    const volatile float* const origin = work.origin;
    const ColumnShare share = finish_column(finish.stage, classes, dims, finish.weight, shift, origin[column], column, t,
                                            a, finish.columns, work);
    square += share.square, cross += share.cross;
  }
  if (finish.stage == MEAN_ONLY) return;
  square = warp_sum(square), cross = warp_sum(cross);
  __syncthreads();
  if (lane == 0) parts[warp] = square, parts[WARPS + warp] = cross;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < WARPS; ++w) square += parts[w], cross += parts[WARPS + w];
    work.tiles[blockIdx.x * 2] = square, work.tiles[blockIdx.x * 2 + 1] = cross;
  }
  if (!last_to_arrive(work.counter, tiles, flag)) return;
  finish_loss(finish.stage, classes, dims, int64_t(chunks) * tiles, tiles, finish.eps, finish.weight, finish.loss,
              finish.factors, finish.columns, work, parts);
}

// FUSED: the last blocks finish; the workspace's counters must be zero before. Otherwise `flow_finish` follows.
// Compiled for four blocks per multiprocessor (16-bit: two), so that the registers of the finish don't slow down all
// blocks.
template <typename T, int VEC, bool FUSED>
__global__ void __launch_bounds__(THREADS, FUSED ? (VEC == 8 ? 2 : 4) : RESIDENT)
    flow_sums(Rows<T> rows, const float* __restrict__ centers, const float* __restrict__ shift, int64_t classes,
              int dims, int64_t chunk_rows, int kind, Finish finish, Workspace work) {
  SFM_SHARED(shared);
  float* column_parts = reinterpret_cast<float*>(shared);                             // (WARPS, 2, 32 * VEC)
  double* scalar_parts = reinterpret_cast<double*>(column_parts + WARPS * 64 * VEC);  // (WARPS, 3)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = (blockIdx.x * 32 + lane) * VEC;
  const int64_t start = blockIdx.y * chunk_rows, stop = min(classes, start + chunk_rows);
  if (!FUSED && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *work.counter = 0;

  float sum_t[VEC] = {}, sum_a[VEC] = {};
  double dot = 0, square_a = 0, square_t = 0;
  if (column < dims) {
    float offset[VEC];
    first_row<VEC>(rows, centers, shift, kind, column, offset);
    if (blockIdx.y == 0 && warp == 0) store<VEC>(work.origin + column, offset);
    float part_dot = 0.f, part_a = 0.f, part_t = 0.f;  // of a few rows, then added in float64
    int held = 0;
    const auto use = [&](int64_t, const float (&t)[VEC], const float (&a)[VEC]) {
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const float value = kind >= FLOW_MSE ? t[k] - a[k] : t[k];
        sum_t[k] += value;
        sum_a[k] += a[k];
        part_dot += value * a[k];
        part_a += a[k] * a[k];
        part_t += value * value;
      }
      if (++held == 8) {
        dot += part_dot, square_a += part_a, square_t += part_t;
        part_dot = part_a = part_t = 0.f;
        held = 0;
      }
    };
    if (kind == CLASS_COSINE) {
      for_each_class<VEC, false>(rows, centers, dims, start + warp, stop, WARPS, column, offset, use);
    } else {
      for_each_class<VEC, true>(rows, centers, dims, start + warp, stop, WARPS, column, offset, use);
    }
    dot += part_dot, square_a += part_a, square_t += part_t;
  }

#pragma unroll
  for (int k = 0; k < VEC; ++k) {  // lane-major for each k, so that a warp writes neighbouring words
    column_parts[(warp * 2 * VEC + k) * 32 + lane] = sum_t[k];
    column_parts[((warp * 2 + 1) * VEC + k) * 32 + lane] = sum_a[k];
  }
  dot = warp_sum(dot), square_a = warp_sum(square_a), square_t = warp_sum(square_t);
  if (lane == 0) {
    scalar_parts[warp * 3] = dot, scalar_parts[warp * 3 + 1] = square_a, scalar_parts[warp * 3 + 2] = square_t;
  }
  __syncthreads();
  for (int index = threadIdx.x; index < 64 * VEC; index += THREADS) {  // index = (which * VEC + k) * 32 + lane
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += column_parts[w * 64 * VEC + index];
    const int which = index / (32 * VEC), k = index / 32 % VEC;
    const int at = (blockIdx.x * 32 + index % 32) * VEC + k;
    if (at < dims) work.sums[(int64_t(blockIdx.y) * 2 + which) * dims + at] = sum;
  }
  if (threadIdx.x < 3) {
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += scalar_parts[w * 3 + threadIdx.x];
    work.scalars[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 3 + threadIdx.x] = sum;
  }
  if constexpr (FUSED) finish_tile<VEC>(shift, classes, dims, finish, work, shared);
}

// The loss, p and q of every class, b = t - mean. Second pass of the class cosine: `mean` is that of all t about the
// origin, and column sums of p a + q b of this chunk follow. ANCHORED, the only pass: `mean` is the anchor, `origin`
// the shift, and the columns m, r are written here.
template <typename T, int VEC, bool ANCHORED>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    flow_classes(Rows<T> rows, const float* __restrict__ centers, const float* __restrict__ origin,
                 const float* __restrict__ mean, const float* __restrict__ kept_mean, int64_t classes, int dims,
                 int64_t chunk_rows, float eps, float length_weight, float delta, float* __restrict__ factors,
                 float* __restrict__ columns, Workspace work) {
  SFM_SHARED(shared);
  float* block_factors = reinterpret_cast<float*>(shared);                // (WARPS, 2): p, q of the current classes
  double* losses = reinterpret_cast<double*>(block_factors + 2 * WARPS);  // (WARPS,)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t start = blockIdx.x * chunk_rows, stop = min(classes, start + chunk_rows);
  const double ratio = ANCHORED ? 1 : double(classes) / double(classes - 1), scale = ratio * ratio;
  if (blockIdx.x == 0 && threadIdx.x == 0) *work.counter = 0;
  float* partial = work.sums + int64_t(blockIdx.x) * 2 * dims;  // a thread reads back only its own writes
  double loss = 0;
  for (int64_t base = start; base < stop; base += WARPS) {
    const int64_t c = base + warp;
    if (c < stop) {
      float dot = 0.f, square_a = 0.f, square_b = 0.f;
      for (int column = lane * VEC; column < dims; column += 32 * VEC) {
        float offset[VEC], centre[VEC], a[VEC], t[VEC];
        load<VEC>(origin + column, offset);
        load<VEC>(mean + column, centre);
        load<VEC>(centers + c * dims + column, a);
        class_mean<VEC>(rows, c, column, offset, t);
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
          const float b = t[k] - centre[k];
          dot += a[k] * b, square_a += a[k] * a[k], square_b += b * b;
        }
      }
      dot = warp_sum(dot), square_a = warp_sum(square_a), square_b = warp_sum(square_b);
      if (lane == 0) {
        const double limit = double(eps) * eps, length = sqrt(double(square_a)) * sqrt(double(square_b));
        const bool is_short = scale * square_a < limit || scale * square_b < limit;
        const double cosine = is_short ? double(dot) * 0 : dot / length + 0 * length;  // NaN for NaN and infinity
        const float p = is_short ? 0.f : float(-1 / (classes * length));
        double slope = cosine;  // of the loss with log |b|
        loss += 1 - cosine;
        if constexpr (ANCHORED) {
          if (!is_short && length_weight != 0.f) {
            const double logarithm = log(double(square_b) / double(square_a)) / 2;
            // Huber's function of the logarithm; NaN stays.
            const double near = logarithm > delta ? delta : logarithm < -delta ? -delta : logarithm;
            loss += double(length_weight) * near * (2 * logarithm - near);
            slope += 2 * double(length_weight) * near;
          }
        }
        const float q = is_short ? 0.f : float(slope / (double(classes) * square_b));
        factors[c] = p, factors[classes + c] = q;
        block_factors[warp * 2] = p, block_factors[warp * 2 + 1] = q;
      }
    }
    if constexpr (!ANCHORED) {
      __syncthreads();
      for (int column = threadIdx.x * VEC; column < dims; column += THREADS * VEC) {
        float offset[VEC], centre[VEC], sum[VEC] = {};
        load<VEC>(origin + column, offset);
        load<VEC>(kept_mean + column, centre);
        if (base > start) load<VEC>(partial + column, sum);
        for (int w = 0; w < WARPS && base + w < stop; ++w) {
          float a[VEC], t[VEC];
          load<VEC>(centers + (base + w) * dims + column, a);
          class_mean<VEC>(rows, base + w, column, offset, t);
          const float p = block_factors[w * 2], q = block_factors[w * 2 + 1];
#pragma unroll
          for (int k = 0; k < VEC; ++k) sum[k] += p * a[k] + q * (t[k] - centre[k]);
        }
        store<VEC>(partial + column, sum);
      }
      __syncthreads();
    }
  }
  if constexpr (ANCHORED) {
    if (blockIdx.x == 0) {
      for (int column = threadIdx.x; column < dims; column += THREADS) {
        columns[column] = mean[column], columns[dims + column] = 0.f;
      }
    }
  }
  if (lane == 0) losses[warp] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < WARPS; ++w) loss += losses[w];
    work.scalars[blockIdx.x] = loss;
  }
}

}  // namespace sfm
