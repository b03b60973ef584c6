// Mean of (features - shift) over each class, (N, D) -> (C, D) float32, and its backward: each item gets its class's gradient
// divided by the class's count. A class's rows are summed in the order of `order`, so that results are bitwise reproducible.
#include "rows.h"

namespace sfm_fast {

struct MeansKernel {
  template <int W, class T>
  static SFM_INLINE void run(const Items& items, float* means, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) class_mean_row<W, T>(items, c, means + c * items.dim);
  }
};

template <int W>
SFM_INLINE void means_kernel(const Items& items, float* means, int64_t begin, int64_t end) {
  by_type<W, MeansKernel>(items.type, items, means, begin, end);
}
SFM_DISPATCH(means, (const Items& items, float* out, int64_t begin, int64_t end), (items, out, begin, end))

void mean_rows(const Items& items, float* out, int64_t begin, int64_t end) { means(items, out, begin, end); }

struct ScatterKernel {
  template <int W, class T>
  static SFM_INLINE void run(const Items& items, const float* grad, void* out, int64_t begin, int64_t end) {
    const int64_t dim = items.dim, whole = dim - dim % W;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = items.begin(c), last = items.end(c);
      const float scale = 1.0f / static_cast<float>(last - first);
      const float* g = grad + c * dim;
      for (int64_t i = first; i < last; ++i) {
        T* row = static_cast<T*>(out) + items.row(i) * dim;
        for (int64_t d = 0; d < whole; d += W) store<W>(row + d, load<W>(g + d) * scale);
        if (whole < dim) store_partial<W>(row + whole, load_partial<W>(g + whole, dim - whole) * scale, dim - whole);
      }
    }
  }
};

template <int W>
SFM_INLINE void scatter_kernel(const Items& items, const float* grad, void* out, int64_t begin, int64_t end) {
  by_type<W, ScatterKernel>(items.type, items, grad, out, begin, end);
}
SFM_DISPATCH(scatter, (const Items& items, const float* grad, void* out, int64_t begin, int64_t end), (items, grad, out, begin, end))

Tensor class_means(Tensor features, std::optional<Tensor> order, std::optional<Tensor> offsets, Tensor shift) {
  features = with_contiguous_rows(features);
  const int64_t dim = features.size(1), classes = offsets ? offsets->size(0) - 1 : features.size(0);
  const Segments segments(order, offsets, features.size(0), classes);
  shift = float_vector(shift, dim, "shift");
  Tensor out = torch::stable::new_empty(shift, {classes, dim});
  prefer_huge_pages(out);
  const Items items{features.const_data_ptr(), features.stride(0), features.scalar_type(), segments.order,
                    segments.offsets, shift.const_data_ptr<float>(), classes, dim};
  float* result = out.mutable_data_ptr<float>();
  parallel_chunks(chunks_of(classes, dim), classes,
                  [&](int64_t, int64_t begin, int64_t end) { means(items, result, begin, end); });
  return out;
}

Tensor class_means_backward(Tensor grad, std::optional<Tensor> order, std::optional<Tensor> offsets, int64_t num_items, ScalarType dtype) {
  STD_TORCH_CHECK(grad.dim() == 2 && is_feature_type(dtype), "grad must be a matrix and dtype float32, bfloat16 or float16");
  const int64_t classes = grad.size(0), dim = grad.size(1);
  grad = float_rows(grad, classes, dim, "grad");
  const Segments segments(order, offsets, num_items, classes);
  Tensor out = torch::stable::new_empty(grad, {num_items, dim}, dtype);
  prefer_huge_pages(out);
  const Items items{nullptr, 0, dtype, segments.order, segments.offsets, nullptr, classes, dim};
  const float* g = grad.const_data_ptr<float>();
  void* result = out.mutable_data_ptr();
  parallel_chunks(chunks_of(num_items, dim), classes,
                  [&](int64_t, int64_t begin, int64_t end) { scatter(items, g, result, begin, end); });
  return out;
}

}  // namespace sfm_fast
