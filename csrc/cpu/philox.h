// Counter-based normal numbers, W blocks of Philox4x32-10 at a time. The definition: sfm_fast/philox.py.
#pragma once

#include "simd.h"

namespace sfm_fast {

struct NoiseKey {
  uint64_t seed;
  uint32_t step, stream;
};

template <int W>
SFM_INLINE void multiply_wide(
    typename Simd<W>::bits a, uint32_t factor, typename Simd<W>::bits& high, typename Simd<W>::bits& low) {
  typedef uint64_t wide __attribute__((vector_size(W * 4)));
  const wide pairs = reinterpret_cast<wide>(a);
  const wide even = (pairs & 0xffffffffu) * uint64_t{factor}, odd = (pairs >> 32) * uint64_t{factor};
  high = reinterpret_cast<typename Simd<W>::bits>((even >> 32) | (odd & 0xffffffff00000000u));
  low = reinterpret_cast<typename Simd<W>::bits>((even & 0xffffffffu) | (odd << 32));
}

template <int W>
SFM_INLINE typename Simd<W>::vec select(typename Simd<W>::ints mask, typename Simd<W>::vec yes, typename Simd<W>::vec no) {
  using ints = typename Simd<W>::ints;
  using vec = typename Simd<W>::vec;
  return reinterpret_cast<vec>((mask & reinterpret_cast<ints>(yes)) | (~mask & reinterpret_cast<ints>(no)));
}

// sqrt(-2 ln u) with u = (w + 0.5) / 2^32. Above one half it uses 1 - u, which is exact in the integer; u itself would lose
// the significant digits there. Polynomial of Cephes' logf.
template <int W>
SFM_INLINE typename Simd<W>::vec radius(typename Simd<W>::bits w) {
  using ints = typename Simd<W>::ints;
  using bits = typename Simd<W>::bits;
  using vec = typename Simd<W>::vec;
  const ints upper = reinterpret_cast<ints>(w) < 0;
  const ints folded = reinterpret_cast<ints>(w) ^ upper;
  const vec t = (__builtin_convertvector(folded, vec) + 0.5f) * 0x1p-32f;
  // ln t: t = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const bits shifted = reinterpret_cast<bits>(t) - 0x3f3504f3u;
  vec exponent = __builtin_convertvector(reinterpret_cast<ints>(shifted) >> 23, vec);
  vec f = reinterpret_cast<vec>((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  // ln (1 - t): 1 - t = 1 + f, or below sqrt(1/2) half of 1 + f.
  const ints small = t <= 0.29289322f;
  f = select<W>(upper, select<W>(small, -t, 1.0f - 2.0f * t), f);
  exponent = select<W>(upper, select<W>(small, vec{}, vec{} - 1.0f), exponent);
  const vec z = f * f;
  vec p = vec{} + 7.0376836292e-2f;
  for (const float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                        2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * f + c;
  const vec logarithm = (f + (exponent * -2.12194440e-4f - 0.5f * z + f * z * p)) + exponent * 0.693359375f;
  vec root;
  for (int i = 0; i < W; ++i) root[i] = std::sqrt(-2.0f * logarithm[i]);
  return root;
}

// cos and sin of 2 pi (w + 0.5) / 2^32: the quadrant is taken from the integer, so the rest keeps all its digits.
template <int W>
SFM_INLINE void cos_sin(typename Simd<W>::bits w, typename Simd<W>::vec& cosine, typename Simd<W>::vec& sine) {
  using ints = typename Simd<W>::ints;
  using bits = typename Simd<W>::bits;
  using vec = typename Simd<W>::vec;
  const bits quadrant = (w + 0x20000000u) >> 30;
  const ints rest = reinterpret_cast<ints>(w - (quadrant << 30));
  const vec x = (__builtin_convertvector(rest, vec) + 0.5f) * 1.4629180792671596e-9f, z = x * x;
  const vec s = x + x * z * ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f);
  const vec c = 1.0f - 0.5f * z + z * z * ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f);
  const ints swapped = reinterpret_cast<ints>(quadrant << 31) < 0;
  const bits negative_cosine = ((quadrant + 1) & 2) << 30, negative_sine = (quadrant & 2) << 30;
  cosine = reinterpret_cast<vec>(reinterpret_cast<bits>(select<W>(swapped, s, c)) ^ negative_cosine);
  sine = reinterpret_cast<vec>(reinterpret_cast<bits>(select<W>(swapped, c, s)) ^ negative_sine);
}

template <int W, int OFFSET>
SFM_INLINE typename Simd<W>::vec interleave(typename Simd<W>::vec a, typename Simd<W>::vec b) {
  typename Simd<W>::ints at;
  for (int i = 0; i < W; ++i) at[i] = OFFSET + i / 2 + (i % 2) * W;
  return __builtin_shuffle(a, b, at);
}

// Writes normal numbers 4 * block .. 4 * (block + W) - 1 of `item` to out.
template <int W>
SFM_INLINE void normal_blocks(const NoiseKey& key, uint32_t item, uint32_t block, float* out) {
  using bits = typename Simd<W>::bits;
  using vec = typename Simd<W>::vec;
  bits c0, c1 = bits{} + item, c2 = bits{} + key.step, c3 = bits{} + key.stream;
  for (int i = 0; i < W; ++i) c0[i] = block + i;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    bits high0, low0, high1, low1;
    multiply_wide<W>(c0, 0xD2511F53u, high0, low0);
    multiply_wide<W>(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  vec cos0, sin0, cos1, sin1;
  cos_sin<W>(c1, cos0, sin0);
  cos_sin<W>(c3, cos1, sin1);
  const vec r0 = radius<W>(c0), r1 = radius<W>(c2);
  const vec n0 = r0 * cos0, n1 = r0 * sin0, n2 = r1 * cos1, n3 = r1 * sin1;
  const vec a = interleave<W, 0>(n0, n2), b = interleave<W, 0>(n1, n3);
  const vec c = interleave<W, W / 2>(n0, n2), d = interleave<W, W / 2>(n1, n3);
  store<W>(out, interleave<W, 0>(a, b));
  store<W>(out + W, interleave<W, W / 2>(a, b));
  store<W>(out + 2 * W, interleave<W, 0>(c, d));
  store<W>(out + 3 * W, interleave<W, W / 2>(c, d));
}

// Normal numbers `position` .. `position + count` - 1 of `item`; `scratch` holds count + 8 * W floats. Returns their start.
template <int W>
SFM_INLINE const float* normals(const NoiseKey& key, uint32_t item, int64_t position, int64_t count, float* scratch) {
  const int64_t first = position / 4, last = (position + count + 3) / 4;
  for (int64_t block = first; block < last; block += W)
    normal_blocks<W>(key, item, static_cast<uint32_t>(block), scratch + 4 * (block - first));
  return scratch + (position - 4 * first);
}

}  // namespace sfm_fast
