"""Pieces that kernels of all kinds share: rounding to int8 and e4m3, and products of tiles in bf16.

Numbers of tokens, rows and blocks are not specialized in any kernel: a server meets all of them, and each
variant takes a second to compile.
"""

import triton
import triton.language as tl

# Interpreted kernels (TRITON_INTERPRET=1) can neither run assembly nor multiply bf16.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


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
def by_position(values_RM):
    """[R, M] whose rows, in each 64, are in the order in which 1:4 sparse weights take their inputs: those
    with position 0 of all quads, then those with position 1, and so on.
    """
    ROWS: tl.constexpr = values_RM.shape[0]
    cut = tl.reshape(values_RM, (ROWS // 64, 16, 4, values_RM.shape[1]))
    return tl.reshape(tl.permute(cut, (0, 2, 1, 3)), (ROWS, values_RM.shape[1]))


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
