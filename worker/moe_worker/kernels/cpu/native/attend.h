// Attention over the paged latents, flash style (arXiv:2205.14135): blocks of 32 rows, running maximum and sum.
//
// Blocks always start at multiples of 32, so that a query's sums have one order whatever shares its tile.
#pragma once
#include "attend_bf16.h"
#include "pool.h"

namespace {

inline const float* row_at(const Tile& tile, int row) { return (const float*)tile.rows[row]; }

inline void score_part(Tile& tile, int q, int r, int width) {
    vf sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = zero();
    for (int w = 0; w < width; w += LANES) {
        int n = width - w < LANES ? width - w : LANES;
        vf k[ROW_PART];
        for (int j = 0; j < ROW_PART; j++) k[j] = n == LANES ? load(row_at(tile, r + j) + w) : load_n(row_at(tile, r + j) + w, n);
        for (int i = 0; i < QUERY_PART; i++) {
            vf x = n == LANES ? load(tile.query[q + i] + w) : load_n(tile.query[q + i] + w, n);
            for (int j = 0; j < ROW_PART; j++) sums[i * ROW_PART + j] = fma(x, k[j], sums[i * ROW_PART + j]);
        }
    }
    put_scores(tile, q, r, sums);
}

template <int Q, int V>
inline void add_rows(Tile& tile, int q, int w, int count) {
    vf sums[Q][V];
    for (int i = 0; i < Q; i++)
        for (int v = 0; v < V; v++) sums[i][v] = load(tile.out[q + i] + w + v * LANES);
    for (int s = 0; s < count; s++) {
        vf row[V];
        for (int v = 0; v < V; v++) row[v] = load(row_at(tile, s) + w + v * LANES);
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
    for (int s = 0; s < count; s++) total = fma(set(tile.scores[q][s]), load_n(row_at(tile, s) + w, n), total);
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

// Points at the block's rows, or at float32 copies of bfloat16 ones that the variant cannot multiply; behind the last
// row it stands again.
inline void find_rows(Tile& tile, int start, int count, int width, float* wide) {
    const MoeCache& cache = tile.a.cache;
    const int32_t* pages = cache.pages + int64_t(tile.sequence) * cache.page_stride;
    for (int i = 0; i < SPAN; i++) {
        int position = start + (i < count ? i : count - 1), mask = (1 << cache.page_shift) - 1;
        int64_t row = (int64_t(pages[position >> cache.page_shift]) << cache.page_shift) + (position & mask);
        const uint16_t* from = (const uint16_t*)cache.rows + row * width;
        tile.rows[i] = cache.bf16 ? (const void*)from : (const float*)cache.rows + row * width;
        if (!cache.bf16 || PAIRS) continue;
        float* to = wide + i * width;
        int w = 0;
        for (; w + LANES <= width; w += LANES) store(to + w, load_bf16(from + w));
        for (; w < width; w++) to[w] = from_bf16(from[w]);
        tile.rows[i] = to;
    }
}

// Whether the exponent of an element is all ones: infinite or NaN.
template <typename Bits>
inline bool has_broken(const void* row, int width, Bits exponent) {
    bool broken = false;
    for (int w = 0; w < width; w++) broken |= (((const Bits*)row)[w] & exponent) == exponent;
    return broken;
}

// A weight of 0 times NaN is NaN, so that a row that is not finite would reach the queries of the tile that stand
// before it, whose pages other requests share. Zeros take its place; the queries that see it get NaN at the end.
inline void hide_broken_rows(Tile& tile, int start, int count, int width, const void* zeros) {
    bool halves = tile.a.cache.bf16 && PAIRS;
    for (int i = tile.limit[0] > start ? tile.limit[0] - start : 0; i < SPAN; i++) {
        int position = start + (i < count ? i : count - 1);
        bool broken = halves ? has_broken<uint16_t>(tile.rows[i], width, 0x7f80) : has_broken<uint32_t>(tile.rows[i], width, 0x7f800000);
        if (!broken || position < tile.limit[0]) continue;
        tile.rows[i] = zeros;
        if (position < tile.broken) tile.broken = position;
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

inline void run_block(Tile& tile, int start, int count) {
    int width = tile.a.rank + tile.a.rope;
    for (int q = 0; q < tile.count; q += QUERY_PART)
        for (int r = 0; r < count; r += ROW_PART) score_part(tile, q, r, width);
    for (int q = 0; q < tile.count; q++) soften(tile, q, start, count, tile.a.rank);
    weigh(tile, count, tile.a.rank);
}

// room: float32 copies of the rows, or the queries in bfloat16
inline void run_tile(Tile& tile, float* room, float* spare, const float* zeros) {
    const MoeAttendArgs& a = tile.a;
    int width = a.rank + a.rope;
    start_tile(tile, spare);
#if defined(__AVX512BF16__)
    if (a.cache.bf16) round_queries(tile, (uint16_t*)room, width);
#endif
    int end = tile.limit[tile.count - 1];
    for (int start = 0; start < end; start += SPAN) {
        int count = end - start < SPAN ? end - start : SPAN;
        find_rows(tile, start, count, width, room);
        if (end > tile.limit[0]) hide_broken_rows(tile, start, count, width, zeros);
#if defined(__AVX512BF16__)
        if (a.cache.bf16) {
            run_block_pairs(tile, (const uint16_t*)room, start, count);
            continue;
        }
#endif
        run_block(tile, start, count);
    }
    for (int q = 0; q < tile.count; q++) {
        vf total = set(tile.limit[q] > tile.broken ? __builtin_nanf("") : tile.total[q]);
        for (int i = 0; i < a.rank; i += LANES) {
            int n = a.rank - i < LANES ? a.rank - i : LANES;
            store_n(tile.out[q] + i, div(load_n(tile.out[q] + i, n), total), n);
        }
    }
}

inline int attend_scratch(int width) { return (SPAN + 2) * width; }

// scratch: attend_scratch(W) floats a thread
void attend(const Context& c, const MoeAttendArgs& a, float* scratch) {
    float* wide = scratch + int64_t(c.id) * attend_scratch(a.rank + a.rope);
    float *spare = wide + SPAN * (a.rank + a.rope), *zeros = spare + a.rank + a.rope;
    memset(zeros, 0, sizeof(float) * (a.rank + a.rope));
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
        Tile tile{a, sequence, first, queries - first < size ? queries - first : size, INT32_MAX, {}, {}, {}, {}, {}, {}, {}};
        run_tile(tile, wide, spare, zeros);
    }
}

}  // namespace
