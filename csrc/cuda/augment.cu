// Random views of images, normalised for a backbone: bilinear crops with zeros outside, noise from counters; and their
// backward.
//
// Forward: a thread computes 4 values at consecutive noise positions, which are one Philox block. Backward: a thread
// gathers one source pixel, all channels, from the taps that read it; only the range of candidates is estimated, the
// weights are exactly those of the forward.
#include "images.cuh"
#include "philox.cuh"

namespace sfm {
namespace {

constexpr int TILE_WIDTH = 32, TILE_HEIGHT = THREADS / TILE_WIDTH;  // tile of source pixels in the backward
constexpr int GROUP = 3;                                            // channels per pass over the taps

// View v is of image v % images; this is the distance in memory, in views, between two views of the same image.
__device__ __forceinline__ int64_t views_apart(const ViewShape& shape) {
  return shape.stride > 0 ? shape.stride : shape.images;
}

struct Box {
  float x0, dx, y0, dy;
};
__device__ __forceinline__ Box read_box(const float* __restrict__ boxes, int64_t view) {
  const float* box = boxes + 4 * view;
  return {box[0], box[1], box[2], box[3]};
}

// The two taps of a coordinate along an axis of `size` pixels: at and at + 1, if they exist.
struct Taps {
  int at;
  float first, second;
  bool has_first, has_second;

  __device__ __forceinline__ Taps(float coordinate, int size) {
    const float low = floorf(coordinate);
    has_first = low >= 0.f && low < float(size), has_second = low >= -1.f && low < float(size - 1);
    at = has_first || has_second ? int(low) : 0;  // far outside, low doesn't fit an int
    second = coordinate - low, first = 1.f - second;
  }
};

// Taps of view row i, and the image row of the first tap.
template <typename T>
__device__ __forceinline__ Taps row_taps(const T* __restrict__ image, const ViewShape& shape, int channel, int i,
                                         const Box& box, const T*& row) {
  const Taps y(fmaf(float(i), box.dy, box.y0), shape.height);
  row = image + (int64_t(channel) * shape.height + y.at) * shape.width;
  return y;
}

template <typename T>
__device__ __forceinline__ float sample_row(const T* __restrict__ row, const Taps& x) {
  float value = 0.f;
  if (x.has_first) value = x.first * to_float(row[x.at]);
  if (x.has_second) value += x.second * to_float(row[x.at + 1]);
  return value;
}

template <typename T, typename U>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    augment_views(const T* __restrict__ images, const ViewShape shape, int tiles, const float* __restrict__ boxes,
                  const ViewNoise noise, const float* __restrict__ mean, const float* __restrict__ std, bool wide,
                  U* __restrict__ views) {
  const unsigned shown = blockIdx.x / tiles, image_count = unsigned(shape.images), image_index = shown % image_count;
  const int64_t view = shown / image_count * views_apart(shape) + image_index;
  const int size = shape.size, area = size * size;
  const int block = int(blockIdx.x % tiles * blockDim.x + threadIdx.x), count = shape.channels * area - QUAD * block;
  if (count <= 0) return;
  const T* const image = images + int64_t(image_index) * shape.channels * shape.height * shape.width;
  const Box box = read_box(boxes, view);
  int channel = QUAD * block / area;
  const int place = QUAD * block - channel * area;
  int i = place / size, j = place - i * size;
  int channels[QUAD];
  const T* row;
  Taps y = row_taps(image, shape, channel, i, box, row);
  float value[QUAD];
#pragma unroll
  for (int k = 0; k < QUAD; ++k) {
    const Taps x(fmaf(float(j), box.dx, box.x0), shape.width);
    channels[k] = channel, value[k] = 0.f;
    if (y.has_first) value[k] = y.first * sample_row(row, x);
    if (y.has_second) value[k] += y.second * sample_row(row + shape.width, x);
    if (++j == size && k + 1 < QUAD) {
      j = 0;
      if (++i == size) {
        i = 0;
        if (channel + 1 < shape.channels) ++channel;  // past the last value, any channel will do
      }
      y = row_taps(image, shape, channel, i, box, row);
    }
  }
  const int64_t item = noise.items[view];
  if (item >= 0) {
    float normal[QUAD];
    normals({uint32_t(noise.seed), uint32_t(noise.seed >> 32), noise.step, noise.stream}, uint32_t(block),
            uint32_t(item), normal);
#pragma unroll
    for (int k = 0; k < QUAD; ++k) value[k] += noise.mean + noise.std * normal[k];
  }
  U* const to = views + view * shape.view_channels * area + int64_t(QUAD) * block;
  const int copies = shape.view_channels / shape.channels;  // a grey image is copied to all channels
  for (int copy = 0; copy < copies; ++copy) {
    float center = 0.f, scale = 0.f, out[QUAD];
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
      if (k == 0 || channels[k] != channels[k - 1])
        center = mean[channels[k] + copy], scale = 1.f / std[channels[k] + copy];
      out[k] = (value[k] - center) * scale;
    }
    store_quad(to + int64_t(copy) * area, out, wide, count);
  }
}

// View indices that may read pixel `at`: first <= index <= last.
struct Candidates {
  int first, last;

  __device__ __forceinline__ Candidates(int at, float start, float step, int pixels, int size) {
    const float inverse = 1.f / step, one = (float(at - 1) - start) * inverse, two = (float(at + 1) - start) * inverse;
    // Margin for the rounding of the forward's coordinates and of these; NaN from 0 * infinity gives the whole range.
    const float slack = 0.01f + 1e-6f * (float(size) + float(pixels + 2) * fabsf(inverse));
    first = int(ceilf(fminf(fmaxf(fminf(one, two) - slack, 0.f), float(size))));
    last = int(floorf(fmaxf(fminf(fmaxf(one, two) + slack, float(size - 1)), -1.f)));
  }
};

// Weight with which a coordinate reads pixel `at`, bitwise equal to that of Taps.
__device__ __forceinline__ float tap_weight(float coordinate, int at) {
  const float behind = coordinate - float(at);
  const float weight = behind >= 0.f ? 1.f - behind : coordinate - float(at - 1);
  return coordinate >= float(at - 1) && coordinate < float(at + 1) ? weight : 0.f;
}

template <typename T, typename U>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    augment_gradient(const T* __restrict__ grad, const ViewShape shape, int columns, int tiles,
                     const float* __restrict__ boxes, const float* __restrict__ std, U* __restrict__ gradient) {
  const int64_t image = blockIdx.x / tiles;
  const int tile = int(blockIdx.x % tiles), size = shape.size, area = size * size;
  const int q = tile % columns * TILE_WIDTH + threadIdx.x % TILE_WIDTH;
  const int p = tile / columns * TILE_HEIGHT + threadIdx.x / TILE_WIDTH;
  if (p >= shape.height || q >= shape.width) return;
  const bool grey = shape.channels < shape.view_channels;
  U* const to = gradient + (image * shape.channels * shape.height + p) * shape.width + q;
  float total = 0.f;
  for (int channel = 0; channel < shape.view_channels; channel += GROUP) {
    const int group = shape.view_channels - channel;
    float sum[GROUP] = {};
    for (int64_t shown = image, view = image; shown < shape.views; shown += shape.images, view += views_apart(shape)) {
      const Box box = read_box(boxes, view);
      const Candidates rows(p, box.y0, box.dy, shape.height, size), taps(q, box.x0, box.dx, shape.width, size);
      if (taps.first > taps.last) continue;
      const T* const from = grad + (view * shape.view_channels + channel) * area;
      for (int i = rows.first; i <= rows.last; ++i) {
        const float down = tap_weight(fmaf(float(i), box.dy, box.y0), p);
        if (down == 0.f) continue;
        float across[GROUP] = {};
        for (int j = taps.first; j <= taps.last; ++j) {
          const float weight = tap_weight(fmaf(float(j), box.dx, box.x0), q);
          if (weight == 0.f) continue;
          const T* const at = from + i * size + j;
#pragma unroll
          for (int c = 0; c < GROUP; ++c) {
            if (c < group) across[c] += weight * to_float(at[c * area]);
          }
        }
#pragma unroll
        for (int c = 0; c < GROUP; ++c) sum[c] += down * across[c];
      }
    }
#pragma unroll
    for (int c = 0; c < GROUP; ++c) {
      if (c >= group) continue;
      const float value = sum[c] / std[channel + c];
      if (grey)
        total += value;
      else
        from_float(value, to[int64_t(channel + c) * shape.height * shape.width]);
    }
  }
  if (grey) from_float(total, *to);
}

template <typename T, typename U>
cudaError_t augment_forward(const void* images, const ViewShape& shape, const float* boxes, const ViewNoise& noise,
                            const float* mean, const float* std, void* out, cudaStream_t stream) {
  const int64_t blocks = divide_up(int64_t(shape.channels) * shape.size * shape.size, QUAD);
  const int threads = int(blocks < THREADS ? round_up(blocks, 32) : THREADS), tiles = int(divide_up(blocks, threads));
  if (shape.views * tiles > MAX_BLOCKS) return cudaErrorInvalidValue;
  const bool wide = shape.size * shape.size % QUAD == 0 && aligned_quad<U>(out);
  const T* const from = static_cast<const T*>(images);
  U* const to = static_cast<U*>(out);
  const auto kernel = augment_views<T, U>;
  SFM_LAUNCH(kernel, dim3(unsigned(shape.views * tiles)), dim3(unsigned(threads)), 0, stream, from, shape, tiles, boxes,
             noise, mean, std, wide, to);
  return cudaGetLastError();
}

template <typename T, typename U>
cudaError_t augment_adjoint(const void* grad, const ViewShape& shape, const float* boxes, const float* std,
                            void* gradient, cudaStream_t stream) {
  const int columns = int(divide_up(shape.width, TILE_WIDTH));
  const int64_t tiles = divide_up(shape.height, TILE_HEIGHT) * columns;
  if (shape.images * tiles > MAX_BLOCKS) return cudaErrorInvalidValue;
  const T* const from = static_cast<const T*>(grad);
  U* const to = static_cast<U*>(gradient);
  const auto kernel = augment_gradient<T, U>;
  const int tile_count = int(tiles);
  SFM_LAUNCH(kernel, dim3(unsigned(shape.images * tiles)), dim3(THREADS), 0, stream, from, shape, columns, tile_count,
             boxes, std, to);
  return cudaGetLastError();
}

}  // namespace

cudaError_t augment(const void* images, Dtype dtype, const ViewShape& shape, const float* boxes, const ViewNoise& noise,
                    const float* mean, const float* std, Dtype out_dtype, void* out, cudaStream_t stream) {
  if (shape.views == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    return with_type(out_dtype, [&](auto result) {
      return augment_forward<decltype(element), decltype(result)>(images, shape, boxes, noise, mean, std, out, stream);
    });
  });
}

cudaError_t augment_backward(const void* grad, Dtype dtype, const ViewShape& shape, const float* boxes,
                             const float* std, Dtype out_dtype, void* gradient, cudaStream_t stream) {
  if (shape.images == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) {
    return with_type(out_dtype, [&](auto result) {
      return augment_adjoint<decltype(element), decltype(result)>(grad, shape, boxes, std, gradient, stream);
    });
  });
}

}  // namespace sfm
