// Shared by the CUDA kernels: 16-byte loads and stores of float32, bfloat16 and float16, warp sums, means over labelled
// items.
#pragma once

#include <cstdint>

#include "launchers.h"

#ifdef SFM_SHIM  // the kernels run on the CPU, see tests/shim/cuda_emu.h
#define SFM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emu::launch(grid, block, shared, [=] { kernel(__VA_ARGS__); })
#define SFM_SHARED(name) unsigned char* name = emu::shared_memory()
#else
#define SFM_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SFM_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// Returns from the launcher with the first error of a launch or of a call to the runtime.
#define SFM_RETURN_IF_ERROR(expression)             \
  do {                                              \
    const cudaError_t sfm_error = (expression);     \
    if (sfm_error != cudaSuccess) return sfm_error; \
  } while (0)

namespace sfm {

constexpr int WARPS = 8;  // per block in the kernels that stream rows: each warp takes one row (class) at a time
constexpr int THREADS = 32 * WARPS;
constexpr int RESIDENT = 2;  // blocks per multiprocessor: allows 128 registers; without it the compiler spills for more blocks
constexpr unsigned ALL_LANES = 0xffffffffu;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t round_up(int64_t value, int64_t to) { return divide_up(value, to) * to; }
__host__ __device__ inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 value) {
#ifdef SFM_SHIM
  return emu::half_to_float(value.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ void from_float(float value, float& result) { result = value; }
__device__ __forceinline__ void from_float(float value, Bfloat16& result) {
#ifdef SFM_SHIM
  result.bits = emu::float_to_bfloat(value);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#endif
}
__device__ __forceinline__ void from_float(float value, Float16& result) {
#ifdef SFM_SHIM
  result.bits = emu::float_to_half(value);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#endif
}

template <typename T>
constexpr int WIDE = 16 / int(sizeof(T));  // elements of a 16-byte access

// VEC elements of T at `from` as float32; one 16-byte load if VEC = WIDE<T>.
template <int VEC, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[VEC]) {
  if constexpr (VEC == 1) {
    to[0] = to_float(*from);
  } else {
    static_assert(VEC % WIDE<T> == 0, "a whole number of 16-byte accesses");
#pragma unroll
    for (int part = 0; part < VEC; part += WIDE<T>) {
      if constexpr (sizeof(T) == 4) {
        const float4 raw = *reinterpret_cast<const float4*>(from + part);
        to[part] = raw.x, to[part + 1] = raw.y, to[part + 2] = raw.z, to[part + 3] = raw.w;
      } else {
        const uint4 raw = *reinterpret_cast<const uint4*>(from + part);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          to[part + 2 * k] = to_float(T{uint16_t(words[k] & 0xffffu)});
          to[part + 2 * k + 1] = to_float(T{uint16_t(words[k] >> 16)});
        }
      }
    }
  }
}

template <int VEC, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[VEC]) {
  if constexpr (VEC == 1) {
    from_float(from[0], *to);
  } else {
#pragma unroll
    for (int part = 0; part < VEC; part += WIDE<T>) {
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(to + part) = make_float4(from[part], from[part + 1], from[part + 2], from[part + 3]);
      } else {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          T low, high;
          from_float(from[part + 2 * k], low);
          from_float(from[part + 2 * k + 1], high);
          words[k] = uint32_t(low.bits) | uint32_t(high.bits) << 16;
        }
        *reinterpret_cast<uint4*>(to + part) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

// Features as the kernels read them: class c has the items order[offsets[c]] ... order[offsets[c + 1] - 1], or row c
// without labels.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* order;
  const int64_t* offsets;
};

// Row `row` minus the shift, columns [column, column + VEC).
template <int VEC, typename T>
__device__ __forceinline__ void shifted_row(const Rows<T>& rows, int64_t row, int column, const float (&shift)[VEC],
                                            float (&value)[VEC]) {
  load<VEC>(rows.data + row * rows.stride + column, value);
#pragma unroll
  for (int k = 0; k < VEC; ++k) value[k] -= shift[k];
}

// Mean over class c of (features - shift), columns [column, column + VEC): 0/0 = NaN for a class without items.
template <int VEC, typename T>
__device__ __forceinline__ void class_mean(const Rows<T>& rows, int64_t c, int column, const float (&shift)[VEC],
                                           float (&mean)[VEC]) {
  if (rows.offsets == nullptr) return shifted_row<VEC>(rows, c, column, shift, mean);
  const int64_t begin = rows.offsets[c], end = rows.offsets[c + 1];
#pragma unroll
  for (int k = 0; k < VEC; ++k) mean[k] = 0.f;
#pragma unroll 4
  for (int64_t item = begin; item < end; ++item) {
    float value[VEC];
    shifted_row<VEC>(rows, rows.order[item], column, shift, value);
#pragma unroll
    for (int k = 0; k < VEC; ++k) mean[k] += value[k];
  }
  const float count = float(end - begin);
#pragma unroll
  for (int k = 0; k < VEC; ++k) mean[k] /= count;
}

// Calls use(c, t_c, a_c) for the classes first, first + step, ... below stop; a_c is zero if CENTERS is false. Without
// labels, two rows are read before the first is used, so that enough loads overlap.
template <int VEC, bool CENTERS, typename T, typename F>
__device__ __forceinline__ void for_each_class(const Rows<T>& rows, const float* __restrict__ centers, int64_t dims,
                                               int64_t first, int64_t stop, int64_t step, int column,
                                               const float (&shift)[VEC], F use) {
  int64_t c = first;
  float t[2][VEC], a[2][VEC] = {};
  if (rows.offsets == nullptr) {
    for (; c + step < stop; c += 2 * step) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        shifted_row<VEC>(rows, c + u * step, column, shift, t[u]);
        if constexpr (CENTERS) load<VEC>(centers + (c + u * step) * dims + column, a[u]);
      }
      use(c, t[0], a[0]);
      use(c + step, t[1], a[1]);
    }
  }
  for (; c < stop; c += step) {
    if constexpr (CENTERS) load<VEC>(centers + c * dims + column, a[0]);
    class_mean<VEC>(rows, c, column, shift, t[0]);
    use(c, t[0], a[0]);
  }
}

// How the streaming kernels divide rows x columns: tiles of 32 * vec columns, chunks of rows, about BLOCKS blocks. It
// depends only on the shape, and so does the order of every sum.
struct Partition {
  int64_t tiles, chunks, chunk_rows;
};
inline Partition partition(int64_t rows, int64_t dims, int vec) {
  constexpr int64_t BLOCKS = 2048, SMALLEST_CHUNK = 2 * WARPS;
  Partition cut;
  cut.tiles = divide_up(dims, 32 * vec);
  const int64_t wanted = cut.tiles < BLOCKS ? BLOCKS / cut.tiles : 1;
  const int64_t chunk = divide_up(rows, wanted);
  cut.chunk_rows = round_up(chunk < SMALLEST_CHUNK ? SMALLEST_CHUNK : chunk, WARPS);
  cut.chunks = divide_up(rows, cut.chunk_rows);
  return cut;
}

// Calls run(T{}) with the element type that `dtype` names.
template <typename F>
cudaError_t with_type(Dtype dtype, F run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float{});
    case Dtype::bfloat16:
      return run(Bfloat16{});
    case Dtype::float16:
      return run(Float16{});
  }
  return cudaErrorInvalidValue;
}

template <typename T>
Rows<T> typed_rows(const Features& features) {
  return {static_cast<const T*>(features.data), features.row_stride, features.order, features.offsets};
}

}  // namespace sfm
