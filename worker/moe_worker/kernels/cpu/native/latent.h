// What multi-head latent attention (arXiv:2405.04434) does around its products: norm and rotation of a cache
// row, and the small projections of each head that absorb W_UK and W_UV.
#pragma once
#include "linear.h"

namespace {

inline void turn(const float* x, const float* rotation, float* out, int width) {
    for (int i = 0; i < width; i += 2) {
        out[i] = x[i] * rotation[i] - x[i + 1] * rotation[i + 1];
        out[i + 1] = x[i] * rotation[i + 1] + x[i + 1] * rotation[i];
    }
}

inline void write_row(const MoeCache& cache, int64_t row, const float* values, int width) {
    if (!cache.bf16) {
        memcpy((float*)cache.rows + row * width, values, sizeof(float) * width);
        return;
    }
    uint16_t* out = (uint16_t*)cache.rows + row * width;
    for (int i = 0; i < width; i++) out[i] = to_bf16(values[i]);
}

// scratch: [T, R + P]
void latent(const Context& c, const MoeLatentArgs& a, float* scratch) {
    int begin, end, width = a.rank + a.rope;
    while (c.take(a.tokens, c.grain(a.tokens), begin, end))
        for (int t = begin; t < end; t++) {
            const float* x = a.x + int64_t(t) * a.stride;
            float* row = scratch + int64_t(t) * width;
            norm_row(x, a.norm, row, a.rank, a.eps);
            turn(x + a.rank, a.rotations + a.positions[t] * a.rope, row + a.rank, a.rope);
            write_row(a.cache, a.rows[t], row, width);
        }
}

// NB blocks of a head for TB tokens that lie `x_stride` and `out_stride` apart; inputs are added up in their order,
// whatever TB and NB.
template <int TB, int NB>
inline __attribute__((always_inline)) void head_tile(const MoeHeadWeight& w, const uint8_t* data, int block, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
    constexpr int VECTORS = NB * BLOCK / LANES;
    const int64_t size = block_bytes(w);
    const uint8_t* at[VECTORS];
    for (int v = 0; v < VECTORS; v++) at[v] = data + v * LANES / BLOCK * size + v * LANES % BLOCK * 4;
    vf sums[TB][VECTORS];
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < VECTORS; v++) sums[t][v] = zero();
    for (int i = 0; i < w.cols; i += 2) {
        vf even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            vi pairs = load_int(at[v] + i * 32);
            even[v] = even_bf16(pairs);
            odd[v] = odd_bf16(pairs);
        }
        for (int t = 0; t < TB; t++) {
            vf first = set(x[t * x_stride + i]);
            for (int v = 0; v < VECTORS; v++) sums[t][v] = fma(first, even[v], sums[t][v]);
        }
        if (i + 1 == w.cols) break;
        for (int t = 0; t < TB; t++) {
            vf second = set(x[t * x_stride + i + 1]);
            for (int v = 0; v < VECTORS; v++) sums[t][v] = fma(second, odd[v], sums[t][v]);
        }
    }
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < VECTORS; v++) {
            int begin = block * BLOCK + v * LANES, n = w.rows - begin;
            if (n > 0) store_n(out + t * out_stride + begin, sums[t][v], n < LANES ? n : LANES);
        }
}

// NB blocks at once, as many as registers hold: they share the tokens' values and hide each other's latency.
template <int TB, int NB>
inline void head_blocks(const MoeHeadWeight& w, const uint8_t* data, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
    const int blocks = ceil_div(w.rows, BLOCK);
    const int64_t size = block_bytes(w);
    int b = 0;
    for (; b + NB <= blocks; b += NB) head_tile<TB, NB>(w, data + b * size, b, x, x_stride, out, out_stride);
    for (; b < blocks; b++) head_tile<TB, 1>(w, data + b * size, b, x, x_stride, out, out_stride);
}

template <int TB, int NB>
inline int head_tokens(const MoeHeadsArgs& a, const uint8_t* data, const float* x, float* out, int t) {
    for (; t + TB <= a.tokens; t += TB)
        head_blocks<TB, NB>(a.weight, data, x + int64_t(t) * a.x_token, a.x_token, out + int64_t(t) * a.out_token, a.out_token);
    return t;
}

void heads(const Context& c, const MoeHeadsArgs& a) {
    constexpr int MOST = LANES == 16 ? 8 : 4, BLOCKS = LANES == 16 ? 2 : 1;
    int h, stop;
    while (c.take(a.heads, 1, h, stop)) {
        const uint8_t* data = a.weight.data + h * weight_bytes(a.weight);
        const float* x = a.x + int64_t(h) * a.x_head;
        float* out = a.out + int64_t(h) * a.out_head;
        for (int t = 0; a.rotations && t < a.tokens; t++)
            turn(x + int64_t(t) * a.x_token + a.weight.cols, a.rotations + a.positions[t] * a.rope,
                 out + int64_t(t) * a.out_token + a.weight.rows, a.rope);
        int t = head_tokens<MOST, BLOCKS>(a, data, x, out, 0);
        t = head_tokens<MOST / 2, BLOCKS>(a, data, x, out, t);
        head_tokens<1, 4 * BLOCKS>(a, data, x, out, t);
    }
}

}  // namespace
