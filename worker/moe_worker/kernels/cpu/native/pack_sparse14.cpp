// Packs 1:4 sparse weights as sparse14.h reads them.
#include <string.h>

#include "layout.h"

namespace {

struct Source {
    const uint8_t *values, *positions;  // of one row, as quant/sparse14.py has them
    int quads;

    int value(int quad) const { return quad < quads ? (quad % 2 ? values[quad / 2] >> 4 : values[quad / 2] & 15) : 8; }
    int position(int quad) const { return quad < quads ? positions[quad / 4] >> quad % 4 * 2 & 3 : 0; }

    // The 4 bytes of a row in each of the three parts of a step whose first quad is `first`.
    void pack(uint8_t* step, int first) const {
        for (int k = 0; k < 4; k++) {
            int at = first + k;
            step[k] = position(at) | position(at + 4) << 2 | position(at + 8) << 4 | position(at + 12) << 6;
            step[64 + k] = value(at) | value(at + 4) << 4;
            step[128 + k] = value(at + 8) | value(at + 12) << 4;
        }
    }
};

}  // namespace

void moe_pack_sparse14(const uint8_t* values, const uint8_t* positions, const float* scales, uint8_t* data,
                       int32_t rows, int32_t cols, int32_t group, int32_t paired) {
    const int quads = cols / 4, groups = ceil_div(cols, group), blocks = block_count(rows, paired);
    const int part = paired ? rows / 2 : rows;
    memset(data, 0, block_bytes(cols, group, SPARSE14) * blocks);
    for (int block = 0; block < blocks; block++)
        for (int g = 0; g < groups; g++) {
            int left = cols - g * group, steps = ceil_div(left < group ? left : group, 64);
            for (int lane = 0; lane < BLOCK; lane++) {
                int at = (paired ? block / 2 : block) * BLOCK + lane;
                if (at >= part) continue;
                int64_t row = at + (paired && block % 2 ? part : 0);
                memcpy(data + lane * 4, &scales[row * groups + g], 4);
                Source source{values + row * ceil_div(quads, 2), positions + row * ceil_div(quads, 4), quads};
                for (int s = 0; s < steps; s++)
                    source.pack(data + 64 + s * 192 + lane * 4, (g * group + s * 64) / 4);
            }
            data += 64 * (1 + 3 * steps);
        }
}
