// How the backward of the rendering divides its work: strips of rows, the place of each level's sums, the rows that
// strips share.
#pragma once

#include "images.cuh"

namespace sfm {
namespace {

constexpr int STRIP_PIXELS = 16;                          // per thread: rows times columns
constexpr int STRIP_THREADS = 512;                        // at most
constexpr int WIDE_COLUMNS = MAX_CANVAS / STRIP_THREADS;  // per thread, for images wider than a block
constexpr int EDGE_ROWS = 4;          // per strip and level that may be shared with other strips: two on each side
constexpr int FOOTPRINT_WEIGHTS = 8;  // per lane, kept in registers
constexpr int64_t STRIP_SHARED = 52 * 1024;  // for the sums down the columns, unless a single level needs more

// The layout of the levels in the gradient, the workspace and shared memory. It depends only on the shape.
struct StripPlan {
  int count, channels, size, columns, rows, strips, threads;
  int texel_rows = 0;  // of all levels that are smaller than the images
  int shared = 0;      // bytes
  int64_t texels = 0;  // of one image, all levels
  int side[MOST_LEVELS], lanes[MOST_LEVELS], first_row[MOST_LEVELS];
  int sums[MOST_LEVELS], span[MOST_LEVELS];  // start of the level's sums in shared memory, in rows, and rows per channel
  int group_stop[MOST_LEVELS];              // levels below it are in shared memory at the same time
  int64_t offset[MOST_LEVELS];              // in the image's gradient

  __host__ __device__ int pitch() const { return size + size / 32 + 1; }
  __host__ __device__ int edge_values() const { return EDGE_ROWS * channels * texel_rows; }
  int64_t partials(int64_t images) const { return strips > 1 ? images * strips * edge_values() : 0; }

  StripPlan(const Sides& sides, int channel_count, int canvas)
      : count(sides.count), channels(channel_count), size(canvas) {
    columns = size <= STRIP_THREADS ? 1 : WIDE_COLUMNS;
    rows = STRIP_PIXELS / columns;
    strips = int(divide_up(size, rows));
    threads = int(round_up(divide_up(size, columns), 32));
    int used = 0, most = 0, group = 0;
    for (int k = 0; k < count; ++k) {
      side[k] = sides.side[k], offset[k] = texels;
      texels += int64_t(channels) * side[k] * side[k];
      first_row[k] = texel_rows, lanes[k] = 1, span[k] = sums[k] = 0;
      if (side[k] < size) {
        texel_rows += side[k];
        const int64_t reach = divide_up((rows - 1) * side[k], size) + 2, width = 2 * size / side[k] + 1;
        span[k] = int(reach < side[k] ? reach : side[k]);
        while (lanes[k] < 32 && divide_up(width < size ? width : size, lanes[k]) > FOOTPRINT_WEIGHTS) lanes[k] *= 2;
      }
      if (k > group && int64_t(used + channels * span[k]) * pitch() * 4 > STRIP_SHARED) {
        for (; group < k; ++group) group_stop[group] = k;
        used = 0;
      }
      sums[k] = used, used += channels * span[k];
      if (used > most) most = used;
    }
    for (; group < count; ++group) group_stop[group] = count;
    shared = count * (rows + 2) * 4 + most * pitch() * 4;
  }
};

__device__ __forceinline__ int skewed(int column) { return column + column / 32; }  // strides of 2^n: no bank conflicts

// Texel rows of a level that rows [row, row + rows) of the images read.
struct TexelRows {
  int first, last;
  __device__ __forceinline__ TexelRows(int row, int rows, int side, int size) {
    first = Walk(row, side, size).index();
    last = Walk((row + rows < size ? row + rows : size) - 1, side, size).index() + 1;
    if (last > side - 1) last = side - 1;
  }
  // Slot of a row that other strips may share, -1 for any other row.
  __device__ __forceinline__ int edge(int i) const {
    return i - first < EDGE_ROWS / 2 ? i - first : last - i < EDGE_ROWS / 2 ? EDGE_ROWS - 1 - (last - i) : -1;
  }
};

}  // namespace
}  // namespace sfm
