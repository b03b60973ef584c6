// The losses' CUDA kernels as implementations of the sfm_fast operations, through LibTorch's stable ABI. Schemas:
// csrc/ops.cpp.
//
// Every function allocates its outputs and its workspace with the caching allocator, queues work on the current stream
// of the features' device and returns; sizes depend only on shapes, so CUDA graphs can capture all of it.
#include "binding.h"

namespace {

using namespace sfm_binding;

// Features (items, dims) with unit column stride and their labels; owns the tensors that the pointers point to.
struct Labelled {
  Tensor features;
  std::optional<Tensor> order, offsets;
  int64_t items, dims, classes;
  sfm::Features view;

  Labelled(const Tensor& given, const std::optional<Tensor>& given_order, const std::optional<Tensor>& given_offsets)
      : features(given) {
    STD_TORCH_CHECK(on_gpu(given) && given.dim() == 2, "features must be an (items, dims) CUDA tensor");
    STD_TORCH_CHECK(given_order.has_value() == given_offsets.has_value(), "order and offsets come together");
    items = given.size(0), dims = given.size(1);
    STD_TORCH_CHECK(dims < (int64_t(1) << 30), "features have too many columns");
    order = checked_indices(given_order, given, "order"), offsets = checked_indices(given_offsets, given, "offsets");
    STD_TORCH_CHECK(!order.has_value() || order->size(0) == items, "order must have one entry an item, ", items);
    STD_TORCH_CHECK(!offsets.has_value() || offsets->size(0) >= 1, "offsets must have one entry more than classes");
    classes = offsets.has_value() ? offsets->size(0) - 1 : items;
    if (dims > 1 && given.stride(1) != 1) features = torch::stable::contiguous(given);
    view = {features.const_data_ptr(), kernel_dtype(given.scalar_type(), "features"), features.stride(0),
            indices(order), indices(offsets)};
  }
};

std::tuple<Tensor, Tensor, Tensor> flow_alignment(const Tensor& features, const std::optional<Tensor>& order,
                                                  const std::optional<Tensor>& offsets, const Tensor& centers,
                                                  const Tensor& shift, const std::optional<Tensor>& anchor,
                                                  int64_t kind, double eps, double weight, double delta) {
  const DeviceGuard guard(features.get_device_index());
  const Labelled rows(features, order, offsets);
  STD_TORCH_CHECK(kind >= sfm::GLOBAL_COSINE && kind <= sfm::ANCHORED_COSINE, "kind must be 0 to 5");
  STD_TORCH_CHECK(anchor.has_value() == (kind == sfm::ANCHORED_COSINE), "anchor belongs to kind 5");
  const Tensor a = checked(centers, features, ScalarType::Float, 2, "centers"),
               s = checked(shift, features, ScalarType::Float, 1, "shift");
  STD_TORCH_CHECK(a.size(0) == rows.classes && a.size(1) == rows.dims && s.size(0) == rows.dims,
                  "centers and shift must fit the features");
  std::optional<Tensor> point;
  if (anchor.has_value()) {
    point = checked(*anchor, features, ScalarType::Float, 1, "anchor");
    STD_TORCH_CHECK(point->size(0) == rows.dims, "anchor must fit the features");
  }
  const int fewest = sfm::fewest_classes(int(kind), weight);
  STD_TORCH_CHECK(rows.classes >= fewest && rows.dims >= 1, "one dimension at least, and of classes ", fewest);
  const bool per_class = kind == sfm::CLASS_COSINE || kind == sfm::ANCHORED_COSINE;
  const Tensor loss = torch::stable::new_empty(features, {}, ScalarType::Float);
  const Tensor factors =
      torch::stable::new_empty(features, {2, per_class ? rows.classes : 1}, ScalarType::Float);
  const Tensor columns = torch::stable::new_empty(features, {2, rows.dims}, ScalarType::Float);
  const Tensor space = workspace(features, sfm::flow_alignment_workspace_bytes(rows.classes, rows.dims));
  check_launch(sfm::flow_alignment(rows.view, read<float>(a), read<float>(s), point ? read<float>(*point) : nullptr,
                                   rows.classes, rows.dims, int(kind), float(eps), float(weight), float(delta),
                                   write<float>(loss),
                                   write<float>(factors), write<float>(columns), space.mutable_data_ptr(), new_kernels(), current_stream(features)),
               "flow_alignment");
  return {loss, factors, columns};
}

Tensor flow_alignment_backward(const Tensor& grad_output, const Tensor& features, const std::optional<Tensor>& order,
                               const std::optional<Tensor>& offsets, const Tensor& centers, const Tensor& shift,
                               const Tensor& factors, const Tensor& columns) {
  const DeviceGuard guard(features.get_device_index());
  const Labelled rows(features, order, offsets);
  const Tensor a = checked(centers, features, ScalarType::Float, 2, "centers"),
               s = checked(shift, features, ScalarType::Float, 1, "shift");
  const Tensor pq = checked(factors, features, ScalarType::Float, 2, "rows"),
               mr = checked(columns, features, ScalarType::Float, 2, "columns");
  const Tensor upstream = checked(grad_output, features, ScalarType::Float, 0, "grad_output");
  STD_TORCH_CHECK(a.size(0) == rows.classes && a.size(1) == rows.dims && s.size(0) == rows.dims && mr.size(0) == 2 &&
                      mr.size(1) == rows.dims && pq.size(0) == 2 && (pq.size(1) == 1 || pq.size(1) == rows.classes),
                  "centers, shift, rows and columns must fit the features");
  const Tensor gradient = torch::stable::new_empty(features, {rows.items, rows.dims}, features.scalar_type());
  if (gradient.numel() == 0) return gradient;
  check_launch(sfm::flow_alignment_backward(read<float>(upstream), rows.view, read<float>(a), read<float>(s),
                                            read<float>(pq), pq.size(1), read<float>(mr), rows.classes, rows.dims,
                                            gradient.mutable_data_ptr(), current_stream(features)),
               "flow_alignment_backward");
  return gradient;
}

Tensor class_means(const Tensor& features, const std::optional<Tensor>& order, const std::optional<Tensor>& offsets,
                   const Tensor& shift) {
  const DeviceGuard guard(features.get_device_index());
  const Labelled rows(features, order, offsets);
  const Tensor s = checked(shift, features, ScalarType::Float, 1, "shift");
  STD_TORCH_CHECK(s.size(0) == rows.dims, "shift must fit the features");
  const Tensor means = torch::stable::new_empty(features, {rows.classes, rows.dims}, ScalarType::Float);
  check_launch(sfm::class_means(rows.view, read<float>(s), rows.classes, rows.dims, write<float>(means),
                                current_stream(features)),
               "class_means");
  return means;
}

Tensor class_means_backward(const Tensor& grad, const std::optional<Tensor>& order,
                            const std::optional<Tensor>& offsets, int64_t num_items, ScalarType dtype) {
  const DeviceGuard guard(grad.get_device_index());
  const Tensor rows = checked(grad, grad, ScalarType::Float, 2, "grad");
  const std::optional<Tensor> by_class = checked_indices(order, grad, "order"),
                              bounds = checked_indices(offsets, grad, "offsets");
  STD_TORCH_CHECK(by_class.has_value() == bounds.has_value(), "order and offsets come together");
  const int64_t classes = rows.size(0), dims = rows.size(1);
  STD_TORCH_CHECK(
      by_class.has_value() ? by_class->size(0) == num_items && bounds->size(0) == classes + 1 : classes == num_items,
      "order and offsets must fit grad and num_items");
  const Tensor gradient = torch::stable::new_empty(grad, {num_items, dims}, dtype);
  check_launch(
      sfm::class_means_backward(read<float>(rows), indices(by_class), indices(bounds), classes, dims,
                                kernel_dtype(dtype, "dtype"), gradient.mutable_data_ptr(), current_stream(grad)),
      "class_means_backward");
  return gradient;
}

std::tuple<Tensor, Tensor> pair_alignment(const Tensor& a, const Tensor& b, const std::optional<Tensor>& groups,
                                          int64_t row_start, int64_t row_stop, double eps, bool need_gradient,
                                          bool high) {
  const DeviceGuard guard(a.get_device_index());
  const Tensor real = checked(a, a, ScalarType::Float, 2, "a"), synthetic = checked(b, a, ScalarType::Float, 2, "b");
  const std::optional<Tensor> group = checked_indices(groups, a, "groups");
  const int64_t classes = real.size(0), dims = real.size(1);
  STD_TORCH_CHECK(synthetic.size(0) == classes && synthetic.size(1) == dims, "a and b must have the same shape");
  STD_TORCH_CHECK(!group.has_value() || group->size(0) == classes, "groups must have one entry a class");
  STD_TORCH_CHECK(classes >= 1 && dims >= 1 && dims < (int64_t(1) << 30), "one class and one dimension at least");
  STD_TORCH_CHECK(0 <= row_start && row_start <= row_stop && row_stop <= classes, "rows must lie within the classes");
  const Tensor total = torch::stable::new_empty(a, {}, ScalarType::Double);
  const Tensor gradient =
      torch::stable::new_empty(a, {need_gradient ? row_stop - row_start : 0, dims}, ScalarType::Float);
  const sfm::PairProblem problem{read<float>(real),
                                 read<float>(synthetic),
                                 indices(group),
                                 classes,
                                 dims,
                                 row_start,
                                 row_stop,
                                 float(eps),
                                 need_gradient,
                                 high,
                                 0,
                                 0,
                                 new_kernels()};
  const Tensor space = workspace(a, sfm::pair_alignment_workspace_bytes(problem));
  check_launch(sfm::pair_alignment(problem, write<double>(total), write<float>(gradient), space.mutable_data_ptr(),
                                   current_stream(a)),
               "pair_alignment");
  return {total, gradient};
}

}  // namespace

SFM_LIBRARY_IMPL(library) {
  library.impl("flow_alignment", TORCH_BOX(&flow_alignment));
  library.impl("flow_alignment_backward", TORCH_BOX(&flow_alignment_backward));
  library.impl("class_means", TORCH_BOX(&class_means));
  library.impl("class_means_backward", TORCH_BOX(&class_means_backward));
  library.impl("pair_alignment", TORCH_BOX(&pair_alignment));
}
