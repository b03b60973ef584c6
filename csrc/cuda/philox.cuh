// Standard normal numbers from counters (Philox4x32-10, Box-Muller), as sfm_fast/philox.py defines them.
//
// It uses plain float32 operations, as on the CPU: errors are below 2e-6 for every word, including the largest values
// (6.7).
#pragma once

#include "common.cuh"

namespace sfm {

struct NoiseKey {
  uint32_t low, high, step, stream;
};

__device__ __forceinline__ void philox(uint32_t (&word)[4], uint32_t low, uint32_t high) {
#pragma unroll
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    const uint64_t first = uint64_t(0xD2511F53u) * word[0], second = uint64_t(0xCD9E8D57u) * word[2];
    word[0] = uint32_t(second >> 32) ^ word[1] ^ low, word[1] = uint32_t(second);
    word[2] = uint32_t(first >> 32) ^ word[3] ^ high, word[3] = uint32_t(first);
  }
}

// -2 ln((word + 0.5) / 2^32). Polynomial: Cephes logf.
__device__ __forceinline__ float square_radius(uint32_t word) {
  const bool upper = word >> 31;  // near 1: 1 - t with t exact, so that the logarithm keeps its relative precision
  const float t = (float(upper ? ~word : word) + 0.5f) * 0x1p-32f;
  const float x = upper ? 1.f - t : t;
  const uint32_t bits = __float_as_uint(x);
  const int exponent = int(bits - 0x3f3504f3u) >> 23;  // x = 2^exponent m, m in [sqrt(1/2), sqrt(2))
  const float m = __uint_as_float(bits - (uint32_t(exponent) << 23));
  const float f = upper && exponent == 0 ? -t : m - 1.f, square = f * f;
  float y = 7.0376836292e-2f;
  y = fmaf(y, f, -1.1514610310e-1f);
  y = fmaf(y, f, 1.1676998740e-1f);
  y = fmaf(y, f, -1.2420140846e-1f);
  y = fmaf(y, f, 1.4249322787e-1f);
  y = fmaf(y, f, -1.6668057665e-1f);
  y = fmaf(y, f, 2.0000714765e-1f);
  y = fmaf(y, f, -2.4999993993e-1f);
  y = fmaf(y, f, 3.3333331174e-1f);
  y = fmaf(float(exponent), -2.12194440e-4f, y * f * square);
  y = fmaf(-0.5f, square, y) + f;
  return -2.f * fmaf(float(exponent), 0.693359375f, y);
}

// Cosine and sine of 2 pi (word + 0.5) / 2^32: the nearest quarter turn in integers, polynomials for the rest.
__device__ __forceinline__ void turn(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float angle = (float(int32_t(word - (quarter << 30))) + 0.5f) * 1.46291807926715969e-9f, z = angle * angle;
  const float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f) * z, angle, angle);
  const float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f) * z, z,
                       fmaf(-0.5f, z, 1.f));
  const float across = quarter & 1 ? s : c, up = quarter & 1 ? c : s;
  cosine = __uint_as_float(__float_as_uint(across) ^ ((quarter + 1) & 2) << 30);
  sine = __uint_as_float(__float_as_uint(up) ^ (quarter & 2) << 30);
}

__device__ __forceinline__ void normals(const uint32_t (&word)[4], float (&value)[4]) {
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = sqrtf(square_radius(word[pair]));
    float cosine, sine;
    turn(word[pair + 1], cosine, sine);
    value[pair] = radius * cosine, value[pair + 1] = radius * sine;
  }
}

// Normal numbers 4 block ... 4 block + 3 of an item.
__device__ __forceinline__ void normals(const NoiseKey& key, uint32_t block, uint32_t item, float (&value)[4]) {
  uint32_t word[4] = {block, item, key.step, key.stream};
  philox(word, key.low, key.high);
  normals(word, value);
}

}  // namespace sfm
