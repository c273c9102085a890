"""The CPU kernels for torch tensors: on the CPU, float32 and contiguous unless noted otherwise.

tests/worker/reference_w4a8.py defines their results. models/native.py builds layers from these operations.

Legend: T tokens, I inputs, O outputs, D hidden, H heads, R latent rank, P rotary elements, W = R + P, K
experts of a token, E routed experts, X pieces and G segments of inputs, S = I padded to 64, B sequences, N
pages of a sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_worker.config.moe import Routing
from moe_worker.kernels.cpu import structs
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.kernels.cpu.weights import HeadWeight, PackedWeight


@dataclass(frozen=True)
class Activations:
    """Tokens in int8: values_TS (zeros after the I values), scales_TX float32, sums_TG int32 of segments."""

    values_TS: Tensor
    scales_TX: Tensor
    sums_TG: Tensor

    @classmethod
    def empty(cls, tokens: int, inputs: int, piece: int, segment: int) -> "Activations":
        """Room for `tokens` of `inputs` values."""
        return cls(
            torch.empty(tokens, -(-inputs // 64) * 64, dtype=torch.int8),
            torch.empty(tokens, -(-inputs // piece)),
            torch.empty(tokens, -(-inputs // segment), dtype=torch.int32),
        )

    @property
    def struct(self) -> structs.Quantized:
        """The activations as the kernels read them."""
        return structs.Quantized(
            self.values_TS.data_ptr(), self.scales_TX.data_ptr(), self.sums_TG.data_ptr()
        )


@dataclass(frozen=True)
class PagedRows:
    """A layer's cache rows ([rows, W] float32 or bfloat16) and the pages of a batch in it.

    pages_BN, starts (first token of each sequence, [B + 1]) and lengths_B are int32.
    """

    rows_CW: Tensor
    page_size: int
    pages_BN: Tensor
    starts: Tensor
    lengths_B: Tensor

    @property
    def struct(self) -> structs.Cache:
        """The cache as the kernels read it."""
        rows_CW, pages_BN = self.rows_CW, self.pages_BN
        cache = structs.Cache.of(rows_CW.dtype == torch.bfloat16, self.page_size, rows_CW.data_ptr())
        batch = (pages_BN.data_ptr(), self.starts.data_ptr(), self.lengths_B.data_ptr())
        cache.point_to(*batch, (pages_BN.shape[0], pages_BN.shape[1]))
        return cache


def quantize(
    kernels: Kernels, x_TI: Tensor, reader: PackedWeight, norm_I: Tensor | None = None, eps: float = 1e-6
) -> tuple[Activations, Tensor]:
    """int8 tokens for `reader`, of x or, with `norm_I`, of its RMSNorm; also the values that were rounded [T,
    I].
    """
    tokens, inputs = x_TI.shape
    normed_TI = torch.empty_like(x_TI)
    out = Activations.empty(tokens, inputs, reader.piece, reader.segment)
    weight = None if norm_I is None else norm_I.data_ptr()
    sizes = (tokens, inputs, inputs, reader.piece, reader.segment)
    kernels.run(
        structs.QuantizeArguments(x_TI.data_ptr(), weight, normed_TI.data_ptr(), out.struct, eps, *sizes)
    )
    return out, x_TI if norm_I is None else normed_TI


def norm(kernels: Kernels, x_TD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) [T, D], the same as `quantize` computes."""
    tokens, width = x_TD.shape
    normed_TD, unused = torch.empty_like(x_TD), Activations.empty(tokens, width, 64, 64)
    pointers = x_TD.data_ptr(), norm_D.data_ptr(), normed_TD.data_ptr()
    kernels.run(structs.QuantizeArguments(*pointers, unused.struct, eps, tokens, width, width, 64, 64))
    return normed_TD


def linear(kernels: Kernels, x: Activations, weight: PackedWeight) -> Tensor:
    """[T, O]; for a paired weight silu(gate) * up, [T, O / 2]."""
    tokens = x.values_TS.shape[0]
    width = weight.outputs // 2 if weight.paired else weight.outputs
    out_TO = torch.zeros(tokens, width)
    kernels.run(structs.LinearArguments(weight.struct, x.struct, out_TO.data_ptr(), tokens, width, 0))
    return out_TO


def experts(
    kernels: Kernels,
    x: Activations,
    gate_up: PackedWeight,
    down: PackedWeight,
    choice: tuple[Tensor, Tensor],
) -> Tensor:
    """Weighted sum of the chosen experts, [T, D]; `choice`: experts int32 [T, K] (-1: none) and weights."""
    experts_TK, weights_TK = choice
    tokens, per_token = experts_TK.shape
    out_TD = torch.zeros(tokens, down.outputs)
    pointers = (experts_TK.data_ptr(), weights_TK.data_ptr(), out_TD.data_ptr(), None)
    kernels.run(
        structs.ExpertsArguments(
            gate_up.struct, down.struct, x.struct, *pointers, tokens, per_token, gate_up.count, 0
        )
    )
    return out_TD


class Rotation(NamedTuple):
    """Rotation of rotary elements: complex64 rotations [C, P / 2], int64 positions [T]; P is `width`."""

    rotations_CP: Tensor
    positions_T: Tensor
    width: int


def heads(kernels: Kernels, x_THI: Tensor, weight_HOI: HeadWeight, turned: Rotation | None = None) -> Tensor:
    """One small projection a head, int8 weights and activations rounded to bfloat16: [T, H, O].

    Only the elements of a head must be contiguous. turned: rotates the elements after the inputs of each head
    and writes them after its outputs.
    """
    tokens, count, _ = x_THI.shape
    outputs = weight_HOI.outputs + (0 if turned is None else turned.width)
    out_THO = torch.empty(tokens, count, outputs)
    rotations, positions, width = (None, None, 0) if turned is None else (
        turned.rotations_CP.data_ptr(), turned.positions_T.data_ptr(), turned.width
    )  # fmt: skip
    kernels.run(
        structs.HeadsArguments(
            weight_HOI.struct, x_THI.data_ptr(), out_THO.data_ptr(), tokens, count,
            x_THI.stride(0), x_THI.stride(1), count * outputs, outputs, rotations, positions, width,
        )
    )  # fmt: skip
    return out_THO


def route(
    kernels: Kernels, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Experts int32 [T, K] by descending score (-1: none), then the shared ones (E, E + 1, ...), and their
    weights.
    """
    tokens, width = x_TD.shape
    experts_TK = torch.empty(tokens, routing.per_token, dtype=torch.int32)
    weights_TK = torch.empty(tokens, routing.per_token)
    arguments = structs.RouteArguments(
        x=x_TD.data_ptr(),
        weight=weight_ED.data_ptr(),
        bias=None if bias_E is None else bias_E.data_ptr(),
        experts=experts_TK.data_ptr(),
        weights=weights_TK.data_ptr(),
        tokens=tokens,
        width=width,
        count=routing.experts,
        choice=structs.choice_struct(routing),
    )
    kernels.run(arguments)
    return experts_TK, weights_TK


def write_latents(
    kernels: Kernels,
    x_TW: Tensor,
    norm_R: Tensor,
    rotations_CP: Tensor,
    places: tuple[Tensor, Tensor],
    cache: PagedRows,
) -> None:
    """Normalises the latents, rotates the rotary key, and writes both to the cache.

    `rotations_CP` is complex64 [C, P / 2]; `places` are positions and rows of the tokens, int64 [T].
    """
    positions_T, rows_T = places
    rank = norm_R.shape[0]
    pointers = (x_TW.data_ptr(), norm_R.data_ptr(), rotations_CP.data_ptr())
    sizes = (x_TW.shape[0], x_TW.shape[1], rank, x_TW.shape[1] - rank)
    kernels.run(
        structs.LatentArguments(
            cache.struct, *pointers, positions_T.data_ptr(), rows_T.data_ptr(), *sizes, 1e-6
        )
    )


def attend(kernels: Kernels, query_THW: Tensor, cache: PagedRows, rank: int, scale: float) -> Tensor:
    """Causal attention of each token over its sequence; weighted sums of latents [T, H, R]."""
    tokens, count, width = query_THW.shape
    out_THR = torch.empty(tokens, count, rank)
    kernels.run(
        structs.AttendArguments(
            cache.struct, query_THW.data_ptr(), out_THR.data_ptr(), count, rank, width - rank, scale
        )
    )
    return out_THR
