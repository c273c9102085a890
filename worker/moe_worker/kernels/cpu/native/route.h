// The router (arXiv:2412.19437, 2.1.2): float32 scores, choice limited to the best groups of each level.
#pragma once
#include "pool.h"
#include "simd.h"

namespace {

inline float dot_floats(const float* a, const float* b, int n) {
    vf even = zero(), odd = zero();
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        even = fma(load(a + i), load(b + i), even);
        odd = fma(load(a + i + LANES), load(b + i + LANES), odd);
    }
    for (; i < n; i += LANES) {
        int left = n - i < LANES ? n - i : LANES;
        even = fma(load_n(a + i, left), load_n(b + i, left), even);
    }
    return sum(add(even, odd));
}

inline void scores_of(float* x, int n, bool softmax) {
    float most = x[0];
    for (int i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    float total = 0;
    for (int i = 0; i < n; i += LANES) {
        int left = n - i < LANES ? n - i : LANES;
        vf y = load_n(x + i, left);
        if (softmax) y = exponential(sub(y, set(most)));
        else y = div(set(1.0f), add(set(1.0f), exponential(sub(zero(), y))));
        store_n(x + i, y, left);
    }
    if (!softmax) return;
    for (int i = 0; i < n; i++) total += x[i];
    for (int i = 0; i < n; i++) x[i] /= total;
}

// NaN counts as the largest, as in torch: a token that has one fails instead of going on without it.
inline int best_of(const float* x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best] || (x[i] != x[i] && x[best] == x[best])) best = i;
    return best;
}

// Sets the choice of experts outside the level's best groups to -inf. `scores` has room for one value a group.
inline void keep_groups(float* choice, float* scores, int count, const MoeLevel& level) {
    int size = count / level.groups;
    for (int g = 0; g < level.groups; g++) {
        float first = -__builtin_inff(), second = first;
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > first) second = first, first = choice[i];
            else if (choice[i] > second) second = choice[i];
        }
        scores[g] = level.best == 2 ? first + second : first;
    }
    for (int k = 0; k < level.keep; k++) scores[best_of(scores, level.groups)] = -__builtin_inff();
    for (int i = 0; i < count; i++)
        if (scores[i / size] != -__builtin_inff()) choice[i] = -__builtin_inff();
}

// Experts, best first, are needed until their weights reach `mass` of all; from there on they become none.
inline void cut_at_mass(int32_t* experts, float* weights, int top_k, float mass) {
    float total = 0, before = 0;
    for (int k = 0; k < top_k; k++) total += weights[k];
    for (int k = 0; k < top_k; k++) {
        bool left = k && before >= mass * total;
        before += weights[k];
        if (left) experts[k] = -1, weights[k] = 0;
    }
}

// logits [E] become scores; `choice` has room for E values, `groups` for one value a group.
inline void choose(const MoeRouteArgs& a, int t, float* logits, float* choice, float* groups) {
    const MoeChoice& c = a.choice;
    scores_of(logits, a.count, c.softmax);
    for (int e = 0; e < a.count; e++) choice[e] = logits[e] + (a.bias ? a.bias[e] : 0);
    for (int i = 0; i < c.level_count; i++) keep_groups(choice, groups, a.count, c.levels[i]);
    int width = c.top_k + c.shared;
    int32_t* experts = a.experts + int64_t(t) * width;
    float* weights = a.weights + int64_t(t) * width;
    float total = 1e-20f;
    for (int k = 0; k < c.top_k; k++) {
        experts[k] = best_of(choice, a.count);
        weights[k] = logits[experts[k]];
        choice[experts[k]] = -__builtin_inff();
    }
    if (c.mass < 1) cut_at_mass(experts, weights, c.top_k, c.mass);
    for (int k = 0; k < c.top_k; k++) total += weights[k];
    for (int k = 0; k < c.top_k; k++) weights[k] *= c.normalise ? c.scale / total : c.scale;
    for (int s = 0; s < c.shared; s++) experts[c.top_k + s] = a.count + s, weights[c.top_k + s] = 1;
}

// scratch: [T, 3 * E]
void route(const Context& c, const MoeRouteArgs& a, float* scratch) {
    int begin, end, stride = 3 * a.count, items = a.tokens * a.count;
    while (c.take(items, c.grain(items), begin, end))
        for (int i = begin; i < end; i++) {
            int t = i / a.count, e = i % a.count;
            scratch[int64_t(t) * stride + e] = dot_floats(a.x + int64_t(t) * a.width, a.weight + int64_t(e) * a.width, a.width);
        }
    c.sync();
    while (c.take(a.tokens, c.grain(a.tokens), begin, end))
        for (int t = begin; t < end; t++) {
            float* row = scratch + int64_t(t) * stride;
            choose(a, t, row, row + a.count, row + 2 * a.count);
        }
}

}  // namespace
