// The kernel that computes the loss and the backward's factors from the partial sums of flow alignment's forward.
#pragma once

#include "flow_totals.cuh"

namespace sfm {

// Adds the chunks' column sums (a block has 32 columns); the last block to finish computes the loss, p and q from them.
static __global__ void __launch_bounds__(THREADS, RESIDENT)
    flow_finish(int stage, int64_t classes, int dims, int64_t chunks, int64_t blocks, float eps, float weight,
                const float* __restrict__ shift, float* __restrict__ loss, float* __restrict__ factors,
                float* __restrict__ columns, Workspace work) {
  SFM_SHARED(shared);
  double* parts = reinterpret_cast<double*>(shared);  // (2, THREADS), then (5, WARPS)
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
    ColumnShare share{};
    if (column < dims) {
      share = finish_column(stage, classes, dims, weight, shift, work.origin[column], column, sum_t, sum_a, columns, work);
    }
    __threadfence();  // the last block also reads the columns
    __syncwarp();
    const double square = warp_sum(share.square), cross = warp_sum(share.cross);
    if (lane == 0) {
      work.tiles[blockIdx.x * 2] = square, work.tiles[blockIdx.x * 2 + 1] = cross;
      __threadfence();
      *done = atomicAdd(work.counter, 1u);
    }
  }
  if (stage == MEAN_ONLY) return;
  __syncthreads();
  if (*done + 1 != gridDim.x) return;  // only the last block continues
  __threadfence();
  finish_loss(stage, classes, dims, blocks, gridDim.x, eps, weight, loss, factors, columns, work, parts);
}

}  // namespace sfm
