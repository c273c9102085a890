// Attention in bfloat16 on CPUs that multiply pairs of it (AVX512_BF16): queries and weights are rounded to bfloat16,
// as the rows of the cache are; sums are float32. Twice as fast as float32.
#pragma once
#include "attend_tile.h"

namespace {

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;

// query: [QUERIES, width]
inline void round_queries(const Tile& tile, uint16_t* query, int width) {
    for (int q = 0; q < QUERIES; q++)
        for (int w = 0; w < width; w += LANES) {
            int n = width - w < LANES ? width - w : LANES;
            store_halves(query + q * width + w, load_n(tile.query[q] + w, n), n);
        }
}

inline void score_pairs(Tile& tile, const uint16_t* query, int q, int r, int width) {
    vf sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = zero();
    for (int w = 0; w < width; w += PAIRED) {
        int n = width - w;
        __m512i k[ROW_PART];
        for (int j = 0; j < ROW_PART; j++) k[j] = load_halves((const uint16_t*)tile.rows[r + j] + w, n);
        for (int i = 0; i < QUERY_PART; i++) {
            __m512i x = load_halves(query + (q + i) * width + w, n);
            for (int j = 0; j < ROW_PART; j++) sums[i * ROW_PART + j] = dot_pairs(sums[i * ROW_PART + j], x, k[j]);
        }
    }
    put_scores(tile, q, r, sums);
}

// Two rows become two vectors of pairs, one pair a column: columns 0 to 15 and 16 to 31.
inline void pair_rows(__m512i a, __m512i b, __m512i (&pairs)[2]) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    pairs[0] = _mm512_permutex2var_epi16(a, order, b);
    pairs[1] = _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b);
}

// Columns w to w + 32 of all queries; `low` and `high` of them are there.
inline void add_pairs(Tile& tile, const uint16_t (*weights)[SPAN], int w, int count, int low, int high) {
    vf sums[QUERIES][2];
    for (int q = 0; q < QUERIES; q++) {
        sums[q][0] = load_n(tile.out[q] + w, low);
        sums[q][1] = load_n(tile.out[q] + w + LANES, high);
    }
    for (int s = 0; s < count; s += 2) {
        __m512i pairs[2];
        pair_rows(load_halves((const uint16_t*)tile.rows[s] + w, low + high),
                  load_halves((const uint16_t*)tile.rows[s + 1] + w, low + high), pairs);
        for (int q = 0; q < QUERIES; q++) {
            int32_t both;
            memcpy(&both, weights[q] + s, sizeof both);
            for (int v = 0; v < 2; v++) sums[q][v] = dot_pairs(sums[q][v], pairs[v], set_int(both));
        }
    }
    for (int q = 0; q < QUERIES; q++) {
        store_n(tile.out[q] + w, sums[q][0], low);
        store_n(tile.out[q] + w + LANES, sums[q][1], high);
    }
}

// Behind `count` rows weights are 0 and the last row stands again.
inline void weigh_pairs(Tile& tile, int count, int rank) {
    alignas(64) uint16_t weights[QUERIES][SPAN];
    for (int q = 0; q < QUERIES; q++)
        for (int s = 0; s < SPAN; s += LANES) store_halves(weights[q] + s, load(tile.scores[q] + s), LANES);
    for (int w = 0; w < rank; w += PAIRED) {
        int left = rank - w, low = left < LANES ? left : LANES;
        add_pairs(tile, weights, w, count, low, left - low < LANES ? left - low : LANES);
    }
}

inline void run_block_pairs(Tile& tile, const uint16_t* query, int start, int count) {
    for (int q = 0; q < tile.count; q += QUERY_PART)
        for (int r = 0; r < count; r += ROW_PART) score_pairs(tile, query, q, r, tile.a.rank + tile.a.rope);
    for (int q = 0; q < tile.count; q++) soften(tile, q, start, count, tile.a.rank);
    weigh_pairs(tile, count, tile.a.rank);
}
#else
constexpr bool PAIRS = false;
#endif

}  // namespace
