// Means of labelled features per class, and their backward: one read and one write of every row.
#include "common.cuh"

namespace sfm {
namespace {

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    class_means_forward(Rows<T> rows, const float* __restrict__ shift, int64_t classes, int dims, int64_t chunk_rows,
                        float* __restrict__ means) {
  const int column = (blockIdx.x * 32 + threadIdx.x % 32) * VEC;
  if (column >= dims) return;
  const int64_t start = blockIdx.y * chunk_rows, stop = min(classes, start + chunk_rows);
  float offset[VEC];
  load<VEC>(shift + column, offset);
  for_each_class<VEC, false>(
      rows, nullptr, dims, start + threadIdx.x / 32, stop, WARPS, column, offset,
      [&](int64_t c, const float (&t)[VEC], const float (&)[VEC]) { store<VEC>(means + c * dims + column, t); });
}

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    class_means_gradient(const float* __restrict__ grad, const int64_t* __restrict__ order,
                         const int64_t* __restrict__ offsets, int64_t classes, int dims, int64_t chunk_rows,
                         T* __restrict__ item_gradient) {
  const int column = (blockIdx.x * 32 + threadIdx.x % 32) * VEC;
  if (column >= dims) return;
  const int64_t start = blockIdx.y * chunk_rows, stop = min(classes, start + chunk_rows);
  for (int64_t c = start + threadIdx.x / 32; c < stop; c += WARPS) {
    const int64_t begin = offsets == nullptr ? c : offsets[c], end = offsets == nullptr ? c + 1 : offsets[c + 1];
    float value[VEC];
    load<VEC>(grad + c * dims + column, value);
#pragma unroll
    for (int k = 0; k < VEC; ++k) value[k] /= float(end - begin);
    for (int64_t item = begin; item < end; ++item) {
      store<VEC>(item_gradient + (order == nullptr ? item : order[item]) * dims + column, value);
    }
  }
}

template <typename T, int VEC>
cudaError_t means_forward(const Features& features, const float* shift, int64_t classes, int dims, float* means,
                          cudaStream_t stream) {
  const Partition cut = partition(classes, dims, VEC);
  const Rows<T> rows = typed_rows<T>(features);
  const auto kernel = class_means_forward<T, VEC>;
  SFM_LAUNCH(kernel, dim3(unsigned(cut.tiles), unsigned(cut.chunks)), dim3(THREADS), 0, stream, rows, shift, classes,
             dims, cut.chunk_rows, means);
  return cudaGetLastError();
}

template <typename T, int VEC>
cudaError_t means_backward(const float* grad, const int64_t* order, const int64_t* offsets, int64_t classes, int dims,
                           void* item_gradient, cudaStream_t stream) {
  const Partition cut = partition(classes, dims, VEC);
  const auto kernel = class_means_gradient<T, VEC>;
  T* const out = static_cast<T*>(item_gradient);
  SFM_LAUNCH(kernel, dim3(unsigned(cut.tiles), unsigned(cut.chunks)), dim3(THREADS), 0, stream, grad, order, offsets,
             classes, dims, cut.chunk_rows, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t class_means(const Features& features, const float* shift, int64_t classes, int64_t dims, float* means,
                        cudaStream_t stream) {
  if (classes == 0 || dims == 0) return cudaSuccess;
  return with_type(features.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = dims % WIDE<T> == 0 && features.row_stride % WIDE<T> == 0 && aligned16(features.data) &&
                      aligned16(shift) && aligned16(means);
    const auto run = wide ? means_forward<T, WIDE<T>> : means_forward<T, 1>;
    return run(features, shift, classes, int(dims), means, stream);
  });
}

cudaError_t class_means_backward(const float* grad, const int64_t* order, const int64_t* offsets, int64_t classes,
                                 int64_t dims, Dtype dtype, void* item_gradient, cudaStream_t stream) {
  if (classes == 0 || dims == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = dims % WIDE<T> == 0 && aligned16(grad) && aligned16(item_gradient);
    const auto run = wide ? means_backward<T, WIDE<T>> : means_backward<T, 1>;
    return run(grad, order, offsets, classes, int(dims), item_gradient, stream);
  });
}

}  // namespace sfm
