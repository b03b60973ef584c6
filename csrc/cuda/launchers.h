// The CUDA operations as plain C++ functions: they take raw device pointers, queue work on `stream` and return an error
// code.
//
// No function waits for the device or allocates, so CUDA graphs can capture all of them. A workspace needs no
// initialisation and may be reused after the call in stream order; pointers to it must be 16-byte aligned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kinds.h"

#ifdef SFM_SHIM
#include "cuda_emu.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace sfm {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// (items, dims) with unit column stride. order and offsets are both null if row c is class c.
struct Features {
  const void* data;
  Dtype dtype;
  int64_t row_stride;  // in elements; 0 for an expanded row
  const int64_t* order;
  const int64_t* offsets;
};

// loss (), rows (2, classes or 1) = p, q and columns (2, dims) = m, r: dL/dt_c = p_c a_c + q_c (t_c - m) + r. fused:
// the last blocks of the first kernel finish, instead of a second kernel; both are kept until measured on a GPU.
// anchor (dims,) is null for every kind but the anchored cosine.
size_t flow_alignment_workspace_bytes(int64_t classes, int64_t dims);
cudaError_t flow_alignment(const Features& features, const float* centers, const float* shift, const float* anchor,
                           int64_t classes, int64_t dims, int kind, float eps, float weight, float delta, float* loss, float* rows,
                           float* columns, void* workspace, bool fused, cudaStream_t stream);

// gradient (items, dims) contiguous, of the features' dtype. row_count is 1 or `classes`, the second size of `rows`.
cudaError_t flow_alignment_backward(const float* grad_output, const Features& features, const float* centers,
                                    const float* shift, const float* rows, int64_t row_count, const float* columns,
                                    int64_t classes, int64_t dims, void* gradient, cudaStream_t stream);

// means (classes, dims) of features - shift.
cudaError_t class_means(const Features& features, const float* shift, int64_t classes, int64_t dims, float* means,
                        cudaStream_t stream);

// item_gradient (items, dims) contiguous of `dtype`: the row of `grad` (classes, dims) for the item's class, divided by
// the count of the class.
cudaError_t class_means_backward(const float* grad, const int64_t* order, const int64_t* offsets, int64_t classes,
                                 int64_t dims, Dtype dtype, void* item_gradient, cudaStream_t stream);

// Arguments of pair_alignment: a, b (classes, dims) contiguous; ordered pairs of rows [row_start, row_stop) with all
// classes.
struct PairProblem {
  const float* a;
  const float* b;
  const int64_t* groups;  // (classes,) or null
  int64_t classes, dims, row_start, row_stop;
  float eps;
  bool need_gradient, high;
  int64_t block_rows = 0;  // side of the block of the pair matrix held in memory, a multiple of 4; 0: automatic
  int tile_size = 0;       // 1: small tiles, 2: large ones, 0: automatic
  bool gram = true;        // three Gram products instead of four products; both are kept until measured on a GPU
};
size_t pair_alignment_workspace_bytes(const PairProblem& problem);
cudaError_t pair_alignment(const PairProblem& problem, double* total, float* gradient, void* workspace,
                           cudaStream_t stream);

constexpr int MAX_CANVAS = 2048;                 // side of a rendered image
constexpr int64_t MAX_BLOCKS = (1ll << 31) - 1;  // per launch

// Pyramid levels (N, channels, side, side) float32, 1 <= side <= the images' side; the inner three dims contiguous.
struct Levels {
  int count;
  int side[MOST_LEVELS];
  const float* data[MOST_LEVELS];
  int64_t stride[MOST_LEVELS];  // from image to image, in elements
};
struct Sides {
  int count;
  int side[MOST_LEVELS];
};

// out (images, channels, size, size) of `dtype`, channels 1 or 3; rows (images,) or null: indices into the levels.
// quads: coarse levels as four coefficients for every 4 x 4 pixels; both variants are kept until measured on a GPU.
cudaError_t render(const Levels& levels, const int64_t* rows, int64_t images, int channels, int size, Dtype dtype,
                   void* out, bool quads, cudaStream_t stream);

// gradient (images, channels * sum of side^2) from grad and rendered, both (images, channels, size, size) contiguous,
// of `dtype`.
size_t render_backward_workspace_bytes(const Sides& sides, int64_t images, int channels, int size);
cudaError_t render_backward(const void* grad, const void* rendered, Dtype dtype, const Sides& sides, int64_t images,
                            int channels, int size, float* gradient, void* workspace, cudaStream_t stream);

// Views (views, view_channels, size, size) of images (images, channels, height, width): view v shows image v % images,
// boxes (views, 4) = x0, dx, y0, dy. channels is 1 or view_channels; mean and std are (view_channels,).
struct ViewShape {
  int64_t views, images;
  int channels, view_channels, height, width, size;
  int64_t stride = 0;  // of one image's views if `images` are part of a larger batch; 0: images
};
struct ViewNoise {
  const int64_t* items;  // (views,), negative: none
  float mean, std;
  uint64_t seed;
  uint32_t step, stream;
};
cudaError_t augment(const void* images, Dtype dtype, const ViewShape& shape, const float* boxes, const ViewNoise& noise,
                    const float* mean, const float* std, Dtype out_dtype, void* out, cudaStream_t stream);

// gradient (images, channels, height, width) of out_dtype from grad, contiguous like the views.
cudaError_t augment_backward(const void* grad, Dtype dtype, const ViewShape& shape, const float* boxes,
                             const float* std, Dtype out_dtype, void* gradient, cudaStream_t stream);

// Rendering and views together: views of rendered images (images, channels, canvas, canvas), and the levels' gradient
// from that of the views, for which the images are rendered again. blocks: as many images at a time as fit in the L2
// cache, otherwise all at once; both are kept until measured on a GPU.
size_t render_augment_workspace_bytes(int64_t images, int channels, int canvas, bool blocks);
cudaError_t render_augment(const Levels& levels, const int64_t* rows, int canvas, const ViewShape& shape,
                           const float* boxes, const ViewNoise& noise, const float* mean, const float* std,
                           Dtype out_dtype, void* out, void* workspace, bool blocks, cudaStream_t stream);
size_t render_augment_backward_workspace_bytes(const Sides& sides, int64_t images, int channels, int canvas,
                                               bool blocks);
cudaError_t render_augment_backward(const void* grad, Dtype dtype, const Levels& levels, const int64_t* rows, int canvas,
                                    const ViewShape& shape, const float* boxes, const float* std, float* gradient,
                                    void* workspace, bool blocks, cudaStream_t stream);

}  // namespace sfm
