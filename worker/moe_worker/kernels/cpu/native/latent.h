// What multi-head latent attention (arXiv:2405.04434) does around its products: norm and rotation of a cache row.
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

}  // namespace
