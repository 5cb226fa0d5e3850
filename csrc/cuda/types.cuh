// 16-bit floating-point types, without CUDA's headers: not every machine with a GPU has them.
#pragma once

namespace udi {

#ifdef __CUDACC_RTC__
inline float widened(unsigned short half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

inline unsigned short to_half(float x) {
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}
#endif

inline unsigned short to_bfloat16(float x) {
#if __CUDA_ARCH__ >= 800
  unsigned short bfloat16;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat16) : "f"(x));
  return bfloat16;
#else
  if (x != x) return 0x7fff;
  const unsigned bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}

struct Half {
  unsigned short bits;
  Half() = default;
  explicit Half(float x) : bits(to_half(x)) {}
  operator float() const { return widened(bits); }
};

struct BFloat16 {
  unsigned short bits;
  BFloat16() = default;
  explicit BFloat16(float x) : bits(to_bfloat16(x)) {}
  operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

}  // namespace udi
