// Rows of features as float32, for all CPU operations on labelled features.
#pragma once

#include "ops.h"
#include "simd.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sfm_fast {

using torch::headeronly::ScalarType;

template <int W, class T>
SFM_INLINE typename Simd<W>::vec load_partial(const T* p, int64_t count) {
  T whole[W] = {};
  std::memcpy(whole, p, count * sizeof(T));
  return load<W>(whole);
}

template <int W, class T>
SFM_INLINE void store_partial(T* p, typename Simd<W>::vec value, int64_t count) {
  T whole[W];
  store<W>(whole, value);
  std::memcpy(p, whole, count * sizeof(T));
}

// Features (N, D) grouped into classes; without `order`, row c is class c.
struct Items {
  const void* data;
  int64_t stride;  // elements from row to row; within a row they are contiguous
  ScalarType type;
  const int64_t* order;
  const int64_t* offsets;  // null without labels (order may be null with them: an empty tensor has no address)
  const float* shift;
  int64_t classes;
  int64_t dim;

  int64_t begin(int64_t c) const { return offsets ? offsets[c] : c; }
  int64_t end(int64_t c) const { return offsets ? offsets[c + 1] : c + 1; }
  int64_t row(int64_t i) const { return offsets ? order[i] : i; }
};

// mean[0..dim) = mean over class c of (row - shift). The shift is subtracted before the sum, since the common mean of features
// may be far larger than the spread between classes. A class without rows gives NaN.
template <int W, class T>
SFM_INLINE void class_mean_row(const Items& items, int64_t c, float* mean) {
  const int64_t begin = items.begin(c), end = items.end(c), dim = items.dim, whole = dim - dim % W;
  const float inverse = 1.0f / static_cast<float>(end - begin);
  if (begin == end) std::fill(mean, mean + dim, inverse * 0.0f);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(items.data) + items.row(i) * items.stride;
    const bool first = i == begin, last = i + 1 == end && end - begin > 1;
    for (int64_t d = 0; d < whole; d += W) {
      auto value = load<W>(x + d) - load<W>(items.shift + d);
      if (!first) value = value + load<W>(mean + d);
      if (last) value = value * inverse;
      store<W>(mean + d, value);
    }
    if (const int64_t rest = dim - whole) {
      auto value = load_partial<W>(x + whole, rest) - load_partial<W>(items.shift + whole, rest);
      if (!first) value = value + load_partial<W>(mean + whole, rest);
      if (last) value = value * inverse;
      store_partial<W>(mean + whole, value, rest);
    }
  }
}

// Calls `Kernel::run<W, T>(args...)` with T the features' element type.
template <int W, class Kernel, class... Args>
SFM_INLINE void by_type(ScalarType type, const Args&... args) {
  if (type == ScalarType::Float) Kernel::template run<W, float>(args...);
  if (type == ScalarType::BFloat16) Kernel::template run<W, BFloat16>(args...);
  if (type == ScalarType::Half) Kernel::template run<W, Float16>(args...);
}

// out[c] = class_mean_row of c, for the classes in [begin, end); defined in class_means.cpp.
void mean_rows(const Items& items, float* out, int64_t begin, int64_t end);

// The number of chunks of classes. It depends only on the shape, so that results don't depend on the number of threads.
inline int64_t chunks_of(int64_t classes, int64_t dim) {
  int64_t chunks = 1;
  while (chunks < 64 && chunks * 65536 < classes * dim) chunks *= 2;
  return std::min(chunks, classes);
}

template <class F>
void parallel_chunks(int64_t chunks, int64_t classes, const F& body) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(k, classes * k / chunks, classes * (k + 1) / chunks);
  });
}

// The OS provides new memory of this size page by page, which costs more than the whole computation: this asks for huge pages.
inline void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const size_t bytes = static_cast<size_t>(fresh.numel()) * fresh.element_size();
  if (bytes < (size_t{8} << 20)) return;
  const uintptr_t page = 4096, start = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint, which may fail
#endif
}

inline bool is_feature_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// Checks only what memory safety needs; the public API has already checked with clearer errors.
inline Tensor float_rows(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.scalar_type() == ScalarType::Float,
                  name, " must be float32 of shape (", rows, ", ", columns, ")");
  return torch::stable::contiguous(tensor);
}

inline Tensor float_vector(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == ScalarType::Float, name,
                  " must be float32 of shape (", size, ",)");
  return torch::stable::contiguous(tensor);
}

// `order` and `offsets`, checked to be contiguous and in range.
struct Segments {
  Segments(std::optional<Tensor> order_tensor, std::optional<Tensor> offsets_tensor, int64_t items, int64_t classes) {
    STD_TORCH_CHECK(order_tensor.has_value() == offsets_tensor.has_value(), "order and offsets belong together");
    if (!order_tensor) {
      STD_TORCH_CHECK(items == classes, "without order and offsets there must be one row a class");
      return;
    }
    STD_TORCH_CHECK(order_tensor->dim() == 1 && order_tensor->size(0) == items && order_tensor->scalar_type() == ScalarType::Long,
                    "order must be int64 of shape (", items, ",)");
    STD_TORCH_CHECK(classes >= 1, "there must be at least one class");
    STD_TORCH_CHECK(offsets_tensor->dim() == 1 && offsets_tensor->size(0) == classes + 1 && offsets_tensor->scalar_type() == ScalarType::Long,
                    "offsets must be int64 of shape (", classes + 1, ",)");
    keep_order = torch::stable::contiguous(*order_tensor);
    keep_offsets = torch::stable::contiguous(*offsets_tensor);
    order = keep_order.const_data_ptr<int64_t>();
    offsets = keep_offsets.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(offsets[0] == 0 && offsets[classes] == items && std::is_sorted(offsets, offsets + classes + 1),
                    "offsets must rise from 0 to the number of items");
    for (int64_t i = 0; i < items; ++i) STD_TORCH_CHECK(order[i] >= 0 && order[i] < items, "order must hold row numbers");
  }
  Tensor keep_order, keep_offsets;
  const int64_t* order = nullptr;
  const int64_t* offsets = nullptr;
};

// Features with contiguous rows: copied only if the last stride isn't 1.
inline Tensor with_contiguous_rows(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 2 && is_feature_type(features.scalar_type()),
                  "features must be a float32, bfloat16 or float16 matrix");
  STD_TORCH_CHECK(features.numel() == 0 || features.const_data_ptr() != nullptr, "features have lost their memory");
  if (features.size(1) == 1 || features.stride(1) == 1) return features;
  return torch::stable::contiguous(features);
}

}  // namespace sfm_fast
