// The CUDA kernels of images (render.cu, augment.cu) as implementations of the sfm_fast operations. Schemas:
// csrc/ops.cpp.
//
// As in binding_losses.cpp: memory comes from the caching allocator, nothing waits, and CUDA graphs can capture all of
// it.
#include "binding.h"

namespace {

using namespace sfm_binding;

constexpr int64_t MAX_VIEW = 8192, MAX_IMAGE = 1 << 20;  // offsets inside a view are 32-bit

// Images (count, channels, height, width) as the kernels read them: contiguous, of one of the three dtypes.
Tensor checked_images(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(on_gpu(tensor) && tensor.dim() == 4, name, " must be a CUDA tensor of 4 dimensions, it has ",
                  tensor.dim());
  kernel_dtype(tensor.scalar_type(), name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Pyramid levels and the images to render; owns the tensors that the pointers point to.
struct Pyramid {
  std::vector<Tensor> held;
  std::optional<Tensor> rows;
  int64_t images, texels = 0;
  int channels, size;
  sfm::Levels levels{};
  sfm::Sides sides{};

  Pyramid(const std::vector<Tensor>& given, const std::optional<Tensor>& given_rows, int64_t canvas) {
    STD_TORCH_CHECK(!given.empty() && given.size() <= sfm::MOST_LEVELS, "levels must be 1 to ", int(sfm::MOST_LEVELS),
                    " tensors, got ", given.size());
    STD_TORCH_CHECK(canvas >= 1 && canvas <= sfm::MAX_CANVAS, "size must be 1 to ", int(sfm::MAX_CANVAS), ", got ",
                    canvas);
    const Tensor& like = given[0];
    STD_TORCH_CHECK(on_gpu(like) && like.dim() == 4 && (like.size(1) == 1 || like.size(1) == 3),
                    "levels must be CUDA tensors (images, 1 or 3 channels, side, side)");
    channels = int(like.size(1)), size = int(canvas);
    for (const Tensor& level : given) {
      STD_TORCH_CHECK(on_gpu(level) && level.get_device_index() == like.get_device_index() &&
                          level.scalar_type() == ScalarType::Float && level.dim() == 4,
                      "levels must be float32 tensors of 4 dimensions on one CUDA device");
      const int64_t side = level.size(3);
      STD_TORCH_CHECK(level.size(0) == like.size(0) && level.size(1) == channels && level.size(2) == side &&
                          side >= 1 && side <= canvas,
                      "levels must be (", like.size(0), ", ", channels, ", side, side) with sides of 1 to ", canvas,
                      ", got (", level.size(0), ", ", level.size(1), ", ", level.size(2), ", ", side, ")");
      const bool dense = (side == 1 || (level.stride(3) == 1 && level.stride(2) == side)) &&
                         (channels == 1 || level.stride(1) == side * side);
      held.push_back(dense ? level : torch::stable::contiguous(level));
      const int k = sides.count++;
      texels += channels * side * side;
      sides.side[k] = levels.side[k] = int(side);
      levels.data[k] = read<float>(held.back()), levels.stride[k] = held.back().stride(0);
    }
    levels.count = sides.count;
    rows = checked_indices(given_rows, like, "rows");
    images = rows.has_value() ? rows->size(0) : like.size(0);
  }

  Tensor render(ScalarType dtype) const {
    const sfm::Dtype kind = kernel_dtype(dtype, "dtype");
    const Tensor out = torch::stable::new_empty(held[0], {images, channels, size, size}, dtype);
    check_launch(sfm::render(levels, indices(rows), images, channels, size, kind, out.mutable_data_ptr(),
                             new_kernels(), current_stream(held[0])),
                 "render");
    return out;
  }
};

Tensor gradient_of_levels(const Tensor& grad, const Tensor& images, const sfm::Sides& sides) {
  const int64_t count = images.size(0), channels = images.size(1);
  const int size = int(images.size(3));
  int64_t texels = 0;
  for (int k = 0; k < sides.count; ++k) texels += channels * sides.side[k] * sides.side[k];
  const Tensor gradient = torch::stable::new_empty(images, {count, texels}, ScalarType::Float);
  const Tensor space = workspace(images, sfm::render_backward_workspace_bytes(sides, count, int(channels), size));
  check_launch(sfm::render_backward(grad.const_data_ptr(), images.const_data_ptr(),
                                    kernel_dtype(images.scalar_type(), "images"), sides, count, int(channels), size,
                                    write<float>(gradient), space.mutable_data_ptr(), current_stream(images)),
               "render_backward");
  return gradient;
}

// The shape of views and their inputs besides the images, checked.
struct Views {
  sfm::ViewShape shape;
  Tensor boxes, std;

  Views(const Tensor& like, const Tensor& given_boxes, const Tensor& given_std, int64_t images, int64_t channels,
        int64_t height, int64_t width, int64_t size)
      : boxes(checked(given_boxes, like, ScalarType::Float, 2, "boxes")),
        std(checked(given_std, like, ScalarType::Float, 1, "std")) {
    const int64_t views = boxes.size(0), view_channels = std.size(0);
    STD_TORCH_CHECK(boxes.size(1) == 4, "boxes must be (views, 4), got (", views, ", ", boxes.size(1), ")");
    STD_TORCH_CHECK(images >= 0 && (images == 0 ? views == 0 : views % images == 0),
                    "boxes must be a whole number of views for each of ", images, " images, got ", views);
    STD_TORCH_CHECK(view_channels >= 1 && view_channels <= sfm::MOST_CHANNELS, "std must have 1 to ", int(sfm::MOST_CHANNELS),
                    " values, got ", view_channels);
    STD_TORCH_CHECK(channels == 1 || channels == view_channels, "images must have 1 or ", view_channels,
                    " channels, as std, got ", channels);
    STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= MAX_IMAGE && width <= MAX_IMAGE,
                    "images must have sides of 1 to ", MAX_IMAGE, ", got ", height, " x ", width);
    STD_TORCH_CHECK(size >= 1 && size <= MAX_VIEW, "size must be 1 to ", MAX_VIEW, ", got ", size);
    shape = {views, images, int(channels), int(view_channels), int(height), int(width), int(size)};
  }

  void check_gradient(const Tensor& grad) const {
    STD_TORCH_CHECK(grad.size(0) == shape.views && grad.size(1) == shape.view_channels && grad.size(2) == shape.size,
                    "grad must be (", shape.views, ", ", shape.view_channels, ", size, size), got (", grad.size(0), ", ",
                    grad.size(1), ", ", grad.size(2), ", ", grad.size(3), ")");
  }
};

// Noise and the backbone's mean, checked.
struct Noise {
  Tensor items, mean;
  sfm::ViewNoise noise;

  Noise(const Tensor& like, const sfm::ViewShape& shape, const Tensor& noise_items, const Tensor& given_mean,
        double noise_mean, double noise_std, int64_t seed, int64_t step, int64_t stream)
      : items(checked(noise_items, like, ScalarType::Long, 1, "noise_items")),
        mean(checked(given_mean, like, ScalarType::Float, 1, "mean")) {
    STD_TORCH_CHECK(items.size(0) == shape.views, "noise_items must be (", shape.views, "), got ", items.size(0));
    STD_TORCH_CHECK(mean.size(0) == shape.view_channels, "mean must have as many values as std, ", shape.view_channels,
                    ", got ", mean.size(0));
    STD_TORCH_CHECK(0 <= step && step < (int64_t(1) << 32) && 0 <= stream && stream < (int64_t(1) << 32),
                    "step and stream must be 0 to 2^32 - 1, got ", step, " and ", stream);
    noise = {read<int64_t>(items), float(noise_mean), float(noise_std),
             uint64_t(seed),       uint32_t(step),    uint32_t(stream)};
  }
};

Tensor render(const std::vector<Tensor>& levels, const std::optional<Tensor>& rows, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(!levels.empty(), "levels must be 1 tensor or more");
  const DeviceGuard guard(levels[0].get_device_index());
  return Pyramid(levels, rows, size).render(dtype);
}

Tensor render_backward(const Tensor& grad, const Tensor& images, const std::vector<int64_t>& sides) {
  const DeviceGuard guard(images.get_device_index());
  Tensor upstream = checked_images(grad, "grad"), y = checked_images(images, "images");
  const int64_t size = y.size(3);
  STD_TORCH_CHECK((y.size(1) == 1 || y.size(1) == 3) && y.size(2) == size && size >= 1 && size <= sfm::MAX_CANVAS,
                  "images must be (images, 1 or 3 channels, size, size) with sizes of 1 to ", int(sfm::MAX_CANVAS));
  STD_TORCH_CHECK(upstream.get_device_index() == y.get_device_index() && upstream.size(0) == y.size(0) &&
                      upstream.size(1) == y.size(1) && upstream.size(2) == size && upstream.size(3) == size,
                  "grad must have the shape and device of images");
  STD_TORCH_CHECK(!sides.empty() && sides.size() <= sfm::MOST_LEVELS, "sides must be 1 to ", int(sfm::MOST_LEVELS),
                  " numbers, got ", sides.size());
  sfm::Sides checked_sides{};
  for (const int64_t side : sides) {
    STD_TORCH_CHECK(side >= 1 && side <= size, "sides must be 1 to ", size, ", got ", side);
    checked_sides.side[checked_sides.count++] = int(side);
  }
  if (upstream.scalar_type() != y.scalar_type()) {  // the conversion is exact; autograd never needs it
    upstream = torch::stable::to(upstream, ScalarType::Float), y = torch::stable::to(y, ScalarType::Float);
  }
  return gradient_of_levels(upstream, y, checked_sides);
}

Tensor augment(const Tensor& given, const Tensor& boxes, const Tensor& noise_items, int64_t size, const Tensor& mean,
               const Tensor& std, double noise_mean, double noise_std, int64_t seed, int64_t step, int64_t stream,
               ScalarType dtype) {
  const DeviceGuard guard(given.get_device_index());
  const Tensor images = checked_images(given, "images");
  const Views views(images, boxes, std, images.size(0), images.size(1), images.size(2), images.size(3), size);
  const Noise noise(images, views.shape, noise_items, mean, noise_mean, noise_std, seed, step, stream);
  const Tensor out =
      torch::stable::new_empty(images, {views.shape.views, views.shape.view_channels, size, size}, dtype);
  check_launch(sfm::augment(images.const_data_ptr(), kernel_dtype(images.scalar_type(), "images"), views.shape,
                            read<float>(views.boxes), noise.noise, read<float>(noise.mean), read<float>(views.std),
                            kernel_dtype(dtype, "dtype"), out.mutable_data_ptr(), current_stream(images)),
               "augment");
  return out;
}

Tensor augment_backward(const Tensor& grad, const Tensor& boxes, const Tensor& std, int64_t images, int64_t channels,
                        int64_t height, int64_t width, ScalarType dtype) {
  const DeviceGuard guard(grad.get_device_index());
  const Tensor upstream = checked_images(grad, "grad");
  const int64_t size = upstream.size(3);
  const Views views(upstream, boxes, std, images, channels, height, width, size);
  const sfm::ViewShape& shape = views.shape;
  views.check_gradient(upstream);
  const sfm::Dtype kind = kernel_dtype(dtype, "dtype");
  const Tensor gradient = torch::stable::new_empty(upstream, {images, channels, height, width}, dtype);
  check_launch(sfm::augment_backward(upstream.const_data_ptr(), kernel_dtype(upstream.scalar_type(), "grad"), shape,
                                     read<float>(views.boxes), read<float>(views.std), kind,
                                     gradient.mutable_data_ptr(), current_stream(upstream)),
               "augment_backward");
  return gradient;
}

Tensor render_augment(const std::vector<Tensor>& levels, const std::optional<Tensor>& rows, int64_t canvas,
                      const Tensor& boxes, const Tensor& noise_items, int64_t size, const Tensor& mean,
                      const Tensor& std, double noise_mean, double noise_std, int64_t seed, int64_t step,
                      int64_t stream, ScalarType dtype) {
  STD_TORCH_CHECK(!levels.empty(), "levels must be 1 tensor or more");
  const Tensor& like = levels[0];
  const DeviceGuard guard(like.get_device_index());
  const Pyramid pyramid(levels, rows, canvas);
  const Views views(like, boxes, std, pyramid.images, pyramid.channels, canvas, canvas, size);
  const Noise noise(like, views.shape, noise_items, mean, noise_mean, noise_std, seed, step, stream);
  const Tensor out =
      torch::stable::new_empty(like, {views.shape.views, views.shape.view_channels, size, size}, dtype);
  const Tensor space = workspace(
      like, sfm::render_augment_workspace_bytes(pyramid.images, pyramid.channels, pyramid.size, new_kernels()));
  check_launch(sfm::render_augment(pyramid.levels, indices(pyramid.rows), pyramid.size, views.shape,
                                   read<float>(views.boxes), noise.noise, read<float>(noise.mean),
                                   read<float>(views.std), kernel_dtype(dtype, "dtype"), out.mutable_data_ptr(),
                                   space.mutable_data_ptr(), new_kernels(), current_stream(like)),
               "render_augment");
  return out;
}

// The canvas is rendered again, because a stored one would be the largest tensor of a step.
Tensor render_augment_backward(const Tensor& grad, const std::vector<Tensor>& levels, const std::optional<Tensor>& rows,
                               int64_t canvas, const Tensor& boxes, const Tensor& std) {
  STD_TORCH_CHECK(!levels.empty(), "levels must be 1 tensor or more");
  const Tensor& like = levels[0];
  const DeviceGuard guard(like.get_device_index());
  const Pyramid pyramid(levels, rows, canvas);
  STD_TORCH_CHECK(on_gpu(grad) && grad.get_device_index() == like.get_device_index(),
                  "grad must be on the CUDA device of the levels");
  const Tensor upstream = checked_images(grad, "grad");
  const Views views(like, boxes, std, pyramid.images, pyramid.channels, canvas, canvas, upstream.size(3));
  views.check_gradient(upstream);
  const Tensor gradient = torch::stable::new_empty(like, {pyramid.images, pyramid.texels}, ScalarType::Float);
  const Tensor space = workspace(like, sfm::render_augment_backward_workspace_bytes(
                                           pyramid.sides, pyramid.images, pyramid.channels, pyramid.size, new_kernels()));
  check_launch(sfm::render_augment_backward(upstream.const_data_ptr(), kernel_dtype(upstream.scalar_type(), "grad"),
                                            pyramid.levels, indices(pyramid.rows), pyramid.size, views.shape,
                                            read<float>(views.boxes), read<float>(views.std), write<float>(gradient),
                                            space.mutable_data_ptr(), new_kernels(), current_stream(like)),
               "render_augment_backward");
  return gradient;
}

}  // namespace

SFM_LIBRARY_IMPL(library) {
  library.impl("render", TORCH_BOX(&render));
  library.impl("render_backward", TORCH_BOX(&render_backward));
  library.impl("augment", TORCH_BOX(&augment));
  library.impl("augment_backward", TORCH_BOX(&augment_backward));
  library.impl("render_augment", TORCH_BOX(&render_augment));
  library.impl("render_augment_backward", TORCH_BOX(&render_augment_backward));
}
