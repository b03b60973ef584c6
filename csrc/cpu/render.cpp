// Images from pyramid levels in one pass, and the gradient of all levels from that of the images in another.
#include "images.h"

namespace sfm_fast {
namespace {

template <int W>
SFM_INLINE void render_images_kernel(const Pyramid& pyramid, const Output& out, int64_t begin, int64_t end) {
  RowRenderer<W> renderer(pyramid);
  const int size = pyramid.size;
  std::vector<float> row(pyramid.channels * renderer.width);
  for (int64_t m = begin; m < end; ++m) {
    renderer.start(m);
    for (int p = 0; p < size; ++p) {
      renderer.row(p, 0, size, row.data());
      for (int c = 0; c < pyramid.channels; ++c)
        out.write<W>(((m * pyramid.channels + c) * size + p) * size, row.data() + c * renderer.width + PAD, size);
    }
  }
}
SFM_DISPATCH(
    render_images, (const Pyramid& pyramid, const Output& out, int64_t begin, int64_t end), (pyramid, out, begin, end))

template <int W>
SFM_INLINE void render_gradients_kernel(
    const Pyramid& pyramid, const Pixels& grad, const Pixels& images, float* out, int64_t begin, int64_t end) {
  RowCollector<W> collector(pyramid);
  const int size = pyramid.size, channels = pyramid.channels;
  const int64_t width = collector.width, floats = pyramid.floats();
  std::vector<float> picture(channels * width), gradient(channels * width);
  for (int64_t m = begin; m < end; ++m) {
    collector.start(out + m * floats);
    for (int p = 0; p < size; ++p) {
      for (int c = 0; c < channels; ++c) {
        const int64_t offset = ((m * channels + c) * size + p) * size;
        images.read<W>(offset, picture.data() + c * width + PAD, size);
        grad.read<W>(offset, gradient.data() + c * width, size);
      }
      through_sigmoid_and_color<W>(picture.data(), gradient.data(), channels, width, 0, size);
      collector.row(p, gradient.data());
    }
    collector.finish();
  }
}
SFM_DISPATCH(
    render_gradients,
    (const Pyramid& pyramid, const Pixels& grad, const Pixels& images, float* out, int64_t begin, int64_t end),
    (pyramid, grad, images, out, begin, end))

}  // namespace

// (M, channels, size, size) = sigmoid(2 D sum_k bilinear(level_k)).
Tensor render(std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t size, ScalarType dtype) {
  check_output_type(dtype);
  const CheckedPyramid pyramid(levels, rows, size, false);
  const Pyramid& view = pyramid.view;
  Tensor out = torch::stable::new_empty(levels[0], {view.images, view.channels, size, size}, dtype);
  prefer_huge_pages(out);
  const Output result{out.mutable_data_ptr(), dtype};
  torch::stable::parallel_for(0, view.images, 1, [&](int64_t begin, int64_t end) {
    render_images(view, result, begin, end);
  });
  return out;
}

// (M, channels * sum of sides^2) float32: the gradients of an image's levels in sequence. `images` is the result of render.
Tensor render_backward(Tensor grad, Tensor images, std::vector<int64_t> sides) {
  images = checked_images(images, "images"), grad = checked_images(grad, "grad");
  const int64_t count = images.size(0), channels = images.size(1), size = images.size(2);
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad.size(d) == images.size(d), "grad must have the shape of images");
  STD_TORCH_CHECK((channels == 1 || channels == 3) && images.size(3) == size, "images must be square, of 1 or 3 channels");
  Pyramid view{{}, {}, {}, nullptr, count, static_cast<int>(channels), static_cast<int>(size)};
  STD_TORCH_CHECK(!sides.empty() && sides.size() <= 64, "sides must be 1 to 64 numbers, got ", sides.size());
  for (const int64_t side : sides) {
    STD_TORCH_CHECK(side >= 1 && side <= size, "sides must be 1 to ", size, ", got ", side);
    view.maps.push_back(upsampling(static_cast<int>(side), static_cast<int>(size), true));
  }
  Tensor out = torch::stable::new_empty(grad, {count, view.floats()}, ScalarType::Float);
  prefer_huge_pages(out);
  const Pixels gradient{grad.const_data_ptr(), grad.scalar_type()}, pictures{images.const_data_ptr(), images.scalar_type()};
  float* result = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    render_gradients(view, gradient, pictures, result, begin, end);
  });
  return out;
}

}  // namespace sfm_fast
