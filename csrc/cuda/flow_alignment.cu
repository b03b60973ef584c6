// Flow alignment in O(C * D): one pass over the features for the loss (two for the class cosine, whose second one is the
// only one of the anchored cosine), one read and one write in the backward.
//
// Every kernel divides the C x D rows into tiles of 32 * VEC columns and chunks of classes; a warp takes one class at a
// time. Chunks write partial sums to the workspace, and the finish kernel adds them in a fixed order. There are no
// floating-point atomics.
#include "flow_finish.cuh"
#include "flow_passes.cuh"

namespace sfm {
namespace {

constexpr size_t FINISH_SHARED = 2 * THREADS * sizeof(double) + 16;
constexpr int CLASS_CHUNKS = 1024;  // maximum number of chunks in the pass with a cosine per class

// Writes grad_output / n_c * (p_c a_c + q_c (t_c - m) + r) for every item of class c.
template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    flow_gradient(const float* __restrict__ grad_output, Rows<T> rows, const float* __restrict__ centers,
                  const float* __restrict__ shift, const float* __restrict__ factors, int64_t factor_count,
                  const float* __restrict__ columns, int64_t classes, int dims, int64_t chunk_rows,
                  T* __restrict__ gradient) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = (blockIdx.x * 32 + lane) * VEC;
  if (column >= dims) return;
  const int64_t start = blockIdx.y * chunk_rows, stop = min(classes, start + chunk_rows);
  float offset[VEC], mean[VEC], rest[VEC];
  load<VEC>(shift + column, offset);
  load<VEC>(columns + column, mean);
  load<VEC>(columns + dims + column, rest);
#pragma unroll
  for (int k = 0; k < VEC; ++k) {  // t - m = (x - sum) - lost, exact also where t and m are far larger
    const float sum = offset[k] + mean[k], high = sum - offset[k], lost = (offset[k] - (sum - high)) + (mean[k] - high);
    offset[k] = sum, mean[k] = lost;
  }
  const float upstream = *grad_output;
  for_each_class<VEC, true>(
      rows, centers, dims, start + warp, stop, WARPS, column, offset,
      [&](int64_t c, const float (&t)[VEC], const float (&a)[VEC]) {
        const float p = factors[factor_count == 1 ? 0 : c], q = factors[factor_count == 1 ? 1 : factor_count + c];
        const int64_t begin = rows.offsets == nullptr ? c : rows.offsets[c],
                      end = rows.offsets == nullptr ? c + 1 : rows.offsets[c + 1];
        const float factor = upstream / float(end - begin);
        float value[VEC];
#pragma unroll
        for (int k = 0; k < VEC; ++k) value[k] = factor * (p * a[k] + q * (t[k] - mean[k]) + rest[k]);
        for (int64_t item = begin; item < end; ++item) {
          store<VEC>(gradient + (rows.order == nullptr ? item : rows.order[item]) * dims + column, value);
        }
      });
}

// 16-byte accesses need every row to start at a multiple of 16 bytes. The operations' buffers do if the dims allow it.
template <typename T>
bool wide_rows(const Features& features, const void* centers, const void* shift, int64_t dims) {
  return dims % WIDE<T> == 0 && features.row_stride % WIDE<T> == 0 && aligned16(features.data) && aligned16(centers) &&
         aligned16(shift);
}

struct Sizes {
  int64_t chunks = 0, blocks = 0, finish_blocks = 0, tiles = 0;
};
Sizes largest(int64_t classes, int64_t dims) {
  Sizes sizes;
  for (const int vec : {1, 4, 8}) {
    const Partition cut = partition(classes, dims, vec);
    if (cut.chunks > sizes.chunks) sizes.chunks = cut.chunks;
    if (cut.tiles > sizes.tiles) sizes.tiles = cut.tiles;
    if (cut.chunks * cut.tiles > sizes.blocks) sizes.blocks = cut.chunks * cut.tiles;
  }
  const int64_t rows = divide_up(classes, WARPS), second = rows < CLASS_CHUNKS ? rows : CLASS_CHUNKS;
  if (second > sizes.chunks) sizes.chunks = second;
  if (second > sizes.blocks) sizes.blocks = second;
  sizes.finish_blocks = divide_up(dims, FINISH_COLUMNS);
  return sizes;
}

// The pass with a cosine per class and the sum of its partial results; arguments as in flow_classes.
template <typename T, int VEC, bool ANCHORED>
cudaError_t class_pass(const Features& features, const float* centers, const float* origin, const float* mean,
                       const float* shift, int64_t classes, int dims, float eps, float length_weight, float delta, float* loss,
                       float* factors, float* columns, Workspace work, cudaStream_t stream) {
  const int64_t chunk_rows = round_up(divide_up(classes, CLASS_CHUNKS), WARPS), chunks = divide_up(classes, chunk_rows);
  const auto kernel = flow_classes<T, VEC, ANCHORED>;
  SFM_LAUNCH(kernel, dim3(unsigned(chunks)), dim3(THREADS), WARPS * 16, stream, typed_rows<T>(features), centers,
             origin, mean, work.kept_mean, classes, dims, chunk_rows, eps, length_weight, delta, factors, columns, work);
  SFM_RETURN_IF_ERROR(cudaGetLastError());
  const int stage = CLASS_END, summed = ANCHORED ? 0 : dims;  // columns
  const dim3 grid(unsigned(ANCHORED ? 1 : divide_up(dims, FINISH_COLUMNS)));
  SFM_LAUNCH(flow_finish, grid, dim3(THREADS), FINISH_SHARED, stream, stage, classes, summed, chunks, chunks, eps,
             length_weight, shift, loss, factors, columns, work);
  return cudaGetLastError();
}

template <typename T, int VEC, bool FUSED>
cudaError_t flow_forward(const Features& features, const float* centers, const float* shift, const float* anchor,
                         int64_t classes, int dims, int kind, float eps, float weight, float delta, float* loss, float* factors,
                         float* columns, Workspace work, cudaStream_t stream) {
  if (kind == ANCHORED_COSINE) {
    return class_pass<T, VEC, true>(features, centers, shift, anchor, shift, classes, dims, eps, weight, delta, loss,
                                    factors, columns, work, stream);
  }
  const Partition cut = partition(classes, dims, VEC);
  const Rows<T> rows = typed_rows<T>(features);
  const dim3 grid(unsigned(cut.tiles), unsigned(cut.chunks)), finish_grid(unsigned(divide_up(dims, FINISH_COLUMNS)));
  const size_t sums_shared = FUSED ? WARPS * 64 * VEC * sizeof(double) + 16
                                   : WARPS * 64 * VEC * sizeof(float) + WARPS * 3 * sizeof(double);
  const int first_stage = kind == CLASS_COSINE ? int(MEAN_ONLY) : kind;
  const Finish finish{first_stage, eps, weight, loss, factors, columns};
  if constexpr (FUSED) {
    SFM_RETURN_IF_ERROR(cudaMemsetAsync(work.counter, 0, size_t(1 + cut.tiles) * sizeof(unsigned), stream));
  }
  const auto sums = flow_sums<T, VEC, FUSED>;
  SFM_LAUNCH(sums, grid, dim3(THREADS), sums_shared, stream, rows, centers, shift, classes, dims, cut.chunk_rows, kind,
             finish, work);
  SFM_RETURN_IF_ERROR(cudaGetLastError());
  if constexpr (!FUSED) {
    SFM_LAUNCH(flow_finish, finish_grid, dim3(THREADS), FINISH_SHARED, stream, first_stage, classes, dims, cut.chunks,
               cut.chunks * cut.tiles, eps, weight, shift, loss, factors, columns, work);
    SFM_RETURN_IF_ERROR(cudaGetLastError());
  }
  if (kind != CLASS_COSINE) return cudaSuccess;
  return class_pass<T, VEC, false>(features, centers, work.origin, work.mean, shift, classes, dims, eps, 0.f, 0.f, loss,
                                   factors, columns, work, stream);
}

template <typename T, int VEC>
cudaError_t flow_backward(const float* grad_output, const Features& features, const float* centers, const float* shift,
                          const float* factors, int64_t factor_count, const float* columns, int64_t classes, int dims,
                          void* gradient, cudaStream_t stream) {
  const Partition cut = partition(classes, dims, VEC);
  const Rows<T> rows = typed_rows<T>(features);
  const auto kernel = flow_gradient<T, VEC>;
  T* const out = static_cast<T*>(gradient);
  SFM_LAUNCH(kernel, dim3(unsigned(cut.tiles), unsigned(cut.chunks)), dim3(THREADS), 0, stream, grad_output, rows,
             centers, shift, factors, factor_count, columns, classes, dims, cut.chunk_rows, out);
  return cudaGetLastError();
}

}  // namespace

size_t flow_alignment_workspace_bytes(int64_t classes, int64_t dims) {
  const Sizes sizes = largest(classes, dims);
  return size_t(round_up(sizes.chunks * 2 * dims * 4, 16) + round_up(sizes.blocks * 3 * 8, 16) +
                sizes.finish_blocks * 16 + round_up((1 + sizes.tiles) * 4, 16) + 3 * round_up(dims * 4, 16));
}

cudaError_t flow_alignment(const Features& features, const float* centers, const float* shift, const float* anchor,
                           int64_t classes, int64_t dims, int kind, float eps, float weight, float delta, float* loss, float* rows,
                           float* columns, void* workspace, bool fused, cudaStream_t stream) {
  const Sizes sizes = largest(classes, dims);
  char* at = static_cast<char*>(workspace);
  Workspace work;
  work.sums = reinterpret_cast<float*>(at), at += round_up(sizes.chunks * 2 * dims * 4, 16);
  work.scalars = reinterpret_cast<double*>(at), at += round_up(sizes.blocks * 3 * 8, 16);
  work.tiles = reinterpret_cast<double*>(at), at += sizes.finish_blocks * 16;
  work.counter = reinterpret_cast<unsigned*>(at), work.arrived = work.counter + 1;
  at += round_up((1 + sizes.tiles) * 4, 16);
  work.origin = reinterpret_cast<float*>(at), at += round_up(dims * 4, 16);
  work.mean = reinterpret_cast<float*>(at), at += round_up(dims * 4, 16);
  work.kept_mean = reinterpret_cast<float*>(at);
  return with_type(features.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = wide_rows<T>(features, centers, shift, dims) && aligned16(anchor) && aligned16(columns);
    const auto run = wide ? (fused ? flow_forward<T, WIDE<T>, true> : flow_forward<T, WIDE<T>, false>)
                          : (fused ? flow_forward<T, 1, true> : flow_forward<T, 1, false>);
    return run(features, centers, shift, anchor, classes, int(dims), kind, eps, weight, delta, loss, rows, columns, work, stream);
  });
}

cudaError_t flow_alignment_backward(const float* grad_output, const Features& features, const float* centers,
                                    const float* shift, const float* rows, int64_t row_count, const float* columns,
                                    int64_t classes, int64_t dims, void* gradient, cudaStream_t stream) {
  return with_type(features.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = wide_rows<T>(features, centers, shift, dims) && aligned16(columns) && aligned16(gradient);
    const auto run = wide ? flow_backward<T, WIDE<T>> : flow_backward<T, 1>;
    return run(grad_output, features, centers, shift, rows, row_count, columns, classes, int(dims), gradient, stream);
  });
}

}  // namespace sfm
