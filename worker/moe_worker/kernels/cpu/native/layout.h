// Sizes of packed weights and of quantized rows; shared by the packer and the kernels.
#pragma once
#include "interface.h"

namespace {

constexpr int BLOCK = 16;  // output rows of a block, whatever the vector width

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int padded(int cols) { return ceil_div(cols, 64) * 64; }
inline int group_count(const MoeWeight& w) { return ceil_div(w.cols, w.group); }
inline int block_count(int rows, int paired) { return paired ? 2 * ceil_div(rows / 2, BLOCK) : ceil_div(rows, BLOCK); }
inline int block_count(const MoeWeight& w) { return block_count(w.rows, w.paired); }
// Pieces of 64 bytes that hold so many inputs of a block: three for 64 inputs where 1 of 4 is kept.
inline int steps_for(int inputs, int bits) { return bits == SPARSE14 ? 3 * ceil_div(inputs, 64) : ceil_div(inputs, 8); }
inline int64_t block_bytes(int cols, int group, int bits) {
    return 64 * (int64_t(ceil_div(cols, group)) + steps_for(cols, bits));
}
inline int64_t block_bytes(const MoeWeight& w) { return block_bytes(w.cols, w.group, w.bits); }
// Of MoeHeadWeight: a block, and a head's matrix.
inline int64_t block_bytes(const MoeHeadWeight& w) { return 64 * int64_t(1 + ceil_div(w.cols, 4)); }
inline int64_t weight_bytes(const MoeHeadWeight& w) { return block_bytes(w) * ceil_div(w.rows, BLOCK); }

}  // namespace
