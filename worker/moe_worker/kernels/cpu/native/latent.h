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

// A block of a head for TB tokens that lie `x_stride` and `out_stride` apart. Even and odd inputs are summed apart and
// added at the end, whatever TB. One block at a time reads weights in their order, at the rate of memory.
template <int TB>
inline __attribute__((always_inline)) void head_tile(const MoeHeadWeight& w, const uint8_t* data, int block, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
    constexpr int VECTORS = BLOCK / LANES;
    vf even[TB][VECTORS], odd[TB][VECTORS];
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < VECTORS; v++) even[t][v] = odd[t][v] = zero();
    int i = 0;
    for (; i + 2 <= w.cols; i += 2) {
        fetch_ahead<TB>(data + i * 32);
        for (int v = 0; v < VECTORS; v++) {
            vi pairs = load_int(data + i * 32 + v * LANES * 4);
            for (int t = 0; t < TB; t++) {
                const float* at = x + t * x_stride + i;
                even[t][v] = fma(set(at[0]), even_bf16(pairs), even[t][v]);
                odd[t][v] = fma(set(at[1]), odd_bf16(pairs), odd[t][v]);
            }
        }
    }
    for (int v = 0; i < w.cols && v < VECTORS; v++) {
        vi pairs = load_int(data + i * 32 + v * LANES * 4);
        for (int t = 0; t < TB; t++) even[t][v] = fma(set(x[t * x_stride + i]), even_bf16(pairs), even[t][v]);
    }
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < VECTORS; v++) {
            int begin = block * BLOCK + v * LANES, n = w.rows - begin;
            if (n > 0) store_n(out + t * out_stride + begin, add(even[t][v], odd[t][v]), n < LANES ? n : LANES);
        }
}

template <int TB>
inline void head_blocks(const MoeHeadWeight& w, const uint8_t* data, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
    const int64_t size = block_bytes(w);
    for (int b = 0; b < ceil_div(w.rows, BLOCK); b++) head_tile<TB>(w, data + b * size, b, x, x_stride, out, out_stride);
}

void heads(const Context& c, const MoeHeadsArgs& a) {
    constexpr int MOST = LANES == 16 ? 8 : 2;
    int h, stop;
    while (c.take(a.heads, 1, h, stop)) {
        const uint8_t* data = a.weight.data + h * weight_bytes(a.weight);
        const float* x = a.x + int64_t(h) * a.x_head;
        float* out = a.out + int64_t(h) * a.out_head;
        for (int t = 0; a.rotations && t < a.tokens; t++)
            turn(x + int64_t(t) * a.x_token + a.weight.cols, a.rotations + a.positions[t] * a.rope,
                 out + int64_t(t) * a.out_token + a.weight.rows, a.rope);
        int t = 0;
        for (; t + MOST <= a.tokens; t += MOST)
            head_blocks<MOST>(a.weight, data, x + int64_t(t) * a.x_token, a.x_token, out + int64_t(t) * a.out_token, a.out_token);
        for (; t < a.tokens; t++)
            head_blocks<1>(a.weight, data, x + int64_t(t) * a.x_token, a.x_token, out + int64_t(t) * a.out_token, a.out_token);
    }
}

}  // namespace
