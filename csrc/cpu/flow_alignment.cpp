// The flow-alignment losses that cost O(C D), forward and backward, in C++ for the CPU.
//
// With t_c the mean of class c minus `shift` and a_c = centers[c], every kind has dL/dt_c = p_c a_c + q_c (t_c - m) + r:
// the forward computes the loss and (p, q), (m, r) from sums in one pass over the features (two for `class`, whose
// lengths need the mean of all t first; `anchored` knows its m), and the backward is one pass that reads the features and writes the gradient.
// Sums are in float32 over at most 64 rows and in float64 beyond, chunk by chunk in an order that depends only on the shape.
// Source of the losses: Xia et al., arXiv 2602.05391; derivations in docs/losses.md.
#include "../kinds.h"
#include "rows.h"

namespace sfm_fast {

using namespace sfm;  // the kinds

constexpr int64_t kFlushRows = 64;

// 1 - cos + length_weight h(log(|b| / |a|)) from its three sums, and the factors of its gradient: d/db = p a + q b. h(x) is x^2 up to
// |x| = delta and straight beyond. Short flows have cosine and logarithm 0 and no gradient; NaN stays NaN.
struct Distance {
  Distance(double dot, double aa, double bb, double scale, double eps, double length_weight = 0, double delta = 0) {
    const bool is_short = std::sqrt(scale * aa) < eps || std::sqrt(scale * bb) < eps;
    double cosine = is_short ? dot * 0 : dot / (std::sqrt(aa) * std::sqrt(bb));
    if (std::isinf(aa) || std::isinf(bb)) cosine = NAN;  // squares that overflow float32 must not give a cosine of 0
    const double logarithm = is_short || length_weight == 0 ? 0 : std::log(bb / aa) / 2;
    const double near = logarithm > delta ? delta : logarithm < -delta ? -delta : logarithm;  // NaN stays
    value = 1 - cosine + length_weight * near * (2 * logarithm - near);
    p = is_short ? 0 : -1 / (std::sqrt(aa) * std::sqrt(bb));
    q = is_short ? 0 : (cosine + 2 * length_weight * near) / bb;
  }
  double value, p, q;
};

struct Pass {
  Items items;
  const float* centers;
  int64_t kind;
  const float* pivot;  // (D), subtracted from every row before it is summed
  const float* mean;  // m of a cosine per class: the mean of all t, or the anchor
  double scale;       // (C / (C-1))^2, or 1
  double eps;
  double length_weight, delta;  // of `anchored`
  float* rows;        // (2, C) p and q of a cosine per class
  double* columns;    // (chunks, D): sums over the classes of a chunk; not for `anchored`
  double* sums;       // (chunks, 3): the sums of x.y, x.x and y.y (of the loss, for a cosine per class)
};

SFM_INLINE void flush(float* columns, double* total, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    total[d] += columns[d];
    columns[d] = 0;
  }
}

// sums += x.y, x.x, y.y and columns += y for one class: x = a, y = t - pivot; with Difference, y = t - a - pivot and only y.y.
template <int W, bool Difference, bool Columns>
SFM_INLINE void add_row(const float* a, const float* t, const float* pivot, float* columns, int64_t dim, double* sums) {
  using vec = typename Simd<W>::vec;
  constexpr int kUnroll = 2;
  vec xy[kUnroll] = {}, xx[kUnroll] = {}, yy[kUnroll] = {};
  int64_t d = 0;
  for (; d + kUnroll * W <= dim; d += kUnroll * W)
    for (int k = 0; k < kUnroll; ++k) {
      const vec x = load<W>(a + d + k * W);
      const vec row = Difference ? load<W>(t + d + k * W) - x : load<W>(t + d + k * W);
      const vec y = row - load<W>(pivot + d + k * W);
      if (!Difference) {
        xy[k] += x * y;
        xx[k] += x * x;
      }
      yy[k] += y * y;
      if (Columns) store<W>(columns + d + k * W, load<W>(columns + d + k * W) + y);
    }
  for (; d < dim; d += W) {
    const int64_t count = std::min<int64_t>(W, dim - d);
    const vec x = load_partial<W>(a + d, count);
    const vec row = Difference ? load_partial<W>(t + d, count) - x : load_partial<W>(t + d, count);
    const vec y = row - load_partial<W>(pivot + d, count);
    xy[0] += x * y;
    xx[0] += x * x;
    yy[0] += y * y;
    if (Columns) store_partial<W>(columns + d, load_partial<W>(columns + d, count) + y, count);
  }
  sums[0] += sum<W>(xy[0] + xy[1]);
  sums[1] += sum<W>(xx[0] + xx[1]);
  sums[2] += sum<W>(yy[0] + yy[1]);
}

// `add_row` for a class of one row, read where it lies instead of from a copy of its mean.
template <int W, class T, bool Difference>
SFM_INLINE void add_single_row(const Pass& pass, int64_t c, float* columns, double* sums) {
  using vec = typename Simd<W>::vec;
  const int64_t dim = pass.items.dim, whole = dim - dim % W;
  const T* x = static_cast<const T*>(pass.items.data) + c * pass.items.stride;
  const float* a = pass.centers + c * dim;
  vec xy = {}, xx = {}, yy = {};
  const auto add = [&](int64_t d, const auto& read) __attribute__((always_inline)) {
    const vec centre = read(a + d), row = read(x + d) - read(pass.items.shift + d);
    const vec y = (Difference ? row - centre : row) - read(pass.pivot + d);
    if (!Difference) {
      xy += centre * y;
      xx += centre * centre;
    }
    yy += y * y;
    return read(columns + d) + y;
  };
  for (int64_t d = 0; d < whole; d += W)
    store<W>(columns + d, add(d, [](const auto* p) __attribute__((always_inline)) { return load<W>(p); }));
  if (const int64_t rest = dim - whole)
    store_partial<W>(columns + whole, add(whole, [rest](const auto* p) __attribute__((always_inline)) { return load_partial<W>(p, rest); }), rest);
  sums[0] += sum<W>(xy);
  sums[1] += sum<W>(xx);
  sums[2] += sum<W>(yy);
}

struct SumsKernel {
  template <int W, class T>
  static SFM_INLINE void run(const Pass& pass, int64_t chunk, int64_t begin, int64_t end) {
    const int64_t dim = pass.items.dim;
    std::vector<float> scratch(2 * dim);
    float *t = scratch.data(), *columns = t + dim;
    double *total = pass.columns + chunk * dim, *sums = pass.sums + chunk * 3;
    const bool single = !pass.items.offsets && pass.kind != CLASS_COSINE;
    for (int64_t c = begin; c < end; ++c) {
      if (!single) class_mean_row<W, T>(pass.items, c, t);
      const float* a = pass.centers + c * dim;
      if (single && pass.kind == GLOBAL_COSINE)
        add_single_row<W, T, false>(pass, c, columns, sums);
      else if (single)
        add_single_row<W, T, true>(pass, c, columns, sums);
      else if (pass.kind == GLOBAL_COSINE)
        add_row<W, false, true>(a, t, pass.pivot, columns, dim, sums);
      else if (pass.kind == CLASS_COSINE)
        for (int64_t d = 0; d < dim; ++d) columns[d] += t[d] - pass.pivot[d];
      else
        add_row<W, true, true>(a, t, pass.pivot, columns, dim, sums);
      if ((c - begin) % kFlushRows == kFlushRows - 1) flush(columns, total, dim);
    }
    flush(columns, total, dim);
  }
};

// The pass of `anchored` and second pass of `class`: each class's loss, p and q, and for `class` the column sums of p a + q b.
struct ClassKernel {
  template <int W, class T>
  static SFM_INLINE void run(const Pass& pass, int64_t chunk, int64_t begin, int64_t end) {
    const int64_t dim = pass.items.dim, classes = pass.items.classes;
    std::vector<float> scratch(2 * dim);
    float *b = scratch.data(), *columns = b + dim;
    double *total = pass.columns + chunk * dim, *loss = pass.sums + chunk * 3;
    for (int64_t c = begin; c < end; ++c) {
      class_mean_row<W, T>(pass.items, c, b);
      const float* a = pass.centers + c * dim;
      double sums[3] = {};
      add_row<W, false, false>(a, b, pass.mean, nullptr, dim, sums);
      const Distance distance(sums[0], sums[1], sums[2], pass.scale, pass.eps, pass.length_weight, pass.delta);
      loss[0] += distance.value;
      const float p = static_cast<float>(distance.p / classes), q = static_cast<float>(distance.q / classes);
      pass.rows[c] = p;
      pass.rows[classes + c] = q;
      if (pass.kind != CLASS_COSINE) continue;
      for (int64_t d = 0; d < dim; ++d) columns[d] += p * a[d] + q * (b[d] - pass.mean[d]);
      if ((c - begin) % kFlushRows == kFlushRows - 1) flush(columns, total, dim);
    }
    if (pass.kind == CLASS_COSINE) flush(columns, total, dim);
  }
};

template <int W>
SFM_INLINE void sums_kernel(const Pass& pass, int64_t chunk, int64_t begin, int64_t end) {
  by_type<W, SumsKernel>(pass.items.type, pass, chunk, begin, end);
}
SFM_DISPATCH(sums, (const Pass& pass, int64_t chunk, int64_t begin, int64_t end), (pass, chunk, begin, end))

template <int W>
SFM_INLINE void class_rows_kernel(const Pass& pass, int64_t chunk, int64_t begin, int64_t end) {
  by_type<W, ClassKernel>(pass.items.type, pass, chunk, begin, end);
}
SFM_DISPATCH(class_rows, (const Pass& pass, int64_t chunk, int64_t begin, int64_t end), (pass, chunk, begin, end))

// The sums over all chunks, in order: `columns` (D) and three numbers.
struct Totals {
  Totals(const std::vector<double>& partial, int64_t chunks, int64_t dim) : columns(dim) {
    const double* part = partial.data();
    for (int64_t k = 0; k < chunks; ++k)
      for (int64_t d = 0; d < dim; ++d) columns[d] += part[k * dim + d];
    for (int64_t k = 0; k < chunks; ++k)
      for (int i = 0; i < 3; ++i) sums[i] += part[chunks * dim + k * 3 + i];
    for (double value : columns) columns_squared += value * value;
  }
  std::vector<double> columns;
  double sums[3] = {};
  double columns_squared = 0;
};

// max that propagates NaN
static double not_negative(double value) { return value < 0 ? 0 : value; }

std::tuple<Tensor, Tensor, Tensor> flow_alignment(
    Tensor features, std::optional<Tensor> order, std::optional<Tensor> offsets, Tensor centers, Tensor shift,
    std::optional<Tensor> anchor, int64_t kind, double eps, double weight, double delta) {
  STD_TORCH_CHECK(kind >= GLOBAL_COSINE && kind <= ANCHORED_COSINE, "kind must be 0 to 5, got ", kind);
  const bool per_class = kind == CLASS_COSINE || kind == ANCHORED_COSINE;
  const int fewest = fewest_classes(static_cast<int>(kind), weight);
  STD_TORCH_CHECK(centers.dim() == 2 && centers.size(0) >= fewest, "centers must be a matrix, its fewest rows ", fewest);
  STD_TORCH_CHECK(anchor.has_value() == (kind == ANCHORED_COSINE), "anchor belongs to kind 5");
  features = with_contiguous_rows(features);
  const int64_t classes = centers.size(0), dim = centers.size(1);
  STD_TORCH_CHECK(features.size(1) == dim, "features and centers must have the same number of columns");
  const Segments segments(order, offsets, features.size(0), classes);
  centers = float_rows(centers, classes, dim, "centers");
  shift = float_vector(shift, dim, "shift");
  const Items items{features.const_data_ptr(), features.stride(0), features.scalar_type(), segments.order,
                    segments.offsets, shift.const_data_ptr<float>(), classes, dim};

  Tensor loss = torch::stable::new_empty(centers, {});
  Tensor rows = torch::stable::new_empty(centers, {2, per_class ? classes : 1});
  Tensor columns = torch::stable::new_empty(centers, {2, dim});
  float *row = rows.mutable_data_ptr<float>(), *m = columns.mutable_data_ptr<float>(), *r = m + dim;

  const double C = static_cast<double>(classes), elements = C * static_cast<double>(dim);
  const double scale = kind == ANCHORED_COSINE ? 1 : kind == PAIR_MSE ? 2 * C / (C - 1) : (C / (C - 1)) * (C / (C - 1));
  const int64_t chunks = chunks_of(classes, dim);
  const int64_t summed = kind == ANCHORED_COSINE ? 0 : dim;  // columns
  std::vector<double> partial(chunks * (summed + 3));
  const double length_weight = kind == ANCHORED_COSINE ? weight : 0;
  Pass pass{items, centers.const_data_ptr<float>(), kind, nullptr, nullptr, scale, eps, length_weight, delta, row, partial.data(), partial.data() + chunks * summed};
  if (kind == ANCHORED_COSINE) {
    const Tensor point = float_vector(*anchor, dim, "anchor");
    std::copy_n(point.const_data_ptr<float>(), dim, m);
    std::fill_n(r, dim, 0.0f);
    pass.mean = m;
    parallel_chunks(chunks, classes, [&](int64_t k, int64_t begin, int64_t end) { class_rows(pass, k, begin, end); });
    *loss.mutable_data_ptr<float>() = static_cast<float>(Totals(partial, chunks, summed).sums[0] / C);
    return {loss, rows, columns};
  }
  // |sum of centred rows|^2 = sum of squares - C |mean|^2 cancels if features are far from `shift` and close together (as for
  // images that are still noise), so the first row is subtracted from all; only the decoupled kind needs absolute values.
  std::vector<float> pivot(dim);
  if (kind != DECOUPLED_MSE) {
    mean_rows(items, pivot.data(), 0, 1);
    const float* first = centers.const_data_ptr<float>();
    if (kind == FLOW_MSE || kind == PAIR_MSE)
      for (int64_t d = 0; d < dim; ++d) pivot[d] -= first[d];
  }
  pass.pivot = pivot.data();
  parallel_chunks(chunks, classes, [&](int64_t k, int64_t begin, int64_t end) { sums(pass, k, begin, end); });
  const Totals total(partial, chunks, dim);

  // If q is the same for all classes, r also contains the rounding error of m in float32.
  const auto keep_rounding_of_m = [&](double q) {
    for (int64_t d = 0; d < dim; ++d) r[d] = static_cast<float>(-q * (total.columns[d] / C + pivot[d] - m[d]));
  };
  double value;
  for (int64_t d = 0; d < dim; ++d) {
    m[d] = static_cast<float>(total.columns[d] / C + pivot[d]);
    r[d] = 0;
  }
  if (kind == GLOBAL_COSINE) {
    const Distance distance(total.sums[0], total.sums[1], not_negative(total.sums[2] - total.columns_squared / C), scale, eps);
    value = distance.value;
    row[0] = static_cast<float>(distance.p);
    row[1] = static_cast<float>(distance.q);
    keep_rounding_of_m(distance.q);
  } else if (kind == CLASS_COSINE) {
    std::fill(partial.begin(), partial.end(), 0.0);
    pass.mean = m;
    parallel_chunks(chunks, classes, [&](int64_t k, int64_t begin, int64_t end) { class_rows(pass, k, begin, end); });
    const Totals second(partial, chunks, dim);
    value = second.sums[0] / C;
    for (int64_t d = 0; d < dim; ++d) r[d] = static_cast<float>(-second.columns[d] / C);
  } else if (kind == DECOUPLED_MSE) {
    const double own = 2 * weight / elements;
    const double others = classes == 1 ? 0 : 2 * (1 - weight) / ((C - 1) * (C - 1) * elements);
    value = (own * total.sums[2] + others * ((C - 2) * total.columns_squared + total.sums[2])) / 2;
    row[1] = static_cast<float>(own + others);
    row[0] = -row[1];
    for (int64_t d = 0; d < dim; ++d) {
      m[d] = 0;
      r[d] = static_cast<float>(others * (C - 2) * total.columns[d]);
    }
  } else {
    value = scale * not_negative(total.sums[2] - total.columns_squared / C) / elements;
    row[1] = static_cast<float>(2 * scale / elements);
    row[0] = -row[1];
    keep_rounding_of_m(2 * scale / elements);
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(value);
  return {loss, rows, columns};
}

struct Backward {
  Items items;
  const float* centers;
  const float* rows;
  int64_t rows_step;  // 1 if p and q differ between classes, else 0
  int64_t classes_of_rows;
  const float* columns;
  float grad_output;
  void* out;
};

struct BackwardKernel {
  // The gradient of a class of one row, which is read where it lies instead of from a copy of its mean.
  template <int W, class T>
  static SFM_INLINE void single(const Backward& call, int64_t c) {
    using vec = typename Simd<W>::vec;
    const Items& items = call.items;
    const int64_t dim = items.dim, whole = dim - dim % W;
    const T* x = static_cast<const T*>(items.data) + c * items.stride;
    T* out = static_cast<T*>(call.out) + c * dim;
    const float *a = call.centers + c * dim, *m = call.columns, *r = m + dim;
    const float p = call.grad_output * call.rows[c * call.rows_step];
    const float q = call.grad_output * call.rows[call.classes_of_rows + c * call.rows_step];
    const auto gradient = [&](int64_t d, const auto& read) __attribute__((always_inline)) {
      const vec centred = (read(x + d) - read(items.shift + d)) - read(m + d);
      return p * read(a + d) + (q * centred + call.grad_output * read(r + d));
    };
    for (int64_t d = 0; d < whole; d += W)
      store<W>(out + d, gradient(d, [](const auto* p) __attribute__((always_inline)) { return load<W>(p); }));
    if (const int64_t rest = dim - whole)
      store_partial<W>(out + whole, gradient(whole, [rest](const auto* p) __attribute__((always_inline)) { return load_partial<W>(p, rest); }), rest);
  }

  template <int W, class T>
  static SFM_INLINE void run(const Backward& call, int64_t begin, int64_t end) {
    const Items& items = call.items;
    if (!items.offsets) {
      for (int64_t c = begin; c < end; ++c) single<W, T>(call, c);
      return;
    }
    const int64_t dim = items.dim, whole = dim - dim % W;
    std::vector<float> scratch(dim);
    float* t = scratch.data();
    const float *m = call.columns, *r = m + dim;
    for (int64_t c = begin; c < end; ++c) {
      class_mean_row<W, T>(items, c, t);
      const int64_t first = items.begin(c), last = items.end(c);
      const float scale = call.grad_output / static_cast<float>(last - first);
      const float p = scale * call.rows[c * call.rows_step], q = scale * call.rows[call.classes_of_rows + c * call.rows_step];
      const float* a = call.centers + c * dim;
      for (int64_t i = first; i < last; ++i) {
        T* out = static_cast<T*>(call.out) + items.row(i) * dim;
        for (int64_t d = 0; d < whole; d += W) {
          const auto g = p * load<W>(a + d) + (q * (load<W>(t + d) - load<W>(m + d)) + scale * load<W>(r + d));
          store<W>(out + d, g);
        }
        if (const int64_t rest = dim - whole) {
          const auto centred = load_partial<W>(t + whole, rest) - load_partial<W>(m + whole, rest);
          const auto g = p * load_partial<W>(a + whole, rest) + (q * centred + scale * load_partial<W>(r + whole, rest));
          store_partial<W>(out + whole, g, rest);
        }
      }
    }
  }
};

template <int W>
SFM_INLINE void gradient_kernel(const Backward& call, int64_t begin, int64_t end) {
  by_type<W, BackwardKernel>(call.items.type, call, begin, end);
}
SFM_DISPATCH(gradient, (const Backward& call, int64_t begin, int64_t end), (call, begin, end))

Tensor flow_alignment_backward(
    Tensor grad_output, Tensor features, std::optional<Tensor> order, std::optional<Tensor> offsets, Tensor centers, Tensor shift,
    Tensor rows, Tensor columns) {
  features = with_contiguous_rows(features);
  const int64_t classes = centers.size(0), dim = centers.size(1), items_count = features.size(0);
  STD_TORCH_CHECK(grad_output.numel() == 1 && grad_output.scalar_type() == ScalarType::Float, "grad_output must be a float32 scalar");
  STD_TORCH_CHECK(features.size(1) == dim, "features and centers must have the same number of columns");
  const Segments segments(order, offsets, items_count, classes);
  centers = float_rows(centers, classes, dim, "centers");
  shift = float_vector(shift, dim, "shift");
  STD_TORCH_CHECK(rows.dim() == 2 && (rows.size(1) == 1 || rows.size(1) == classes), "rows must be (2, 1) or (2, C)");
  rows = float_rows(rows, 2, rows.size(1), "rows");
  columns = float_rows(columns, 2, dim, "columns");
  Tensor out = torch::stable::new_empty(features, {items_count, dim});
  prefer_huge_pages(out);
  const Items items{features.const_data_ptr(), features.stride(0), features.scalar_type(), segments.order,
                    segments.offsets, shift.const_data_ptr<float>(), classes, dim};
  void* data = out.mutable_data_ptr();
  const Backward call{items, centers.const_data_ptr<float>(), rows.const_data_ptr<float>(), rows.size(1) == 1 ? 0 : 1,
                      rows.size(1), columns.const_data_ptr<float>(), *grad_output.const_data_ptr<float>(), data};
  parallel_chunks(chunks_of(items_count, dim), classes,
                  [&](int64_t, int64_t begin, int64_t end) { gradient(call, begin, end); });
  return out;
}

}  // namespace sfm_fast
