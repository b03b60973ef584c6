// Views directly from pyramid levels, and the levels' gradients directly from those of the views, without storing an image.
#include "views.h"

namespace sfm_fast {
namespace {

template <int W>
SFM_INLINE void render_views_kernel(
    const Pyramid& pyramid, const Views& views, const Output& out, int64_t begin, int64_t end) {
  RowRenderer<W> renderer(pyramid);
  for (int64_t v = begin; v < end; ++v) {
    renderer.start(v % views.images);
    write_view<W>(views, v, renderer, out);
  }
}
SFM_DISPATCH(
    render_views, (const Pyramid& pyramid, const Views& views, const Output& out, int64_t begin, int64_t end),
    (pyramid, views, out, begin, end))

template <int W>
SFM_INLINE void collect_views_kernel(
    const Pyramid& pyramid, const Views& views, const Pixels& grad, float* out, int64_t begin, int64_t end) {
  RowRenderer<W> renderer(pyramid);
  RowCollector<W> collector(pyramid);
  ViewGradients<W> gradients(views, grad);
  const int64_t width = renderer.width, floats = pyramid.floats();
  std::vector<float> picture(pyramid.channels * width), row(pyramid.channels * width);
  for (int64_t m = begin; m < end; ++m) {
    gradients.start(m);
    renderer.start(m);
    collector.start(out + m * floats);
    const int first = gradients.first_column, last = gradients.last_column + 1;
    for (int p = gradients.first_row; p <= gradients.last_row; ++p) {
      gradients.row(p, row.data(), width);
      renderer.row(p, first, last, picture.data());
      through_sigmoid_and_color<W>(picture.data(), row.data(), pyramid.channels, width, first, last);
      collector.row(p, row.data());
    }
    collector.finish();
  }
}
SFM_DISPATCH(
    collect_views,
    (const Pyramid& pyramid, const Views& views, const Pixels& grad, float* out, int64_t begin, int64_t end),
    (pyramid, views, grad, out, begin, end))

}  // namespace

// augment(render(levels, rows, canvas), ...): (V, channels, size, size).
Tensor render_augment(std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t canvas, Tensor boxes, Tensor noise_items,
                      int64_t size, Tensor mean, Tensor std, double noise_mean, double noise_std, int64_t seed, int64_t step,
                      int64_t stream, ScalarType dtype) {
  check_output_type(dtype);
  const CheckedPyramid pyramid(levels, rows, canvas, false);
  CheckedViews views(
      boxes, noise_items, pyramid.view.images, pyramid.view.channels, canvas, canvas, size, mean, std);
  views.set_noise(noise_mean, noise_std, seed, step, stream);
  Tensor out = torch::stable::new_empty(levels[0], {views.view.count, views.view.channels, size, size}, dtype);
  prefer_huge_pages(out);
  const Output result{out.mutable_data_ptr(), dtype};
  torch::stable::parallel_for(0, views.view.count, 1, [&](int64_t begin, int64_t end) {
    render_views(pyramid.view, views.view, result, begin, end);
  });
  return out;
}

// (M, channels * sum of sides^2) float32, laid out as in render_backward; the canvas is rendered again, row by row.
Tensor render_augment_backward(Tensor grad, std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t canvas, Tensor boxes,
                               Tensor std) {
  grad = checked_images(grad, "grad");
  const CheckedPyramid pyramid(levels, rows, canvas, true);
  const Pyramid& images = pyramid.view;
  const CheckedViews views(
      boxes, std::nullopt, images.images, images.channels, canvas, canvas, grad.size(2), std::nullopt, std);
  STD_TORCH_CHECK(grad.size(0) == views.view.count && grad.size(1) == views.view.channels && grad.size(3) == grad.size(2),
                  "grad must be (views, channels, size, size) to fit boxes and std");
  Tensor out = torch::stable::new_empty(levels[0], {images.images, images.floats()}, ScalarType::Float);
  prefer_huge_pages(out);
  const Pixels from{grad.const_data_ptr(), grad.scalar_type()};
  float* result = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, images.images, 1, [&](int64_t begin, int64_t end) {
    collect_views(images, views.view, from, result, begin, end);
  });
  return out;
}

}  // namespace sfm_fast
