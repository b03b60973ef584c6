// Shared by the bindings of the CUDA kernels to the operations: checks of arguments, pointers, the stream, workspaces.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "launchers.h"

namespace sfm_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef SFM_SHIM  // the emulator takes CPU tensors and has no devices or streams
constexpr bool on_gpu(const Tensor&) { return true; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
  ~DeviceGuard() {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#define SFM_LIBRARY_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(sfm_fast, CPU, library)
#else
inline bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }
using torch::stable::accelerator::DeviceGuard;
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}
#define SFM_LIBRARY_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(sfm_fast, CUDA, library)
#endif

inline void check_launch(cudaError_t error, const char* operation) {
  STD_TORCH_CHECK(error == cudaSuccess, "sfm_fast::", operation,
                  ": the CUDA kernels did not start: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

// Private, for the first run on a GPU: SFM_FAST_KERNELS=old uses the kernels that are to be replaced.
inline bool new_kernels() {
  const char* const value = std::getenv("SFM_FAST_KERNELS");
  return value == nullptr || std::strcmp(value, "old") != 0;
}

inline sfm::Dtype kernel_dtype(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float      ? sfm::Dtype::float32
         : dtype == ScalarType::BFloat16 ? sfm::Dtype::bfloat16
                                         : sfm::Dtype::float16;
}

// A contiguous tensor on the device of `like`, of the dtype and number of dimensions that the kernels read.
inline Tensor checked(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t dim, const char* name) {
  STD_TORCH_CHECK(on_gpu(tensor) && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the CUDA device of the other arguments");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, it has ", tensor.dim());
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> checked_indices(const std::optional<Tensor>& tensor, const Tensor& like,
                                             const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(*tensor, like, ScalarType::Long, 1, name);
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
inline const int64_t* indices(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? read<int64_t>(*tensor) : nullptr;
}

inline Tensor workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {int64_t(bytes)}, ScalarType::Byte);
}

}  // namespace sfm_binding
