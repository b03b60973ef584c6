// The steps from the partial sums of flow alignment's forward to the loss and the backward's factors, shared by several
// kernels.
#pragma once

#include "common.cuh"

namespace sfm {

constexpr int FINISH_COLUMNS = 32;  // per block of the finish kernel

enum Stage : int { MEAN_ONLY = 8, CLASS_END = 9 };  // what the finish kernel does beside the kinds of one pass

// What the forward kernels write for the finish kernel.
struct Workspace {
  float* sums;        // (chunks, 2, dims): column sums of t (or t - a) about the origin, and of a
  double* scalars;    // (blocks, 3): sums of a.t, a.a, t.t; for a cosine per class (chunks, 1) of the loss
  double* tiles;      // (finish blocks, 2): |mean|^2 and mean . sum a
  unsigned* counter;  // finish blocks (or tiles) that are done
  unsigned* arrived;  // (tiles,): blocks of each tile of columns that have written their sums, if they finish themselves
  float* origin;      // (dims,): the row that flow_sums subtracted from every row of features instead of the shift
  float* mean;        // (dims,), class cosine: mean of all t about the origin,
  float* kept_mean;   // (dims,) and the same as the backward reads it, after m has been rounded to float32
};

// Weight of a squared sum over the other classes in the decoupled kind; a single class has none, and alpha 1.
__device__ __forceinline__ double others_factor(double count, int dims, float alpha) {
  const double rest = count > 1 ? count - 1 : 1;
  return (1 - double(alpha)) / (rest * rest * count * dims);
}

// The loss, p and q from the sums a.t, a.a, t.t, |mean|^2, mean . sum a; returns q. Not for a cosine per class.
__device__ __forceinline__ double finish_scalars(const double (&total)[5], int stage, double count, int dims, float eps,
                                                 float weight, float* loss, float* factors) {
  const double elements = count * dims, scale = count / (count - 1) * (count / (count - 1));
  double p = 0, q = 0, result = 0;
  if (stage == GLOBAL_COSINE) {
    const double square_t = total[2] - count * total[3], square_b = square_t < 0 ? 0 : square_t;  // NaN stays NaN
    const double limit = double(eps) * eps, dot = total[0] - total[4], length = sqrt(total[1]) * sqrt(square_b);
    const bool is_short = scale * total[1] < limit || scale * square_b < limit;
    // + 0 * length: squares that overflow float32 give NaN instead of a cosine of 0.
    const double cosine = is_short ? dot * 0 : dot / length + 0 * length;
    result = 1 - cosine;
    p = is_short ? 0 : -1 / length;
    q = is_short ? 0 : cosine / square_b;
  } else if (stage == DECOUPLED_MSE) {
    const double others = others_factor(count, dims, weight);
    result = weight * total[2] / elements + others * ((count - 2) * total[3] + total[2]);
    q = 2 * double(weight) / elements + 2 * others;
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

// Computes m and r, or (class cosine) the means, from a column's sums of t and of a over all chunks. Returns |mean|^2
// and mean . sum a of the column.
struct ColumnShare {
  double square, cross;
};
__device__ __forceinline__ ColumnShare finish_column(int stage, int64_t classes, int dims, float weight,
                                                     const float* __restrict__ shift, float origin, int column,
                                                     double sum_t, double sum_a, float* columns, const Workspace& work) {
  const double count = double(classes), mean = sum_t / count;
  if (stage == CLASS_END) {
    columns[dims + column] = float(-mean);
  } else if (stage == DECOUPLED_MSE) {
    const double decoupled = 2 * others_factor(count, dims, weight) * (count - 2);
    columns[column] = 0.f, columns[dims + column] = float(decoupled * sum_t);
  } else {
    const double pivot = double(origin) - shift[column];
    const float m = float(mean + pivot);
    columns[column] = m;
    if (stage == MEAN_ONLY) {
      work.mean[column] = float(mean), work.kept_mean[column] = float(m - pivot);
    } else {  // r is q times the rounding error of m; the global cosine multiplies by q last
      const double lost = m - pivot - mean, factor = stage == FLOW_MSE ? count / (count - 1) : 2;
      const double q = stage == GLOBAL_COSINE ? 1 : 2 * factor / ((count - 1) * dims);
      columns[dims + column] = float(q * lost);
    }
  }
  return {stage == DECOUPLED_MSE ? sum_t * sum_t : mean * mean, mean * sum_a};
}

// Loss, p and q from the partial sums of all blocks; called by all THREADS of the last block to write its own. parts:
// 5 * WARPS doubles of shared memory.
__device__ __forceinline__ void finish_loss(int stage, int64_t classes, int dims, int64_t blocks, unsigned shares,
                                            float eps, float weight, float* loss, float* factors, float* columns,
                                            const Workspace& work, double* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const volatile double *tiles = work.tiles, *scalars = work.scalars;
  const int per_block = stage == CLASS_END ? 1 : 3;
  double total[5] = {};  // a.t, a.a, t.t, |mean|^2, mean . sum a
  for (int64_t block = threadIdx.x; block < blocks; block += THREADS) {
    for (int k = 0; k < per_block; ++k) total[k] += scalars[block * per_block + k];
  }
  for (unsigned tile = threadIdx.x; tile < shares; tile += THREADS) {
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
      *loss = float(total[0] / classes);  // the factors of a cosine per class are already written
    } else {
      parts[0] = finish_scalars(total, stage, double(classes), dims, eps, weight, loss, factors);
    }
  }
  if (stage != GLOBAL_COSINE) return;
  __syncthreads();
  const double q = parts[0];
  volatile float* rest = columns + dims;
  for (int at = threadIdx.x; at < dims; at += THREADS) rest[at] = float(q * rest[at]);
}

}  // namespace sfm
