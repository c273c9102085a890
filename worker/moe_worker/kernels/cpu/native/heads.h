// The small projections of each head that absorb W_UK and W_UV (arXiv:2405.04434): int8 weights, each row with a power of
// two as its scale, inputs rounded to bfloat16, sums in float32. Both are exact in bfloat16, which AVX512_BF16 multiplies;
// the other variants multiply in float32. The order of the sums does not depend on the number of tokens.
#pragma once
#include "arena.h"
#include "latent.h"

namespace {

constexpr int HEAD_INPUTS = 4;     // of a row in a step of 64 bytes
constexpr int HEAD_TOKENS = 128;   // for which a block is converted once

inline int head_steps(const MoeHeadWeight& w) { return ceil_div(w.cols, HEAD_INPUTS); }

#if defined(__AVX512BF16__)
typedef uint16_t HeadValue;  // bfloat16
constexpr int MOST_HEAD_TOKENS = 8;

// Low and high bytes of 0 to 127 in bfloat16.
struct SmallIntegers {
    alignas(64) uint8_t low[128], high[128];
    constexpr SmallIntegers() : low(), high() {
        for (int n = 1; n < 128; n++) {
            int exponent = 0;
            while (n >> (exponent + 1)) exponent++;
            int bits = (127 + exponent) << 7 | (n << (7 - exponent) & 127);
            low[n] = bits & 255, high[n] = bits >> 8;
        }
    }
};
constexpr SmallIntegers SMALL_INTEGERS;

// A step to two vectors of pairs of inputs: of rows 0 and 1 of each four rows, and of rows 2 and 3.
inline __attribute__((always_inline)) void convert_step(const uint8_t* step, __m512i (&pairs)[2]) {
    __m512i bytes = load_int(step), sizes = _mm512_abs_epi8(bytes);
    __m512i low = _mm512_permutex2var_epi8(load_int(SMALL_INTEGERS.low), sizes, load_int(SMALL_INTEGERS.low + 64));
    __m512i high = _mm512_permutex2var_epi8(load_int(SMALL_INTEGERS.high), sizes, load_int(SMALL_INTEGERS.high + 64));
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(char(0x80)), 0xf8);  // high | (bytes & 0x80): the sign
    pairs[0] = _mm512_unpacklo_epi8(low, high);
    pairs[1] = _mm512_unpackhi_epi8(low, high);
}

inline void convert_block(const uint8_t* data, int steps, HeadValue* out) {
    for (int s = 0; s < steps; s++) {
        fetch_ahead<2>(data + s * 64);
        __m512i pairs[2];
        convert_step(data + s * 64, pairs);
        for (int v = 0; v < 2; v++) _mm512_store_si512(out + (2 * s + v) * PAIRED, pairs[v]);
    }
}

// Sums of 16 rows for TB tokens, from the block's int8 (`data`) for a single one, else from `values` of convert_block.
template <int TB>
inline __attribute__((always_inline)) void head_sums(const uint8_t* data, const HeadValue* values, int steps, const HeadValue* x, int stride, vf (&sums)[TB][BLOCK / LANES]) {
    vf parts[TB][2];
    for (int t = 0; t < TB; t++) parts[t][0] = parts[t][1] = zero();
    for (int s = 0; s < steps; s++) {
        __m512i pairs[2];
        if (TB > 1) {
            for (int v = 0; v < 2; v++) pairs[v] = load_int(values + (2 * s + v) * PAIRED);
        } else {
            fetch_ahead<TB>(data + s * 64);
            convert_step(data + s * 64, pairs);
        }
        for (int t = 0; t < TB; t++) {
            int64_t four;
            memcpy(&four, x + t * stride + s * HEAD_INPUTS, sizeof four);
            for (int v = 0; v < 2; v++) parts[t][v] = dot_pairs(parts[t][v], pairs[v], _mm512_set1_epi64(four));
        }
    }
    for (int t = 0; t < TB; t++)  // the two pairs of a row lie side by side
        sums[t][0] = add(_mm512_shuffle_ps(parts[t][0], parts[t][1], 0x88), _mm512_shuffle_ps(parts[t][0], parts[t][1], 0xdd));
}

inline void round_values(const float* x, int n, HeadValue* out) { store_halves(out, load_n(x, n), LANES); }
#else
typedef float HeadValue;
constexpr int MOST_HEAD_TOKENS = LANES == 16 ? 8 : 4;

// A step to float32: the rows of its first input, of its second and so on.
inline __attribute__((always_inline)) void convert_step(const uint8_t* step, vf (&values)[HEAD_INPUTS][BLOCK / LANES]) {
    for (int v = 0; v < BLOCK / LANES; v++) {
        vi bytes = load_int(step + v * LANES * 4);
        values[0][v] = byte_float<0>(bytes);
        values[1][v] = byte_float<1>(bytes);
        values[2][v] = byte_float<2>(bytes);
        values[3][v] = byte_float<3>(bytes);
    }
}

inline void convert_block(const uint8_t* data, int steps, HeadValue* out) {
    for (int s = 0; s < steps; s++) {
        fetch_ahead<2>(data + s * 64);
        vf values[HEAD_INPUTS][BLOCK / LANES];
        convert_step(data + s * 64, values);
        for (int i = 0; i < HEAD_INPUTS; i++)
            for (int v = 0; v < BLOCK / LANES; v++) store(out + (s * HEAD_INPUTS + i) * BLOCK + v * LANES, values[i][v]);
    }
}

// Adds the inputs i, i + 2, ... of `values`.
template <int TB>
inline __attribute__((always_inline)) void head_chain(const HeadValue* values, int i, int end, const HeadValue* x, int stride, vf (&sums)[TB][BLOCK / LANES]) {
    for (; i < end; i += 2)
        for (int v = 0; v < BLOCK / LANES; v++) {
            vf now = load(values + i * BLOCK + v * LANES);
            for (int t = 0; t < TB; t++) sums[t][v] = fma(set(x[t * stride + i]), now, sums[t][v]);
        }
}

// Even and odd inputs are summed apart: the second chain hides the latency of the first. With many tokens and few
// registers, they are summed one after the other.
template <int TB>
inline __attribute__((always_inline)) void head_sums(const uint8_t* data, const HeadValue* values, int steps, const HeadValue* x, int stride, vf (&sums)[TB][BLOCK / LANES]) {
    constexpr int VECTORS = BLOCK / LANES;
    constexpr bool APART = TB * VECTORS > LANES / 2;
    vf odd[TB][VECTORS];
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < VECTORS; v++) sums[t][v] = odd[t][v] = zero();
    if (APART) {
        head_chain<TB>(values, 0, steps * HEAD_INPUTS, x, stride, sums);
        head_chain<TB>(values, 1, steps * HEAD_INPUTS, x, stride, odd);
    }
    for (int s = 0; s < steps && !APART; s++) {
        vf now[HEAD_INPUTS][VECTORS];
        if (TB > 1) {
            for (int i = 0; i < HEAD_INPUTS; i++)
                for (int v = 0; v < VECTORS; v++) now[i][v] = load(values + (s * HEAD_INPUTS + i) * BLOCK + v * LANES);
        } else {
            fetch_ahead<TB>(data + s * 64);
            convert_step(data + s * 64, now);
        }
        for (int i = 0; i < HEAD_INPUTS; i += 2)
            for (int t = 0; t < TB; t++) {
                const float* at = x + t * stride + s * HEAD_INPUTS + i;
                for (int v = 0; v < VECTORS; v++) {
                    sums[t][v] = fma(set(at[0]), now[i][v], sums[t][v]);
                    odd[t][v] = fma(set(at[1]), now[i + 1][v], odd[t][v]);
                }
            }
    }
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < VECTORS; v++) sums[t][v] = add(sums[t][v], odd[t][v]);
}

inline void round_values(const float* x, int n, HeadValue* out) { store(out, round_bf16(load_n(x, n))); }
#endif

// Of a thread: rounded inputs of HEAD_TOKENS, padded to whole vectors, and a converted block.
struct HeadScratch {
    HeadValue *x, *block;
};

inline int padded_inputs(int cols) { return ceil_div(cols, LANES) * LANES; }

inline HeadScratch take_heads(Arena& arena, int threads, int cols) {
    return {arena.take<HeadValue>(int64_t(threads) * HEAD_TOKENS * padded_inputs(cols)),
            arena.take<HeadValue>(int64_t(threads) * BLOCK * padded_inputs(cols))};
}

// A tile of tokens; all numbers of tokens give the same sums.
template <int TB = MOST_HEAD_TOKENS>
inline int head_tile(const MoeHeadWeight& w, int block, const uint8_t* data, const HeadValue* values, const HeadValue* x, int stride, int left, float* out, int64_t out_stride) {
    if (TB > 1 && left < TB) return head_tile<(TB > 1 ? TB / 2 : 1)>(w, block, data, values, x, stride, left, out, out_stride);
    vf sums[TB][BLOCK / LANES];
    head_sums<TB>(data + 64, values, head_steps(w), x, stride, sums);
    for (int v = 0; v < BLOCK / LANES; v++) {
        int begin = block * BLOCK + v * LANES, n = w.rows - begin;
        vf scale = load((const float*)data + v * LANES);
        for (int t = 0; t < TB && n > 0; t++) store_n(out + t * out_stride + begin, mul(sums[t][v], scale), n < LANES ? n : LANES);
    }
    return TB;
}

// All blocks of head h for the tokens begin to end.
inline void head_tokens(const MoeHeadsArgs& a, int h, int begin, int end, const HeadScratch& s) {
    const MoeHeadWeight& w = a.weight;
    const int width = padded_inputs(w.cols);
    for (int t = begin; t < end; t++) {
        const float* x = a.x + int64_t(t) * a.x_token + int64_t(h) * a.x_head;
        for (int i = 0; i < width; i += LANES) {
            int n = w.cols - i;
            round_values(x + i, n < LANES ? n : LANES, s.x + int64_t(t - begin) * width + i);
        }
    }
    float* out = a.out + int64_t(begin) * a.out_token + int64_t(h) * a.out_head;
    for (int b = 0; b < ceil_div(w.rows, BLOCK); b++) {
        const uint8_t* data = w.data + h * weight_bytes(w) + b * block_bytes(w);
        if (end - begin > 1) convert_block(data + 64, head_steps(w), s.block);
        for (int t = 0, left = end - begin, done; left > 0; t += done, left -= done)
            done = head_tile(w, b, data, s.block, s.x + int64_t(t) * width, width, left, out + int64_t(t) * a.out_token, a.out_token);
    }
}

void heads(const Context& c, const MoeHeadsArgs& a, const HeadScratch& scratch) {
    const int width = padded_inputs(a.weight.cols);
    const HeadScratch own{scratch.x + int64_t(c.id) * HEAD_TOKENS * width, scratch.block + int64_t(c.id) * BLOCK * width};
    int h, stop;
    while (c.take(a.heads, 1, h, stop)) {
        for (int t = 0; a.rotations && t < a.tokens; t++)
            turn(a.x + int64_t(t) * a.x_token + int64_t(h) * a.x_head + a.weight.cols, a.rotations + a.positions[t] * a.rope,
                 a.out + int64_t(t) * a.out_token + int64_t(h) * a.out_head + a.weight.rows, a.rope);
        for (int begin = 0; begin < a.tokens; begin += HEAD_TOKENS)
            head_tokens(a, h, begin, begin + HEAD_TOKENS < a.tokens ? begin + HEAD_TOKENS : a.tokens, own);
    }
}

}  // namespace
