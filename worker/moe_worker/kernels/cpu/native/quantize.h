// Activations to int8, one scale a piece of a token, with or without RMSNorm before.
#pragma once
#include "layout.h"
#include "pool.h"
#include "simd.h"

namespace {

inline MoeQuantized at_token(const MoeQuantized& q, int t, int width, int piece, int segment) {
    return {q.values + int64_t(t) * padded(width), q.scales + int64_t(t) * ceil_div(width, piece),
            q.sums + int64_t(t) * ceil_div(width, segment)};
}

// NaN where any is NaN: the bits of magnitudes have the order of their values, and those of NaN stand above all.
inline float largest_magnitude(const float* x, int n) {
    vf most = zero();
    int i = 0;
    for (; i + LANES <= n; i += LANES) most = max_bits(most, abs(load(x + i)));
    if (i < n) most = max_bits(most, abs(load_n(x + i, n - i)));
    return largest_bits(most);
}

inline int sum_values(const int8_t* values, int n) {
    int total = 0;
    for (int i = 0; i < n; i++) total += values[i];
    return total;
}

// Divides instead of multiplying by the inverse: the result is the reference's, to the bit. A piece that is not finite
// has a scale that is not, so that products with it are not finite either.
inline float quantize_piece(const float* x, int n, int8_t* values) {
    float most = largest_magnitude(x, n);
    float scale = most == 0 ? 1 : most / 127;
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_int8(values + i, round_int(div(load(x + i), set(scale))));
    if (i < n) store_int8(values + i, round_int(div(load_n(x + i, n - i), set(scale))));
    return scale;
}

// One token.
inline void quantize_row(const float* x, int n, int piece, int segment, const MoeQuantized& out) {
    for (int begin = 0, p = 0; begin < n; begin += piece, p++)
        out.scales[p] = quantize_piece(x + begin, n - begin < piece ? n - begin : piece, out.values + begin);
    memset(out.values + n, 0, padded(n) - n);
    for (int begin = 0, s = 0; begin < n; begin += segment, s++)
        out.sums[s] = sum_values(out.values + begin, n - begin < segment ? n - begin : segment);
}

inline void norm_row(const float* x, const float* weight, float* out, int n, float eps) {
    vf squares = zero();
    int i = 0;
    for (; i + LANES <= n; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    if (i < n) squares = fma(load_n(x + i, n - i), load_n(x + i, n - i), squares);
    vf factor = set(1.0f / __builtin_sqrtf(sum(squares) / n + eps));
    for (i = 0; i + LANES <= n; i += LANES) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
    if (i < n) store_n(out + i, mul(mul(load_n(x + i, n - i), factor), load_n(weight + i, n - i)), n - i);
}

// `normed` is given wherever `weight` is: the norm needs room for its result.
void quantize(const Context& c, const MoeQuantizeArgs& a) {
    int begin, end;
    while (c.take(a.tokens, c.grain(a.tokens), begin, end))
        for (int t = begin; t < end; t++) {
            const float* x = a.x + int64_t(t) * a.stride;
            if (a.weight) {
                float* normed = a.normed + int64_t(t) * a.width;
                norm_row(x, a.weight, normed, a.width, a.eps);
                x = normed;
            }
            quantize_row(x, a.width, a.piece, a.segment, at_token(a.out, t, a.width, a.piece, a.segment));
        }
}

}  // namespace
