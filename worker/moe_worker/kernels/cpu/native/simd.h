// Vectors of floats and integers, 16 lanes with AVX-512 and 8 without; everything above is written once.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
typedef __m512 vf;
typedef __m512i vi;
inline vf zero() { return _mm512_setzero_ps(); }
inline vf set(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_n(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float largest(vf a) { return _mm512_reduce_max_ps(a); }
inline vf max_bits(vf a, vf b) { return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
// The largest of values that are not negative; NaN where one is.
inline float largest_bits(vf a) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a))))); }
// The sums of 16 vectors, in their order; each is added up in the same order.
inline vf sums_of(const vf (&a)[16]) {
    vf pairs[8], fours[4];
    for (int i = 0; i < 8; i++) pairs[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++)
        fours[i] = add(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44), _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
    vf low = add(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    vf high = add(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
inline vi round_int(vf a) { return _mm512_cvtps_epi32(a); }  // half to even
// Byte I of each lane, signed.
template <int I>
inline vf byte_float(vi a) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * I), 24)); }
// To the nearest bfloat16, half to even; a NaN stays one.
inline vf round_bf16(vf a) {
    vi bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    vf rounded = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, a);
}
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vf power_of_two(vi n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }
inline vf where_less(vf a, vf b, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
inline void store_int8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
inline vf load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vi zero_int() { return _mm512_setzero_si512(); }
inline vi set_int(int32_t x) { return _mm512_set1_epi32(x); }
inline vi load_int(const void* p) { return _mm512_loadu_si512(p); }
inline vi add_int(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi sub_int(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi mul_int(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
inline vi load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline vi low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline vi high_nibbles(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
#else
constexpr int LANES = 8;
typedef __m256 vf;
typedef __m256i vi;
inline vf zero() { return _mm256_setzero_ps(); }
inline vf set(float x) { return _mm256_set1_ps(x); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_n(float* p, vf x, int n) { _mm256_maskstore_ps(p, first(n), x); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline float sum(vf a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float largest(vf a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline vf max_bits(vf a, vf b) { return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
inline float largest_bits(vf a) {
    __m128i b = _mm_max_epi32(_mm_castps_si128(_mm256_castps256_ps128(a)), _mm_castps_si128(_mm256_extractf128_ps(a, 1)));
    b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1))));
}
// The sums of 8 vectors, in their order; each is added up in the same order.
inline vf sums_of(const vf (&a)[8]) {
    vf low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    vf high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
inline vi round_int(vf a) { return _mm256_cvtps_epi32(a); }  // half to even
template <int I>
inline vf byte_float(vi a) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * I), 24)); }
inline vf round_bf16(vf a) {
    vi bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    vf rounded = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))));
    return _mm256_blendv_ps(rounded, a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
inline vf power_of_two(vi n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
inline vf where_less(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline void store_int8(int8_t* p, vi a) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
inline vf load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vi zero_int() { return _mm256_setzero_si256(); }
inline vi set_int(int32_t x) { return _mm256_set1_epi32(x); }
inline vi load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline vi add_int(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi sub_int(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi mul_int(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
inline vi load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline vi low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline vi high_nibbles(vi a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
#endif

#if defined(__AVX512BF16__)
constexpr int PAIRED = 2 * LANES;  // bfloat16 of a vector

inline __m512i load_halves(const uint16_t* p, int n) { return _mm512_maskz_loadu_epi16(n < PAIRED ? (1u << n) - 1 : ~0u, p); }
inline vf dot_pairs(vf sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
inline void store_halves(uint16_t* p, vf x, int n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

// Fetches weights that a product with so many tokens reads soon. A single token reads each weight once: weights then pass by
// the L2 and L3 caches, which keep what the next step reads again (non-temporal). With more tokens, the next block comes while
// a block is read again for further tokens. GCC removes calls that only prefetch, so it must be inlined.
template <int TOKENS>
inline __attribute__((always_inline)) void fetch_ahead(const uint8_t* weights) {
    if (TOKENS == 1) _mm_prefetch((const char*)weights + 256, _MM_HINT_NTA);
    else _mm_prefetch((const char*)weights + 2048, _MM_HINT_T0);
}

inline float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bf16(float value) {  // to nearest, half to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // a NaN stays one
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// e^x to about 1e-7, 0 below -87 (where float32 has no normal numbers left); NaN of NaN, since the instructions
// give their second operand where one is NaN.
inline vf exponential(vf x) {
    vf clamped = min(set(88.37f), max(set(-87.33f), x));
    vi n = round_int(mul(clamped, set(1.44269504f)));
    vf whole = to_float(n);
    vf r = fma(whole, set(2.12194440e-4f), fma(whole, set(-0.693359375f), clamped));
    vf p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set(1.0f)));
    return where_less(x, set(-87.33f), zero(), mul(p, power_of_two(n)));
}

inline vf silu(vf x) { return div(x, add(set(1.0f), exponential(sub(zero(), x)))); }

}  // namespace
