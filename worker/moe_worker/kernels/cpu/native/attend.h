// Attention over the paged latents, flash style (arXiv:2205.14135): blocks of 32 rows, running maximum and sum.
//
// A tile is up to 8 queries (pairs of a token and a head) of one sequence; they share every row that is loaded.
// Blocks always start at multiples of 32, so that a query's sums have one order whatever shares its tile.
#pragma once
#include "layout.h"
#include "pool.h"
#include "simd.h"

namespace {

constexpr int SPAN = 32;     // cache rows of a block
constexpr int QUERIES = 8;   // of a tile
constexpr int QUERY_PART = LANES == 16 ? 4 : 2;  // by 4 rows: as many sums as registers allow
constexpr int ROW_PART = 4;

struct Tile {
    const MoeAttendArgs& a;
    int sequence, first, count;         // queries first to first + count of the sequence, token-major
    const float* query[QUERIES];
    float* out[QUERIES];
    int limit[QUERIES];                 // rows that a query sees
    float most[QUERIES], total[QUERIES];
    const float* rows[SPAN];
    alignas(64) float scores[QUERIES][SPAN];
};

inline void score_part(Tile& tile, int q, int r, int width) {
    const float *query[QUERY_PART], *row[ROW_PART];
    vf sums[QUERY_PART][ROW_PART];
    for (int i = 0; i < QUERY_PART; i++) query[i] = tile.query[q + i];
    for (int j = 0; j < ROW_PART; j++) row[j] = tile.rows[r + j];
    for (int i = 0; i < QUERY_PART; i++)
        for (int j = 0; j < ROW_PART; j++) sums[i][j] = zero();
    int w = 0;
    for (; w + LANES <= width; w += LANES) {
        vf k[ROW_PART];
        for (int j = 0; j < ROW_PART; j++) k[j] = load(row[j] + w);
        for (int i = 0; i < QUERY_PART; i++) {
            vf x = load(query[i] + w);
            for (int j = 0; j < ROW_PART; j++) sums[i][j] = fma(x, k[j], sums[i][j]);
        }
    }
    if (w < width)
        for (int i = 0; i < QUERY_PART; i++)
            for (int j = 0; j < ROW_PART; j++)
                sums[i][j] = fma(load_n(query[i] + w, width - w), load_n(row[j] + w, width - w), sums[i][j]);
    for (int i = 0; i < QUERY_PART; i++)
        for (int j = 0; j < ROW_PART; j++) tile.scores[q + i][r + j] = sum(sums[i][j]) * tile.a.scale;
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

template <int Q, int V>
inline void add_rows(Tile& tile, int q, int w, int count) {
    vf sums[Q][V];
    for (int i = 0; i < Q; i++)
        for (int v = 0; v < V; v++) sums[i][v] = load(tile.out[q + i] + w + v * LANES);
    for (int s = 0; s < count; s++) {
        vf row[V];
        for (int v = 0; v < V; v++) row[v] = load(tile.rows[s] + w + v * LANES);
        for (int i = 0; i < Q; i++) {
            vf p = set(tile.scores[q + i][s]);
            for (int v = 0; v < V; v++) sums[i][v] = fma(p, row[v], sums[i][v]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int v = 0; v < V; v++) store(tile.out[q + i] + w + v * LANES, sums[i][v]);
}

inline void add_tail(Tile& tile, int q, int w, int n, int count) {
    vf total = load_n(tile.out[q] + w, n);
    for (int s = 0; s < count; s++) total = fma(set(tile.scores[q][s]), load_n(tile.rows[s] + w, n), total);
    store_n(tile.out[q] + w, total, n);
}

inline void weigh(Tile& tile, int count, int rank) {
    constexpr int Q = LANES == 16 ? 8 : 4, V = 2;
    for (int q = 0; q < QUERIES; q += Q) {
        int w = 0;
        for (; w + V * LANES <= rank; w += V * LANES) add_rows<Q, V>(tile, q, w, count);
        for (; w + LANES <= rank; w += LANES) add_rows<Q, 1>(tile, q, w, count);
        if (w < rank)
            for (int i = 0; i < Q; i++) add_tail(tile, q + i, w, rank - w, count);
    }
}

// Points at the block's rows, or at float32 copies of bfloat16 ones; behind the last row it stands again.
inline void find_rows(Tile& tile, int start, int count, int width, float* wide) {
    const MoeCache& cache = tile.a.cache;
    const int32_t* pages = cache.pages + int64_t(tile.sequence) * cache.page_stride;
    for (int i = 0; i < SPAN; i++) {
        int position = start + (i < count ? i : count - 1), mask = (1 << cache.page_shift) - 1;
        int64_t row = (int64_t(pages[position >> cache.page_shift]) << cache.page_shift) + (position & mask);
        if (!cache.bf16) {
            tile.rows[i] = (const float*)cache.rows + row * width;
            continue;
        }
        const uint16_t* from = (const uint16_t*)cache.rows + row * width;
        float* to = wide + i * width;
        int w = 0;
        for (; w + LANES <= width; w += LANES) store(to + w, load_bf16(from + w));
        for (; w < width; w++) to[w] = from_bf16(from[w]);
        tile.rows[i] = to;
    }
}

// A tile always computes QUERIES of them: what is missing repeats the last one into `spare`.
inline void start_tile(Tile& tile, float* spare) {
    const MoeAttendArgs& a = tile.a;
    int token = a.cache.starts[tile.sequence], tokens = a.cache.starts[tile.sequence + 1] - token;
    for (int i = 0; i < QUERIES; i++) {
        int q = tile.first + (i < tile.count ? i : tile.count - 1);
        int64_t flat = int64_t(token) * a.heads + q;
        tile.query[i] = a.query + flat * (a.rank + a.rope);
        tile.out[i] = i < tile.count ? a.out + flat * a.rank : spare;
        tile.limit[i] = a.cache.lengths[tile.sequence] - tokens + q / a.heads + 1;
        tile.most[i] = -__builtin_inff();
        tile.total[i] = 0;
        memset(tile.out[i], 0, sizeof(float) * a.rank);
    }
}

inline void run_tile(Tile& tile, float* wide, float* spare) {
    const MoeAttendArgs& a = tile.a;
    int width = a.rank + a.rope;
    start_tile(tile, spare);
    int end = tile.limit[tile.count - 1];
    for (int start = 0; start < end; start += SPAN) {
        int count = end - start < SPAN ? end - start : SPAN;
        find_rows(tile, start, count, width, wide);
        for (int q = 0; q < tile.count; q += QUERY_PART)
            for (int r = 0; r < count; r += ROW_PART) score_part(tile, q, r, width);
        for (int q = 0; q < tile.count; q++) soften(tile, q, start, count, a.rank);
        weigh(tile, count, a.rank);
    }
    for (int q = 0; q < tile.count; q++)
        for (int i = 0; i < a.rank; i += LANES) {
            int n = a.rank - i < LANES ? a.rank - i : LANES;
            store_n(tile.out[q] + i, div(load_n(tile.out[q] + i, n), set(tile.total[q])), n);
        }
}

inline int attend_scratch(int width) { return (SPAN + 1) * width; }

// scratch: attend_scratch(W) floats a thread
void attend(const Context& c, const MoeAttendArgs& a, float* scratch) {
    float* wide = scratch + int64_t(c.id) * attend_scratch(a.rank + a.rope);
    float* spare = wide + SPAN * (a.rank + a.rope);
    int64_t all = int64_t(a.cache.starts[a.cache.batch]) * a.heads;
    int size = all / c.threads >= QUERIES ? QUERIES : int(all / c.threads) > 0 ? int(all / c.threads) : 1;
    int item, stop, sequence = 0, before = 0;
    while (c.take(INT32_MAX, 1, item, stop)) {
        int queries = 0;
        for (; sequence < a.cache.batch; sequence++) {
            queries = (a.cache.starts[sequence + 1] - a.cache.starts[sequence]) * a.heads;
            if (item < before + ceil_div(queries, size)) break;
            before += ceil_div(queries, size);
        }
        if (sequence == a.cache.batch) return;
        int first = (item - before) * size;
        Tile tile{a, sequence, first, queries - first < size ? queries - first : size, {}, {}, {}, {}, {}, {}, {}};
        run_tile(tile, wide, spare);
    }
}

}  // namespace
