// Views of rendered images without storing all images: blocks of images use one canvas in memory in turn.
//
// One kernel writes the canvas and the next one reads it. A canvas of CANVAS_BYTES stays in the L2 cache of an A100 or
// later GPU (40 MB and more), so that only levels and views are read from and written to memory.
#include "common.cuh"

namespace sfm {
namespace {

// The number of images per block with `canvases` canvases each; a multiple of 16 if at least 16.
int64_t block_images(int64_t images, int channels, int canvas, int canvases, bool blocks) {
  const int64_t bytes = int64_t(canvases) * channels * canvas * canvas * 4, fit = CANVAS_BYTES / bytes;
  if (!blocks || images <= fit) return images;
  return fit >= 16 ? fit / 16 * 16 : fit > 1 ? fit : 1;
}

// Images [first, first + count) of the levels.
Levels some_images(const Levels& levels, const int64_t* rows, int64_t first) {
  Levels some = levels;
  for (int k = 0; rows == nullptr && k < some.count; ++k) some.data[k] += first * some.stride[k];
  return some;
}
ViewShape some_views(const ViewShape& shape, int64_t count) {
  ViewShape some = shape;
  some.images = count, some.views = shape.views / shape.images * count, some.stride = shape.images;
  return some;
}

}  // namespace

size_t render_augment_workspace_bytes(int64_t images, int channels, int canvas, bool blocks) {
  return size_t(block_images(images, channels, canvas, 1, blocks) * channels * canvas * canvas * 4);
}

cudaError_t render_augment(const Levels& levels, const int64_t* rows, int canvas, const ViewShape& shape,
                           const float* boxes, const ViewNoise& noise, const float* mean, const float* std,
                           Dtype out_dtype, void* out, void* workspace, bool blocks, cudaStream_t stream) {
  const int64_t block = block_images(shape.images, shape.channels, canvas, 1, blocks);
  const int64_t view_bytes =
      int64_t(shape.view_channels) * shape.size * shape.size * (out_dtype == Dtype::float32 ? 4 : 2);
  for (int64_t first = 0; first < shape.images; first += block) {
    const int64_t count = shape.images - first < block ? shape.images - first : block;
    const Levels some = some_images(levels, rows, first);
    SFM_RETURN_IF_ERROR(render(some, rows == nullptr ? nullptr : rows + first, count, shape.channels, canvas,
                               Dtype::float32, workspace, blocks, stream));
    ViewNoise items = noise;
    items.items += first;
    SFM_RETURN_IF_ERROR(augment(workspace, Dtype::float32, some_views(shape, count), boxes + 4 * first, items, mean, std,
                                out_dtype, static_cast<char*>(out) + first * view_bytes, stream));
  }
  return cudaSuccess;
}

size_t render_augment_backward_workspace_bytes(const Sides& sides, int64_t images, int channels, int canvas,
                                               bool blocks) {
  const int64_t block = block_images(images, channels, canvas, 2, blocks);
  const size_t canvases = size_t(2 * block * channels * canvas * canvas * 4);
  return canvases + render_backward_workspace_bytes(sides, block, channels, canvas);
}

cudaError_t render_augment_backward(const void* grad, Dtype dtype, const Levels& levels, const int64_t* rows, int canvas,
                                    const ViewShape& shape, const float* boxes, const float* std, float* gradient,
                                    void* workspace, bool blocks, cudaStream_t stream) {
  const int64_t block = block_images(shape.images, shape.channels, canvas, 2, blocks);
  const int64_t pixels = int64_t(shape.channels) * canvas * canvas;
  const int64_t view_bytes = int64_t(shape.view_channels) * shape.size * shape.size * (dtype == Dtype::float32 ? 4 : 2);
  Sides sides{};
  int64_t texels = 0;
  for (; sides.count < levels.count; ++sides.count) {
    const int64_t side = sides.side[sides.count] = levels.side[sides.count];
    texels += shape.channels * side * side;
  }
  float* const images = static_cast<float*>(workspace);
  float* const canvas_gradient = images + block * pixels;
  for (int64_t first = 0; first < shape.images; first += block) {
    const int64_t count = shape.images - first < block ? shape.images - first : block;
    SFM_RETURN_IF_ERROR(augment_backward(static_cast<const char*>(grad) + first * view_bytes, dtype,
                                         some_views(shape, count), boxes + 4 * first, std, Dtype::float32,
                                         canvas_gradient, stream));
    SFM_RETURN_IF_ERROR(render(some_images(levels, rows, first), rows == nullptr ? nullptr : rows + first, count,
                               shape.channels, canvas, Dtype::float32, images, blocks, stream));
    SFM_RETURN_IF_ERROR(render_backward(canvas_gradient, images, Dtype::float32, sides, count, shape.channels, canvas,
                                        gradient + first * texels, canvas_gradient + block * pixels, stream));
  }
  return cudaSuccess;
}

}  // namespace sfm
