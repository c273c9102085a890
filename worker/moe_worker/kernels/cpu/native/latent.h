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

// scratch: [T, H] rows of padded(I) bytes, scales and sums
void heads(const Context& c, const MoeHeadsArgs& a, const MoeQuantized& scratch) {
    int inputs = a.weight.cols, h, stop;
    while (c.take(a.heads, 1, h, stop)) {
        MoeQuantized x = at_token(scratch, h * a.tokens, inputs, a.weight.group);
        for (int t = 0; t < a.tokens; t++) {
            const float* from = a.x + int64_t(t) * a.x_token + int64_t(h) * a.x_head;
            float* to = a.out + int64_t(t) * a.out_token + int64_t(h) * a.out_head;
            quantize_row(from, inputs, a.weight.group, at_token(x, t, inputs, a.weight.group));
            if (a.rotations) turn(from + inputs, a.rotations + a.positions[t] * a.rope, to + a.weight.rows, a.rope);
        }
        Output out{a.out + int64_t(h) * a.out_head, a.out_token, false};
        multiply(Matrix(a.weight, h), {x, nullptr, padded(inputs)}, 0, a.tokens, 0, block_count(a.weight), out);
    }
}

}  // namespace
