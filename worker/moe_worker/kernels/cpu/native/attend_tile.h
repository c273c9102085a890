// A tile of attention: up to 8 queries (pairs of a token and a head) of one sequence, which share every row that is
// loaded, and 32 rows of the cache at a time.
#pragma once
#include "layout.h"
#include "simd.h"

namespace {

constexpr int SPAN = 32;     // cache rows of a block
constexpr int QUERIES = 8;   // of a tile
constexpr int QUERY_PART = LANES == 16 ? 4 : 2;  // by 4 rows: as many sums as registers allow
constexpr int ROW_PART = 4;
static_assert(QUERY_PART * ROW_PART == LANES, "sums_of gives one vector");

struct Tile {
    const MoeAttendArgs& a;
    int sequence, first, count;         // queries first to first + count of the sequence, token-major
    int broken;                         // position of the first row that is not finite, of those that not all see
    const float* query[QUERIES];
    float* out[QUERIES];
    int limit[QUERIES];                 // rows that a query sees
    float most[QUERIES], total[QUERIES];
    const void* rows[SPAN];             // float32, or bfloat16 where the variant multiplies these
    alignas(64) float scores[QUERIES][SPAN];
};

// The sums of 4 rows with 4 (or 2) queries, query-major, become scores of the rows from r on.
inline void put_scores(Tile& tile, int q, int r, const vf (&sums)[LANES]) {
    alignas(64) float scores[LANES];
    store(scores, mul(sums_of(sums), set(tile.a.scale)));
    for (int i = 0; i < QUERY_PART; i++) memcpy(tile.scores[q + i] + r, scores + i * ROW_PART, ROW_PART * sizeof(float));
}

// Scores of one query become weights; what it has summed up so far shrinks where the maximum rises.
inline void soften(Tile& tile, int q, int start, int count, int rank) {
    float* scores = tile.scores[q];
    int seen = tile.limit[q] - start < count ? tile.limit[q] - start : count;
    for (int i = seen < 0 ? 0 : seen; i < SPAN; i++) scores[i] = -__builtin_inff();
    vf high = load(scores);
    for (int i = LANES; i < SPAN; i += LANES) high = max(high, load(scores + i));
    float most = largest(high) > tile.most[q] ? largest(high) : tile.most[q];
    if (most > tile.most[q]) {
        vf shrink = exponential(set(tile.most[q] - most));
        for (int i = 0; i < rank; i += LANES) {
            int n = rank - i < LANES ? rank - i : LANES;
            store_n(tile.out[q] + i, mul(load_n(tile.out[q] + i, n), shrink), n);
        }
        alignas(64) float factor[LANES];
        store(factor, shrink);
        tile.total[q] *= factor[0];
        tile.most[q] = most;
    }
    vf added = zero();
    for (int i = 0; i < SPAN; i += LANES) {
        vf p = exponential(sub(load(scores + i), set(most)));
        store(scores + i, p);
        added = add(added, p);
    }
    tile.total[q] += sum(added);
}

}  // namespace
