// Cosine alignment of every ordered pair of class flows and its gradient, block by block, in C++ for the CPU.
//
// For f = a_j - a_i, g = b_j - b_i: total = sum of cos(f, g), and with u = 1/(|f||g|), w = cos/|g|^2 (symmetric),
//   gradient_k = d total / d b_k = 2 [a_k sum_i u_ik - sum_i u_ik a_i - b_k sum_i w_ik + sum_i w_ik b_i].
// A block of the pair matrix exists only in cache: there is no C x C matrix and no C x C x D tensor. Three products a pair give
// f.f, g.g and f.g: with s = a + b, |s_j - s_i|^2 = f.f + 2 f.g + g.g. Where they would lose digits, because two classes are
// close to each other beside their distance from the mean, products of *differences* are accumulated instead, which cost
// two subtractions a number more; so equal rows have length exactly 0. If all rows are asked for, each unordered pair of blocks
// is computed once and added to both blocks' gradients, in rounds of disjoint pairs (a tournament), so no two threads
// write the same row and the order of every sum depends only on the shape. Derivation in docs/losses.md.
#include "pair_block.h"

#include <cmath>
#include <limits>

namespace sfm_fast {

// Block edges and the rounds of a tournament: every two blocks are paired once, and each block at most once per round.
// With many classes a block fills the cache; otherwise there are eight, four or two, so that two threads, or four, always
// have equal work. Small blocks cost more a pair, for copies of rows and incomplete register tiles (hence columns^3 classes, measured),
// and a block must not be so small that starting a round (some microseconds) costs more than its work.
struct Schedule {
  Schedule(int64_t classes, int64_t dim, int64_t first, int64_t last) {
    const auto worthwhile = static_cast<int64_t>(std::sqrt(3e5 / static_cast<double>(dim)));
    columns = 8;
    while (columns > 1 && classes < columns * std::max(columns * columns, worthwhile)) columns /= 2;
    if (classes > columns * kBlock) columns = ((classes + kBlock - 1) / kBlock + 1) / 2 * 2;
    size = (classes + columns - 1) / columns;
    columns = (classes + size - 1) / size;
    rows = (last - first + size - 1) / size;
    symmetric = first == 0 && last == classes;
  }
  int64_t size, columns, rows;
  bool symmetric;
};

template <class F>
static void parallel_workers(int64_t workers, int64_t jobs, const F& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t job = worker; job < jobs; job += workers) body(worker, job);
  };
  if (workers == 1) return run(0, 1);
  torch::stable::parallel_for(0, workers, 1, run);
}

// Writes the squared lengths of the rows of a, scale * b and a + scale * b, and returns the scale: the power of two that makes
// the rows of b about as long as those of a, because sums of a long and a short row keep few digits of the short one.
static float row_lengths(const float* a, const float* b, int64_t classes, int64_t dim, int64_t rows_a_task, float* lengths) {
  torch::stable::parallel_for(0, classes, rows_a_task, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) row_products(a + c * dim, b + c * dim, dim, lengths + c, classes);
  });
  double aa = 0, bb = 0;
  for (int64_t c = 0; c < classes; ++c) {
    aa += lengths[c];
    bb += lengths[classes + c];
  }
  const double ratio = std::sqrt(aa / bb);  // 0, infinite or NaN for rows that are all 0 or not finite: no scale then
  const bool usable = ratio > 1e-12 && ratio < 1e12;
  const float scale = usable ? std::exp2(std::round(std::log2(static_cast<float>(ratio)))) : 1.0f;
  for (int64_t c = 0; c < classes; ++c) {
    float *own = lengths + c, *scaled = own + classes, *sum = scaled + classes;
    *scaled *= scale * scale;
    *sum = *own + 2 * scale * *sum + *scaled;
  }
  return scale;
}

std::tuple<Tensor, Tensor> pair_alignment(
    Tensor a, Tensor b, std::optional<Tensor> groups, int64_t row_start, int64_t row_stop, double eps, bool need_gradient,
    bool high) {
  (void)high;  // always float32 without cancellation
  STD_TORCH_CHECK(a.dim() == 2 && a.size(0) >= 2 && a.size(1) >= 1, "a must be a matrix with at least 2 rows");
  const int64_t classes = a.size(0), dim = a.size(1);
  a = float_rows(a, classes, dim, "a");
  b = float_rows(b, classes, dim, "b");
  STD_TORCH_CHECK(0 <= row_start && row_start <= row_stop && row_stop <= classes, "rows must lie in 0..", classes);
  if (groups) {
    STD_TORCH_CHECK(groups->dim() == 1 && groups->size(0) == classes && groups->scalar_type() == ScalarType::Long,
                    "groups must be int64 of shape (", classes, ",)");
    groups = torch::stable::contiguous(*groups);
  }
  const int64_t rows = row_stop - row_start;
  const Schedule plan(classes, dim, row_start, row_stop);
  Tensor total = torch::stable::new_empty(a, {}, ScalarType::Double);
  Tensor gradient = torch::stable::new_empty(a, {need_gradient ? rows : 0, dim});
  prefer_huge_pages(gradient);

  // Waking other threads costs more than a small problem.
  const bool small = static_cast<double>(rows) * static_cast<double>(classes) * static_cast<double>(dim) < 2e6;
  const int64_t workers = small ? 1 : std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), plan.rows));
  std::vector<BlockScratch> scratch;
  for (int64_t worker = 0; worker < workers; ++worker) scratch.emplace_back(a, plan.size);
  std::vector<double> u_sum(need_gradient ? rows : 0), w_sum(need_gradient ? rows : 0);
  // One slot per block pair keeps the order of the final sum fixed.
  std::vector<double> cosines(plan.rows * plan.columns);

  const int64_t rows_a_task = std::max<int64_t>(1, 65536 / dim);
  std::vector<float> lengths(3 * classes);
  const float scale = row_lengths(a.const_data_ptr<float>(), b.const_data_ptr<float>(), classes, dim, rows_a_task, lengths.data());
  const PairProblem problem{a.const_data_ptr<float>(), b.const_data_ptr<float>(),
                            groups ? groups->const_data_ptr<int64_t>() : nullptr, classes, dim,
                            std::max(static_cast<float>(eps), std::numeric_limits<float>::min()), scale, lengths.data()};
  float* out = need_gradient ? gradient.mutable_data_ptr<float>() : nullptr;
  if (out)
    torch::stable::parallel_for(0, rows, rows_a_task, [&](int64_t begin, int64_t end) {
      std::memset(out + begin * dim, 0, (end - begin) * dim * sizeof(float));
    });

  const auto visit = [&](int64_t worker, int64_t i_block, int64_t j_block) {
    const int64_t i0 = row_start + i_block * plan.size, i1 = std::min(i0 + plan.size, row_stop);
    const int64_t j0 = j_block * plan.size, j1 = std::min(j0 + plan.size, classes);
    BlockScratch& mine = scratch[worker];
    const bool mirrored = plan.symmetric && i_block != j_block;
    double& cosine = cosines[i_block * plan.columns + j_block];
    block_weights(problem, mine, i0, i1, j0, j1, cosine);
    if (mirrored) cosine *= 2;
    if (!out) return;
    for (int64_t i = i0; i < i1; ++i) {
      u_sum[i - row_start] += mine.row_u[i - i0];
      w_sum[i - row_start] += mine.row_w[i - i0];
    }
    block_gradient(problem, mine, false, i0, i1, j0, j1, out + (i0 - row_start) * dim);
    if (!mirrored) return;
    for (int64_t j = j0; j < j1; ++j) {
      u_sum[j] += mine.column_u[j - j0];
      w_sum[j] += mine.column_w[j - j0];
    }
    block_gradient(problem, mine, true, j0, j1, i0, i1, out + j0 * dim);
  };

  if (plan.symmetric) {
    parallel_workers(workers, plan.rows, [&](int64_t worker, int64_t block) { visit(worker, block, block); });
    const int64_t even = plan.rows + plan.rows % 2, half = even / 2;
    for (int64_t round = 0; round + 1 < even; ++round)
      parallel_workers(workers, half, [&](int64_t worker, int64_t k) {
        // The circle method: the last block stays, the others move by one place per round.
        const int64_t turning = even - 1;
        int64_t i = k ? (round + k) % turning : turning, j = (round - k + turning) % turning;
        if (i > j) std::swap(i, j);
        if (j < plan.rows) visit(worker, i, j);
      });
  } else {
    parallel_workers(workers, plan.rows, [&](int64_t worker, int64_t block) {
      for (int64_t j = 0; j < plan.columns; ++j) visit(worker, block, j);
    });
  }
  double sum = 0;
  for (double value : cosines) sum += value;
  *total.mutable_data_ptr<double>() = sum;
  if (out)
    torch::stable::parallel_for(0, rows, rows_a_task, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        finish_row(problem.a + (row_start + k) * dim, problem.b + (row_start + k) * dim, static_cast<float>(u_sum[k]),
                   static_cast<float>(w_sum[k]), out + k * dim, dim);
    });
  return {total, gradient};
}

}  // namespace sfm_fast
