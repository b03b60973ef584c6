// The CUDA sources compiled for the CPU emulator, behind C functions that take host pointers. Each returns 0 or an
// error code.
#include <cstdlib>

#include "kernels.cpp"

namespace {
struct Memory {  // a workspace of the asked size, filled with NaN, its end watched
  explicit Memory(size_t size) : bytes(size), data(static_cast<char*>(std::aligned_alloc(16, (size + 79) / 16 * 16))) {
    std::memset(data, 0xff, bytes);
    std::memset(data + bytes, 0x5a, 64);
  }
  ~Memory() {
    for (int k = 0; k < 64; ++k) {
      if (data[bytes + k] != 0x5a) emu::fail("write past the end of the workspace");
    }
    std::free(data);
  }
  size_t bytes;
  char* data;
};
int finish() {
  const int code = emu::status;
  emu::status = cudaSuccess;
  return code;
}
sfm::Features view(const void* data, int dtype, int64_t stride, const int64_t* order, const int64_t* offsets) {
  return {data, sfm::Dtype(dtype), stride, order, offsets};
}
}  // namespace

extern "C" {

void set_reversed(int value) { emu::set_reversed(value != 0); }
void set_rounding_products(int value) { emu::rounding_products = value != 0; }
const char* last_message() { return emu::message.c_str(); }

int flow_alignment(const void* features, int dtype, int64_t stride, const int64_t* order, const int64_t* offsets,
                   const float* centers, const float* shift, const float* anchor, int64_t classes, int64_t dims,
                   int kind, float eps, float weight, float delta, float* loss, float* rows, float* columns, int fused) {
  {
    Memory work(sfm::flow_alignment_workspace_bytes(classes, dims));
    sfm::flow_alignment(view(features, dtype, stride, order, offsets), centers, shift, anchor, classes, dims, kind, eps,
                        weight, delta, loss, rows, columns, work.data, fused != 0, nullptr);
  }
  return finish();
}

int flow_alignment_backward(const float* grad_output, const void* features, int dtype, int64_t stride,
                            const int64_t* order, const int64_t* offsets, const float* centers, const float* shift,
                            const float* rows, int64_t row_count, const float* columns, int64_t classes, int64_t dims,
                            void* gradient) {
  sfm::flow_alignment_backward(grad_output, view(features, dtype, stride, order, offsets), centers, shift, rows,
                               row_count, columns, classes, dims, gradient, nullptr);
  return finish();
}

int class_means(const void* features, int dtype, int64_t stride, const int64_t* order, const int64_t* offsets,
                const float* shift, int64_t classes, int64_t dims, float* means) {
  sfm::class_means(view(features, dtype, stride, order, offsets), shift, classes, dims, means, nullptr);
  return finish();
}

int class_means_backward(const float* grad, const int64_t* order, const int64_t* offsets, int64_t classes, int64_t dims,
                         int dtype, void* item_gradient) {
  sfm::class_means_backward(grad, order, offsets, classes, dims, sfm::Dtype(dtype), item_gradient, nullptr);
  return finish();
}

int pair_alignment(const float* a, const float* b, const int64_t* groups, int64_t classes, int64_t dims,
                   int64_t row_start, int64_t row_stop, float eps, int need_gradient, int high, int64_t block_rows,
                   int tile_size, int gram, double* total, float* gradient) {
  const sfm::PairProblem problem{a,   b,                  groups,    classes,    dims,      row_start, row_stop,
                                 eps, need_gradient != 0, high != 0, block_rows, tile_size, gram != 0};
  {
    Memory work(sfm::pair_alignment_workspace_bytes(problem));
    sfm::pair_alignment(problem, total, gradient, work.data, nullptr);
  }
  return finish();
}
int64_t pair_workspace(int64_t classes, int64_t dims) {
  sfm::PairProblem problem{};
  problem.classes = problem.row_stop = classes, problem.dims = dims, problem.need_gradient = true;
  return int64_t(sfm::pair_alignment_workspace_bytes(problem));
}
// Levels one behind the other: their sides, addresses and strides from image to image.
sfm::Levels levels_of(int64_t count, const int64_t* sides, const int64_t* data, const int64_t* strides) {
  sfm::Levels levels{int(count), {}, {}, {}};
  for (int k = 0; k < count; ++k) {
    levels.side[k] = int(sides[k]), levels.data[k] = reinterpret_cast<const float*>(data[k]);
    levels.stride[k] = strides[k];
  }
  return levels;
}
int render(int64_t count, const int64_t* sides, const int64_t* data, const int64_t* strides, const int64_t* rows,
           int64_t images, int64_t channels, int64_t size, int64_t dtype, int64_t quads, void* out) {
  const auto error = sfm::render(levels_of(count, sides, data, strides), rows, images, int(channels), int(size),
                                 sfm::Dtype(dtype), out, quads != 0, nullptr);
  return error != cudaSuccess ? error : finish();
}

int render_backward(const void* grad, const void* rendered, int64_t dtype, int64_t count, const int64_t* side,
                    int64_t images, int64_t channels, int64_t size, float* gradient) {
  sfm::Sides sides{int(count), {}};
  for (int k = 0; k < count; ++k) sides.side[k] = int(side[k]);
  cudaError_t error;
  {
    Memory work(sfm::render_backward_workspace_bytes(sides, images, int(channels), int(size)));
    error = sfm::render_backward(grad, rendered, sfm::Dtype(dtype), sides, images, int(channels), int(size), gradient,
                                 work.data, nullptr);
  }
  return error != cudaSuccess ? error : finish();
}

// shape: views, images, channels, view channels, height, width, size.
sfm::ViewShape view_shape(const int64_t* shape) {
  return {shape[0], shape[1], int(shape[2]), int(shape[3]), int(shape[4]), int(shape[5]), int(shape[6])};
}

int augment(const void* images, int64_t dtype, const int64_t* shape, const float* boxes, const int64_t* items,
            float noise_mean, float noise_std, int64_t seed, int64_t step, int64_t stream, const float* mean,
            const float* std, int64_t out_dtype, void* out) {
  const sfm::ViewNoise noise{items, noise_mean, noise_std, uint64_t(seed), uint32_t(step), uint32_t(stream)};
  const auto error = sfm::augment(images, sfm::Dtype(dtype), view_shape(shape), boxes, noise, mean, std,
                                  sfm::Dtype(out_dtype), out, nullptr);
  return error != cudaSuccess ? error : finish();
}

int augment_backward(const void* grad, int64_t dtype, const int64_t* shape, const float* boxes, const float* std,
                     int64_t out_dtype, void* gradient) {
  const auto error = sfm::augment_backward(grad, sfm::Dtype(dtype), view_shape(shape), boxes, std,
                                           sfm::Dtype(out_dtype), gradient, nullptr);
  return error != cudaSuccess ? error : finish();
}

int render_augment(int64_t count, const int64_t* sides, const int64_t* data, const int64_t* strides,
                   const int64_t* rows, int64_t canvas, const int64_t* shape, const float* boxes, const int64_t* items,
                   float noise_mean, float noise_std, int64_t seed, int64_t step, int64_t stream, const float* mean,
                   const float* std, int64_t dtype, int64_t blocks, void* out) {
  const sfm::ViewNoise noise{items, noise_mean, noise_std, uint64_t(seed), uint32_t(step), uint32_t(stream)};
  const sfm::ViewShape views = view_shape(shape);
  cudaError_t error;
  {
    Memory work(sfm::render_augment_workspace_bytes(views.images, views.channels, int(canvas), blocks != 0));
    error = sfm::render_augment(levels_of(count, sides, data, strides), rows, int(canvas), views, boxes, noise, mean,
                                std, sfm::Dtype(dtype), out, work.data, blocks != 0, nullptr);
  }
  return error != cudaSuccess ? error : finish();
}
int render_augment_backward(const void* grad, int64_t dtype, int64_t count, const int64_t* sides, const int64_t* data,
                            const int64_t* strides, const int64_t* rows, int64_t canvas, const int64_t* shape,
                            const float* boxes, const float* std, int64_t blocks, float* gradient) {
  const sfm::ViewShape views = view_shape(shape);
  const sfm::Levels levels = levels_of(count, sides, data, strides);
  sfm::Sides sizes{int(count), {}};
  for (int k = 0; k < count; ++k) sizes.side[k] = int(sides[k]);
  cudaError_t error;
  {
    Memory work(sfm::render_augment_backward_workspace_bytes(sizes, views.images, views.channels, int(canvas),
                                                             blocks != 0));
    error = sfm::render_augment_backward(grad, sfm::Dtype(dtype), levels, rows, int(canvas), views, boxes, std, gradient,
                                         work.data, blocks != 0, nullptr);
  }
  return error != cudaSuccess ? error : finish();
}

// Four normal numbers from the four words of a block, without and with Philox.
void box_muller(int64_t blocks, const int64_t* words, float* normals) {
  for (int64_t k = 0; k < blocks; ++k, words += 4, normals += 4) {
    const uint32_t word[4] = {uint32_t(words[0]), uint32_t(words[1]), uint32_t(words[2]), uint32_t(words[3])};
    float value[4];
    sfm::normals(word, value);
    std::memcpy(normals, value, sizeof value);
  }
}
void philox_words(int64_t blocks, int64_t* words, int64_t seed) {
  for (int64_t k = 0; k < blocks; ++k, words += 4) {
    uint32_t word[4] = {uint32_t(words[0]), uint32_t(words[1]), uint32_t(words[2]), uint32_t(words[3])};
    sfm::philox(word, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
    for (int n = 0; n < 4; ++n) words[n] = word[n];
  }
}
}
