// Runs CUDA kernels on the CPU, for tests of correctness: CUDA's names in terms of `fibers.h`. g++ only.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr : int { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

namespace emu {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}
inline uint16_t float_to_half(float value) {
  const _Float16 rounded = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
// cvt.rna.tf32.f32: 10 bits of mantissa, to nearest, ties away from zero.
inline float round_tf32(float value) {
  return std::isfinite(value) ? as_float((as_bits(value) + 0x1000) & 0xffffe000u) : value;
}
// What the tensor cores read of an operand: the low 13 bits are ignored.
inline float truncate_tf32(float value) { return std::isnan(value) ? value : as_float(as_bits(value) & 0xffffe000u); }

// Whether the tensor cores round what they add up, as a processor does, or truncate it, as they do.
inline bool rounding_products = false;
inline float toward_zero(double value) {
  const float rounded = float(value);
  return std::isfinite(rounded) && std::fabs(double(rounded)) > std::fabs(value) ? std::nextafter(rounded, 0.f) : rounded;
}

// mma.sync.m16n8k8 row.col f32.tf32.tf32.f32, with g = lane / 4 and t = lane % 4:
// A (16 x 8) a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); B (8 x 8) b0 (t, g), b1 (t + 4, g);
// C (16 x 8) c0 (g, 2t), c1 (g, 2t + 1), c2 (g + 8, 2t), c3 (g + 8, 2t + 1).
// C and the eight exact products are added up at once and truncated: no less exact than the cores, which also drop
// what lies far below the largest of the nine.
inline void mma_m16n8k8(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  uint64_t words[6];
  for (int k = 0; k < 4; ++k) words[k] = as_bits(truncate_tf32(a[k]));
  for (int k = 0; k < 2; ++k) words[4 + k] = as_bits(truncate_tf32(b[k]));
  const auto lanes = swap_words(2, words, 6);
  const int g = current % WARP / 4, t = current % WARP % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + (e / 2) * 8, column = 2 * t + e % 2;
    double sum = c[e];
    for (int k = 0; k < 8; ++k) {
      const float left = as_float(uint32_t(lanes[(row % 8) * 4 + k % 4][row / 8 + (k / 4) * 2]));
      const float right = as_float(uint32_t(lanes[column * 4 + k % 4][4 + k / 4]));
      sum += double(left) * right;
    }
    c[e] = rounding_products ? float(sum) : toward_zero(sum);
  }
}

// ldmatrix.m8n8.x4 of 16-bit values, read as rows of 4 floats.
inline void load_matrices(float (&to)[4], const float* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) return fail("misaligned row of a matrix");
  const uint64_t word = reinterpret_cast<uintptr_t>(row);
  const auto lanes = swap_words(4, &word, 1);
  const int g = current % WARP / 4, t = current % WARP % 4;
  for (int n = 0; n < 4; ++n) to[n] = reinterpret_cast<const float*>(uintptr_t(lanes[8 * n + g][0]))[t];
}

}  // namespace emu

#define threadIdx emu::thread
#define blockIdx emu::block
#define blockDim emu::block_size
#define gridDim emu::grid_size

inline cudaError_t cudaGetLastError() { return emu::status; }
inline const char* cudaGetErrorName(cudaError_t) { return "error of the emulator"; }
inline const char* cudaGetErrorString(cudaError_t) {
  emu::status = cudaSuccess;  // said once; the next call starts anew
  return emu::message.c_str();
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 227 * 1024, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline void __syncthreads() {
#ifndef SFM_SHIM_NO_BARRIERS  // a planted bug: the tests must notice
  emu::yield(emu::BLOCK);
#endif
}
inline void __syncwarp(unsigned = ~0u) { emu::yield(2); }
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emu::shuffle(value, emu::current % 32 ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emu::shuffle(value, lane & 31);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t word = predicate;
  const auto lanes = emu::swap_words(3, &word, 1);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(lanes[lane][0]) << lane;
  return bits;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned old = *to;
  *to = old + value;
  return old;
}
inline float __uint_as_float(uint32_t bits) { return emu::as_float(bits); }
inline uint32_t __float_as_uint(float value) { return emu::as_bits(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return float(1 / std::sqrt(double(value))); }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
