// The operations' schemas and their CPU entry points. sfm_fast/ops/schemas.py holds the same text; a test compares the two.
#ifndef SFM_SHIM  // with SFM_SHIM the CUDA kernels replace these, see tests/shim/library.py
#include "cpu/ops.h"
#endif

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sfm_fast, m) {
  m.def("class_means(Tensor features, Tensor? order, Tensor? offsets, Tensor shift) -> Tensor");
  m.def("class_means_backward(Tensor grad, Tensor? order, Tensor? offsets, SymInt num_items, ScalarType dtype) -> Tensor");
  m.def(
      "flow_alignment(Tensor features, Tensor? order, Tensor? offsets, Tensor centers, Tensor shift, "
      "Tensor? anchor, int kind, float eps, float weight, float delta) -> (Tensor, Tensor, Tensor)");
  m.def(
      "flow_alignment_backward(Tensor grad_output, Tensor features, Tensor? order, Tensor? offsets, Tensor centers, "
      "Tensor shift, Tensor rows, Tensor columns) -> Tensor");
  m.def(
      "pair_alignment(Tensor a, Tensor b, Tensor? groups, SymInt row_start, SymInt row_stop, float eps, "
      "bool need_gradient, bool high) -> (Tensor, Tensor)");
  m.def("render(Tensor[] levels, Tensor? rows, SymInt size, ScalarType dtype) -> Tensor");
  m.def("render_backward(Tensor grad, Tensor images, SymInt[] sides) -> Tensor");
  m.def(
      "augment(Tensor images, Tensor boxes, Tensor noise_items, SymInt size, Tensor mean, Tensor std, float noise_mean, "
      "float noise_std, int seed, SymInt step, int stream, ScalarType dtype) -> Tensor");
  m.def(
      "augment_backward(Tensor grad, Tensor boxes, Tensor std, SymInt images, SymInt channels, SymInt height, "
      "SymInt width, ScalarType dtype) -> Tensor");
  m.def(
      "render_augment(Tensor[] levels, Tensor? rows, SymInt canvas, Tensor boxes, Tensor noise_items, SymInt size, "
      "Tensor mean, Tensor std, float noise_mean, float noise_std, int seed, SymInt step, int stream, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "render_augment_backward(Tensor grad, Tensor[] levels, Tensor? rows, SymInt canvas, Tensor boxes, Tensor std) "
      "-> Tensor");
}

#ifndef SFM_SHIM
STABLE_TORCH_LIBRARY_IMPL(sfm_fast, CPU, m) {
  m.impl("class_means", TORCH_BOX(&sfm_fast::class_means));
  m.impl("class_means_backward", TORCH_BOX(&sfm_fast::class_means_backward));
  m.impl("flow_alignment", TORCH_BOX(&sfm_fast::flow_alignment));
  m.impl("flow_alignment_backward", TORCH_BOX(&sfm_fast::flow_alignment_backward));
  m.impl("pair_alignment", TORCH_BOX(&sfm_fast::pair_alignment));
  m.impl("render", TORCH_BOX(&sfm_fast::render));
  m.impl("render_backward", TORCH_BOX(&sfm_fast::render_backward));
  m.impl("augment", TORCH_BOX(&sfm_fast::augment));
  m.impl("augment_backward", TORCH_BOX(&sfm_fast::augment_backward));
  m.impl("render_augment", TORCH_BOX(&sfm_fast::render_augment));
  m.impl("render_augment_backward", TORCH_BOX(&sfm_fast::render_augment_backward));
}
#endif
