// Portable compiler vectors of W floats: one kernel source for every instruction set, which is chosen at run time.
//
// A kernel is a template `template <int W> SFM_INLINE void name_kernel(Args...)`; SFM_DISPATCH(name, (types), (args)) wraps
// it once per instruction set, each wrapper compiled for its own target, and defines `name`, which calls the widest usable one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define SFM_INLINE inline __attribute__((always_inline))

namespace sfm_fast {

template <int W>
struct Simd {
  typedef float vec __attribute__((vector_size(W * 4)));
  typedef float loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(W * 4)));
  typedef uint32_t bits __attribute__((vector_size(W * 4)));
  typedef uint16_t half_bits __attribute__((vector_size(W * 2)));
  typedef uint16_t loose_half_bits __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

// Elements of one type, read as float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int W>
SFM_INLINE typename Simd<W>::vec load(const float* p) {
  return *reinterpret_cast<const typename Simd<W>::loose*>(p);
}

template <int W>
SFM_INLINE typename Simd<W>::bits widen(const uint16_t* p) {
  const typename Simd<W>::half_bits narrow = *reinterpret_cast<const typename Simd<W>::loose_half_bits*>(p);
  return __builtin_convertvector(narrow, typename Simd<W>::bits);
}

template <int W>
SFM_INLINE typename Simd<W>::vec load(const BFloat16* p) {
  return reinterpret_cast<typename Simd<W>::vec>(widen<W>(&p->bits) << 16);
}

template <int W>
SFM_INLINE typename Simd<W>::vec load(const Float16* p) {
  using bits = typename Simd<W>::bits;
  using vec = typename Simd<W>::vec;
  const bits x = widen<W>(&p->bits);
  const bits magnitude = (x & 0x7fff) << 13;
  // The scale moves the exponent bias from 15 to 127 and normalises subnormals; infinity and NaN get their exponent restored.
  const vec value = reinterpret_cast<vec>(magnitude) * 0x1p112f;
  const bits special = reinterpret_cast<bits>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<vec>(reinterpret_cast<bits>(value) | special | ((x & 0x8000) << 16));
}

template <int W>
SFM_INLINE void store(float* p, typename Simd<W>::vec value) {
  *reinterpret_cast<typename Simd<W>::loose*>(p) = value;
}

template <int W>
SFM_INLINE void store_bits(uint16_t* p, typename Simd<W>::bits value) {
  *reinterpret_cast<typename Simd<W>::loose_half_bits*>(p) =
      __builtin_convertvector(value, typename Simd<W>::half_bits);
}

template <int W>
SFM_INLINE void store(BFloat16* p, typename Simd<W>::vec value) {
  using bits = typename Simd<W>::bits;
  const bits x = reinterpret_cast<bits>(value);
  const bits rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;  // to nearest, ties to even
  const bits nan = reinterpret_cast<bits>((x & 0x7fffffffu) > 0x7f800000u);
  store_bits<W>(&p->bits, (nan & ((x >> 16) | 0x40)) | (~nan & rounded));
}

template <int W>
SFM_INLINE void store(Float16* p, typename Simd<W>::vec value) {
  using bits = typename Simd<W>::bits;
  using vec = typename Simd<W>::vec;
  const bits x = reinterpret_cast<bits>(value);
  const bits sign = x & 0x80000000u;
  const bits twice = x + x;
  // Adding a power of two that leaves exactly the half's mantissa bits rounds to nearest even; the scales overflow to infinity.
  const vec magnitude = reinterpret_cast<vec>(x & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
  bits bias = twice & 0xff000000u;
  const bits low = reinterpret_cast<bits>(bias < 0x71000000u);
  bias = (low & 0x71000000u) | (~low & bias);
  const bits sum = reinterpret_cast<bits>(reinterpret_cast<vec>((bias >> 1) + 0x07800000u) + magnitude);
  const bits half = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  const bits nan = reinterpret_cast<bits>(twice > 0xff000000u);
  store_bits<W>(&p->bits, (sign >> 16) | (nan & 0x7e00) | (~nan & half));
}

template <int W>
SFM_INLINE float sum(typename Simd<W>::vec value) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += value[i];
  return total;
}

enum class Isa { base, avx2, avx512 };

// The widest instruction set of this machine; SFM_FAST_CPU_ISA=base|avx2|avx512 selects a lower one, for tests.
inline Isa detect_isa() {
  Isa found = Isa::base;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found = Isa::avx2;
  if (found == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found = Isa::avx512;
#endif
  const char* asked = std::getenv("SFM_FAST_CPU_ISA");
  if (asked && !std::strcmp(asked, "base")) return Isa::base;
  if (asked && !std::strcmp(asked, "avx2") && found == Isa::avx512) return Isa::avx2;
  return found;
}

inline Isa isa() {
  static const Isa value = detect_isa();
  return value;
}

#if defined(__x86_64__)
#define SFM_DISPATCH(name, types, arguments)                                                            \
  static void name##_base types { name##_kernel<4> arguments; }                                         \
  __attribute__((target("avx2,fma"))) static void name##_avx2 types { name##_kernel<8> arguments; }     \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) static void name##_avx512 types {   \
    name##_kernel<16> arguments;                                                                        \
  }                                                                                                     \
  static void name types {                                                                              \
    if (isa() == Isa::avx512) return name##_avx512 arguments;                                           \
    if (isa() == Isa::avx2) return name##_avx2 arguments;                                               \
    return name##_base arguments;                                                                       \
  }
#else
#define SFM_DISPATCH(name, types, arguments) \
  static void name types { name##_kernel<4> arguments; }
#endif

}  // namespace sfm_fast
