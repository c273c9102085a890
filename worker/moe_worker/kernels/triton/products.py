"""Products of a tile of outputs with packed weights, which several kernels share.

Each loads a group of 128 inputs, dequantizes the weights in registers, and adds the scaled sums in float32.
KIND of a kernel is how weights meet activations: "w4a8", "s14" (as w4a8, but 1:4 sparse weights), "w4a16" or
"fp8" (both of these with bf16 activations).

Legend: N outputs of a tile, M its tokens, I inputs, G groups of 128 inputs, J = 64 bytes of a group.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from moe_worker.kernels.triton.tiles import COMPILED, dot_bf16


class Tile(NamedTuple):
    """How a product is cut: outputs and rows of one program, its warps, iterations of its loop that are
    loaded ahead, and groups of inputs in an iteration. registers: the most of a thread; 0: as compiled.

    The choices for each product were measured by benchmarks/gpu_tiles.py on Hopper GPUs.
    """

    n: int
    m: int
    warps: int
    stages: int
    turn: int = 1
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Those of a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


@triton.jit
def unpack_low(packed):
    """Low nibbles of int8 values, as signed int8 times 16."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return (packed << 4).to(tl.int8)


@triton.jit
def unpack_high(packed):
    """High nibbles of int8 values, as signed int8 times 16."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return (packed & -16).to(tl.int8)


def placing(number: int) -> str:
    """Assembly that makes four values of one position, $1 in a word of eight values and $2 in a word of
    positions (see PackedSparse14), a word `v` of signed int8 times 16; bytes of other positions are zero.

    number: the position, the half of the group, and the group of the pair, from its low bits on.
    """
    position, half, shift = number % 4, number // 4 % 2, 2 * (number // 4)
    values = "and.b32 v, $1, 0xF0F0F0F0;" if half else "shl.b32 v, $1, 4; and.b32 v, v, 0xF0F0F0F0;"
    # Masks of the bytes whose position has its high bit, and its low bit.
    masks = "".join(
        f"shl.b32 {mask}, $2, {shift + bit}; prmt.b32 {mask}, {mask}, 0, 0xBA98;"
        for bit, mask in enumerate("ab")
    )
    return f".reg .b32 v, a, b; {values} {masks} lop3.b32 v, v, a, b, {16 << position};"


_PLACING = tl.constexpr(tuple(f"{{ {placing(number)} mov.b32 $0, v; }}" for number in range(16)))


@triton.jit
def _placed(values, positions, NUMBER: tl.constexpr):
    """The values of one half of a group that have one position, as signed int8 times 16; zeros elsewhere."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            _PLACING[NUMBER], "=r,r,r", [values, positions], dtype=tl.int8, is_pure=True, pack=4
        )
    own = unpack_low(values) if NUMBER // 4 % 2 == 0 else unpack_high(values)
    return tl.where((positions >> (6 - NUMBER // 4 * 2)) & 3 == NUMBER % 4, own, 0).to(tl.int8)


@triton.jit
def _side_by_side(low_Nj, high_Nj):
    """[N, 2 J] of two [N, J]."""
    both_Nhj = tl.permute(tl.join(low_Nj, high_Nj), (0, 2, 1))
    return tl.reshape(both_Nhj, (low_Nj.shape[0], 2 * low_Nj.shape[1]))


@triton.jit
def _placed_half(values, positions, FIRST: tl.constexpr):
    low = _side_by_side(_placed(values, positions, FIRST), _placed(values, positions, FIRST + 1))
    high = _side_by_side(_placed(values, positions, FIRST + 2), _placed(values, positions, FIRST + 3))
    return _side_by_side(low, high)


@triton.jit
def unpack_sparse14(values, positions, SECOND: tl.constexpr):
    """A group of a pair as signed int8 times 16 [N, 128], inputs `by_position`."""
    low = _placed_half(values, positions, SECOND * 8)
    return _side_by_side(low, _placed_half(values, positions, SECOND * 8 + 4))


_NIBBLES = tl.constexpr(
    tuple(
        "{ .reg .b32 a, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; "
        f"cvt.u32.u16 a, $1; {shift}prmt.b32 a, a, 0, 0x4140; "
        "lop3.b32 a, a, 0x000F000F, 0x43084308, 0x6A; fma.rn.bf16x2 $0, a, one, less; }"
        for shift in ("", "shr.b32 a, a, 4; ")
    )
)


@triton.jit
def _bf16_of_nibbles(packed, HIGH: tl.constexpr):
    """Low (0) or high (1) nibbles of int8 values, as signed bf16: the bits of 136 + value, less 136."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            _NIBBLES[HIGH], "=r,h", [packed], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return ((packed << 4 - 4 * HIGH).to(tl.int8) >> 4).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _bf16_of_fp8(values):
    """e4m3 values as bf16, by their bits.

    An exponent has an offset of 7 here and of 127 in bf16: a multiplication by 2**120, which is exact, makes
    up for it. NaN becomes 480, see `pack_fp8`. Conversion instructions take longer.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, up, none; mov.b32 up, 0x7B807B80; mov.b32 none, 0x80008000; "
            "cvt.u32.u16 a, $1; prmt.b32 a, a, 0, 0x1404; shr.b32 b, a, 4; and.b32 b, b, 0x07F007F0; "
            "lop3.b32 a, a, none, b, 0xEA; fma.rn.bf16x2 $0, a, up, none; }",
            "=r,h", [values], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return values.to(tl.bfloat16)


@triton.jit
def dot_int4_group(
    acc_NM, packed_base, x_base, x_scale_base, group, at, rows_N, token_M, mask_M, scale_N,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, PIECE: tl.constexpr,
    INT8: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Adds the products of one group of 128 inputs; x has INPUTS columns, of int8 or bf16.

    Weights stand as the left operand, so that few tokens still fill the tensor cores' wide side.
    """
    j, k = tl.arange(0, 64), tl.arange(0, 128)
    # What an iteration adds to an address is a scalar, and the rest is the same in all: fewer instructions.
    where_Nj = packed_base + group * (OUTPUTS * 64) + (rows_N[:, None] * 64 + j[None, :])
    x = x_base + group * 128
    if GROUPS % TURN == 0:
        packed = tl.load(where_Nj)
    else:
        packed = tl.load(where_Nj, mask=(rows_N * 0 + group < GROUPS)[:, None], other=0)
        mask_M = mask_M & (group < GROUPS)
    # One way out: what stands behind a return is compiled, too.
    if INT8 and PIECE == 64:
        mask_high_M = mask_M
        if INPUTS % 128 != 0:
            mask_high_M = mask_M & (group * 128 + 64 < INPUTS)
        low_jM = tl.load(x + (token_M[None, :] * INPUTS + j[:, None]), mask=mask_M[None, :], other=0)
        high_jM = tl.load(
            x + 64 + (token_M[None, :] * INPUTS + j[:, None]), mask=mask_high_M[None, :], other=0
        )
        x_scale = x_scale_base + token_M * (INPUTS // 64)
        scale_M = tl.load(x_scale + at * 2)
        second_M = tl.load(x_scale + tl.minimum(at * 2 + 1, INPUTS // 64 - 1))
        low = tl.dot(unpack_low(packed), low_jM, out_dtype=tl.int32)
        high = tl.dot(unpack_high(packed), high_jM, out_dtype=tl.int32)
        sums = low.to(tl.float32) * scale_M[None, :] + high.to(tl.float32) * second_M[None, :]
        # Nibbles are dequantized as 16 times their value.
        acc_NM += sums * (scale_N * 0.0625)[:, None]
    else:
        # One product of all inputs of the group: Triton waits for each product before it goes on.
        mask_kM = mask_M[None, :]
        if INPUTS % 128 != 0:
            mask_kM = mask_kM & (group * 128 + k < INPUTS)[:, None]
        x_kM = tl.load(x + (token_M[None, :] * INPUTS + k[:, None]), mask=mask_kM, other=0)
        if INT8:
            scale_M = tl.load(x_scale_base + at + token_M * (INPUTS // 128))
            weight_Nk = _side_by_side(unpack_low(packed), unpack_high(packed))
            sums = tl.dot(weight_Nk, x_kM, out_dtype=tl.int32).to(tl.float32)
            acc_NM += sums * ((scale_N * 0.0625)[:, None] * scale_M[None, :])
        else:
            weight_Nk = _side_by_side(_bf16_of_nibbles(packed, 0), _bf16_of_nibbles(packed, 1))
            acc_NM += dot_bf16(weight_Nk, x_kM) * scale_N[:, None]
    return acc_NM


@triton.jit
def dot_int4_group_of_many(
    acc_NM, packed_base, scale_base, x_base, x_scale_base, group, rows_N, token_M,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """As `dot_int4_group` with int8 values and whole groups, for 64 tokens, whose sums fill the registers.

    It takes few of them: offsets are unsigned, so that addresses need no arithmetic of 64 bits, scales of
    weights are read behind the product, and tokens of padding are multiplied, for which all programs read the
    same one: with fewer tokens, of which more are padding, that takes longer.
    """
    j, k = tl.arange(0, 64), tl.arange(0, 128)
    x_kM = tl.load(x_base + group * 128 + (token_M[None, :] * INPUTS + k[:, None]).to(tl.uint32))
    scale_M = tl.load(x_scale_base + group + (token_M * (INPUTS // 128)).to(tl.uint32))
    at_Nj = (rows_N[:, None] * 64 + j[None, :]).to(tl.uint32)
    packed = tl.load(packed_base + group * (OUTPUTS * 64) + at_Nj)
    weight_Nk = _side_by_side(unpack_low(packed), unpack_high(packed))
    sums = tl.dot(weight_Nk, x_kM, out_dtype=tl.int32).to(tl.float32)
    scale_N = tl.load(scale_base + group * OUTPUTS + rows_N.to(tl.uint32)) * 0.0625
    return acc_NM + sums * (scale_N[:, None] * scale_M[None, :])


@triton.jit
def dot_sparse14_group(
    acc_NM, packed_base, x_base, x_scale_base, first, at, rows_N, token_M, mask_M, scale_N,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Adds the products of a group of the pair that begins with group `first`; x is int8 `by_position`."""
    j, k = tl.arange(0, 16), tl.arange(0, 128)
    own = packed_base + first // 2 * (3 * OUTPUTS * 16)
    from_Nj = rows_N[:, None] * 16 + j[None, :]
    positions = tl.load(own + 2 * OUTPUTS * 16 + from_Nj)
    if SECOND and GROUPS % 2 != 0:
        values = tl.load(
            own + OUTPUTS * 16 + from_Nj, mask=(rows_N * 0 + first + 1 < GROUPS)[:, None], other=0
        )
        mask_M = mask_M & (first + 1 < GROUPS)
    else:
        values = tl.load(own + SECOND * OUTPUTS * 16 + from_Nj)
    x = x_base + (first + SECOND) * 128
    x_kM = tl.load(x + (token_M[None, :] * INPUTS + k[:, None]), mask=mask_M[None, :], other=0)
    scale_M = tl.load(x_scale_base + at + token_M * (INPUTS // 128))
    sums = tl.dot(unpack_sparse14(values, positions, SECOND), x_kM, out_dtype=tl.int32).to(tl.float32)
    return acc_NM + sums * ((scale_N * 0.0625)[:, None] * scale_M[None, :])


@triton.jit
def dot_fp8_group(
    acc_NM, weight_base, x_base, group, rows_N, token_M, mask_M, scale_N,
    GROUPS: tl.constexpr, INPUTS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Adds the products of one group of 128 inputs, or of the 64 that are left; x is bf16.

    Every e4m3 value is a bf16 value, so nothing is rounded but the sums, in float32.
    """
    k = group * 128 + tl.arange(0, 128)
    where_Nk = weight_base + rows_N[:, None] * INPUTS + k[None, :]
    where_kM = x_base + token_M[None, :] * INPUTS + k[:, None]
    if INPUTS % 128 == 0 and GROUPS % TURN == 0:
        values_Nk = tl.load(where_Nk)
        x_kM = tl.load(where_kM, mask=mask_M[None, :], other=0.0)
    else:
        values_Nk = tl.load(where_Nk, mask=(k < INPUTS)[None, :], other=0.0)
        x_kM = tl.load(where_kM, mask=mask_M[None, :] & (k < INPUTS)[:, None], other=0.0)
    return acc_NM + dot_bf16(_bf16_of_fp8(values_Nk), x_kM) * scale_N[:, None]


@triton.jit
def dot_group(
    acc_NM, weight_base, scale_base, x_base, x_scale_base, first, rows_N, token_M, mask_M,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, PIECE: tl.constexpr,
    KIND: tl.constexpr, TURN: tl.constexpr, AT: tl.constexpr, MANY: tl.constexpr = False,
):  # fmt: skip
    """Adds the products of one group of 128 inputs, group AT of an iteration that begins with group `first`;
    x has INPUTS columns, of int8 or bf16.

    Groups behind the last, which an iteration of TURN groups may reach, add nothing. All tokens must exist,
    also those that mask_M leaves out: a mask on the loads of scales would take instructions each time.
    """
    group = first + AT
    at = group if GROUPS % TURN == 0 else tl.minimum(group, GROUPS - 1)
    scale_N = tl.load(scale_base + at * OUTPUTS + rows_N)
    if MANY and KIND == "w4a8" and PIECE == 128 and INPUTS % 128 == 0 and GROUPS % TURN == 0:
        acc_NM = dot_int4_group_of_many(
            acc_NM, weight_base, scale_base, x_base, x_scale_base, group, rows_N, token_M, OUTPUTS, INPUTS
        )
    elif KIND == "s14":
        acc_NM = dot_sparse14_group(
            acc_NM, weight_base, x_base, x_scale_base, first, at, rows_N, token_M, mask_M, scale_N,
            OUTPUTS, GROUPS, INPUTS, AT,
        )  # fmt: skip
    elif KIND == "fp8":
        acc_NM = dot_fp8_group(
            acc_NM, weight_base, x_base, group, rows_N, token_M, mask_M, scale_N, GROUPS, INPUTS, TURN
        )
    else:
        acc_NM = dot_int4_group(
            acc_NM, weight_base, x_base, x_scale_base, group, at, rows_N, token_M, mask_M, scale_N,
            OUTPUTS, GROUPS, INPUTS, PIECE, KIND == "w4a8", TURN,
        )  # fmt: skip
    return acc_NM


@triton.jit
def add_product(
    acc_NM, weight_base, scale_base, x_base, x_scale_base, rows_N, token_M, mask_M,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, PIECE: tl.constexpr,
    KIND: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr, MANY: tl.constexpr = False,
):  # fmt: skip
    """acc + the products of all groups, TURN of them in an iteration.

    A loop that names its number of stages pipelines scales, too, and not only what a product reads.
    """
    for group in tl.range(0, GROUPS, TURN, num_stages=STAGES):
        for i in tl.static_range(TURN):
            acc_NM = dot_group(
                acc_NM, weight_base, scale_base, x_base, x_scale_base, group, rows_N, token_M, mask_M,
                OUTPUTS, GROUPS, INPUTS, PIECE, KIND, TURN, i, MANY,
            )  # fmt: skip
    return acc_NM
