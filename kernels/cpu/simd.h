// Vector types and elementary functions shared by every CPU kernel.
//
// Written with GCC vector extensions, so the same source becomes AVX-512, AVX2 or plain SSE2 code, whatever -march says.
// Rule: a function's result for one lane must not depend on the other lanes; batch invariance rests on it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace braid {

constexpr int kLanes = 16;
typedef float vf __attribute__((vector_size(64), may_alias));
typedef int32_t vi __attribute__((vector_size(64), may_alias));
typedef uint32_t vu __attribute__((vector_size(64), may_alias));
typedef uint16_t vh __attribute__((vector_size(32), may_alias));
typedef int16_t vs __attribute__((vector_size(32), may_alias));
typedef int8_t vb __attribute__((vector_size(16), may_alias));
typedef uint8_t vub __attribute__((vector_size(16), may_alias));

struct bf16 {
  uint16_t bits;
};

#define BRAID_INLINE inline __attribute__((always_inline))

template <class V>
BRAID_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
BRAID_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
BRAID_INLINE vf splat(float x) { return x - vf{}; }
BRAID_INLINE vi splat_i(int32_t x) { return x - vi{}; }
// Bytes as integers. In two steps, because GCC 12 takes one step of four times the width byte by byte.
BRAID_INLINE vi load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<vb>(p), vs), vi);
#endif
}
BRAID_INLINE vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<vub>(p), vs), vi);
#endif
}
// acc + the sums of four products in each word, of bytes up to 127 with bytes of a sign; of two products 16 bits must hold the sum.
BRAID_INLINE vi dot_bytes(vi acc, vu a, const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, _mm512_set1_epi32(word));
#elif defined(__AVX512BW__)
  __m512i pairs = _mm512_maddubs_epi16((__m512i)a, _mm512_set1_epi32(word));
  return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  __m256i halves[2];
  std::memcpy(halves, &a, sizeof(a));
  for (__m256i& half : halves)
    half = _mm256_madd_epi16(_mm256_maddubs_epi16(half, _mm256_set1_epi32(word)), _mm256_set1_epi16(1));
  return acc + load<vi>(halves);
#else
  for (int i = 0; i < 4; i++) acc = acc + ((vi)a >> (8 * i) & 127) * int32_t(four[i]);
  return acc;
#endif
}
BRAID_INLINE vi lane_ids() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

BRAID_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
BRAID_INLINE float to_float(float x) { return x; }

// Round to nearest even; a NaN stays a (quiet) NaN.
BRAID_INLINE bf16 to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
BRAID_INLINE vh to_bf16(vf x) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  vu bits = is_nan ? ((u >> 16) | 0x40u) : rounded;
  return __builtin_convertvector(bits, vh);
}
BRAID_INLINE vf load_vec(const float* p) { return load<vf>(p); }
BRAID_INLINE vf load_vec(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
BRAID_INLINE void store_vec(float* p, vf x) { store(p, x); }
BRAID_INLINE void store_vec(bf16* p, vf x) { store(p, to_bf16(x)); }
BRAID_INLINE void put(float* p, float x) { *p = x; }
BRAID_INLINE void put(bf16* p, float x) { *p = to_bf16(x); }

// Lanes past `count` read as `fill` and are not written; every kernel's ragged end goes through these two.
template <class T>
BRAID_INLINE vf load_tail(const T* p, long count, float fill = 0.f) {
  if (count >= kLanes) return load_vec(p);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = i < count ? to_float(p[i]) : fill;
  return load<vf>(lanes);
}
template <class T>
BRAID_INLINE void store_tail(T* p, vf x, long count) {
  if (count >= kLanes) return store_vec(p, x);
  for (long i = 0; i < count; i++) put(p + i, x[i]);
}

BRAID_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
// The lanes W further on, cyclically; W = 8, 4, 2, 1 makes trees of a fixed shape.
template <int W>
BRAID_INLINE vf turned(vf x) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, W & 15, (W + 1) & 15, (W + 2) & 15, (W + 3) & 15, (W + 4) & 15, (W + 5) & 15,
                                 (W + 6) & 15, (W + 7) & 15, (W + 8) & 15, (W + 9) & 15, (W + 10) & 15, (W + 11) & 15,
                                 (W + 12) & 15, (W + 13) & 15, (W + 14) & 15, (W + 15) & 15);
#else
  return __builtin_shuffle(x, (lane_ids() + W) & 15);
#endif
}
BRAID_INLINE float sum_lanes(vf x) {
  x = x + turned<8>(x);
  x = x + turned<4>(x);
  x = x + turned<2>(x);
  return (x + turned<1>(x))[0];
}
BRAID_INLINE float max_lanes(vf x) {
  x = vmax(x, turned<8>(x));
  x = vmax(x, turned<4>(x));
  x = vmax(x, turned<2>(x));
  return vmax(x, turned<1>(x))[0];
}

// exp(x), relative error under 2 ulp on [-87, 88]; below, denormals or 0, from -110 down exactly 0; overflows to inf; NaN stays.
// Cody-Waite reduction by ln 2 in two parts, then a degree-6 Taylor-Chebyshev polynomial on [-ln2/2, ln2/2].
BRAID_INLINE vf vexp(vf x) {
#if defined(__AVX512F__)  // maxps and minps return their second operand if one is NaN; scalef under- and overflows by itself
  vf clipped = (vf)_mm512_max_ps((__m512)splat(-110.f), (__m512)x);
  clipped = (vf)_mm512_min_ps((__m512)splat(90.f), (__m512)clipped);
  vf n = (vf)_mm512_roundscale_ps((__m512)(clipped * 1.44269504088896f), 0);
#else
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  vf clipped = x < -87.3f ? splat(-87.3f) : x;
  clipped = clipped > 88.7f ? splat(88.7f) : clipped;
  vf n = (clipped * 1.44269504088896f + magic) - magic;
#endif
  vf r = clipped - n * 0.693145751953125f;
  r = r - n * 1.428606765330187e-06f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors: n reaches 128 just below overflow, where one factor's exponent field would.
  vi whole = __builtin_convertvector(n, vi);
  vi half = whole >> 1;
  vf y = p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
  y = x < -87.3f ? vf{} : y;
  y = x > 88.7f ? splat(__builtin_inff()) : y;
  return x == x ? y : x;
#endif
}

// log(x) for normal x > 0, relative error under 2 ulp, also next to 1 (Cephes logf's reduction and polynomial).
BRAID_INLINE vf vlog(vf x) {
  vi bits = (vi)x;
  vi exponent = ((bits >> 23) & 0xff) - 126;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  vi small = m < 0.70710678118654752440f;
  exponent = exponent + small;  // small is -1 where true
  m = small ? m + m : m;
  vf f = m - 1.f;
  vf e = __builtin_convertvector(exponent, vf);
  vf z = f * f;
  vf y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  return f + y + e * 0.693359375f;
}

// acc += one 32-bit word of A (broadcast) times a vector of words of B. A word is two bf16 (consecutive k) or one float.
// each: the same with a vector of words of A.
template <class T>
struct Word;
template <>
struct Word<bf16> {
  static constexpr int k = 2;  // elements of K in a word
  static BRAID_INLINE vf dot(vf acc, vu b, uint32_t a) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(a)));
#else
    float lo, hi;
    uint32_t a_lo = a << 16, a_hi = a & 0xffff0000u;
    std::memcpy(&lo, &a_lo, 4);
    std::memcpy(&hi, &a_hi, 4);
    acc = acc + (vf)(b << 16) * lo;
    return acc + (vf)(b & 0xffff0000u) * hi;
#endif
  }
  static BRAID_INLINE vf each(vf acc, vu b, vu a) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)a);
#else
    acc = acc + (vf)(b << 16) * (vf)(a << 16);
    return acc + (vf)(b & 0xffff0000u) * (vf)(a & 0xffff0000u);
#endif
  }
};
template <>
struct Word<float> {
  static constexpr int k = 1;
  static BRAID_INLINE vf dot(vf acc, vu b, uint32_t a) {
    float x;
    std::memcpy(&x, &a, 4);
    return acc + (vf)b * x;
  }
  static BRAID_INLINE vf each(vf acc, vu b, vu a) { return acc + (vf)b * (vf)a; }
};

}  // namespace braid
