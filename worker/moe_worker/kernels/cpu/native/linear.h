// y[t, o] = x_scale[t] * sum over groups of w_scale[o, g] * dot(x[t, g], w[o, g]), in the order of the groups,
// whatever T and the number of threads: a token's result does not depend on what is computed beside it.
#pragma once
#include "quantize.h"
#include "sparse14.h"

namespace {

// Which token each row of a product is: `index` maps rows to rows of x (null: the same).
struct Rows {
    MoeQuantized x;
    const int32_t* index;
    int width;  // bytes of a row of x
    int at(int row) const { return index ? index[row] : row; }
};

template <int BITS, int TB, int NV>
inline __attribute__((always_inline)) void tile(const MoeWeight& w, const uint8_t* data, const uint8_t* zeros, int lane, const Rows& rows, int first_row, float* out) {
    const int8_t* x[TB];
    const int32_t* sums[TB];
    const int groups = group_count(w);
    for (int t = 0; t < TB; t++) {
        int row = rows.at(first_row + t);
        x[t] = rows.x.values + int64_t(row) * rows.width;
        sums[t] = rows.x.sums + int64_t(row) * groups;
    }
    vf total[TB][NV];
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < NV; v++) total[t][v] = zero();
    for (int g = 0; g < groups; g++) {
        int begin = g * w.group, left = w.cols - begin;
        int steps = steps_for(left < w.group ? left : w.group, BITS);
        vi dots[TB][NV];
        for (int t = 0; t < TB; t++)
            for (int v = 0; v < NV; v++)
                if (zeros)
                    dots[t][v] = sub_int(zero_int(), mul_int(load_bytes(zeros + g * BLOCK + lane + v * LANES), set_int(sums[t][g])));
                else
                    dots[t][v] = set_int(BITS == 4 ? -8 * sums[t][g] : BITS == 8 && OFFSET_INT8 ? -128 * sums[t][g] : 0);
        Dot<BITS, TB, NV>::run(dots, data + 64 + lane * 4, x, begin, steps);
        for (int v = 0; v < NV; v++) {
            vf scale = load((const float*)data + lane + v * LANES);
            for (int t = 0; t < TB; t++) total[t][v] = fma(to_float(dots[t][v]), scale, total[t][v]);
        }
        data += 64 * (steps + 1);
    }
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < NV; v++)
            store(out + t * BLOCK + lane + v * LANES, mul(total[t][v], set(rows.x.scales[rows.at(first_row + t)])));
}

// A whole block (16 output rows) for TB tokens to out[TB][16]. With narrow vectors and several tokens, the block's
// halves go one after the other: there are not enough registers for both.
template <int BITS, int TB>
inline void block_tile(const MoeWeight& w, const uint8_t* data, const uint8_t* zeros, const Rows& rows, int row, float* out) {
    constexpr int VECTORS = BLOCK / LANES;
    if (TB == 1) {
        tile<BITS, TB, VECTORS>(w, data, zeros, 0, rows, row, out);
    } else {
        for (int lane = 0; lane < BLOCK; lane += LANES) tile<BITS, TB, 1>(w, data, zeros, lane, rows, row, out);
    }
}

template <int BITS>
inline int tile_rows(const MoeWeight& w, const uint8_t* data, const uint8_t* zeros, const Rows& rows, int row, int left, float* out) {
    constexpr int MOST = LANES == 16 ? 8 : 4;
    if (left >= MOST) return block_tile<BITS, MOST>(w, data, zeros, rows, row, out), MOST;
    if (left >= 4) return block_tile<BITS, 4>(w, data, zeros, rows, row, out), 4;
    if (left >= 2) return block_tile<BITS, 2>(w, data, zeros, rows, row, out), 2;
    return block_tile<BITS, 1>(w, data, zeros, rows, row, out), 1;
}

inline int tile_any(const MoeWeight& w, const uint8_t* data, const uint8_t* zeros, const Rows& rows, int row, int left, float* out) {
    if (w.bits == SPARSE14) return tile_rows<SPARSE14>(w, data, zeros, rows, row, left, out);
    return w.bits == 4 ? tile_rows<4>(w, data, zeros, rows, row, left, out)
                       : tile_rows<8>(w, data, zeros, rows, row, left, out);
}

struct Output {
    float* data;
    int64_t stride;
    bool accumulate;
};

inline void write_block(const MoeWeight& w, const Output& o, const float* result, int row, int block) {
    int begin = block * BLOCK, left = w.rows - begin;
    float* out = o.data + row * o.stride + begin;
    for (int v = 0; v < BLOCK && v < left; v += LANES) {
        int n = left - v < LANES ? left - v : LANES;
        vf y = load(result + v);
        if (w.bias) y = add(y, load_n(w.bias + begin + v, n));
        if (o.accumulate) y = add(load_n(out + v, n), y);
        store_n(out + v, y, n);
    }
}

inline void write_swiglu(const MoeWeight& w, const Output& o, const float* gate, const float* up, int row, int pair) {
    int begin = pair * BLOCK, left = w.rows / 2 - begin;
    float* out = o.data + row * o.stride + begin;
    for (int v = 0; v < BLOCK && v < left; v += LANES)
        store_n(out + v, mul(silu(load(gate + v)), load(up + v)), left - v < LANES ? left - v : LANES);
}

struct Matrix {
    const MoeWeight& w;
    const uint8_t *data, *zeros;
    Matrix(const MoeWeight& weight, int64_t index)
        : w(weight), data(weight.data + index * weight_bytes(weight)),
          zeros(weight.zeros ? weight.zeros + index * block_count(weight) * group_count(weight) * BLOCK : nullptr) {}
    const uint8_t* block(int b) const { return data + b * block_bytes(w); }
    const uint8_t* block_zeros(int b) const { return zeros ? zeros + int64_t(b) * group_count(w) * BLOCK : nullptr; }
};

// Blocks (or pairs of blocks) begin to end of a matrix, for `count` rows that start at `first`.
inline void multiply(const Matrix& m, const Rows& rows, int first, int count, int begin, int end, const Output& o) {
    alignas(64) float gate[8 * BLOCK], up[8 * BLOCK];
    for (int b = begin; b < end; b++)
        for (int row = first, done; row < first + count; row += done) {
            int left = first + count - row;
            int block = m.w.paired ? 2 * b : b;
            done = tile_any(m.w, m.block(block), m.block_zeros(block), rows, row, left, gate);
            if (m.w.paired) tile_any(m.w, m.block(block + 1), m.block_zeros(block + 1), rows, row, left, up);
            for (int t = 0; t < done; t++)
                if (m.w.paired) write_swiglu(m.w, o, gate + t * BLOCK, up + t * BLOCK, row + t, b);
                else write_block(m.w, o, gate + t * BLOCK, row + t, b);
        }
}

void linear(const Context& c, const MoeLinearArgs& a) {
    Rows rows{a.x, nullptr, padded(a.weight.cols)};
    Output out{a.out, a.stride, a.accumulate != 0};
    int blocks = block_count(a.weight) / (a.weight.paired ? 2 : 1), begin, end;
    while (c.take(blocks, c.grain(blocks), begin, end)) multiply(Matrix(a.weight, 0), rows, 0, a.tokens, begin, end, out);
}

}  // namespace
