// Tensor-core products of float32 operands (TF32 m16n8k8, sm_80 and later) and asynchronous copies to shared memory.
#pragma once

#include "common.cuh"

namespace sfm {

// Copies 16 bytes to shared memory, of which `bytes` (0 to 16) are read and the rest are zero. Both pointers must be
// 16-byte aligned.
__device__ __forceinline__ void copy_async16(float* shared, const float* from, int bytes) {
#ifdef SFM_SHIM
  emu::copy_async(shared, from, bytes);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef SFM_SHIM
  emu::commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most LEFT of the committed groups are pending.
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
#ifdef SFM_SHIM
  emu::wait_group(LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Loads four matrices of 8 rows of 4 floats, one per register: lane 4 g + t gets element (g, t) of each. Lane 8 n + g
// passes the address of row g of matrix n in shared memory, 16-byte aligned.
__device__ __forceinline__ void load_matrices(float (&to)[4], const float* row) {
#ifdef SFM_SHIM
  emu::load_matrices(to, row);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  uint32_t word[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(from));
#pragma unroll
  for (int n = 0; n < 4; ++n) to[n] = __uint_as_float(word[n]);
#endif
}

// Rounds to the nearest TF32 (10 bits of mantissa), as a float32.
__device__ __forceinline__ float round_tf32(float value) {
#ifdef SFM_SHIM
  return emu::round_tf32(value);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits & 0xffffe000u);  // the instruction leaves the low bits undefined
#endif
}

// An operand as the tensor cores read it: they ignore its low 13 bits.
__device__ __forceinline__ float truncate_tf32(float value) {
  return __uint_as_float(__float_as_uint(value) & 0xffffe000u);
}

// A value that they truncate to the nearest TF32, in one instruction. A NaN may become a zero, so callers must detect
// NaN elsewhere.
__device__ __forceinline__ float nearest_tf32(float value) { return __uint_as_float(__float_as_uint(value) + 0x1000u); }

// c += A B for one 16 x 8 x 8 product; the operands' low 13 bits of mantissa are ignored. Sums are rounded toward zero.
__device__ __forceinline__ void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef SFM_SHIM
  emu::mma_m16n8k8(c, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

// An operand of N values per lane: rounded to TF32 (HIGH), or as the sum high + low, which keeps 21 bits of mantissa.
template <bool HIGH, int N>
struct Fragment {
  float high[N];
  float low[HIGH ? 1 : N];

  __device__ __forceinline__ void set(int k, float value) {
    high[k] = round_tf32(value);
    if constexpr (!HIGH) low[k] = value - high[k];
  }
};

// One product (HIGH) or three, smallest first: the error of the sum is that of float32.
template <bool HIGH>
__device__ __forceinline__ void multiply(float (&c)[4], const Fragment<HIGH, 4>& a, const Fragment<HIGH, 2>& b) {
  if constexpr (!HIGH) {
    mma(c, a.low, b.high);
    mma(c, a.high, b.low);
  }
  mma(c, a.high, b.high);
}

// An operand of N values per lane as the tensor cores read it, and (not HIGH) the remainder: splitting a value takes
// two instructions, with rounding five. The sum of both keeps 21 bits of mantissa.
template <bool HIGH, int N>
struct Split {
  float value[N];
  float rest[HIGH ? 1 : N];

  __device__ __forceinline__ void set(int k, float given) {
    if constexpr (HIGH) {
      value[k] = given;
    } else {
      value[k] = truncate_tf32(given), rest[k] = given - value[k];
    }
  }
};
// The square of a value as `multiply` computes it; HIGH: after `nearest_tf32`.
template <bool HIGH>
__device__ __forceinline__ double split_square(float value) {
  const float high = HIGH ? round_tf32(value) : truncate_tf32(value);
  const double rest = HIGH ? 0. : double(truncate_tf32(value - high));
  return double(high) * high + 2 * (double(high) * rest);
}

// One product (HIGH) or three, smallest first.
template <bool HIGH>
__device__ __forceinline__ void multiply(float (&c)[4], const Split<HIGH, 4>& a, const Split<HIGH, 2>& b) {
  if constexpr (!HIGH) {
    mma(c, a.rest, b.value);
    mma(c, a.value, b.rest);
  }
  mma(c, a.value, b.value);
}

// sum += A B. Tensor cores truncate their accumulator, so a long sum would be biased: unless HIGH, each product starts
// at 0 and is added with rounding.
template <bool HIGH>
__device__ __forceinline__ void add_product(float (&sum)[4], const Split<HIGH, 4>& a, const Split<HIGH, 2>& b) {
  if constexpr (HIGH) {
    multiply<HIGH>(sum, a, b);
  } else {
    float part[4] = {};
    multiply<HIGH>(part, a, b);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += part[c];
  }
}
// sum += A B + C D, in the same way.
template <bool HIGH>
__device__ __forceinline__ void add_products(float (&sum)[4], const Split<HIGH, 4>& a, const Split<HIGH, 2>& b,
                                             const Split<HIGH, 4>& c, const Split<HIGH, 2>& d) {
  if constexpr (HIGH) {
    multiply<HIGH>(sum, a, b);
    multiply<HIGH>(sum, c, d);
  } else {
    float part[4] = {};
    multiply<HIGH>(part, a, b);
    multiply<HIGH>(part, c, d);
#pragma unroll
    for (int n = 0; n < 4; ++n) sum[n] += part[n];
  }
}

// Lane = 4 * group + member. A (16 x 8, row-major) has a0 (group, member), a1 (group + 8, member), a2 (group, member +
// 4), a3 (group + 8, member + 4); B (8 x 8) has b0 (row member, column group), b1 (row member + 4, column group); C (16
// x 8) has c0 (group, 2 member), c1 (group, 2 member + 1), c2 (group + 8, 2 member), c3 (group + 8, 2 member + 1).
template <bool HIGH>
__device__ __forceinline__ void load_a(Fragment<HIGH, 4>& fragment, const float* tile, int pitch, int group,
                                       int member) {
#pragma unroll
  for (int k = 0; k < 4; ++k) fragment.set(k, tile[(group + k % 2 * 8) * pitch + member + k / 2 * 4]);
}
// B from a tile stored by columns: element (row, column) at tile[column * pitch + row].
template <bool HIGH>
__device__ __forceinline__ void load_b_columns(Fragment<HIGH, 2>& fragment, const float* tile, int pitch, int group,
                                               int member) {
  fragment.set(0, tile[group * pitch + member]);
  fragment.set(1, tile[group * pitch + member + 4]);
}
// B from a tile stored by rows: element (row, column) at tile[row * pitch + column].
template <bool HIGH>
__device__ __forceinline__ void load_b_rows(Fragment<HIGH, 2>& fragment, const float* tile, int pitch, int group,
                                            int member) {
  fragment.set(0, tile[member * pitch + group]);
  fragment.set(1, tile[(member + 4) * pitch + group]);
}

}  // namespace sfm
