// Shared by the image operations: checks of the arguments, the pyramid as the kernels read it, choice of the element type.
#pragma once

#include "../kinds.h"
#include "canvas_gradient.h"

namespace sfm_fast {

struct ReadRow {
  template <int W, class T>
  SFM_INLINE static void run(const void* from, int64_t offset, float* to, int count) {
    const T* row = static_cast<const T*>(from) + offset;
    int x = 0;
    for (; x + W <= count; x += W) store<W>(to + x, load<W>(row + x));
    if (x < count) store_partial<W>(to + x, load_partial<W>(row + x, count - x), count - x);
  }
};

struct WriteRow {
  template <int W, class T>
  SFM_INLINE static void run(void* out, int64_t offset, const float* from, int count) {
    T* row = static_cast<T*>(out) + offset;
    int x = 0;
    for (; x + W <= count; x += W) store<W>(row + x, load<W>(from + x));
    if (x < count) store_partial<W>(row + x, load<W>(from + x), count - x);
  }
};

// A row of pixels in any float type, to and from float32. Only these depend on the type, so each kernel is compiled once.
struct Pixels {
  const void* data;
  ScalarType type;

  template <int W>
  SFM_INLINE void read(int64_t offset, float* to, int count) const {
    by_type<W, ReadRow>(type, data, offset, to, count);
  }
};

struct Output {
  void* data;
  ScalarType type;

  // `from` is read in whole vectors.
  template <int W>
  SFM_INLINE void write(int64_t offset, const float* from, int count) const {
    by_type<W, WriteRow>(type, data, offset, from, count);
  }
};

// Images (M, channels, height, width) with contiguous planes, in one of the float types.
inline Tensor checked_images(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && is_feature_type(tensor.scalar_type()), name,
                  " must be float32, bfloat16 or float16 of shape (images, channels, height, width)");
  return torch::stable::contiguous(tensor);
}

inline Tensor checked_indices(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long && (count < 0 || tensor.size(0) == count),
                  name, " must be int64 of shape (", count, ",)");
  return torch::stable::contiguous(tensor);
}

// Owns the tensors whose memory `view` points into.
struct CheckedPyramid {
  CheckedPyramid(const std::vector<Tensor>& levels, const std::optional<Tensor>& chosen, int64_t size, bool need_adjoint) {
    STD_TORCH_CHECK(!levels.empty() && levels.size() <= sfm::MOST_LEVELS, "levels must be 1 to ", int(sfm::MOST_LEVELS), " tensors, got ", levels.size());
    STD_TORCH_CHECK(size >= 1 && size <= sfm::MOST_PIXELS, "size must be 1 to ", int(sfm::MOST_PIXELS), " pixels, got ", size);
    STD_TORCH_CHECK(levels[0].dim() == 4, "levels must be (images, channels, side, side)");
    const int64_t images = levels[0].size(0), channels = levels[0].size(1);
    STD_TORCH_CHECK(channels == 1 || channels == 3, "levels must have 1 or 3 channels, got ", channels);
    for (const Tensor& level : levels) {
      STD_TORCH_CHECK(level.dim() == 4 && level.scalar_type() == ScalarType::Float && level.size(0) == images &&
                          level.size(1) == channels && level.size(2) == level.size(3),
                      "levels must be float32 of shape (images, channels, side, side), all of as many images and channels");
      const int64_t side = level.size(2);
      STD_TORCH_CHECK(side >= 1 && side <= size, "levels must have sides of 1 to ", size, ", got ", side);
      // Levels may be slices of one buffer of all levels; within an image they are contiguous.
      const bool dense = level.stride(3) == 1 && level.stride(2) == side && level.stride(1) == side * side;
      held.push_back(dense || level.numel() == 0 ? level : torch::stable::contiguous(level));
      view.data.push_back(held.back().const_data_ptr<float>());
      view.stride.push_back(held.back().stride(0));
      view.maps.push_back(upsampling(static_cast<int>(side), static_cast<int>(size), need_adjoint));
    }
    if (chosen) {
      held.push_back(checked_indices(*chosen, -1, "rows"));
      view.rows = held.back().const_data_ptr<int64_t>();
      for (int64_t m = 0; m < chosen->size(0); ++m)
        STD_TORCH_CHECK(view.rows[m] >= 0 && view.rows[m] < images, "rows must be in 0..", images - 1, ", got ", view.rows[m]);
    } else {
      view.rows = nullptr;
    }
    view.images = chosen ? chosen->size(0) : images;
    view.channels = static_cast<int>(channels), view.size = static_cast<int>(size);
  }

  Pyramid view;
  std::vector<Tensor> held;
};

inline void check_output_type(ScalarType dtype) {
  STD_TORCH_CHECK(is_feature_type(dtype), "dtype must be float32, bfloat16 or float16");
}

}  // namespace sfm_fast
