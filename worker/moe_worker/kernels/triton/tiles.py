"""Pieces that several kernels share: int4 and FP8 tiles, rounding to int8, and the layout of packed weights.

Four-bit weights are stored [G, O, 64] bytes for G groups of 128 inputs: byte j of a row holds input j of the
group in its low and input 64 + j in its high nibble, both as signed values. A tile of any number of rows is
then one contiguous piece of memory, and two dot products over 64 inputs need no shuffling of nibbles. FP8
weights are stored [O, I], as checkpoints have them.

KIND of a kernel is how weights meet activations: "w4a8", "s14" (as w4a8, but 1:4 sparse weights), "w4a16" or
"fp8" (both of these with bf16 activations).

Legend: O outputs, I inputs, G groups of 128 inputs, A experts, T tokens, X pieces of inputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from moe_worker.quant.int8 import PIECE

# Quads of 64 inputs: those that a byte of values holds are so far apart.
QUADS = 16
# Numbers of tokens, rows and blocks are not specialized in any kernel: a server meets all of them, and each
# variant takes a second to compile.

# Interpreted kernels (TRITON_INTERPRET=1) can neither run assembly nor multiply bf16.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


class _Scaled:
    """What has a scale for each output and group of inputs, [..., G, O]."""

    scales: Tensor

    @property
    def outputs(self) -> int:
        """Rows of the matrix, O."""
        return self.scales.shape[-1]

    @property
    def groups(self) -> int:
        """Groups of inputs, G."""
        return self.scales.shape[-2]


@dataclass(frozen=True)
class PackedInt4(_Scaled):
    """Int4 weights as the kernels read them: uint8 [..., G, O, 64] and float32 scales [..., G, O].

    inputs: I, a multiple of 64. int8: whether activations are rounded to int8 (W4A8) or stay bf16 (W4A16).
    """

    packed: Tensor
    scales: Tensor
    inputs: int
    int8: bool = True

    @property
    def kind(self) -> str:
        """KIND of the kernels."""
        return "w4a8" if self.int8 else "w4a16"

    @property
    def stored(self) -> Tensor:
        """The bytes as the kernels take them, int8."""
        return self.packed.view(torch.int8)

    @property
    def stride(self) -> int:
        """Elements of `stored` from one stacked matrix to the next."""
        return self.groups * self.outputs * PIECE

    @property
    def row_stride(self) -> int:
        """Elements of `stored` from one output to the next, within a group."""
        return PIECE


@dataclass(frozen=True)
class PackedFp8(_Scaled):
    """FP8 weights as the kernels read them: e4m3 [..., O, I] and float32 scales [..., G, O].

    I is a multiple of 64. Activations stay bf16 (W8A16).
    """

    values: Tensor
    scales: Tensor
    kind = "fp8"
    int8 = False

    @property
    def inputs(self) -> int:
        """I."""
        return self.values.shape[-1]

    @property
    def stored(self) -> Tensor:
        """The values as the kernels take them."""
        return self.values

    @property
    def stride(self) -> int:
        """Elements of `stored` from one stacked matrix to the next."""
        return self.outputs * self.inputs

    @property
    def row_stride(self) -> int:
        """Elements of `stored` from one output to the next."""
        return self.inputs


@dataclass(frozen=True)
class PackedSparse14(_Scaled):
    """1:4 sparse int4 weights of experts as the kernels read them: uint8 [..., P, 3, O, 16] for P pairs of
    groups, and float32 scales [..., G, O]; activations are rounded to int8 (W4A8).

    The rows of bytes are the values of the first and of the second group of a pair, and the positions of
    both. Byte q of values holds that of quad q of the group in its low and of quad 16 + q in its high nibble,
    as signed values; byte q of positions those of quads q, 16 + q, and q and 16 + q of the second group, the
    first in its highest bits. inputs: I, a multiple of 128.
    """

    packed: Tensor
    scales: Tensor
    inputs: int
    int8 = True
    kind = "s14"

    @property
    def stored(self) -> Tensor:
        """The bytes as the kernels take them, int8."""
        return self.packed.view(torch.int8)

    @property
    def stride(self) -> int:
        """Elements of `stored` from one stacked matrix to the next."""
        return -(-self.groups // 2) * 3 * self.outputs * QUADS

    @property
    def row_stride(self) -> int:
        """Elements of `stored` from one output to the next, within a row of bytes of a pair."""
        return QUADS


Packed = PackedInt4 | PackedFp8 | PackedSparse14


def pack_values(values: Tensor, scales: Tensor, inputs: int, int8: bool = True) -> PackedInt4:
    """Packs values -8..7 [..., G, O, 128] that have their scales [..., G, O] already.

    Raises ValueError where `inputs` are not a multiple of 64.
    """
    if inputs % PIECE:
        raise ValueError(f"{inputs} inputs are not a multiple of {PIECE}")
    low, high = (values & 15).to(torch.uint8).split(PIECE, dim=-1)
    return PackedInt4((low | high << 4).contiguous(), scales.float().contiguous(), inputs, int8)


def pack_sparse14(values: Tensor, positions: Tensor, scales: Tensor) -> PackedSparse14:
    """Packs values -8..7 and positions 0..3 [..., O, Q] of Q quads, which make whole groups of 128 inputs.

    scales: [..., O, G]. Raises ValueError where groups are not whole.
    """
    quads = values.shape[-1]
    if quads % (2 * QUADS):
        raise ValueError(f"{quads} quads are no whole groups of {2 * QUADS}")
    missing = -quads % (4 * QUADS)
    # [..., O, P, group of the pair, half of the group, quad]
    cut = [
        functional.pad(each, (0, missing)).unflatten(-1, (-1, 2, 2, QUADS)) for each in (values, positions)
    ]
    low, high = (cut[0] & 15).to(torch.uint8).unbind(-2)
    shifts = torch.tensor([[6, 4], [2, 0]], dtype=torch.uint8, device=values.device)
    places = (cut[1].to(torch.uint8) << shifts[..., None]).sum((-3, -2), dtype=torch.uint8)
    packed = torch.cat((low | high << 4, places.unsqueeze(-2)), dim=-2).movedim(-4, -2)
    return PackedSparse14(packed.contiguous(), scales.transpose(-1, -2).float().contiguous(), 4 * quads)


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


@triton.jit
def by_position(values_RM):
    """[R, M] whose rows, in each 64, are in the order in which 1:4 sparse weights take their inputs: those
    with position 0 of all quads, then those with position 1, and so on.
    """
    ROWS: tl.constexpr = values_RM.shape[0]
    cut = tl.reshape(values_RM, (ROWS // 64, 16, 4, values_RM.shape[1]))
    return tl.reshape(tl.permute(cut, (0, 2, 1, 3)), (ROWS, values_RM.shape[1]))


@triton.jit
def _bf16_of_low(packed):
    """Low nibbles of int8 values, as signed bf16: the bits of 136 + value, less 136."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; "
            "cvt.u32.u16 a, $1; prmt.b32 a, a, 0, 0x4140; "
            "lop3.b32 a, a, 0x000F000F, 0x43084308, 0x6A; fma.rn.bf16x2 $0, a, one, less; }",
            "=r,h", [packed], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return ((packed << 4).to(tl.int8) >> 4).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _bf16_of_high(packed):
    """As `_bf16_of_low`, of the high nibbles."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; "
            "cvt.u32.u16 a, $1; shr.b32 a, a, 4; prmt.b32 a, a, 0, 0x4140; "
            "lop3.b32 a, a, 0x000F000F, 0x43084308, 0x6A; fma.rn.bf16x2 $0, a, one, less; }",
            "=r,h", [packed], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return (packed >> 4).to(tl.float32).to(tl.bfloat16)


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
def round_even(x):
    """Rounds float32 values below 2**22 to whole numbers, halves to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(values, axis: tl.constexpr):
    """The largest magnitude along `axis`; not finite where a value is not."""
    if COMPILED:
        top = tl.reduce(tl.abs(values), axis, _larger)
    else:
        # The interpreter reduces by any other function value by value.
        top = tl.max(tl.abs(values), axis=axis) + tl.sum(values - values, axis=axis)
    return top


@triton.jit
def scale_of(top):
    """The scale that makes magnitude `top` 127; 1 for zeros, so that nothing is divided by zero."""
    return tl.where(top == 0.0, 1.0, top / 127.0)


@triton.jit
def int8_scale(values, axis: tl.constexpr):
    """The scale that makes the largest magnitude along `axis` 127; 1 for zeros, not finite where one is not.

    So a value that is not finite makes what is computed from its int8 form not finite, too.
    """
    return scale_of(largest(values, axis))


@triton.jit
def e4m3_scale(values, axis: tl.constexpr):
    """The scale that makes the largest magnitude along `axis` 448, the largest of e4m3; 1 for zeros, not
    finite where one is not.
    """
    top = largest(values, axis)
    return tl.where(top == 0.0, 1.0, top / 448.0)


@triton.jit
def to_e4m3(x):
    """The nearest e4m3 values, half to even, of float32 values up to 448."""
    if not COMPILED:
        # The interpreter cuts bits off.
        step = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.abs(x), 0.015625))) - 3.0)
        x = round_even(x / step) * step
    return x.to(tl.float8e4nv)


@triton.jit
def dot_bf16(a_MK, b_KN):
    """a b in float32."""
    return tl.dot(a_MK, b_KN) if COMPILED else tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32))


@triton.jit
def add_dot_bf16(acc_MN, a_MK, b_KN):
    """acc + a b in float32."""
    if COMPILED:
        out_MN = tl.dot(a_MK, b_KN, acc=acc_MN)
    else:
        out_MN = acc_MN + tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32))
    return out_MN


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
            weight_Nk = _side_by_side(_bf16_of_low(packed), _bf16_of_high(packed))
            acc_NM += dot_bf16(weight_Nk, x_kM) * scale_N[:, None]
    return acc_NM


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
    KIND: tl.constexpr, TURN: tl.constexpr, AT: tl.constexpr,
):  # fmt: skip
    """Adds the products of one group of 128 inputs, group AT of an iteration that begins with group `first`;
    x has INPUTS columns, of int8 or bf16.

    Groups behind the last, which an iteration of TURN groups may reach, add nothing. All tokens must exist,
    also those that mask_M leaves out: a mask on the loads of scales would take instructions each time.
    """
    group = first + AT
    at = group if GROUPS % TURN == 0 else tl.minimum(group, GROUPS - 1)
    scale_N = tl.load(scale_base + at * OUTPUTS + rows_N)
    if KIND == "s14":
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
    KIND: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc + the products of all groups, TURN of them in an iteration.

    A loop that names its number of stages pipelines scales, too, and not only what a product reads.
    """
    for group in tl.range(0, GROUPS, TURN, num_stages=STAGES):
        for i in tl.static_range(TURN):
            acc_NM = dot_group(
                acc_NM, weight_base, scale_base, x_base, x_scale_base, group, rows_N, token_M, mask_M,
                OUTPUTS, GROUPS, INPUTS, PIECE, KIND, TURN, i,
            )  # fmt: skip
    return acc_NM


@triton.jit
def store_int8_NM(
    values_NM, q_base, scale_base, row_M, first, mask_M, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Rounds [ROWS, M] to int8, with one scale for each of the M, and stores them at row_M."""
    scale_M = int8_scale(values_NM, 0)
    # The low byte of the float 1.5 * 2**23 + q is q: two instructions for a value, division takes nine.
    q_NM = (values_NM * (1.0 / scale_M)[None, :] + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    n = first + tl.arange(0, ROWS)
    tl.store(q_base + row_M[None, :] * WIDTH + n[:, None], q_NM, mask=mask_M[None, :])
    tl.store(scale_base + row_M * (WIDTH // ROWS) + first // ROWS, scale_M, mask=mask_M)
