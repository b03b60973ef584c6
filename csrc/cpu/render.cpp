// From pyramid levels to images in one pass, and from the images' gradient to that of all levels in another.
#include "images.h"

namespace sfm_fast {
namespace {

struct Render {
  template <int W, class T>
  SFM_INLINE static void run(const Pyramid& pyramid, void* out, int64_t begin, int64_t end) {
    RowRenderer<W> renderer(pyramid);
    const int size = pyramid.size;
    std::vector<float> row(pyramid.channels * renderer.width);
    for (int64_t m = begin; m < end; ++m) {
      renderer.start(m);
      for (int p = 0; p < size; ++p) {
        renderer.row(p, 0, size, row.data());
        for (int c = 0; c < pyramid.channels; ++c) {
          T* to = static_cast<T*>(out) + ((m * pyramid.channels + c) * size + p) * size;
          const float* from = row.data() + c * renderer.width + PAD;
          int x = 0;
          for (; x + W <= size; x += W) store<W>(to + x, load<W>(from + x));
          if (x < size) store_partial<W>(to + x, load<W>(from + x), size - x);
        }
      }
    }
  }
};

template <int W>
SFM_INLINE void render_images_kernel(const Pyramid& pyramid, ScalarType type, void* out, int64_t begin, int64_t end) {
  by_type<W, Render>(type, pyramid, out, begin, end);
}
SFM_DISPATCH(
    render_images, (const Pyramid& pyramid, ScalarType type, void* out, int64_t begin, int64_t end),
    (pyramid, type, out, begin, end))

template <int W, class T>
SFM_INLINE void read_row(const void* from, int64_t offset, float* to, int count) {
  const T* row = static_cast<const T*>(from) + offset;
  int x = 0;
  for (; x + W <= count; x += W) store<W>(to + x, load<W>(row + x));
  if (x < count) store_partial<W>(to + x, load_partial<W>(row + x, count - x), count - x);
}

struct ReadRow {
  template <int W, class T>
  SFM_INLINE static void run(const void* from, int64_t offset, float* to, int count) {
    read_row<W, T>(from, offset, to, count);
  }
};

struct Gradients {
  const void *gradient, *images;
  ScalarType gradient_type, image_type;
  float* out;
};

template <int W>
SFM_INLINE void render_gradients_kernel(const Pyramid& pyramid, const Gradients& from, int64_t begin, int64_t end) {
  RowCollector<W> collector(pyramid);
  const int size = pyramid.size, channels = pyramid.channels;
  const int64_t width = collector.width, floats = pyramid.floats();
  std::vector<float> picture(channels * width), gradient(channels * width);
  for (int64_t m = begin; m < end; ++m) {
    collector.start(from.out + m * floats);
    for (int p = 0; p < size; ++p) {
      for (int c = 0; c < channels; ++c) {
        const int64_t offset = ((m * channels + c) * size + p) * size;
        by_type<W, ReadRow>(from.image_type, from.images, offset, picture.data() + c * width + PAD, size);
        by_type<W, ReadRow>(from.gradient_type, from.gradient, offset, gradient.data() + c * width, size);
      }
      through_sigmoid_and_color<W>(picture.data(), gradient.data(), channels, width, 0, size);
      collector.row(p, gradient.data());
    }
    collector.finish();
  }
}
SFM_DISPATCH(
    render_gradients, (const Pyramid& pyramid, const Gradients& from, int64_t begin, int64_t end),
    (pyramid, from, begin, end))

}  // namespace

// (M, channels, size, size) = sigmoid(2 D sum_k bilinear(level_k)).
Tensor render(std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t size, ScalarType dtype) {
  check_output_type(dtype);
  const CheckedPyramid pyramid(levels, rows, size, false);
  const Pyramid& view = pyramid.view;
  Tensor out = torch::stable::new_empty(levels[0], {view.images, view.channels, size, size}, dtype);
  prefer_huge_pages(out);
  void* result = out.mutable_data_ptr();
  torch::stable::parallel_for(0, view.images, 1, [&](int64_t begin, int64_t end) {
    render_images(view, dtype, result, begin, end);
  });
  return out;
}

// (M, channels * sum of sides^2) float32: the gradients of an image's levels one behind the other. `images` is what render gave.
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
  const Gradients from{
      grad.const_data_ptr(), images.const_data_ptr(), grad.scalar_type(), images.scalar_type(), out.mutable_data_ptr<float>()};
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    render_gradients(view, from, begin, end);
  });
  return out;
}

}  // namespace sfm_fast
