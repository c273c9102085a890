// Dot products of 1:4 sparse int4 weights: of four consecutive inputs (a quad), a row has one value and its position.
//
// A step of 64 inputs is 192 bytes: positions, then values of the first and of the last 32 inputs. Every row has 4 bytes
// of each; byte k is about quads k, 4 + k, 8 + k and 12 + k of the step: their positions in bits 0, 2, 4 and 6, and
// their values plus 8 in the low and high halves of both value bytes. So one shuffle picks, for all rows at once, the
// four activations that meet four weights.
#pragma once
#include "dot.h"

namespace {

#if defined(__AVX512F__)
inline vi sixteen(const int8_t* x) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x)); }
inline vi pick(vi from, vi index) { return _mm512_shuffle_epi8(from, index); }
inline vi index_of(vi positions, int quad) {
    vi two = _mm512_and_si512(_mm512_srli_epi16(positions, 2 * quad), _mm512_set1_epi8(3));
    return _mm512_or_si512(two, _mm512_set1_epi32(0x0c080400));
}
#else
inline vi sixteen(const int8_t* x) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)x)); }
inline vi pick(vi from, vi index) { return _mm256_shuffle_epi8(from, index); }
inline vi index_of(vi positions, int quad) {
    vi two = _mm256_and_si256(_mm256_srli_epi16(positions, 2 * quad), _mm256_set1_epi8(3));
    return _mm256_or_si256(two, _mm256_set1_epi32(0x0c080400));
}
#endif

// What the offset of 8 adds depends on the activations that a row picks, so it is summed separately.
template <int TB, int NV>
struct Dot<SPARSE14, TB, NV> {
    static inline __attribute__((always_inline)) void run(vi (&sums)[TB][NV], const uint8_t* w, const int8_t* const* x, int offset, int steps) {
        const vi eight = set_int(0x08080808);
#if HAVE_VNNI
        vi excess[TB][NV];
        for (int t = 0; t < TB; t++)
            for (int v = 0; v < NV; v++) excess[t][v] = zero_int();
#endif
        for (int s = 0; s < steps; s += 3, offset += 64) {
            for (int line = 0; line < 3; line++) fetch_ahead<TB>(w + (s + line) * 64);
            for (int v = 0; v < NV; v++) {
                const uint8_t* at = w + s * 64 + v * LANES * 4;
                const vi positions = load_int(at), first = load_int(at + 64), last = load_int(at + 128);
                const vi values[4] = {low_nibbles(first), high_nibbles(first), low_nibbles(last), high_nibbles(last)};
#if !HAVE_VNNI
                vi narrow[TB];  // 4 steps of two products: 4 * 2 * 8 * 127 fits 16 bits
                for (int t = 0; t < TB; t++) narrow[t] = zero_int();
#endif
                for (int quad = 0; quad < 4; quad++) {
                    const vi index = index_of(positions, quad);
                    for (int t = 0; t < TB; t++) {
                        const vi picked = pick(sixteen(x[t] + offset + quad * 16), index);
#if HAVE_VNNI
                        sums[t][v] = dot4(sums[t][v], values[quad], picked);
                        excess[t][v] = dot4(excess[t][v], eight, picked);
#else
                        narrow[t] = add16(narrow[t], sub16(pairs(values[quad], picked), pairs(eight, picked)));
#endif
                    }
                }
#if !HAVE_VNNI
                for (int t = 0; t < TB; t++) sums[t][v] = add_int(sums[t][v], widen(narrow[t]));
#endif
            }
        }
#if HAVE_VNNI
        for (int t = 0; t < TB; t++)
            for (int v = 0; v < NV; v++) sums[t][v] = sub_int(sums[t][v], excess[t][v]);
#endif
    }
};

}  // namespace
