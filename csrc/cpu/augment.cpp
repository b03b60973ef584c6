// Views of stored images: forward, and the gradient with respect to the images.
#include "views.h"

namespace sfm_fast {
namespace {

struct Stored {
  const void* data;
  ScalarType type;
};

// Rows of a stored image, as RowRenderer gives those of a rendered one.
template <int W, class U>
struct StoredRows {
  const Views* views;
  const U* image;

  SFM_INLINE void row(int p, int, int, float* out) {
    const int width = views->width;
    for (int c = 0; c < views->source_channels; ++c) {
      const U* from = image + (int64_t(c) * views->height + p) * width;
      float* to = out + c * padded(width) + PAD;
      int x = 0;
      for (; x + W <= width; x += W) store<W>(to + x, load<W>(from + x));
      if (x < width) store_partial<W>(to + x, load_partial<W>(from + x, width - x), width - x);
    }
  }
};

template <class U>
struct Augment {
  template <int W, class T>
  SFM_INLINE static void run(const Views& views, const void* images, void* out, int64_t begin, int64_t end) {
    const int64_t pixels = int64_t(views.source_channels) * views.height * views.width;
    for (int64_t v = begin; v < end; ++v) {
      StoredRows<W, U> source{&views, static_cast<const U*>(images) + v % views.images * pixels};
      write_view<W, T>(views, v, source, out);
    }
  }
};

template <int W>
SFM_INLINE void augment_images_kernel(
    const Views& views, const Stored& images, ScalarType type, void* out, int64_t begin, int64_t end) {
  if (images.type == ScalarType::Float) by_type<W, Augment<float>>(type, views, images.data, out, begin, end);
  if (images.type == ScalarType::BFloat16) by_type<W, Augment<BFloat16>>(type, views, images.data, out, begin, end);
  if (images.type == ScalarType::Half) by_type<W, Augment<Float16>>(type, views, images.data, out, begin, end);
}
SFM_DISPATCH(
    augment_images,
    (const Views& views, const Stored& images, ScalarType type, void* out, int64_t begin, int64_t end),
    (views, images, type, out, begin, end))

template <class T>
struct Collect {
  template <int W, class U>
  SFM_INLINE static void run(const Views& views, const void* gradient, void* out, int64_t begin, int64_t end) {
    ViewGradients<W, T> gradients(views, gradient);
    const int64_t width = padded(views.width);
    std::vector<float> row(views.source_channels * width);
    for (int64_t m = begin; m < end; ++m) {
      gradients.start(m);
      for (int p = 0; p < views.height; ++p) {
        gradients.row(p, row.data(), width);
        for (int c = 0; c < views.source_channels; ++c) {
          U* to = static_cast<U*>(out) + ((m * views.source_channels + c) * views.height + p) * views.width;
          const float* from = row.data() + c * width;
          int x = 0;
          for (; x + W <= views.width; x += W) store<W>(to + x, load<W>(from + x));
          if (x < views.width) store_partial<W>(to + x, load<W>(from + x), views.width - x);
        }
      }
    }
  }
};

template <int W>
SFM_INLINE void augment_gradients_kernel(
    const Views& views, const Stored& gradient, ScalarType type, void* out, int64_t begin, int64_t end) {
  if (gradient.type == ScalarType::Float) by_type<W, Collect<float>>(type, views, gradient.data, out, begin, end);
  if (gradient.type == ScalarType::BFloat16) by_type<W, Collect<BFloat16>>(type, views, gradient.data, out, begin, end);
  if (gradient.type == ScalarType::Half) by_type<W, Collect<Float16>>(type, views, gradient.data, out, begin, end);
}
SFM_DISPATCH(
    augment_gradients,
    (const Views& views, const Stored& gradient, ScalarType type, void* out, int64_t begin, int64_t end),
    (views, gradient, type, out, begin, end))

}  // namespace

// (V, channels, size, size): view v of image v % M through its box, with noise where noise_items[v] >= 0, normalised.
Tensor augment(Tensor images, Tensor boxes, Tensor noise_items, int64_t size, Tensor mean, Tensor std, double noise_mean,
               double noise_std, int64_t seed, int64_t step, int64_t stream, ScalarType dtype) {
  check_output_type(dtype);
  images = checked_images(images, "images");
  CheckedViews views(boxes, noise_items, images.size(0), images.size(1), images.size(2), images.size(3), size, mean, std);
  views.set_noise(noise_mean, noise_std, seed, step, stream);
  Tensor out = torch::stable::new_empty(images, {views.view.count, views.view.channels, size, size}, dtype);
  prefer_huge_pages(out);
  const Stored from{images.const_data_ptr(), images.scalar_type()};
  void* result = out.mutable_data_ptr();
  torch::stable::parallel_for(0, views.view.count, 1, [&](int64_t begin, int64_t end) {
    augment_images(views.view, from, dtype, result, begin, end);
  });
  return out;
}

// (images, channels, height, width): the sum over an image's views of the transposed sampling of grad / std.
Tensor augment_backward(Tensor grad, Tensor boxes, Tensor std, int64_t images, int64_t channels, int64_t height, int64_t width,
                        ScalarType dtype) {
  check_output_type(dtype);
  grad = checked_images(grad, "grad");
  const CheckedViews views(boxes, std::nullopt, images, channels, height, width, grad.size(2), std::nullopt, std);
  STD_TORCH_CHECK(grad.size(0) == views.view.count && grad.size(1) == views.view.channels && grad.size(3) == grad.size(2),
                  "grad must be (views, channels, size, size) to fit boxes and std");
  Tensor out = torch::stable::new_empty(grad, {images, channels, height, width}, dtype);
  prefer_huge_pages(out);
  const Stored from{grad.const_data_ptr(), grad.scalar_type()};
  void* result = out.mutable_data_ptr();
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    augment_gradients(views.view, from, dtype, result, begin, end);
  });
  return out;
}

}  // namespace sfm_fast
