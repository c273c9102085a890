// y[t, o] = sum over segments s of w_scale[o, group of s] * x_scale[t, piece of s] * dot(x[t, s], w[o, s]), in the order
// of the segments, whatever T and the number of threads: a token's result does not depend on the rest of the batch.
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

// One matrix of a stack. Sizes that take divisions are computed once for all of its blocks.
struct Matrix {
    const MoeWeight& w;
    const int groups, segments, pieces;
    const int64_t block_size;
    const uint8_t *data, *zeros;
    Matrix(const MoeWeight& weight, int64_t index)
        : w(weight), groups(group_count(w)), segments(ceil_div(w.cols, w.segment)), pieces(ceil_div(w.cols, w.piece)),
          block_size(block_bytes(w)), data(w.data + index * block_size * block_count(w)),
          zeros(w.zeros ? w.zeros + index * block_count(w) * groups * BLOCK : nullptr) {}
    const uint8_t* block(int b) const { return data + b * block_size; }
    const uint8_t* block_zeros(int b) const { return zeros ? zeros + int64_t(b) * groups * BLOCK : nullptr; }
};

template <int BITS, int TB, int NV>
inline __attribute__((always_inline)) void tile(const Matrix& m, const uint8_t* data, const uint8_t* zeros, int lane, const Rows& rows, int first_row, float* out) {
    const MoeWeight& w = m.w;
    const int8_t* x[TB];
    const int32_t* sums[TB];
    const float* scales[TB];
    for (int t = 0; t < TB; t++) {
        int64_t row = rows.at(first_row + t);
        x[t] = rows.x.values + row * rows.width;
        sums[t] = rows.x.sums + row * m.segments;
        scales[t] = rows.x.scales + row * m.pieces;
    }
    vf total[TB][NV];
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < NV; v++) total[t][v] = zero();
    int begin = 0, piece = 0, piece_end = w.piece;
    for (int g = 0, s = 0; g < m.groups; g++) {
        const float* weight_scales = (const float*)data + lane;
        const int end = begin + w.group < w.cols ? begin + w.group : w.cols;
        data += 64;
        for (; begin < end; begin += w.segment, s++) {
            const int steps = steps_for(end - begin < w.segment ? end - begin : w.segment, BITS);
            if (begin == piece_end) piece++, piece_end += w.piece;
            vi dots[TB][NV];
            for (int t = 0; t < TB; t++)
                for (int v = 0; v < NV; v++)
                    if (zeros)
                        dots[t][v] = sub_int(zero_int(), mul_int(load_bytes(zeros + g * BLOCK + lane + v * LANES), set_int(sums[t][s])));
                    else
                        dots[t][v] = set_int(BITS == 4 ? -8 * sums[t][s] : 0);
            Dot<BITS, TB, NV>::run(dots, data + lane * 4, x, begin, steps);
            for (int v = 0; v < NV; v++) {
                vf scale = load(weight_scales + v * LANES);
                for (int t = 0; t < TB; t++)
                    total[t][v] = fma(mul(to_float(dots[t][v]), set(scales[t][piece])), scale, total[t][v]);
            }
            data += 64 * steps;
        }
        begin = end;
    }
    for (int t = 0; t < TB; t++)
        for (int v = 0; v < NV; v++) store(out + t * BLOCK + lane + v * LANES, total[t][v]);
}

// A whole block (16 output rows) for TB tokens to out[TB][16]. With narrow vectors and several tokens, the block's
// halves go one after the other: there are not enough registers for both.
template <int BITS, int TB>
inline void block_tile(const Matrix& m, int block, const Rows& rows, int row, float* out) {
    constexpr int VECTORS = BLOCK / LANES;
    const uint8_t *data = m.block(block), *zeros = m.block_zeros(block);
    if (TB == 1) {
        tile<BITS, TB, VECTORS>(m, data, zeros, 0, rows, row, out);
    } else {
        for (int lane = 0; lane < BLOCK; lane += LANES) tile<BITS, TB, 1>(m, data, zeros, lane, rows, row, out);
    }
}

constexpr int MOST_ROWS = LANES == 16 ? 8 : 4;  // of a tile

// Computes the largest tile that `left` rows fill; gives its rows.
template <int BITS, int TB = MOST_ROWS>
inline int tile_rows(const Matrix& m, int block, const Rows& rows, int row, int left, float* out) {
    if (TB > 1 && left < TB) return tile_rows<BITS, (TB > 1 ? TB - 1 : 1)>(m, block, rows, row, left, out);
    block_tile<BITS, TB>(m, block, rows, row, out);
    return TB;
}

inline int tile_any(const Matrix& m, int block, const Rows& rows, int row, int left, float* out) {
    return m.w.bits == SPARSE14 ? tile_rows<SPARSE14>(m, block, rows, row, left, out)
                                : tile_rows<4>(m, block, rows, row, left, out);
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

// Blocks (or pairs of blocks) begin to end of a matrix, for `count` rows that start at `first`.
inline void multiply(const Matrix& m, const Rows& rows, int first, int count, int begin, int end, const Output& o) {
    alignas(64) float gate[MOST_ROWS * BLOCK], up[MOST_ROWS * BLOCK];
    for (int b = begin; b < end; b++)
        for (int row = first, done; row < first + count; row += done) {
            int left = first + count - row;
            int block = m.w.paired ? 2 * b : b;
            done = tile_any(m, block, rows, row, left, gate);
            if (m.w.paired) tile_any(m, block + 1, rows, row, left, up);
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
