// Views of images: crop, flip, noise and normalisation, row by row, and their gradient; from stored or rendered images.
#pragma once

#include "images.h"
#include "philox.h"

#include <array>

namespace sfm_fast {

struct Views {
  const float* boxes;          // (count, 4): x0, dx, y0, dy
  const int64_t* noise_items;  // counter of a view's noise, negative for none; null in a backward
  int64_t count, images;       // view v shows image v % images
  int size, channels;          // of the views
  int source_channels, height, width;
  std::vector<float> mean, inverse_std;
  float noise_mean, noise_std;
  NoiseKey key;

  LinearMap columns(int64_t v, bool adjoint) const { return sampling(boxes[4 * v], boxes[4 * v + 1], width, size, adjoint); }
  LinearMap rows(int64_t v, bool adjoint) const { return sampling(boxes[4 * v + 2], boxes[4 * v + 3], height, size, adjoint); }
};

// Writes view `v`. Source has row(p, begin, end, out), as RowRenderer does.
template <int W, class Source>
SFM_INLINE void write_view(const Views& views, int64_t v, Source& source, const Output& out) {
  using vec = typename Simd<W>::vec;
  const LinearMap columns = views.columns(v, false), rows = views.rows(v, false);
  const int size = views.size, planes = views.source_channels;
  const int64_t source_width = padded(views.width), width = padded(size);
  std::vector<float> picture(planes * source_width), sampled(2 * planes * width), scratch(size + 8 * W), row(width);
  const std::vector<float> zeros(planes * width);
  std::array<int, 2> held{-1, -1};  // source rows whose samples are in the two slots
  // Samples of a source row are kept: when zooming in, several rows of the view lie between the same two source rows.
  const auto samples = [&](int p, int other) __attribute__((always_inline)) -> const float* {
    if (p < 0 || p >= views.height) return zeros.data();
    int which = held[0] == p ? 0 : held[1] == p ? 1 : held[0] == other ? 1 : 0;
    float* place = sampled.data() + which * planes * width;
    if (held[which] != p) {
      held[which] = p;
      source.row(p, columns.first, columns.last + 1, picture.data());
      for (int c = 0; c < planes; ++c)
        apply<W>(columns, picture.data() + c * source_width + PAD, place + c * width, 0, size);
    }
    return place;
  };
  const int64_t item = views.noise_items[v];
  const bool any = columns.first <= columns.last;
  for (int i = 0; i < size; ++i) {
    const int p = rows.index[i];
    const float w0 = rows.w0[i], w1 = rows.w1[i];
    const float* above = any && w0 != 0.0f ? samples(p, p + 1) : zeros.data();
    const float* below = any && w1 != 0.0f ? samples(p + 1, p) : zeros.data();
    for (int channel = 0; channel < views.channels; ++channel) {
      const int c = planes == 1 ? 0 : channel;
      const float* noise = nullptr;
      if (item >= 0) {
        const int64_t position = (int64_t(c) * size + i) * size;
        noise = normals<W>(views.key, static_cast<uint32_t>(item), position, size, scratch.data());
      }
      for (int x = 0; x < size; x += W) {
        vec value = w0 * load<W>(above + c * width + x) + w1 * load<W>(below + c * width + x);
        if (noise) value += views.noise_mean + views.noise_std * load<W>(noise + x);
        store<W>(row.data() + x, (value - views.mean[channel]) * views.inverse_std[channel]);
      }
      out.write<W>(((v * views.channels + channel) * size + i) * size, row.data(), size);
    }
  }
}

// The transpose of `write_view` for all views of one image: source rows of the gradient, in any order.
template <int W>
struct ViewGradients {
  const Views* views;
  Pixels gradient;
  std::vector<LinearMap> columns, rows;
  std::vector<int64_t> shown;      // the views of this image
  std::vector<float> sums, spread, read;
  int first_row, last_row, first_column, last_column;  // the range that the views read

  SFM_INLINE ViewGradients(const Views& all, const Pixels& from)
      : views(&all), gradient(from), sums(padded(all.size)), spread(all.width), read(padded(all.size)) {}

  SFM_INLINE void start(int64_t image) {
    columns.clear(), rows.clear(), shown.clear();
    first_row = views->height, last_row = -1, first_column = views->width, last_column = -1;
    for (int64_t v = image; v < views->count; v += views->images) {
      LinearMap x = views->columns(v, true), y = views->rows(v, true);
      if (x.last < x.first || y.last < y.first) continue;
      first_row = std::min(first_row, y.first), last_row = std::max(last_row, y.last);
      first_column = std::min(first_column, x.first), last_column = std::max(last_column, x.last);
      columns.push_back(std::move(x)), rows.push_back(std::move(y)), shown.push_back(v);
    }
  }

  // out[c * width + x] = gradient of source row p.
  SFM_INLINE void row(int p, float* out, int64_t width) {
    std::fill_n(out, views->source_channels * width, 0.0f);
    const int size = views->size, per_plane = views->channels / views->source_channels;
    for (size_t a = 0; a < shown.size(); ++a) {
      const LinearMap &y = rows[a], &x = columns[a];
      const int count = y.offset[p + 1] - y.offset[p];
      if (!count) continue;
      for (int c = 0; c < views->source_channels; ++c) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int t = 0; t < count; ++t) {
          for (int channel = c * per_plane; channel < (c + 1) * per_plane; ++channel) {
            const float weight = y.taps[y.offset[p] + t] * views->inverse_std[channel];
            gradient.read<W>(((shown[a] * views->channels + channel) * size + y.start[p] + t) * size, read.data(), size);
            for (int j = 0; j < size; j += W)
              store<W>(sums.data() + j, load<W>(sums.data() + j) + weight * load<W>(read.data() + j));
          }
        }
        apply_transposed<W>(x, sums.data(), spread.data(), x.first, x.last + 1);
        for (int q = x.first; q <= x.last; ++q) out[c * width + q] += spread[q];
      }
    }
  }
};

// Checks the arguments that describe the views, and owns the tensors whose memory `view` points into.
struct CheckedViews {
  CheckedViews(const Tensor& given_boxes, const std::optional<Tensor>& given_items, int64_t images, int64_t source_channels,
               int64_t height, int64_t width, int64_t size, const std::optional<Tensor>& mean, const Tensor& std)
      : boxes(torch::stable::contiguous(given_boxes)) {
    STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == ScalarType::Float,
                    "boxes must be float32 of shape (views, 4)");
    const int64_t count = boxes.size(0), channels = std.numel();
    STD_TORCH_CHECK(images == 0 ? count == 0 : count % images == 0, "boxes must hold the same number of views, of which there are ",
                    count, ", for each of the ", images, " images");
    STD_TORCH_CHECK(channels >= 1 && channels <= sfm::MOST_CHANNELS, "std must have 1 to ", int(sfm::MOST_CHANNELS), " channels, got ", channels);
    STD_TORCH_CHECK(source_channels == 1 || source_channels == channels, "images must have 1 or ", channels, " channels, got ",
                    source_channels);
    constexpr int64_t most = sfm::MOST_PIXELS;
    STD_TORCH_CHECK(size >= 1 && size <= most && height >= 1 && height <= most && width >= 1 && width <= most,
                    "sizes must be 1 to ", most, " pixels, got ", height, ", ", width, " and ", size);
    view.boxes = boxes.const_data_ptr<float>(), view.noise_items = nullptr;
    if (given_items) {
      items = checked_indices(*given_items, count, "noise_items");
      view.noise_items = items->const_data_ptr<int64_t>();
    }
    view.count = count, view.images = images;
    view.size = static_cast<int>(size), view.channels = static_cast<int>(channels);
    view.source_channels = static_cast<int>(source_channels);
    view.height = static_cast<int>(height), view.width = static_cast<int>(width);
    const Tensor scale = float_vector(std, channels, "std");
    for (int64_t c = 0; c < channels; ++c) view.inverse_std.push_back(1.0f / scale.const_data_ptr<float>()[c]);
    if (mean) {
      const Tensor centre = float_vector(*mean, channels, "mean");
      view.mean.assign(centre.const_data_ptr<float>(), centre.const_data_ptr<float>() + channels);
    }
    view.noise_mean = view.noise_std = 0.0f, view.key = {0, 0, 0};
  }

  void set_noise(double mean, double std, int64_t seed, int64_t step, int64_t stream) {
    view.noise_mean = static_cast<float>(mean), view.noise_std = static_cast<float>(std);
    view.key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
  }

  Views view;
  Tensor boxes;
  std::optional<Tensor> items;
};

}  // namespace sfm_fast
