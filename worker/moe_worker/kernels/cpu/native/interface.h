// The C interface of the CPU kernels: plain structs of pointers, read by ctypes, no torch.
//
// Legend: T tokens, I inputs and O outputs of a projection, D hidden, H heads, R latent rank, P rotary elements,
// W = R + P row of the latent cache, E routed experts, A all experts, K experts of a token, B sequences.
//
// All float arrays are float32 unless said otherwise. Quantized activations lie padded: a row of int8 takes
// moe_padded(I) bytes, with zeros behind its I values. Its inputs are cut into *pieces*, each with a scale of its own;
// docs/formats.md (w4a8) says into which.
#pragma once
#include <stdint.h>

enum MoeOperation : int32_t {
    MOE_QUANTIZE = 0,
    MOE_LINEAR = 1,
    MOE_HEADS = 2,
    MOE_EXPERTS = 3,
    MOE_ROUTE = 4,
    MOE_LATENT = 5,
    MOE_ATTEND = 6,
    MOE_FORWARD = 7,
    MOE_OPERATIONS = 8,
};

// `bits` of a weight in the layout s14: int4 values of 1 in 4 inputs, and their positions (sparse14.h).
constexpr int32_t SPARSE14 = 14;

// A weight packed by moe_pack: blocks of 16 output rows; in a block, for each group of inputs, 16 scales and
// then 64-byte steps, in each of which every row has 8 inputs.
struct MoeWeight {
    const uint8_t* data;    // 64-byte aligned; A weights behind each other where stacked
    const uint8_t* zeros;   // [A, blocks, groups, 16], or null: every zero point is 8
    const float* bias;      // [O] or null
    int32_t rows, cols;     // O and I
    int32_t group;          // inputs that share a scale, a multiple of 8, of 64 where sparse
    int32_t piece;          // inputs that share the scale of an activation, a multiple of 64
    int32_t segment;        // inputs of one integer sum: the largest size that divides group and piece
    int32_t bits;           // 4 or SPARSE14
    int32_t paired;         // 1: blocks alternate between gate and up (the halves of O); the product is silu(gate) * up
};

// One matrix a head, int8: blocks of 16 output rows; in a block 16 scales (float32), powers of two, and then 64-byte
// steps, in each of which every row has 4 inputs. Rows and inputs that fill the last block and step are 0.
struct MoeHeadWeight {
    const uint8_t* data;    // 64-byte aligned; H matrices behind each other
    int32_t rows, cols;     // O and I
};

struct MoeQuantized {
    int8_t* values;   // [T, moe_padded(I)]
    float* scales;    // [T, pieces]
    int32_t* sums;    // [T, segments]: sums of values over each segment
};

// RMSNorm (arXiv:1910.07467) where `weight` is given, then int8 with one scale a piece.
struct MoeQuantizeArgs {
    const float* x;        // [T, stride]
    const float* weight;   // [I] or null: no norm
    float* normed;         // [T, I] or null: not wanted
    MoeQuantized out;
    float eps;
    int32_t tokens, width, stride, piece, segment;
};

struct MoeLinearArgs {
    MoeWeight weight;
    MoeQuantized x;
    float* out;             // [T, stride]
    int32_t tokens, stride;
    int32_t accumulate;     // 1: added to out, 0: written
};

// One small projection a head, of inputs that are rounded to bfloat16; sums in float32: x[t, h, :I] to out[t, h, :O].
struct MoeHeadsArgs {
    MoeHeadWeight weight;
    const float* x;
    float* out;
    int32_t tokens, heads;
    int32_t x_token, x_head, out_token, out_head;   // strides in elements
    const float* rotations; // [C, P / 2] pairs (cos, sin), or null; turns x[t, h, I:I + P] into out[t, h, O:O + P]
    const int64_t* positions;  // [T]
    int32_t rope;           // P
};

struct MoeExpertsArgs {
    MoeWeight gate_up, down;   // stacked; gate_up paired
    MoeQuantized x;
    const int32_t* experts;    // [T, K]; -1: none
    const float* weights;      // [T, K]
    float* out;                // [T, D], added to
    int64_t* used;             // [counted + 1] or null; added to: tokens of an expert, and experts that had any
    int32_t tokens, per_token, count;   // T, K, A
    int32_t counted;           // experts, the first ones, that `used` is about
};

constexpr int32_t MOE_LEVELS = 4;

// Keeps the best `keep` of `groups` equal groups, each scored by the sum of its `best` (1 or 2) best experts.
struct MoeLevel {
    int32_t groups, keep, best;
};

// How experts are chosen (config/moe.py, Routing).
struct MoeChoice {
    int32_t shared, top_k;
    int32_t softmax;        // 1: softmax scores, 0: sigmoid
    int32_t normalise;
    float scale;
    float mass;             // share of the scores of the top_k that a token's experts reach; 1: all of them
    int32_t level_count;
    MoeLevel levels[MOE_LEVELS];   // coarse to fine, the first level_count
};

struct MoeRouteArgs {
    const float* x;         // [T, D]
    const float* weight;    // [E, D]
    const float* bias;      // [E] or null: moves the choice only
    int32_t* experts;       // [T, K + shared]: the chosen (-1: none), then E, E + 1, ...
    float* weights;         // [T, K + shared]: none has 0, shared ones have 1
    int32_t tokens, width, count;
    MoeChoice choice;
};

struct MoeCache {
    void* rows;             // [(pages + 1) * page, W]
    int32_t bf16;           // 1: bfloat16, 0: float32
    int32_t page_shift;     // page size is 1 << page_shift
    const int32_t* pages;   // [B, page_stride]
    const int32_t* starts;  // [B + 1]
    const int32_t* lengths; // [B]
    int32_t page_stride, batch;
};

// Norm of the latents, rotation of the rotary key, write of both to the cache.
struct MoeLatentArgs {
    MoeCache cache;
    const float* x;             // [T, stride]: R latents, then P key elements
    const float* norm;          // [R]
    const float* rotations;     // [C, P / 2, 2]
    const int64_t* positions;   // [T]
    const int64_t* rows;        // [T]
    int32_t tokens, stride, rank, rope;
    float eps;
};

struct MoeAttendArgs {
    MoeCache cache;
    const float* query;     // [T, H, W]
    float* out;             // [T, H, R]
    int32_t heads, rank, rope;
    float scale;
};

struct MoeLayer {
    const float *attention_norm, *query_norm, *latent_norm, *block_norm;   // query_norm null: no low-rank query
    MoeWeight input, query, output;
    MoeWeight gate_up, down;      // stacked where the layer has experts
    MoeHeadWeight key, value;
    const float *router, *router_bias;   // router null: a dense layer
    void* cache_rows;
    int64_t* experts_used;        // [E + 1] or null, as in MoeExpertsArgs
    int32_t* chosen;              // [T, K + shared] or null: receives the layer's choice, as in MoeRouteArgs
};

struct MoeForwardArgs {
    const MoeLayer* layers;
    const void* embedding;        // [V, D] or null: x has hidden states of the stage before
    float* x;                     // [T, D]: hidden states; afterwards those after the last layer
    const float* norm;
    MoeWeight head;
    const float* rotations;
    MoeCache cache;               // rows is taken from the layer
    const int64_t *tokens, *positions, *rows;   // [T]
    const int32_t* selected;      // [N] tokens whose logits are wanted
    float* logits;                // [N, V]
    int32_t count, selected_count;  // T, N
    int32_t embedding_bf16, layer_count, vocabulary;
    int32_t hidden, heads, plain, rope, rank, value, query_rank, segment;   // segment: the least of all weights
    int32_t experts;
    MoeChoice choice;
    float attention_scale, eps, inner_eps;
};

struct MoeEngine;

#define MOE_EXPORT extern "C" __attribute__((visibility("default")))

// Bit set of variants that this CPU can run: bit i for the i-th name of moe_variant_name.
MOE_EXPORT int32_t moe_supported(void);
MOE_EXPORT const char* moe_variant_name(int32_t index);   // null after the last
// Null where the variant cannot run here or threads cannot be made.
MOE_EXPORT MoeEngine* moe_open(int32_t variant, int32_t threads);
MOE_EXPORT void moe_close(MoeEngine* engine);
// Runs one operation on all threads of the engine; concurrent calls run one after the other.
// 0, or ENOMEM if there is too little scratch memory (nothing was written then).
MOE_EXPORT int32_t moe_run(MoeEngine* engine, int32_t operation, const void* arguments);

MOE_EXPORT int64_t moe_packed_bytes(int32_t rows, int32_t cols, int32_t group, int32_t bits, int32_t paired);
// values: nibbles, low first [O, ceil(I / 2)]; scales [O, groups]. With `paired`, blocks of 16 rows come from the
// first and the second half of the rows in turn, so that gate and up of an element meet.
// zeros [O, groups] with zeros_out [blocks, groups, 16], or both null.
MOE_EXPORT void moe_pack(const uint8_t* values, const float* scales, const uint8_t* zeros, uint8_t* data,
                         uint8_t* zeros_out, int32_t rows, int32_t cols, int32_t group, int32_t paired);
// values: nibbles of quads, low first [O, ceil(I / 8)]; positions: two bits each, lowest first [O, ceil(I / 16)].
MOE_EXPORT void moe_pack_sparse14(const uint8_t* values, const uint8_t* positions, const float* scales, uint8_t* data,
                                  int32_t rows, int32_t cols, int32_t group, int32_t paired);

// Size of an operation's arguments, so that a caller in another language can check its own layout.
MOE_EXPORT int64_t moe_argument_bytes(int32_t operation);
