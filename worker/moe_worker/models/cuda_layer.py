"""One layer of the GPU path: about a dozen launches over prepared weights.

Legend: T tokens, D hidden, O outputs of the joint projection, H heads, N query elements without and P with
rotary position, R latent rank, W = R + P, V value elements, Q query rank, E routed experts, A all experts, I
intermediate of an expert, F = 2 * I, K experts a token, M = T * K rows.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.moe import Routing
from moe_worker.kernels.triton import few
from moe_worker.kernels.triton.attention import TokenTiles, attend, merge_values
from moe_worker.kernels.triton.e4m3 import experts_e4m3, linear_e4m3
from moe_worker.kernels.triton.expanded import Contexts, attend_expanded, expand, spreads
from moe_worker.kernels.triton.experts import expert_tiles, experts_bf16, experts_packed, sort_by_expert
from moe_worker.kernels.triton.latent import LatentWeights, write_latents
from moe_worker.kernels.triton.linear import linear_packed, linear_parts
from moe_worker.kernels.triton.norm import Activation, Added, Rounding, residual_norm
from moe_worker.kernels.triton.packed import PackedSparse14
from moe_worker.kernels.triton.router import route
from moe_worker.kernels.triton.sparse14 import to_int4
from moe_worker.kernels.triton.wide import Weight, experts_wide, widen
from moe_worker.models.mla import INNER_NORM_EPS
from moe_worker.quant.int8 import piece_of


class Products(Enum):
    """How a pass multiplies by packed weights: with scaled sums of each group of inputs, or, where it has so
    many tokens that dequantizing costs less, by the library in bf16 or in e4m3. Between them, sparse experts
    become dense.
    """

    GROUPS = "groups"
    DENSE_GROUPS = "groups, dense"
    BF16 = "bf16"
    E4M3 = "e4m3"


@dataclass(frozen=True)
class Pass:
    """What all layers of a pass share.

    rotations_CP2: float32, cosine and sine of each position's pairs. slices: of the context, for attention.
    valid: int32 [1], the tokens that are no padding; None: all. capacity: tokens that each rank of a mesh may
    send to each other one. contexts: where attention expands keys and values; None: where queries are
    absorbed. singles: the first tokens, each the only one of its sequence, whose queries are absorbed
    nevertheless; some of them may stand for others that `contexts` has, and lie in nobody's page.
    """

    positions_T: Tensor
    rows_T: Tensor
    pages_BP: Tensor
    tiles: TokenTiles
    slices: int
    page: int
    rotations_CP2: Tensor
    eps: float
    scale: float
    products: Products = Products.GROUPS
    valid: Tensor | None = None
    capacity: int = 0
    contexts: Contexts | None = None
    singles: "Pass | None" = None


class Work(NamedTuple):
    """What experts compute: activations of R tokens, their experts int32 [R, K] (-1: none), weights float32
    [R, K], and the histogram of the experts, int32 [A].
    """

    x: Activation
    experts_RK: Tensor
    weights_RK: Tensor
    counts_A: Tensor


class Exchange(Protocol):
    """Moves the tokens of one layer between the ranks that share its experts; as moe.dispatch.Dispatch."""

    def scatter(
        self, x: Activation, rounded: bool, experts_TK: Tensor, weights_TK: Tensor, capacity: int
    ) -> Work:
        """The tokens for this rank's experts, with at most `capacity` of each other rank.

        rounded: whether experts read the int8 or e4m3 side of `x`; else the one in bf16.
        """
        ...

    def gather(self, added: Added) -> Added:
        """Outputs of that work to sums for this rank's own tokens."""
        ...


@dataclass(frozen=True)
class CudaLayer:
    """Prepared weights of a layer, bf16 or packed. A dense block is experts that all tokens take.

    value_HRV may be padded behind V; expanding_OR: the same and `latent`'s keys as `expand` reads them.
    counts_A: int32, the tokens of each expert in the newest pass. exchange: None where all experts are here.
    """

    attention_norm_D: Tensor
    input: Weight
    query_norm_Q: Tensor | None
    query: Weight | None
    latent: LatentWeights
    value_HRV: Tensor
    expanding_OR: Tensor
    output: Weight
    block_norm_D: Tensor
    router_ED: Tensor | None
    bias_E: Tensor | None
    routing: Routing
    gate_up: Weight
    down: Weight
    counts_A: Tensor
    exchange: Exchange | None = None

    @property
    def kind(self) -> Hashable:
        """Layers of one kind launch the same kernels."""
        weights = self.input, self.output, self.gate_up, self.down
        shapes = tuple((each.dtype, each.shape) for weight in weights for each in stored_tensors(weight))
        return self.router_ED is None, self.exchange is None, shapes

    def attention(self, x_TD: Tensor, added: Added | None, shared: Pass, cache_SW: Tensor) -> Tensor:
        """Adds `added` to the residual `x_TD` in place; the attention's output, not yet added: [T * S, D], of
        which a token has the sum of S rows.
        """
        tokens = x_TD.shape[0]
        normed = norm(x_TD, added, self.attention_norm_D, shared.eps, self.input, shared.products)
        joint_TO = linear(normed, self.input, shared.products)
        heads, width = self.latent.key_HNR.shape[0], cache_SW.shape[1]
        query_TO, latent_TW = joint_TO[:, :-width], joint_TO[:, -width:]
        if self.query is not None and self.query_norm_Q is not None:
            low = norm(query_TO, None, self.query_norm_Q, INNER_NORM_EPS, self.query, shared.products)
            query_TO = linear(low, self.query, shared.products)
        inputs = self.output.shape[1] if isinstance(self.output, Tensor) else self.output.inputs
        rounded = rounding(self.output, shared.products)
        values = Activation.empty_for(rounded, tokens, inputs, x_TD.device, piece_of(inputs // heads))
        attend_to = self._absorbed if shared.contexts is None else self._both
        # With few tokens the projection rounds, so that a head's values come from several programs.
        if few.takes(self.output, values):
            attend_to(query_TO, latent_TW, shared, cache_SW, values, Rounding.NONE)
            out_TD = torch.empty_like(x_TD)
            few.linear_few(values, self.output, out_TD, rounded=False)
            return out_TD
        attend_to(query_TO, latent_TW, shared, cache_SW, values, rounded)
        return linear(values, self.output, shared.products, summed=True)

    def _absorbed(
        self, query_TO: Tensor, latent_TW: Tensor, shared: Pass, cache_SW: Tensor, out: Activation,
        rounded: Rounding,
    ) -> None:  # fmt: skip
        (heads, _, rank), (tokens, width) = self.latent.key_HNR.shape, latent_TW.shape
        query_THW = torch.empty(tokens, heads, width, dtype=query_TO.dtype, device=query_TO.device)
        self._write(query_TO, latent_TW, shared, cache_SW, query_THW)
        parts_THSR, lse_THS = attend(
            query_THW, cache_SW, shared.pages_BP, shared.positions_T, shared.tiles, rank, shared.page,
            shared.scale, shared.slices,
        )  # fmt: skip
        merge_values(parts_THSR, lse_THS, self.value_HRV, out, rounded)

    def _both(
        self, query_TO: Tensor, latent_TW: Tensor, shared: Pass, cache_SW: Tensor, out: Activation,
        rounded: Rounding,
    ) -> None:  # fmt: skip
        if shared.singles is not None:
            # Written first: some of their rows are those of tokens that `_expanded` writes.
            count = shared.singles.positions_T.shape[0]
            own = Activation(*(each[:count] for each in (out.x_TD, out.q_TD, out.scales_TX)))
            heads = self.latent.key_HNR.shape[0]
            merged = Rounding.NONE if spreads(out, heads, rounded) else rounded
            self._absorbed(query_TO[:count], latent_TW[:count], shared.singles, cache_SW, own, merged)
        self._expanded(query_TO, latent_TW, shared, cache_SW, out, rounded)

    def _expanded(
        self, query_TO: Tensor, latent_TW: Tensor, shared: Pass, cache_SW: Tensor, out: Activation,
        rounded: Rounding,
    ) -> None:  # fmt: skip
        if shared.contexts is None:
            raise ValueError("a pass without contexts has no keys and values to expand")
        _, plain, rank = self.latent.key_HNR.shape
        self._write(query_TO, latent_TW, shared, cache_SW, None)
        expanded_CO, latents_CW = expand(cache_SW, shared.contexts.rows_C, self.expanding_OR)
        attend_expanded(
            query_TO, expanded_CO, latents_CW, shared.positions_T, shared.contexts, plain, rank, shared.scale,
            out, rounded,
        )  # fmt: skip

    def _write(
        self, query_TO: Tensor, latent_TW: Tensor, shared: Pass, cache_SW: Tensor, out_THW: Tensor | None
    ) -> None:
        write_latents(
            query_TO, latent_TW, self.latent, shared.rotations_CP2, shared.positions_T, shared.rows_T,
            cache_SW, out_THW,
        )  # fmt: skip

    def block(self, x_TD: Tensor, attended_TD: Tensor, shared: Pass) -> Added:
        """Adds the attention's output to the residual; the experts' weighted outputs, to be added."""
        normed = norm(x_TD, Added(attended_TD), self.block_norm_D, shared.eps, self.gate_up, shared.products)
        experts_TK, weights_TK = self.routes(normed.x_TD, shared.valid)
        if self.exchange is None:
            return self.compute(Work(normed, experts_TK, weights_TK, self.counts_A), shared.products)
        rounded = rounding(self.gate_up, shared.products) in {Rounding.INT8, Rounding.E4M3}
        work = self.exchange.scatter(normed, rounded, experts_TK, weights_TK, shared.capacity)
        return self.exchange.gather(self.compute(work, shared.products))

    def compute(self, work: Work, products: Products) -> Added:
        """The weighted outputs of this rank's experts."""
        x, experts_TK, weights_TK, counts_A = work
        if products is Products.E4M3:
            return experts_e4m3(x, self.gate_up, self.down, experts_TK, weights_TK, counts_A)
        if products is Products.BF16:
            emulated = rounding(self.down, products) is Rounding.EMULATED
            wide = widen(self.gate_up), widen(self.down)
            return experts_wide(x.x_TD, *wide, experts_TK, weights_TK, counts_A, emulated)
        tokens, per_token = experts_TK.shape
        gate_up, down = self.gate_up, self.down
        if few.takes_experts(gate_up, x) and few.takes_experts(down, x):
            if self.exchange is not None:
                taken = few.Taken(experts_TK, per_token, 0)
            elif self.router_ED is not None:
                taken = few.Taken(experts_TK, self.routing.top_k, self.router_ED.shape[0])
            else:
                taken = few.Taken(experts_TK, 0, 0)
            return Added(few.experts_few(x, gate_up, down, taken, weights_TK), experts_M=experts_TK)
        if products is Products.DENSE_GROUPS:
            gate_up, down = (
                to_int4(each) if isinstance(each, PackedSparse14) else each for each in (gate_up, down)
            )
        mean = tokens * per_token / counts_A.shape[0]
        tiles = expert_tiles(tokens, None if isinstance(gate_up, Tensor) else gate_up.kind, mean)
        blocks = sort_by_expert(experts_TK, counts_A, tiles.rows)
        if not (isinstance(gate_up, Tensor) or isinstance(down, Tensor)):
            rows_MD = experts_packed(x, gate_up, down, blocks, weights_TK, tiles)
            return Added(rows_MD, experts_M=experts_TK)
        rows_MD = experts_bf16(x.x_TD, widen(gate_up), widen(down), blocks, weights_TK, tiles)
        return Added(rows_MD, experts_M=experts_TK)

    def expert_at(self, place: int) -> tuple[Tensor, ...]:
        """What the expert at `place` has in memory, not copied."""
        return _expert(self.gate_up, self.down, place)

    def fitting_expert(self, gate_up: Weight, down: Weight) -> tuple[Tensor, ...]:
        """What one expert has in memory, for `take_experts`. Raises ValueError where the others have another
        shape.
        """
        found = _expert(gate_up, down, 0)
        for into, values in zip(self.expert_at(0), found, strict=True):
            if into.shape != values.shape or into.dtype != values.dtype:
                raise ValueError(f"an expert of shape {list(values.shape)} replaces {list(into.shape)}")
        return found

    def take_experts(self, experts: Mapping[int, Sequence[Tensor]]) -> None:
        """Computes these experts by their place from the next pass on, in the memory of the ones of before,
        whose addresses graphs hold.
        """
        into = [_words(each) for place in experts for each in self.expert_at(place)]
        if into:  # in few launches, since streams wait
            torch._foreach_copy_(into, [_words(each) for new in experts.values() for each in new])

    def routes(self, x_TD: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts int32 [T, K] of each token and their weights float32 [T, K]; adds to `counts_A`."""
        if self.router_ED is not None:
            return route(x_TD, self.router_ED, self.bias_E, self.routing, self.counts_A, valid)
        tokens, experts = x_TD.shape[0], self.counts_A.shape[0]
        self.counts_A.fill_(tokens)
        experts_TK = torch.arange(experts, dtype=torch.int32, device=x_TD.device).repeat(tokens, 1)
        return experts_TK, torch.ones(tokens, experts, device=x_TD.device)


def _expert(gate_up: Weight, down: Weight, place: int) -> tuple[Tensor, ...]:
    return tuple(each[place] for each in (*stored_tensors(gate_up), *stored_tensors(down)))


def _words(values: Tensor) -> Tensor:
    """The same memory in elements that are copied fast."""
    whole = values.nbytes % 8 == 0
    return values.view(-1).view(torch.uint8).view(torch.int64) if whole else values


def stored_tensors(weight: Weight) -> tuple[Tensor, ...]:
    """What a weight has in memory."""
    return (weight,) if isinstance(weight, Tensor) else (weight.stored, weight.scales)


_ROUNDING = {
    Products.GROUPS: Rounding.INT8, Products.DENSE_GROUPS: Rounding.INT8, Products.BF16: Rounding.EMULATED,
    Products.E4M3: Rounding.E4M3,
}  # fmt: skip


def rounding(reader: Weight, products: Products) -> Rounding:
    """How activations are rounded for products with `reader`."""
    if isinstance(reader, Tensor) or not reader.int8:
        return Rounding.NONE
    sparse = isinstance(reader, PackedSparse14) and products is Products.GROUPS
    return Rounding.BY_POSITION if sparse else _ROUNDING[products]


def norm(
    x_TD: Tensor,
    added: Added | None,
    weight_D: Tensor,
    eps: float,
    reader: Weight,
    products: Products,
) -> Activation:
    """Adds to the residual in place; its norm, ready for products with `reader`."""
    rounded = rounding(reader, products)
    normed = Activation.empty_for(rounded, x_TD.shape[0], x_TD.shape[1], x_TD.device)
    residual_norm(x_TD, added, weight_D, eps, normed, rounded)
    return normed


def linear(x: Activation, weight: Weight, products: Products, summed: bool = False) -> Tensor:
    """[T, O] in bf16. summed: [T * S, O], where the product is cut into S parts that the reader sums."""
    if products is Products.E4M3:
        return linear_e4m3(x, weight)
    if products is Products.BF16 or isinstance(weight, Tensor):
        return functional.linear(x.x_TD, widen(weight))
    tokens, is_few = x.x_TD.shape[0], few.takes(weight, x)
    parts = linear_parts(tokens, weight) if summed and not is_few else 1
    out_TO = torch.empty(tokens * parts, weight.outputs, dtype=torch.bfloat16, device=x.x_TD.device)
    if is_few:
        few.linear_few(x, weight, out_TO)
    else:
        linear_packed(x, weight, out_TO, parts)
    return out_TO
