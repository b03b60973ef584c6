// CPU entry points of the operations; each is described at its definition in cpu/<op>.cpp.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace sfm_fast {

using torch::stable::Tensor;

Tensor class_means(Tensor features, std::optional<Tensor> order, std::optional<Tensor> offsets, Tensor shift);

Tensor class_means_backward(
    Tensor grad, std::optional<Tensor> order, std::optional<Tensor> offsets, int64_t num_items,
    torch::headeronly::ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor> flow_alignment(
    Tensor features, std::optional<Tensor> order, std::optional<Tensor> offsets, Tensor centers, Tensor shift,
    std::optional<Tensor> anchor, int64_t kind, double eps, double weight, double delta);

Tensor flow_alignment_backward(
    Tensor grad_output, Tensor features, std::optional<Tensor> order, std::optional<Tensor> offsets, Tensor centers,
    Tensor shift, Tensor rows, Tensor columns);

std::tuple<Tensor, Tensor> pair_alignment(
    Tensor a, Tensor b, std::optional<Tensor> groups, int64_t row_start, int64_t row_stop, double eps,
    bool need_gradient, bool high);

Tensor render(
    std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t size, torch::headeronly::ScalarType dtype);

Tensor render_backward(Tensor grad, Tensor images, std::vector<int64_t> sides);

Tensor augment(
    Tensor images, Tensor boxes, Tensor noise_items, int64_t size, Tensor mean, Tensor std, double noise_mean,
    double noise_std, int64_t seed, int64_t step, int64_t stream, torch::headeronly::ScalarType dtype);

Tensor augment_backward(
    Tensor grad, Tensor boxes, Tensor std, int64_t images, int64_t channels, int64_t height, int64_t width,
    torch::headeronly::ScalarType dtype);

Tensor render_augment(
    std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t canvas, Tensor boxes, Tensor noise_items,
    int64_t size, Tensor mean, Tensor std, double noise_mean, double noise_std, int64_t seed, int64_t step,
    int64_t stream, torch::headeronly::ScalarType dtype);

Tensor render_augment_backward(
    Tensor grad, std::vector<Tensor> levels, std::optional<Tensor> rows, int64_t canvas, Tensor boxes, Tensor std);

}  // namespace sfm_fast
