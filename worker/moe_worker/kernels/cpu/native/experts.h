// The experts of a layer: rows (one for each token and expert) sorted by expert, gate and up with SwiGLU,
// int8 again, down, and a token's experts added up in the order in which they were chosen. Expert -1 is none: it
// has no row, and nothing is computed for it.
#pragma once
#include "linear.h"

namespace {

struct ExpertScratch {
    int32_t *ends, *tokens, *places;  // [A + 1] where an expert's rows end; [M] token of a row; [T, K] row of a choice, -1 of none
    float *hidden, *out;              // [M, I], [M, D]
    MoeQuantized quantized;           // [M, I]
};

inline void sort_rows(const MoeExpertsArgs& a, const ExpertScratch& s) {
    int rows = a.tokens * a.per_token;
    memset(s.ends, 0, sizeof(int32_t) * (a.count + 1));
    for (int i = 0; i < rows; i++)
        if (a.experts[i] >= 0) s.ends[a.experts[i] + 1]++;
    for (int e = 0; e < a.count; e++) s.ends[e + 1] += s.ends[e];
    // Afterwards ends[e] is the end of expert e: each place taken moves it on from where the expert begins.
    for (int i = 0; i < rows; i++) {
        s.places[i] = -1;
        if (a.experts[i] < 0) continue;
        int row = s.ends[a.experts[i]]++;
        s.tokens[row] = i / a.per_token;
        s.places[i] = row;
    }
}

inline void count_used(const MoeExpertsArgs& a, const ExpertScratch& s) {
    for (int e = 0; e < a.counted; e++) {
        int rows = s.ends[e] - (e ? s.ends[e - 1] : 0);
        a.used[e] += rows;
        a.used[a.counted] += rows > 0;
    }
}

// Blocks of all experts that have rows, as one shared loop; empty experts cost one check each.
inline void each_expert(const Context& c, const MoeExpertsArgs& a, const ExpertScratch& s, const MoeWeight& w, const Rows& rows, const Output& out) {
    int per = block_count(w) / (w.paired ? 2 : 1), active = 0;
    for (int e = 0; e < a.count; e++) active += s.ends[e] > (e ? s.ends[e - 1] : 0);
    int grain = a.tokens == 1 ? ceil_div(per, 4) : per < 8 ? per : 8;
    int chunks = ceil_div(per, grain), item, stop, expert = -1, seen = -1;
    while (c.take(active * chunks, 1, item, stop)) {
        while (seen < item / chunks) {
            expert++;
            seen += s.ends[expert] > (expert ? s.ends[expert - 1] : 0);
        }
        int first = expert ? s.ends[expert - 1] : 0, begin = item % chunks * grain;
        int end = begin + grain < per ? begin + grain : per;
        multiply(Matrix(w, expert), rows, first, s.ends[expert] - first, begin, end, out);
    }
}

inline void combine_row(const MoeExpertsArgs& a, const ExpertScratch& s, int t) {
    int width = a.down.rows;
    float* out = a.out + int64_t(t) * width;
    for (int i = 0; i < width; i += LANES) {
        int n = width - i < LANES ? width - i : LANES;
        vf total = zero();
        for (int k = 0; k < a.per_token; k++) {
            int place = s.places[t * a.per_token + k];
            if (place < 0) continue;
            total = fma(load_n(s.out + int64_t(place) * width + i, n), set(a.weights[t * a.per_token + k]), total);
        }
        store_n(out + i, add(load_n(out + i, n), total), n);
    }
}

void experts(const Context& c, const MoeExpertsArgs& a, const ExpertScratch& s) {
    int inner = a.down.cols, width = a.down.rows;
    if (c.id == 0) {
        sort_rows(a, s);
        if (a.used) count_used(a, s);
    }
    c.sync();
    each_expert(c, a, s, a.gate_up, {a.x, s.tokens, padded(a.gate_up.cols)}, {s.hidden, inner, false});
    c.sync();
    quantize(c, {s.hidden, nullptr, nullptr, s.quantized, 0, s.ends[a.count], inner, inner, a.down.piece, a.down.segment});
    c.sync();
    each_expert(c, a, s, a.down, {s.quantized, nullptr, padded(inner)}, {s.out, width, false});
    c.sync();
    int begin, end;
    while (c.take(a.tokens, c.grain(a.tokens), begin, end))
        for (int t = begin; t < end; t++) combine_row(a, s, t);
}

}  // namespace
