// The kernel that turns the partial sums of flow alignment's forward into the loss and what its backward needs.
#pragma once

#include "flow_passes.cuh"

namespace sfm {

// The loss, p and q from the sums a.t, a.a, t.t, |mean|^2, mean . sum a; returns q. Not for the class cosine.
__device__ __forceinline__ double finish_scalars(const double (&total)[5], int stage, double count, int dims, float eps,
                                                 float alpha, float* loss, float* factors) {
  const double elements = count * dims, scale = count / (count - 1) * (count / (count - 1));
  double p = 0, q = 0, result = 0;
  if (stage == GLOBAL_COSINE) {
    const double square_t = total[2] - count * total[3], square_b = square_t < 0 ? 0 : square_t;  // NaN stays NaN
    const double limit = double(eps) * eps, dot = total[0] - total[4], length = sqrt(total[1]) * sqrt(square_b);
    const bool is_short = scale * total[1] < limit || scale * square_b < limit;
    // + 0 * length: squares beyond float32 give NaN and don't pass for a right angle.
    const double cosine = is_short ? dot * 0 : dot / length + 0 * length;
    result = 1 - cosine;
    p = is_short ? 0 : -1 / length;
    q = is_short ? 0 : cosine / square_b;
  } else if (stage == DECOUPLED_MSE) {
    const double others = (1 - double(alpha)) / ((count - 1) * (count - 1) * elements);
    result = alpha * total[2] / elements + others * ((count - 2) * total[3] + total[2]);
    q = 2 * double(alpha) / elements + 2 * others;
    p = -q;
  } else {
    const double factor = stage == FLOW_MSE ? scale : 2 * count / (count - 1);
    const double error = total[2] - count * total[3];
    result = factor * (error < 0 ? 0 : error) / elements;
    q = 2 * factor / elements;
    p = -q;
  }
  *loss = float(result), factors[0] = float(p), factors[1] = float(q);
  return q;
}

// Adds the chunks' column sums (a block has 32 columns); the block that is last to finish makes loss, p and q of them.
static __global__ void __launch_bounds__(THREADS, RESIDENT)
    flow_finish(int stage, int64_t classes, int dims, int64_t chunks, int64_t blocks, float eps, float alpha,
                const float* __restrict__ shift, float* __restrict__ loss, float* __restrict__ factors,
                float* __restrict__ columns, Workspace work) {
  SFM_SHARED(shared);
  double* parts = reinterpret_cast<double*>(shared);  // (2, THREADS), then (3, WARPS)
  unsigned* done = reinterpret_cast<unsigned*>(parts + 2 * THREADS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * FINISH_COLUMNS + lane;
  double sum_t = 0, sum_a = 0;
  if (column < dims) {
    for (int64_t chunk = warp; chunk < chunks; chunk += WARPS) {
      sum_t += work.sums[chunk * 2 * dims + column];
      if (stage == GLOBAL_COSINE) sum_a += work.sums[(chunk * 2 + 1) * dims + column];
    }
  }
  parts[threadIdx.x] = sum_t, parts[THREADS + threadIdx.x] = sum_a;
  __syncthreads();
  if (warp == 0) {
    for (int w = 1; w < WARPS; ++w) sum_t += parts[w * 32 + lane], sum_a += parts[THREADS + w * 32 + lane];
    const double count = double(classes), mean = sum_t / count;
    if (column < dims && stage == CLASS_END) {
      columns[dims + column] = float(-mean);
    } else if (column < dims && stage == DECOUPLED_MSE) {
      const double decoupled = 2 * (1 - double(alpha)) * (count - 2) / ((count - 1) * (count - 1) * count * dims);
      columns[column] = 0.f, columns[dims + column] = float(decoupled * sum_t);
    } else if (column < dims) {
      const double pivot = double(work.origin[column]) - shift[column];
      const float m = float(mean + pivot);
      columns[column] = m;
      if (stage == MEAN_ONLY) {
        work.mean[column] = float(mean), work.kept_mean[column] = float(m - pivot);
      } else {  // r is q times what rounding m has added; the global cosine's q comes last
        const double lost = m - pivot - mean, factor = stage == FLOW_MSE ? count / (count - 1) : 2;
        const double q = stage == GLOBAL_COSINE ? 1 : 2 * factor / ((count - 1) * dims);
        columns[dims + column] = float(q * lost);
      }
    }
    __syncwarp();  // the columns, too, are for the last block
    const double square = warp_sum(stage == DECOUPLED_MSE ? sum_t * sum_t : mean * mean),
                 cross = warp_sum(mean * sum_a);
    if (lane == 0) {
      work.tiles[blockIdx.x * 2] = square, work.tiles[blockIdx.x * 2 + 1] = cross;
      __threadfence();
      *done = atomicAdd(work.counter, 1u);
    }
  }
  if (stage == MEAN_ONLY) return;
  __syncthreads();
  if (*done + 1 != gridDim.x) return;  // from here on the last block alone
  __threadfence();

  const volatile double* tiles = work.tiles;
  const int per_block = stage == CLASS_END ? 1 : 3;
  double total[5] = {};  // a.t, a.a, t.t, |mean|^2, mean . sum a
  for (int64_t block = threadIdx.x; block < blocks; block += THREADS) {
    for (int k = 0; k < per_block; ++k) total[k] += work.scalars[block * per_block + k];
  }
  for (unsigned tile = threadIdx.x; tile < gridDim.x; tile += THREADS) {
    total[3] += tiles[tile * 2], total[4] += tiles[tile * 2 + 1];
  }
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    total[k] = warp_sum(total[k]);
    if (lane == 0) parts[k * WARPS + warp] = total[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 0; k < 5; ++k) {
      for (int w = 1; w < WARPS; ++w) total[k] += parts[k * WARPS + w];
    }
    if (stage == CLASS_END) {
      *loss = float(total[0] / classes);  // the class cosine's factors are written
    } else {
      parts[0] = finish_scalars(total, stage, double(classes), dims, eps, alpha, loss, factors);
    }
  }
  if (stage != GLOBAL_COSINE) return;
  __syncthreads();
  const double q = parts[0];
  volatile float* rest = columns + dims;
  for (int at = threadIdx.x; at < dims; at += THREADS) rest[at] = float(q * rest[at]);
}

}  // namespace sfm
