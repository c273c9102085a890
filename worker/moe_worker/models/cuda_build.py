"""Prepares a loaded model for the GPU kernels: padded to sizes they take, packed weights in their layout.

Legend: D hidden, F = 2 * I gate and up, I intermediate, H heads, N and P query elements without and with
rotary position, R latent rank, V value elements, A experts, O outputs, G groups of inputs, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_worker.config.attention import LatentConfig
from moe_worker.config.model import ModelConfig
from moe_worker.config.quantization import Fp8Storage, PackedStorage, SparseStorage
from moe_worker.kernels.linear import Linear
from moe_worker.kernels.triton import e4m3
from moe_worker.kernels.triton.expanded import expanding_weights
from moe_worker.kernels.triton.latent import LatentWeights
from moe_worker.kernels.triton.packed import PackedFp8, PackedInt4, PackedSparse14, pack_sparse14, pack_values
from moe_worker.kernels.triton.wide import Weight
from moe_worker.models.cuda import CudaModel
from moe_worker.models.cuda_layer import CudaLayer, Exchange
from moe_worker.models.deepseek import DeepseekModel, DenseBlock, MoeBlock, TorchLayer
from moe_worker.models.mla import INNER_NORM_EPS, LatentAttention
from moe_worker.moe.dispatch import Dispatch
from moe_worker.moe.experts import Experts
from moe_worker.quant.formats import FORMATS
from moe_worker.quant.fp8 import Fp8Weight
from moe_worker.quant.int4 import GROUP, Int4Weight
from moe_worker.quant.int8 import PIECE
from moe_worker.quant.matrix import Matrix, join_rows, stack
from moe_worker.quant.sparse14 import Sparse14Weight


@dataclass(frozen=True)
class Sizes:
    """Widths that the kernels see: powers of two for what a program holds whole, pieces of 64 for values."""

    rank: int
    plain: int
    value: int

    @classmethod
    def of(cls, attention: LatentConfig) -> "Sizes":
        """Those that `attention` is padded to."""
        return cls(
            rank=_power(attention.kv_lora_rank),
            plain=_power(attention.qk_nope_head_dim),
            value=-(-attention.v_head_dim // PIECE) * PIECE,
        )

    def cache_width(self, attention: LatentConfig) -> int:
        """Values of a cache row."""
        return self.rank + attention.qk_rope_head_dim


def unsupported(config: ModelConfig, number_format: str) -> str | None:
    """Why there are no GPU kernels for a model in `number_format`, in words; None where there are."""
    attention, storage = config.attention, config.storage
    packed = number_format in FORMATS and FORMATS[number_format].bits is not None
    if not isinstance(attention, LatentConfig):
        return f"there are no GPU kernels for the attention of {config.architecture} yet"
    if isinstance(storage, PackedStorage) and not (storage.symmetric and storage.group == GROUP):
        return f"the GPU kernels take symmetric int4 in groups of {GROUP}; the checkpoint's is not"
    if isinstance(storage, SparseStorage) and packed and storage.group != GROUP:
        return f"the GPU kernels take 1:4 sparse weights in groups of {GROUP}, not of {storage.group}"
    if number_format == "fp8" and isinstance(storage, Fp8Storage) and storage.block[1] != GROUP:
        return (
            f"the GPU kernels take FP8 in blocks of {GROUP} inputs; the checkpoint's have {storage.block[1]}"
        )
    rope = attention.qk_rope_head_dim
    wrong = [
        ("attention_bias", "false", attention.attention_bias),
        ("qk_rope_head_dim", "16, 32, 64 or so on", rope < 16 or rope & (rope - 1)),
        ("hidden_size", f"a multiple of {PIECE}", config.hidden_size % PIECE),
        ("moe_intermediate_size", f"a multiple of {PIECE}", config.moe.intermediate % PIECE),
        (
            "v_head_dim of all heads",
            f"a multiple of {PIECE} in {number_format}",
            packed and attention.num_attention_heads * attention.v_head_dim % PIECE,
        ),
    ]
    return next(
        (f"the GPU kernels need {name} to be {right}" for name, right, is_wrong in wrong if is_wrong), None
    )


def _all_here(_: Dispatch, __: int) -> Exchange | None:
    return None


def prepare(
    model: DeepseekModel,
    consume: bool = False,
    exchange_of: Callable[[Dispatch, int], Exchange | None] = _all_here,
) -> CudaModel:
    """The model for the kernels; it must not be `unsupported`. Dense matrices are not copied.

    consume: takes the layers out of `model`, one by one. exchange_of: the kernels' way to do a layer's
    dispatch, of which this rank holds so many experts.
    """
    config = model.config
    experts = config.moe.routed + config.moe.shared
    blocks = [
        _dense_parts(config) if isinstance(each.block, DenseBlock) else experts for each in model.layers
    ]
    scale = _latent(model.layers[0]).scale
    counts_LA = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=model.device)
    layers = [
        _layer(config, layer, counts_A[:count], exchange_of)
        for layer, counts_A, count in zip(model.each_layer(consume), counts_LA, blocks, strict=True)
    ]
    return CudaModel(
        embedding_VD=model.embedding_VD,
        layers=tuple(layers),
        norm_D=model.norm_D,
        head=_ready(model.head),
        rotations_CP2=torch.view_as_real(model.rotations_CP).float().contiguous(),
        eps=config.rms_norm_eps,
        scale=scale,
        counts_LA=counts_LA,
        begin=model.stage.begin,
        e4m3=e4m3.lacking(model.device) is None and all(map(_multiplies_e4m3, layers)),
    )


def _multiplies_e4m3(layer: CudaLayer) -> bool:
    """Whether large passes may multiply in e4m3: its weights are int4, and its activations rounded anyway."""
    weights = (layer.input, layer.query, layer.output, layer.gate_up, layer.down)
    packed = [
        isinstance(each, PackedInt4 | PackedSparse14) and each.int8 for each in weights if each is not None
    ]
    return all(packed)


def _layer(
    config: ModelConfig,
    layer: TorchLayer,
    counts_A: Tensor,
    exchange_of: Callable[[Dispatch, int], Exchange | None],
) -> CudaLayer:
    attention, block, sizes = _latent(layer), layer.block, Sizes.of(config.latent)
    heads, plain, rope = config.latent.num_attention_heads, sizes.plain, config.latent.qk_rope_head_dim
    query_rows = heads * (config.latent.qk_nope_head_dim + rope)
    query_norm_Q, query = None, None
    joint = attention.input.matrix
    if attention.query is None:
        first, latent = _split_rows(joint, query_rows)
        first = _pad_heads(first, heads, config.latent.qk_nope_head_dim, plain, rope)
    else:
        first, latent = _split_rows(joint, attention.query.norm_Q.shape[0])
        query_norm_Q = attention.query.norm_Q
        expand = attention.query.linear.matrix
        expand = _pad_heads(expand, heads, config.latent.qk_nope_head_dim, plain, rope)
        query = _packed(expand, _int8(attention.query.linear))
    latent = _pad_heads(latent, 1, config.latent.kv_lora_rank, sizes.rank, rope)
    more_r, more_n = sizes.rank - config.latent.kv_lora_rank, plain - config.latent.qk_nope_head_dim
    more_v = sizes.value - config.latent.v_head_dim
    key_HNR = functional.pad(attention.key_HNR, (0, more_r, 0, more_n))
    expanding_OR = expanding_weights(key_HNR, functional.pad(attention.value_HRV, (0, 0, 0, more_r)))
    router = None if isinstance(block, DenseBlock) else block.router
    exchange = None if isinstance(block, DenseBlock) else exchange_of(block.dispatch, block.experts.count)
    gate_up, down = _experts(config, block, exchange is not None)
    return CudaLayer(
        attention_norm_D=layer.attention_norm,
        input=_packed(join_rows((first, latent)), _int8(attention.input)),
        query_norm_Q=query_norm_Q,
        query=query,
        latent=LatentWeights(
            functional.pad(attention.latent_norm_R, (0, more_r)),
            expanding_OR[: heads * plain].view(key_HNR.shape),
            INNER_NORM_EPS,
            config.latent.kv_lora_rank,
        ),
        value_HRV=functional.pad(attention.value_HRV, (0, more_v, 0, more_r)).contiguous(),
        expanding_OR=expanding_OR,
        output=_ready(attention.output),
        block_norm_D=layer.block_norm,
        router_ED=None if router is None else router.weight_ED,
        bias_E=None if router is None else router.bias_E,
        routing=config.moe.routing,
        gate_up=gate_up,
        down=down,
        counts_A=counts_A,
        exchange=exchange,
    )


def prepare_experts(
    experts: Experts, rest: Callable[[], object] = lambda: None
) -> tuple[Weight, Weight]:  # fmt: skip
    """Gate and up, and down, for the kernels of a mesh, whose ranks must all read activations in the same
    order: dense. rest: called between matrices.
    """
    gate_up = _packed(experts.gate_up_AFD, experts.round_tokens)
    rest()
    return gate_up, _packed(experts.down_ADI, experts.round_tokens)


def _experts(config: ModelConfig, block: DenseBlock | MoeBlock, spread: bool) -> tuple[Weight, Weight]:
    """spread: whether other ranks have experts of the layer, too."""
    if isinstance(block, MoeBlock):
        experts = block.experts
        if spread:
            return prepare_experts(experts)
        int8 = experts.round_tokens
        return _packed_experts(experts.gate_up_AFD, int8), _packed_experts(experts.down_ADI, int8)
    gate_up, down = split_dense(block.gate_up.matrix, block.down.matrix, _dense_parts(config))
    return _packed_experts(gate_up, _int8(block.gate_up)), _packed_experts(down, _int8(block.down))


def _dense_parts(config: ModelConfig) -> int:
    """Experts that a dense block is cut into: about as wide as the routed ones, in whole groups."""
    width = -(-config.moe.intermediate // GROUP) * GROUP
    return -(-config.intermediate_size // width)


def split_dense(gate_up: Matrix, down: Matrix, parts: int) -> tuple[Matrix, Matrix]:
    """A dense SwiGLU block [F, D], [D, I] as experts whose outputs add up to its own: [A, F, D], [A, D, I].

    Each takes whole groups of inputs; the last is padded by zeros.
    """
    inner = gate_up.outputs // 2
    width = -(-inner // parts // GROUP) * GROUP
    missing = width * parts - inner

    def cut(rows: Tensor) -> Tensor:
        halves = [
            functional.pad(half, (0, 0, 0, missing)).unflatten(0, (parts, width)) for half in rows.chunk(2)
        ]
        return torch.cat(halves, dim=1)

    return gate_up.map(cut), stack(down.pad_inputs(missing).split_inputs(parts))


def _latent(layer: TorchLayer) -> LatentAttention:
    if not isinstance(layer.attention, LatentAttention):
        raise TypeError(f"there are no GPU kernels for {type(layer.attention).__name__}")
    return layer.attention


def _power(width: int) -> int:
    """The power of two, 16 or more, that holds `width`."""
    return max(16, 1 << (width - 1).bit_length())


def _int8(linear: Linear) -> bool:
    return linear.piece is not None


def _split_rows(matrix: Matrix, first: int) -> tuple[Matrix, Matrix]:
    return matrix.map(lambda rows: rows[:first]), matrix.map(lambda rows: rows[first:])


def _pad_heads(matrix: Matrix, heads: int, width: int, padded: int, rope: int) -> Matrix:
    """Rows of each head, `width` and then `rope` of them, with zeros between, so that they are `padded`."""

    def spread(rows: Tensor) -> Tensor:
        each = rows.unflatten(0, (heads, width + rope))
        return torch.cat(
            (functional.pad(each[:, :width], (0, 0, 0, padded - width)), each[:, width:]), 1
        ).flatten(0, 1)

    return matrix if width == padded else matrix.map(spread)


def _ready(linear: Linear) -> Weight:
    return _packed(linear.matrix, _int8(linear))


def _packed_experts(matrix: Matrix, int8: bool) -> Weight:
    """As `_packed`, but sparse where the kernels take it so."""
    if isinstance(matrix, Sparse14Weight) and int8 and matrix.inputs % GROUP == 0:
        return pack_sparse(matrix)
    return _packed(matrix, int8)


def _packed(matrix: Matrix, int8: bool) -> Weight:
    """A matrix (or stacked ones) in the kernels' layout. Raises ValueError where they take none like it."""
    if matrix.dense is not None:
        return matrix.dense.contiguous()
    packer = _PACKERS.get(type(matrix))
    if packer is None:
        raise ValueError(f"the GPU kernels of the forward pass support no {type(matrix).__name__}")
    return packer(matrix, int8)


def pack_int4(matrix: Int4Weight, int8: bool) -> PackedInt4:
    """A matrix (or stacked ones) as the kernels read it; int8: whether activations are rounded."""
    if matrix.group != GROUP:
        raise ValueError(
            f"the GPU kernels take int4 in groups of {GROUP}; these are groups of {matrix.group}"
        )
    if matrix.zeros_OG is not None and bool(matrix.zeros_OG.any()):
        raise ValueError("the GPU kernels take symmetric int4; these weights have zero points")
    values = functional.pad(matrix.values(), (0, -matrix.inputs % GROUP))
    grouped = values.unflatten(-1, (-1, GROUP)).transpose(-2, -3)
    return pack_values(grouped, matrix.scales_OG.transpose(-1, -2), matrix.inputs, int8)


def pack_sparse(matrix: Sparse14Weight) -> PackedSparse14:
    """Stacked matrices as the kernels of experts read them; activations are rounded."""
    if matrix.group != GROUP:
        raise ValueError(
            f"the GPU kernels take 1:4 sparse weights in groups of {GROUP}, not of {matrix.group}"
        )
    return pack_sparse14(matrix.values(), matrix.positions(), matrix.scales_OG)


def pack_fp8(matrix: Fp8Weight) -> PackedFp8:
    """A matrix (or stacked ones) as the kernels read it; values are not copied."""
    if matrix.columns != GROUP:
        raise ValueError(f"the GPU kernels take FP8 in blocks of {GROUP} inputs, not of {matrix.columns}")
    values, scales_GO = matrix.values().contiguous(), matrix.scales_OC.transpose(-1, -2)
    # The kernels read NaN as a number: the scales of its group become NaN instead.
    broken = functional.pad(values.view(torch.uint8) & 127 == 127, (0, -matrix.inputs % GROUP))
    broken_GO = broken.unflatten(-1, (-1, GROUP)).any(-1).transpose(-1, -2)
    return PackedFp8(values, scales_GO.masked_fill(broken_GO, torch.nan).contiguous())


_PACKERS: dict[type[Matrix], Callable[..., Weight]] = {
    Int4Weight: pack_int4,
    Sparse14Weight: lambda matrix, int8: pack_int4(matrix.to_int4(), int8),
    Fp8Weight: lambda matrix, _: pack_fp8(matrix),
}
