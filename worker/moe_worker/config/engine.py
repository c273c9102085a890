"""The user's choices for an engine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_worker.config.fields import LARGEST_SIZE, MOST_SHOWN, is_unicode
from moe_worker.config.mesh import MOST_RANKS, MeshShape
from moe_worker.config.moe import MOST_EXPERTS
from moe_worker.errors import SettingsError

DEVICES = re.compile(r"auto|cpu|cuda(:[0-9]{1,2})?")
DTYPES = ("auto", "float32", "bfloat16")
FORMATS = ("auto", "dense", "fp8", "w4a16", "w4a8")
GENERATION_CONFIGS = ("auto", "none")
REBALANCE = ("auto", "on", "off")
KV_DTYPES = ("auto", "float32", "bfloat16", "fp8")
# The range of each number. The upper ends are far above what any machine can use, and keep products within 64
# bits.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "context_length": (1, LARGEST_SIZE),
    "max_batch_size": (1, 1 << 16),
    "max_queue": (0, LARGEST_SIZE),
    "kv_memory": (1, 1 << 50),
    "kv_offload": (0, 1 << 50),
    "prefill_tokens": (1, LARGEST_SIZE),
    "target_step_ms": (1, 3_600_000),
    "page_size": (1, 1 << 16),
    "threads": (1, 1 << 12),
    "mesh_rank": (0, MOST_RANKS - 1),
    "mesh_epoch": (0, LARGEST_SIZE),
    "redundant_experts": (0, MOST_EXPERTS),
    "mesh_reforms": (0, LARGEST_SIZE),
    "rebalance_interval": (0.01, 1e9),
    "rebalance_threshold": (1, 100),
    "routing_mass": (0.001, 1),
    "routing_margin": (0, 1),
}
# Of config.json's fields; published ones nest 4 deep.
MOST_NESTED = 16


@dataclass(frozen=True)
class EngineOptions:
    """Choices for one engine; the constructor raises SettingsError if one is impossible.

    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
    dtype: of weights and activations. "auto" is bfloat16 on GPUs, float32 on CPUs, where torch's bfloat16 is
        slower unless the processor has AMX.
    kv_dtype: of the KV cache. "auto" is `dtype`'s (bfloat16 for w4a8 on CPUs). "fp8" (e4m3) takes half the
        memory of bfloat16; the example's text costs 0.08 % more bits.
    format: of the weights that tokens are multiplied with. "dense": numbers of `dtype`; "fp8": eight bits
        (e4m3) with a scale for each block of 128 x 128, as an FP8 checkpoint has them or rounded at load,
        activations as they are (W8A16); "w4a16": four bits in groups of 128 inputs, rounded at load where
        the checkpoint is not; "w4a8": these, and activations rounded to eight bits, with one scale for 128
        or 64 values (docs/formats.md). "auto" is w4a8 for 1:4 sparse checkpoints, w4a16 for others of four
        bits, and dense for the rest.
    context_length: tokens of prompt and continuation together; None: the model's own limit.
    max_batch_size: sequences computed together at most.
    max_queue: requests that may wait beyond those in the batch.
    kv_memory: bytes for the KV cache; what a full batch does not need keeps prefixes. None: as much as
        max_batch_size contexts take, on a GPU at most what weights and forward passes leave.
    kv_offload: bytes of CPU memory for pages that the KV cache evicts. They come back where that takes less
        time than computing them again. On a CPU the same memory does more as kv_memory. 0: they are lost.
    prefill_tokens: prompt tokens computed in one step at most; longer prompts take several.
    target_step_ms: aim for the time of a step while streams run, so the time between two tokens of a
        stream: prompts are split into chunks that meet it. 50 ms is faster than people read.
    page_size: tokens of a page of the KV cache, a power of two. Small pages waste little at the end of a text
    and share short prefixes.
    check_weights: whether loading refuses weights that are not finite numbers, in the pass that reads them.
    check_digests: whether loading first compares files with the SHA-256 digests stored with them.
    prefix_cache: whether requests share the cached beginnings of their prompts.
    generation_config: "auto": sampling that a request does not set is that of generation_config.json; "none":
        it is SamplingParameters' own.
    config_override: fields that replace those of config.json, as {"rope_scaling": {...}} for YaRN.
    mesh: processes of this replica, PIPELINExEXPERT. mesh_rank: which of them this is; 0 leads. mesh_leader:
        HOST:PORT where rank 0 listens. mesh_epoch: how often the mesh has formed; ranks of another epoch are
        refused. mesh_tls: folder with the certificate that encrypts the connections to the leader; empty:
        plaintext. redundant_experts: copies of experts in each layer, spread over a stage's ranks.
    mesh_reforms: how often in 10 minutes a mesh may lose ranks and meet again before the replica ends.
    rebalance: "auto": experts move to where the load of a stage's ranks is even, at most every
        rebalance_interval seconds, in layers whose busiest rank has more than rebalance_threshold times the
        mean, on CPUs; "on": on GPUs, too, where some steps take several times as long meanwhile; "off": they
        stay.
    routing_mass: share of the scores of a token's top_k experts that its experts reach (config/moe.py,
        Routing); None: what the checkpoint says. Less than that only as far as its routing.json allows.
    routing_margin: experts whose scores differ by less may take each other's place, those with less load in
        the checkpoint's routing.json first (moe/balance.py). 0: none do.
    learn_routing: whether requests move the matrix of domains and experts that GetExpertLoad tells; it begins
        with the checkpoint's routing.json. Answers do not depend on it.
    threads: of torch on the CPU; None: all cores that this process may use, or one for small models.
    """

    device: str = "auto"
    dtype: str = "auto"
    format: str = "auto"
    kv_dtype: str = "auto"
    context_length: int | None = None
    max_batch_size: int = 16
    max_queue: int = 256
    kv_memory: int | None = None
    kv_offload: int = 0
    prefill_tokens: int = 2048
    target_step_ms: float = 50.0
    page_size: int = 16
    prefix_cache: bool = True
    check_weights: bool = True
    check_digests: bool = False
    threads: int | None = None
    generation_config: str = "none"
    mesh: str = "1x1"
    mesh_rank: int = 0
    mesh_leader: str = ""
    mesh_epoch: int = 0
    mesh_tls: str = ""
    redundant_experts: int = 0
    mesh_reforms: int = 5
    rebalance: str = "auto"
    rebalance_interval: float = 300.0
    rebalance_threshold: float = 1.2
    routing_mass: float | None = None
    routing_margin: float = 0.0
    learn_routing: bool = False
    config_override: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not DEVICES.fullmatch(self.device):
            raise SettingsError(f"device {self.device!r} is unknown; it must be auto, cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype {self.dtype!r} is unknown; it must be one of {', '.join(DTYPES)}")
        for name, allowed in (
            ("format", FORMATS),
            ("kv_dtype", KV_DTYPES),
            ("generation_config", GENERATION_CONFIGS),
            ("rebalance", REBALANCE),
        ):
            if getattr(self, name) not in allowed:
                raise SettingsError(
                    f"{name} {getattr(self, name)!r} is unknown; it must be one of {', '.join(allowed)}"
                )
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # nor a number that is none (NaN)
                wanted = f"at least {least}" if value < least else f"a number from {least} to {most}"
                raise SettingsError(f"{name} is {str(value)[:MOST_SHOWN]}; it must be {wanted}")
        if self.page_size & (self.page_size - 1):
            raise SettingsError(f"page_size is {self.page_size}; it must be a power of two")
        self._check_mesh()
        _check_override(self.config_override)

    def _check_mesh(self) -> None:
        ranks = self.mesh_shape.ranks
        if self.mesh_rank >= ranks:
            raise SettingsError(
                f"mesh_rank is {self.mesh_rank}; a mesh {self.mesh_shape} has ranks 0 to {ranks - 1}"
            )
        if self.redundant_experts and self.mesh_shape.expert == 1:
            raise SettingsError(
                f"redundant_experts is {self.redundant_experts}; a mesh {self.mesh_shape} has one rank a "
                "stage and no use for them: use 0"
            )
        if self.kv_offload and (ranks > 1 or not self.prefix_cache):
            raise SettingsError(
                f"kv_offload is {self.kv_offload}; it keeps pages of the prefix cache, and a mesh of several "
                "ranks does not support it: use 0"
            )

    @property
    def mesh_shape(self) -> MeshShape:
        """The mesh, parsed."""
        return MeshShape.parse(self.mesh)

    def context_for(self, longest: int) -> int:
        """The context length, given the model's limit `longest`. Raises SettingsError if above it."""
        if self.context_length is None:
            return longest
        if self.context_length > longest:
            raise SettingsError(
                f"context length {self.context_length} is too long; the model (max_position_embeddings) "
                f"allows {longest} at most; where its makers document YaRN for more, add it as "
                """--config-override '{"rope_scaling": {"rope_type": "yarn", "factor": ..., """
                """"original_max_position_embeddings": ...}}'"""
            )
        return self.context_length


def _check_override(value: Any, nested: int = 0) -> None:
    """Accepts only what a config.json can contain. Raises SettingsError."""
    if nested > MOST_NESTED:
        raise SettingsError(f"config_override nests more than {MOST_NESTED} deep; give fields of config.json")
    if isinstance(value, str) and not is_unicode(value):
        raise SettingsError(
            f"config_override holds {value[:MOST_SHOWN]!r}, which is not text; write it in UTF-8"
        )
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise SettingsError(
            f"config_override holds a whole number of {value.bit_length()} bits; use at most 63"
        )
    if isinstance(value, Mapping):
        for part in (*value.keys(), *value.values()):
            _check_override(part, nested + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_override(part, nested + 1)
