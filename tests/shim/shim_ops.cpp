// The CUDA sources compiled for the CPU emulator, behind C functions that take host pointers. Each returns 0 or an
// error code.
#define SFM_SHIM
#include "../../csrc/cuda/class_means.cu"
#include "../../csrc/cuda/flow_alignment.cu"
#include "../../csrc/cuda/pair_alignment.cu"

#include <cstdlib>

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
const char* last_message() { return emu::message.c_str(); }

int flow_alignment(const void* features, int dtype, int64_t stride, const int64_t* order, const int64_t* offsets,
                   const float* centers, const float* shift, int64_t classes, int64_t dims, int kind, float eps,
                   float alpha, float* loss, float* rows, float* columns) {
  {
    Memory work(sfm::flow_alignment_workspace_bytes(classes, dims));
    sfm::flow_alignment(view(features, dtype, stride, order, offsets), centers, shift, classes, dims, kind, eps, alpha,
                        loss, rows, columns, work.data, nullptr);
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
                   int tile_size, double* total, float* gradient) {
  const sfm::PairProblem problem{
      a, b, groups, classes, dims, row_start, row_stop, eps, need_gradient != 0, high != 0, block_rows, tile_size};
  {
    Memory work(sfm::pair_alignment_workspace_bytes(problem));
    sfm::pair_alignment(problem, total, gradient, work.data, nullptr);
  }
  return finish();
}
}
