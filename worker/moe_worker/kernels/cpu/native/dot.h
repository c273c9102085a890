// Integer dot products of one group of inputs: 16 output rows (or the half that a vector holds) by TB tokens.
//
// Weights are unsigned (value plus zero point); what the zero point adds is taken off by the sums of the
// activations.
#pragma once
#include "layout.h"
#include "simd.h"

namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAVE_VNNI 1
#endif

inline vi four(const int8_t* x) {
    int32_t word;
    memcpy(&word, x, 4);
    return set_int(word);
}

#if HAVE_VNNI
#if defined(__AVX512F__)
inline vi dot4(vi sums, vi u8, vi s8) { return _mm512_dpbusd_epi32(sums, u8, s8); }
#else
inline vi dot4(vi sums, vi u8, vi s8) { return _mm256_dpbusd_avx_epi32(sums, u8, s8); }
#endif
#else
#if defined(__AVX512F__)
inline vi pairs(vi u8, vi s8) { return _mm512_maddubs_epi16(u8, s8); }
inline vi add16(vi a, vi b) { return _mm512_add_epi16(a, b); }
inline vi sub16(vi a, vi b) { return _mm512_sub_epi16(a, b); }
inline vi widen(vi a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
#else
inline vi pairs(vi u8, vi s8) { return _mm256_maddubs_epi16(u8, s8); }
inline vi add16(vi a, vi b) { return _mm256_add_epi16(a, b); }
inline vi sub16(vi a, vi b) { return _mm256_sub_epi16(a, b); }
inline vi widen(vi a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
#endif
#endif

// Vectors NV from byte `w` of each 64-byte step; x[t] points at the group's first input.
template <int BITS, int TB, int NV>
struct Dot;

#if HAVE_VNNI
template <int TB, int NV>
struct Dot<4, TB, NV> {
    static inline __attribute__((always_inline)) void run(vi (&sums)[TB][NV], const uint8_t* w, const int8_t* const* x, int offset, int steps) {
        constexpr bool TWO = TB * NV <= 4;  // chains: the second hides the latency of the first
        vi more[TB][NV];
        for (int t = 0; t < TB; t++)
            for (int v = 0; v < NV; v++) more[t][v] = zero_int();
        for (int s = 0; s < steps; s++) {
            fetch_ahead<TB>(w + s * 64);
            vi low[NV], high[NV];
            for (int v = 0; v < NV; v++) {
                vi raw = load_int(w + s * 64 + v * LANES * 4);
                low[v] = low_nibbles(raw);
                high[v] = high_nibbles(raw);
            }
            for (int t = 0; t < TB; t++) {
                vi a = four(x[t] + offset + s * 8), b = four(x[t] + offset + s * 8 + 4);
                for (int v = 0; v < NV; v++) {
                    vi& second = TWO ? more[t][v] : sums[t][v];
                    sums[t][v] = dot4(sums[t][v], low[v], a);
                    second = dot4(second, high[v], b);
                }
            }
        }
        if (TWO)
            for (int t = 0; t < TB; t++)
                for (int v = 0; v < NV; v++) sums[t][v] = add_int(sums[t][v], more[t][v]);
    }
};
#else
template <int TB, int NV>
struct Dot<4, TB, NV> {
    static inline __attribute__((always_inline)) void run(vi (&sums)[TB][NV], const uint8_t* w, const int8_t* const* x, int offset, int steps) {
        // 4 steps of two sums of two products: 16 * 15 * 127 = 30,480, the most that fits 16 bits.
        for (int begin = 0; begin < steps; begin += 4) {
            int end = begin + 4 < steps ? begin + 4 : steps;
            vi narrow[TB][NV];
            for (int t = 0; t < TB; t++)
                for (int v = 0; v < NV; v++) narrow[t][v] = zero_int();
            for (int s = begin; s < end; s++) {
                fetch_ahead<TB>(w + s * 64);
                for (int v = 0; v < NV; v++) {
                    vi raw = load_int(w + s * 64 + v * LANES * 4);
                    vi low = low_nibbles(raw), high = high_nibbles(raw);
                    for (int t = 0; t < TB; t++) {
                        const int8_t* at = x[t] + offset + s * 8;
                        narrow[t][v] = add16(narrow[t][v], add16(pairs(low, four(at)), pairs(high, four(at + 4))));
                    }
                }
            }
            for (int t = 0; t < TB; t++)
                for (int v = 0; v < NV; v++) sums[t][v] = add_int(sums[t][v], widen(narrow[t][v]));
        }
    }
};
#endif

}  // namespace
