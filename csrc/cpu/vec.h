// Sixteen lanes of float or double, in the vector extensions that GCC and Clang share: the compiler maps them to the
// widest registers that its flags allow. 16-bit floats are converted at loads and stores, by integer arithmetic where
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

// The type that a storage type is computed in.
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
  return x - Vec<S>{};  // x + 0 is an addition for the compiler, because of -0
}

template <class V>
inline V max(V a, V b) {  // b where either is NaN
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Floats>)
    return Floats(_mm512_max_ps(__m512(a), __m512(b)));  // GCC makes two instructions of it
#endif
  return a > b ? a : b;
}

template <class V>
inline auto sum(V v) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// f over all lanes; every lane holds the result.
template <int half = kLanes / 2, class V, class F, int... lane>
inline V across(V v, F f, std::integer_sequence<int, lane...> lanes) {
  v = f(v, V(__builtin_shufflevector(v, v, (lane ^ half)...)));
  if constexpr (half > 1) v = across<half / 2>(v, f, lanes);
  return v;
}
template <class V, class F>
inline V across(V v, F f) {
  return across(v, f, std::make_integer_sequence<int, kLanes>());
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

// The first n <= 16 lanes.
template <class T>
inline Vec<T> load_some(const T* from, int n, compute_t<T> fill = 0) {
  return n == kLanes ? load(from) : load(from, n, fill);
}

template <class T>
inline void store_some(T* to, Vec<T> v, int n) {
  n == kLanes ? store(to, v) : store(to, v, n);
}

// f(offset, lanes) for every 16 of n elements.
template <class F>
inline void for_each_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, int(n - i));
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
  Floats p = 1.394649735e-3f * r + 8.366610855e-3f;       // minimax: 1.3e-8 of e^r - 1
  p = p * r + 4.166628048e-2f;
  p = p * r + 1.666654348e-1f;
  p = p * r + 0.5f;
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

// e^x within 1.05 ulp for every float, subnormal results, infinities and NaN included; x above `most` counts as `most`.
inline Floats exp(Floats x, float most = 89.f) {
  x = x < -105.f ? splat(-105.f) : x;  // written so that NaN passes
  x = x > most ? splat(most) : x;
  Int n;
  Floats p = exp_reduced(x, n);
  return scale(p + 1.f, n);
}

// e^x for x <= 0, in half the time: what is below e^-87, about the smallest normal number, is 0.
inline Floats exp_negative(Floats x) {
  Int n;
  Floats p = exp_reduced(x, n), scale = exp2(n);
  return x <= -87.f ? Floats{} : p * scale + scale;
}

// The same for |x| <= 88, and e^x - 1 with the relative accuracy of a small result.
inline void exp_expm1(Floats x, Floats& e, Floats& em1) {
  Int n;
  Floats p = exp_reduced(x, n), scale = exp2(n);
  e = x <= -87.f ? Floats{} : p * scale + scale;
  em1 = p * scale + (scale - 1.f);
}

// The exponent of x, for a mantissa between 2/3 and 4/3, in the upper bits; and 2 to its negative.
inline Int exponent(Floats x) { return (bits<Int>(x) - 0x3f2aaaab) & int32_t(0xff800000); }
inline Floats inverse_power(Int exponent) { return bits<Floats>(0x3f800000 - exponent); }

// ln (1 + m) + exponent ln 2 for |m| <= 1/3, with the relative accuracy of a small m.
inline Floats log_reduced(Floats m, Int exponent) {
  Floats p = -1.331173331e-1f * m + 1.400622725e-1f;  // minimax: 5e-9
  p = p * m - 1.207815185e-1f;
  p = p * m + 1.400082558e-1f;
  p = p * m - 1.668950319e-1f;
  p = p * m + 2.001077086e-1f;
  p = p * m - 2.499950677e-1f;
  p = p * m + 3.333320916e-1f;
  p = p * m - 0.5f;
  return __builtin_convertvector(exponent, Floats) * (0.693147181f * 0x1p-23f) + (p * (m * m) + m);
}

// ln x within 1 ulp for normal floats up to 2^127.
inline Floats log(Floats x) {
  Int n = exponent(x);
  return log_reduced(x * inverse_power(n) - 1.f, n);
}

// ln(1 + x) for -1 < x < 1, with the relative accuracy of a small result.
inline Floats log1p(Floats x) {
  Int n = exponent(1.f + x);
  Floats scale = inverse_power(n);  // the rounding of 1 + x decides the exponent only
  return log_reduced(x * scale + (scale - 1.f), n);
}

// ln x where x - 1 is known too, with the relative accuracy that it has where x is near 1.
inline Floats log(Floats x, Floats x_m1) {
  Int n = exponent(x);
  return log_reduced(n == 0 ? x_m1 : x * inverse_power(n) - 1.f, n);
}

#define UDI_LANE_BY_LANE(f)                               \
  inline Doubles f(Doubles x) {                           \
    for (int i = 0; i < kLanes; ++i) x[i] = std::f(x[i]); \
    return x;                                             \
  }
UDI_LANE_BY_LANE(exp)
UDI_LANE_BY_LANE(log)
UDI_LANE_BY_LANE(log1p)
#undef UDI_LANE_BY_LANE

inline Doubles log(Doubles x, Doubles x_m1) {
  for (int i = 0; i < kLanes; ++i) x[i] = x_m1[i] < -0.5 ? std::log(x[i]) : std::log1p(x_m1[i]);
  return x;
}

inline Doubles exp_negative(Doubles x) { return exp(x); }

inline void exp_expm1(Doubles x, Doubles& e, Doubles& em1) {
  for (int i = 0; i < kLanes; ++i) e[i] = std::exp(x[i]), em1[i] = std::expm1(x[i]);
}

}  // namespace udi
