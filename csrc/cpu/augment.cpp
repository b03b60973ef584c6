// Views of stored images: forward, and the gradient with respect to the images.
#include "views.h"

namespace sfm_fast {
namespace {

// Rows of a stored image, with the interface of RowRenderer.
template <int W>
struct StoredRows {
  const Views* views;
  const Pixels* images;
  int64_t image;

  SFM_INLINE void row(int p, int, int, float* out) {
    const int width = views->width;
    for (int c = 0; c < views->source_channels; ++c) {
      const int64_t offset = ((image * views->source_channels + c) * views->height + p) * width;
      images->read<W>(offset, out + c * padded(width) + PAD, width);
    }
  }
};

template <int W>
SFM_INLINE void augment_images_kernel(
    const Views& views, const Pixels& images, const Output& out, int64_t begin, int64_t end) {
  for (int64_t v = begin; v < end; ++v) {
    StoredRows<W> source{&views, &images, v % views.images};
    write_view<W>(views, v, source, out);
  }
}
SFM_DISPATCH(
    augment_images, (const Views& views, const Pixels& images, const Output& out, int64_t begin, int64_t end),
    (views, images, out, begin, end))

template <int W>
SFM_INLINE void augment_gradients_kernel(
    const Views& views, const Pixels& grad, const Output& out, int64_t begin, int64_t end) {
  ViewGradients<W> gradients(views, grad);
  const int64_t width = padded(views.width);
  std::vector<float> row(views.source_channels * width);
  for (int64_t m = begin; m < end; ++m) {
    gradients.start(m);
    for (int p = 0; p < views.height; ++p) {
      gradients.row(p, row.data(), width);
      for (int c = 0; c < views.source_channels; ++c)
        out.write<W>(
            ((m * views.source_channels + c) * views.height + p) * views.width, row.data() + c * width, views.width);
    }
  }
}
SFM_DISPATCH(
    augment_gradients, (const Views& views, const Pixels& grad, const Output& out, int64_t begin, int64_t end),
    (views, grad, out, begin, end))

}  // namespace

// (V, channels, size, size): view v is the box of image v % M, with noise if noise_items[v] >= 0, normalised.
Tensor augment(Tensor images, Tensor boxes, Tensor noise_items, int64_t size, Tensor mean, Tensor std, double noise_mean,
               double noise_std, int64_t seed, int64_t step, int64_t stream, ScalarType dtype) {
  check_output_type(dtype);
  images = checked_images(images, "images");
  CheckedViews views(boxes, noise_items, images.size(0), images.size(1), images.size(2), images.size(3), size, mean, std);
  views.set_noise(noise_mean, noise_std, seed, step, stream);
  Tensor out = torch::stable::new_empty(images, {views.view.count, views.view.channels, size, size}, dtype);
  prefer_huge_pages(out);
  const Pixels from{images.const_data_ptr(), images.scalar_type()};
  const Output result{out.mutable_data_ptr(), dtype};
  torch::stable::parallel_for(0, views.view.count, 1, [&](int64_t begin, int64_t end) {
    augment_images(views.view, from, result, begin, end);
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
  const Pixels from{grad.const_data_ptr(), grad.scalar_type()};
  const Output result{out.mutable_data_ptr(), dtype};
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    augment_gradients(views.view, from, result, begin, end);
  });
  return out;
}

}  // namespace sfm_fast
