// A forward pass: T tokens through all layers of a stage, and logits of the chosen ones. It fuses the operations of
// models/layers.py and computes the same numbers as they do one by one.
#pragma once
#include "attend.h"
#include "experts.h"
#include "heads.h"
#include "route.h"

namespace {

// Room for the smallest pieces, of 64, and for segments of `segment` or more.
inline MoeQuantized take_quantized(Arena& arena, int64_t tokens, int width, int segment) {
    return {arena.take<int8_t>(tokens * padded(width)), arena.take<float>(tokens * ceil_div(width, 64)),
            arena.take<int32_t>(tokens * ceil_div(width, segment))};
}

inline ExpertScratch take_experts(Arena& arena, int64_t tokens, int per_token, int count, int width, int inner, int segment) {
    int64_t rows = tokens * per_token;
    return {arena.take<int32_t>(count + 1), arena.take<int32_t>(rows), arena.take<int32_t>(rows),
            arena.take<float>(rows * inner), arena.take<float>(rows * width), take_quantized(arena, rows, inner, segment)};
}

struct ForwardScratch {
    float *normed, *joint, *query, *absorbed, *attended, *values, *hidden, *router, *weights, *latents, *tiles;
    int32_t* chosen;
    MoeQuantized x8, query8, values8, hidden8, last8;
    ExpertScratch experts;
    HeadScratch heads;
};

inline int widest_inner(const MoeForwardArgs& a, bool moe) {
    int most = 0;
    for (int i = 0; i < a.layer_count; i++)
        if ((a.layers[i].router != nullptr) == moe && a.layers[i].down.cols > most) most = a.layers[i].down.cols;
    return most;
}

inline ForwardScratch take_forward(Arena& m, const MoeForwardArgs& a, int threads) {
    ForwardScratch s;
    int64_t n = a.count, heads = a.heads;
    int per_token = a.choice.top_k + a.choice.shared, dense = widest_inner(a, false);
    int queries = a.heads * (a.plain + a.rope), least = a.segment;
    s.normed = m.take<float>(n * (a.hidden > a.query_rank ? a.hidden : a.query_rank));
    s.joint = m.take<float>(n * ((a.query_rank ? a.query_rank : queries) + a.rank + a.rope));
    s.query = m.take<float>(n * queries);
    s.absorbed = m.take<float>(n * heads * (a.rank + a.rope));
    s.attended = m.take<float>(n * heads * a.rank);
    s.values = m.take<float>(n * heads * a.value);
    s.hidden = m.take<float>(n * dense);
    s.router = m.take<float>(n * 3 * a.experts);
    s.weights = m.take<float>(n * per_token);
    s.latents = m.take<float>(n * (a.rank + a.rope));
    s.tiles = m.take<float>(int64_t(threads) * attend_scratch(a.rank + a.rope));
    s.chosen = m.take<int32_t>(n * per_token);
    s.x8 = take_quantized(m, n, a.hidden, least);
    s.query8 = take_quantized(m, n, a.query_rank, least);
    s.values8 = take_quantized(m, n, a.heads * a.value, least);
    s.hidden8 = take_quantized(m, n, dense, least);
    s.last8 = take_quantized(m, a.selected_count, a.hidden, least);
    s.experts = take_experts(m, n, per_token, a.experts + a.choice.shared, a.hidden, widest_inner(a, true), least);
    s.heads = take_heads(m, threads, a.rank > a.plain ? a.rank : a.plain);
    return s;
}

inline void embed(const Context& c, const MoeForwardArgs& a) {
    int begin, end;
    while (c.take(a.count, c.grain(a.count), begin, end))
        for (int t = begin; t < end; t++) {
            float* to = a.x + int64_t(t) * a.hidden;
            int64_t from = a.tokens[t] * a.hidden;
            if (!a.embedding_bf16) memcpy(to, (const float*)a.embedding + from, sizeof(float) * a.hidden);
            else for (int i = 0; i < a.hidden; i++) to[i] = from_bf16(((const uint16_t*)a.embedding)[from + i]);
        }
    c.sync();
}

// The latents of the pass go to the cache, its queries into the space of cache rows.
inline void project_queries(const Context& c, const MoeForwardArgs& a, const MoeLayer& l, const MoeCache& cache, const ForwardScratch& s) {
    int queries = a.heads * (a.plain + a.rope), front = l.query_norm ? a.query_rank : queries, joint = front + a.rank + a.rope;
    latent(c, {cache, s.joint + front, l.latent_norm, a.rotations, a.positions, a.rows, a.count, joint, a.rank, a.rope, a.inner_eps}, s.latents);
    c.sync();
    const float* query = s.joint;
    if (l.query_norm) {
        quantize(c, {s.joint, l.query_norm, s.normed, s.query8, a.inner_eps, a.count, front, joint, l.query.piece, l.query.segment});
        c.sync();
        linear(c, {l.query, s.query8, s.query, a.count, queries, 0});
        c.sync();
        query = s.query;
    }
    int row = a.rank + a.rope;
    heads(c, {l.key, query, s.absorbed, a.count, a.heads, l.query_norm ? queries : joint, a.plain + a.rope,
              a.heads * row, row, a.rotations, a.positions, a.rope}, s.heads);
    c.sync();
}

inline void attention(const Context& c, const MoeForwardArgs& a, const MoeLayer& l, const ForwardScratch& s) {
    MoeCache cache = a.cache;
    cache.rows = l.cache_rows;
    int values = a.heads * a.value;
    quantize(c, {a.x, l.attention_norm, s.normed, s.x8, a.eps, a.count, a.hidden, a.hidden, l.input.piece, l.input.segment});
    c.sync();
    linear(c, {l.input, s.x8, s.joint, a.count, l.input.rows, 0});
    c.sync();
    project_queries(c, a, l, cache, s);
    attend(c, {cache, s.absorbed, s.attended, a.heads, a.rank, a.rope, a.attention_scale}, s.tiles);
    c.sync();
    heads(c, {l.value, s.attended, s.values, a.count, a.heads, a.heads * a.rank, a.rank, values, a.value, nullptr, nullptr, 0}, s.heads);
    c.sync();
    quantize(c, {s.values, nullptr, nullptr, s.values8, 0, a.count, values, values, l.output.piece, l.output.segment});
    c.sync();
    linear(c, {l.output, s.values8, a.x, a.count, a.hidden, 1});
    c.sync();
}

inline void feed_forward(const Context& c, const MoeForwardArgs& a, const MoeLayer& l, const ForwardScratch& s) {
    quantize(c, {a.x, l.block_norm, s.normed, s.x8, a.eps, a.count, a.hidden, a.hidden, l.gate_up.piece, l.gate_up.segment});
    c.sync();
    if (l.router) {
        int32_t* chosen = l.chosen ? l.chosen : s.chosen;
        route(c, {s.normed, l.router, l.router_bias, chosen, s.weights, a.count, a.hidden, a.experts, a.choice}, s.router);
        c.sync();
        experts(c, {l.gate_up, l.down, s.x8, chosen, s.weights, a.x, l.experts_used,
                    a.count, a.choice.top_k + a.choice.shared, a.experts + a.choice.shared, a.experts}, s.experts);
    } else {
        int inner = l.down.cols;
        linear(c, {l.gate_up, s.x8, s.hidden, a.count, inner, 0});
        c.sync();
        quantize(c, {s.hidden, nullptr, nullptr, s.hidden8, 0, a.count, inner, inner, l.down.piece, l.down.segment});
        c.sync();
        linear(c, {l.down, s.hidden8, a.x, a.count, a.hidden, 1});
    }
    c.sync();
}

inline void head(const Context& c, const MoeForwardArgs& a, const ForwardScratch& s) {
    int begin, end;
    while (c.take(a.selected_count, 1, begin, end)) {
        float* normed = s.normed + int64_t(begin) * a.hidden;
        norm_row(a.x + int64_t(a.selected[begin]) * a.hidden, a.norm, normed, a.hidden, a.eps);
        quantize_row(normed, a.hidden, a.head.piece, a.head.segment,
                     at_token(s.last8, begin, a.hidden, a.head.piece, a.head.segment));
    }
    c.sync();
    linear(c, {a.head, s.last8, a.logits, a.selected_count, a.vocabulary, 0});
}

void forward(const Context& c, const MoeForwardArgs& a, const ForwardScratch& s) {
    if (a.embedding) embed(c, a);
    for (int i = 0; i < a.layer_count; i++) {
        attention(c, a, a.layers[i], s);
        feed_forward(c, a, a.layers[i], s);
    }
    if (a.selected_count) head(c, a, s);
}

}  // namespace
