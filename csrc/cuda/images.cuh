// Shared by the kernels that render images: the positions and weights of bilinear enlargement, the colour matrix,
// stores of four values.
#pragma once

#include "common.cuh"

namespace sfm {

constexpr int QUAD = 4;  // neighbouring values per thread

// Output indices p, p + 1, ... of an enlargement from `side` to `size`: p reads texels index() and index() + 1 with
// weights 1 - weight() and weight(), in integer arithmetic, so that every backend has the same ones.
struct Walk {
  int low, rest, step, turn;
  float scale;

  __device__ __forceinline__ Walk(int p, int side, int size) : step(2 * side), turn(2 * size) {
    const int numerator = (2 * p + 1) * side - size;  // of p's coordinate; the denominator is `turn`
    low = numerator < 0 ? -1 : int(unsigned(numerator) / unsigned(turn));
    rest = numerator - low * turn;
    scale = 1.f / float(turn);
  }
  __device__ __forceinline__ int index() const { return low < 0 ? 0 : low; }
  __device__ __forceinline__ float weight() const { return low < 0 ? 0.f : float(rest) * scale; }
  __device__ __forceinline__ void next() {  // an enlargement advances by one texel at most
    rest += step;
    if (rest >= turn) rest -= turn, ++low;
  }
};

// Output indices that read texel j with a weight above 0, [first, stop), and that weight.
struct Footprint {
  int first, stop;

  __device__ __forceinline__ Footprint(int j, int side, int size) {
    const unsigned by = 2u * side;
    first = j == 0 ? 0 : int(unsigned((2 * j - 1) * size - side) / by) + 1;
    stop = j == side - 1 ? size : int((unsigned((2 * j + 3) * size - side) + by - 1) / by);
    if (stop > size) stop = size;
  }
};
__device__ __forceinline__ float texel_weight(int p, int j, int side, int size, float scale) {
  const int numerator = (2 * p + 1) * side - size, rest = (numerator < 0 ? 0 : numerator) - j * 2 * size;
  if (rest < 0) return float(rest + 2 * size) * scale;
  return j == side - 1 ? 1.f : 1.f - float(rest) * scale;  // past the last texel, both taps are that texel
}

// Row `out`, column `in` of the 3 x 3 colour matrix of sfm_fast/reference/render.py.
__device__ __forceinline__ constexpr float color(int out, int in) {
  return in == 0   ? (out == 0 ? 0.562828577f : 0.58447583f)
         : in == 1 ? (out == 0   ? 0.194825277f
                      : out == 1 ? 0.f
                                 : -0.194825277f)
                   : (out == 0   ? 0.043294506f
                      : out == 1 ? -0.108236265f
                                 : 0.0649417589f);
}

// Four values, or the first `count`: one access of 16 or 8 bytes if `wide`.
template <typename T>
__device__ __forceinline__ void store_quad(T* to, const float (&from)[QUAD], bool wide, int count) {
  if (wide) {
    if constexpr (sizeof(T) == 4) {
      store<QUAD>(to, from);
    } else {
      T part[QUAD];
#pragma unroll
      for (int k = 0; k < QUAD; ++k) from_float(from[k], part[k]);
      *reinterpret_cast<uint2*>(to) = make_uint2(uint32_t(part[0].bits) | uint32_t(part[1].bits) << 16,
                                                 uint32_t(part[2].bits) | uint32_t(part[3].bits) << 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
      if (k < count) from_float(from[k], to[k]);
    }
  }
}

template <typename T>
bool aligned_quad(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (QUAD * sizeof(T)) == 0;
}

}  // namespace sfm
