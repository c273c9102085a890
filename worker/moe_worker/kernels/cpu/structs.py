"""The structs of native/interface.h, field by field in its order; a test compares their sizes."""

from ctypes import Structure, c_float, c_int32, c_void_p
from typing import Self

from moe_worker.config.moe import MOST_LEVELS, Routing


class Weight(Structure):
    """MoeWeight."""

    _fields_ = [(name, c_void_p) for name in ("data", "zeros", "bias")] + [
        (name, c_int32) for name in ("rows", "cols", "group", "piece", "segment", "bits", "paired")
    ]


class HeadWeightStruct(Structure):
    """MoeHeadWeight."""

    _fields_ = [("data", c_void_p), ("rows", c_int32), ("cols", c_int32)]


class Quantized(Structure):
    """MoeQuantized."""

    _fields_ = [(name, c_void_p) for name in ("values", "scales", "sums")]


class QuantizeArguments(Structure):
    """MoeQuantizeArgs."""

    _fields_ = (
        [(name, c_void_p) for name in ("x", "weight", "normed")]
        + [("out", Quantized), ("eps", c_float)]
        + [(name, c_int32) for name in ("tokens", "width", "stride", "piece", "segment")]
    )


class LinearArguments(Structure):
    """MoeLinearArgs."""

    _fields_ = [
        ("weight", Weight),
        ("x", Quantized),
        ("out", c_void_p),
        *[(name, c_int32) for name in ("tokens", "stride", "accumulate")],
    ]


class HeadsArguments(Structure):
    """MoeHeadsArgs."""

    _fields_ = [
        ("weight", HeadWeightStruct),
        ("x", c_void_p),
        ("out", c_void_p),
        *[(name, c_int32) for name in ("tokens", "heads", "x_token", "x_head", "out_token", "out_head")],
        ("rotations", c_void_p),
        ("positions", c_void_p),
        ("rope", c_int32),
    ]


class ExpertsArguments(Structure):
    """MoeExpertsArgs."""

    _fields_ = [
        ("gate_up", Weight),
        ("down", Weight),
        ("x", Quantized),
        *[(name, c_void_p) for name in ("experts", "weights", "out", "used")],
        *[(name, c_int32) for name in ("tokens", "per_token", "count", "counted")],
    ]


class LevelStruct(Structure):
    """MoeLevel."""

    _fields_ = [(name, c_int32) for name in ("groups", "keep", "best")]


class ChoiceStruct(Structure):
    """MoeChoice."""

    _fields_ = [
        *[(name, c_int32) for name in ("shared", "top_k", "softmax", "normalise")],
        *[(name, c_float) for name in ("scale", "mass")],
        ("level_count", c_int32),
        ("levels", LevelStruct * MOST_LEVELS),
    ]


class RouteArguments(Structure):
    """MoeRouteArgs."""

    _fields_ = (
        [(name, c_void_p) for name in ("x", "weight", "bias", "experts", "weights")]
        + [(name, c_int32) for name in ("tokens", "width", "count")]
        + [("choice", ChoiceStruct)]
    )


class Cache(Structure):
    """MoeCache."""

    _fields_ = [
        ("rows", c_void_p),
        ("bf16", c_int32),
        ("page_shift", c_int32),
        *[(name, c_void_p) for name in ("pages", "starts", "lengths")],
        ("page_stride", c_int32),
        ("batch", c_int32),
    ]

    @classmethod
    def of(cls, bf16: bool, page_size: int, rows: int | None = None) -> Self:
        """Storage without a batch. rows: where a layer's rows are; None: the layer itself says so."""
        return cls(rows=rows, bf16=int(bf16), page_shift=page_size.bit_length() - 1)

    def point_to(self, pages: int, starts: int, lengths: int, shape: tuple[int, int]) -> None:
        """Reads the sequences of a batch at these addresses. shape: of the table of pages."""
        self.pages, self.starts, self.lengths = pages, starts, lengths
        self.batch, self.page_stride = shape


class LatentArguments(Structure):
    """MoeLatentArgs."""

    _fields_ = [
        ("cache", Cache),
        *[(name, c_void_p) for name in ("x", "norm", "rotations", "positions", "rows")],
        *[(name, c_int32) for name in ("tokens", "stride", "rank", "rope")],
        ("eps", c_float),
    ]


class AttendArguments(Structure):
    """MoeAttendArgs."""

    _fields_ = [
        ("cache", Cache),
        ("query", c_void_p),
        ("out", c_void_p),
        *[(name, c_int32) for name in ("heads", "rank", "rope")],
        ("scale", c_float),
    ]


class LayerStruct(Structure):
    """MoeLayer."""

    _fields_ = [
        *[(name, c_void_p) for name in ("attention_norm", "query_norm", "latent_norm", "block_norm")],
        *[(name, Weight) for name in ("input", "query", "output", "gate_up", "down")],
        *[(name, HeadWeightStruct) for name in ("key", "value")],
        *[(name, c_void_p) for name in ("router", "router_bias", "cache_rows", "experts_used", "chosen")],
    ]


class ForwardArguments(Structure):
    """MoeForwardArgs."""

    _fields_ = [
        *[(name, c_void_p) for name in ("layers", "embedding", "x", "norm")],
        ("head", Weight),
        ("rotations", c_void_p),
        ("cache", Cache),
        *[(name, c_void_p) for name in ("tokens", "positions", "rows", "selected", "logits")],
        *[
            (name, c_int32)
            for name in ("count", "selected_count", "embedding_bf16", "layer_count", "vocabulary")
        ],
        *[
            (name, c_int32)
            for name in ("hidden", "heads", "plain", "rope", "rank", "value", "query_rank", "segment")
        ],
        ("experts", c_int32),
        ("choice", ChoiceStruct),
        *[(name, c_float) for name in ("attention_scale", "eps", "inner_eps")],
    ]


# In the order of MoeOperation.
OPERATIONS: tuple[type[Structure], ...] = (
    QuantizeArguments,
    LinearArguments,
    HeadsArguments,
    ExpertsArguments,
    RouteArguments,
    LatentArguments,
    AttendArguments,
    ForwardArguments,
)


def choice_struct(routing: Routing) -> ChoiceStruct:
    """How the router chooses, as the kernels read it."""
    limits = [LevelStruct(level.groups, level.keep, level.best) for level in routing.limits]
    return ChoiceStruct(
        shared=routing.shared,
        top_k=routing.top_k,
        softmax=int(routing.softmax),
        normalise=int(routing.normalise),
        scale=routing.scale,
        mass=routing.mass,
        level_count=len(limits),
        levels=(LevelStruct * MOST_LEVELS)(*limits),
    )
