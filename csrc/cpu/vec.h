// Sixteen lanes of float or double, in the vector extensions that GCC and Clang share: the compiler maps them to the
// widest registers it is allowed to use. 16-bit floats are converted at loads and stores, with integer arithmetic where
// there is no instruction for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <torch/headeronly/core/ScalarType.h>

namespace udi {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

// What a storage type is computed in.
template <class T>
struct Compute {
  using type = float;
  using vec = Floats;
};
template <>
struct Compute<double> {
  using type = double;
  using vec = Doubles;
};
template <class T>
using compute_t = typename Compute<T>::type;
template <class T>
using Vec = typename Compute<T>::vec;

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class S>
inline Vec<S> splat(S x) {
  return Vec<S>{} + x;
}

template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline auto sum(V v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class V>
inline auto max(V v) {
  auto m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

inline Floats widen(Short h, BFloat16*) { return bits<Floats>(__builtin_convertvector(h, Int) << 16); }

#if defined(__AVX512F__)
inline Floats widen(Short h, Half*) { return Floats(_mm512_cvtph_ps(__m256i(h))); }
inline Short narrow(Floats x, Half*) {
  return Short(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Floats widen(Short h, Half*) {
  Int i = __builtin_convertvector(h, Int);
  // Exponent and mantissa moved into place and rescaled by 2^112: right for normal and subnormal numbers.
  Floats x = bits<Floats>((i & 0x7fff) << 13) * 0x1p112f;
  Int special = (i & 0x7c00) == 0x7c00;
  Int magnitude = special ? ((i & 0x7fff) << 13) | 0x7f800000 : bits<Int>(x);
  return bits<Floats>(magnitude | ((i & 0x8000) << 16));
}

inline Short narrow(Floats x, Half*) {
  Int i = bits<Int>(x);
  Int sign = (i >> 16) & 0x8000;
  Floats magnitude = bits<Floats>(i & 0x7fffffff);
  // Normal: rebias the exponent and round to nearest even. Subnormal: adding 0.5 leaves the rounded bits at the bottom.
  Int m = bits<Int>(magnitude);
  Int normal = (m - (112 << 23) + 0xfff + ((m >> 13) & 1)) >> 13;
  Int subnormal = bits<Int>(magnitude + 0.5f) - 0x3f000000;
  Int half = (magnitude < 0x1p-14f) ? subnormal : normal;
  half = (magnitude >= 65520.f) ? Int{} + 0x7c00 : half;
  half = (x == x) ? half : Int{} + 0x7e00;
  return __builtin_convertvector(half | sign, Short);
}
#endif

inline Short narrow(Floats x, BFloat16*) {
  Int i = bits<Int>(x);
  Int rounded = (i + 0x7fff + ((i >> 16) & 1)) >> 16;  // to nearest, ties to even
  return __builtin_convertvector((x == x) ? rounded : Int{} + 0x7fc0, Short);
}

template <class T>
inline Vec<T> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    Short h;
    std::memcpy(&h, from, sizeof h);
    return widen(h, static_cast<T*>(nullptr));
  } else {
    Vec<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class T>
inline void store(T* to, Vec<T> v) {
  if constexpr (sizeof(T) == 2) {
    Short h = narrow(v, static_cast<T*>(nullptr));
    std::memcpy(to, &h, sizeof h);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// The first n < 16 lanes; the others read as `fill`. Compilers make one masked access of the loops.
template <class T>
inline Vec<T> load(const T* from, int n, compute_t<T> fill) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  alignas(64) Bits lanes[kLanes];
  Bits rest;
  const T last = T(fill);
  std::memcpy(&rest, &last, sizeof rest);
  const Bits* bits = reinterpret_cast<const Bits*>(from);
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? bits[i] : rest;
  return load(reinterpret_cast<const T*>(lanes));
}

template <class T>
inline void store(T* to, Vec<T> v, int n) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  alignas(64) Bits lanes[kLanes];
  store(reinterpret_cast<T*>(lanes), v);
  Bits* bits = reinterpret_cast<Bits*>(to);
  for (int i = 0; i < kLanes; ++i)
    if (i < n) bits[i] = lanes[i];
}

// One step of a transposition: exchanges lanes `half` apart between two rows `half` apart.
template <int half, class V, int... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  V first = __builtin_shufflevector(a, b, (lane & half ? kLanes + lane - half : lane)...);
  b = __builtin_shufflevector(a, b, (lane & half ? kLanes + lane : lane + half)...);
  a = first;
}

// Transposes 16 vectors in registers.
template <int half = kLanes / 2, class V>
inline void transpose(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & half)) exchange<half>(rows[i], rows[i + half], std::make_integer_sequence<int, kLanes>());
  if constexpr (half > 1) transpose<half / 2>(rows);
}

// x = n ln 2 + r with |r| <= ln 2 / 2; returns e^r - 1 and leaves n as an integer.
inline Floats exp_reduced(Floats x, Int& n) {
  Floats shifted = x * 1.44269504f + 0x1.8p23f;  // the addition rounds to an integer, left in the low bits
  n = bits<Int>(shifted) - 0x4b400000;
  Floats f = shifted - 0x1.8p23f;
  Floats r = x - f * 0.693359375f - f * -2.12194440e-4f;  // ln 2 in two parts, the first exact times n
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}

inline Floats exp2(Int n) { return bits<Floats>((n + 127) << 23); }

// p 2^n where 2^n alone may be out of range.
inline Floats scale(Floats p, Int n) {
#if defined(__AVX512F__)
  return Floats(_mm512_scalef_ps(__m512(p), __m512(__builtin_convertvector(n, Floats))));
#else
  Int half = n >> 1;
  return p * exp2(half) * exp2(n - half);
#endif
}

// e^x within 1 ulp for every float, subnormal results, infinities and NaN included.
inline Floats exp(Floats x) {
  x = x < -105.f ? splat(-105.f) : x;  // written so that NaN passes
  x = x > 89.f ? splat(89.f) : x;
  Int n;
  Floats p = exp_reduced(x, n);
  return scale(p + 1.f, n);
}

// e^x, and e^x - 1 with the relative accuracy of a small result, for x <= 0; below e^-80 e^x is 0.
inline void exp_expm1(Floats x, Floats& e, Floats& em1) {
  Floats clamped = x < -80.f ? splat(-80.f) : x;
  Int n;
  Floats p = exp_reduced(clamped, n), scale = exp2(n);
  e = x < -80.f ? Floats{} : p * scale + scale;
  em1 = p * scale + (scale - 1.f);
}

// ln x within 1 ulp for positive normal floats; NaN passes.
inline Floats log(Floats x) {
  Int i = bits<Int>(x) - 0x3f3504f3;  // sqrt(1/2)
  Floats e = __builtin_convertvector(i >> 23, Floats);
  Floats m = bits<Floats>((i & 0x7fffff) + 0x3f3504f3) - 1.f;
  Floats p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Floats square = m * m;
  Floats y = p * m * square + e * -2.12194440e-4f - 0.5f * square;
  y = m + y + e * 0.693359375f;
  return x == x ? y : x;
}

// ln(1 + x) for -1 < x <= 0, with the relative accuracy of a small result.
inline Floats log1p(Floats x) {
  Floats a = 1.f + x;
  return log(a) + (x - (a - 1.f));  // what the addition rounded off
}

#define UDI_LANE_BY_LANE(f)                                 \
  inline Doubles f(Doubles x) {                             \
    for (int i = 0; i < kLanes; ++i) x[i] = std::f(x[i]);   \
    return x;                                               \
  }
UDI_LANE_BY_LANE(exp)
UDI_LANE_BY_LANE(log)
UDI_LANE_BY_LANE(log1p)
#undef UDI_LANE_BY_LANE

inline void exp_expm1(Doubles x, Doubles& e, Doubles& em1) {
  for (int i = 0; i < kLanes; ++i) e[i] = std::exp(x[i]), em1[i] = std::expm1(x[i]);
}

}  // namespace udi
