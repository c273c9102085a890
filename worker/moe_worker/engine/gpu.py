"""GPU parts of loading: whether the kernels support a model, whether it fits, and its runner."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist

from moe_worker.config.attention import LatentConfig
from moe_worker.config.engine import EngineOptions
from moe_worker.config.model import ModelConfig
from moe_worker.config.quantization import SparseStorage
from moe_worker.errors import DeviceMemoryError, SettingsError
from moe_worker.kernels.registry import Hardware
from moe_worker.kvcache.paged import CacheShape, PagedCache
from moe_worker.kvcache.pinned import frame_bytes
from moe_worker.mesh.rank_stage import RankStage
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.runner import Runner
from moe_worker.quant.formats import FORMATS

log = logging.getLogger(__name__)
GB = 10**9
CUDA = torch.device("cuda")
# Share of a GPU's memory that is left for forward passes and their CUDA graphs.
SPARE_SHARE = 0.1
# Bits that 1:4 sparse experts save for each weight: one value of four stays, with a position of two bits.
SPARSE_SAVES = 4 - 1.5


def probe_gpu(config: ModelConfig, number_format: str, device: torch.device = CUDA) -> Hardware:
    """Whether the Triton kernels compute this model in `number_format` on `device`, and why."""
    if importlib.util.find_spec("triton") is None:
        return Hardware("cuda", None, "triton is not installed")
    if number_format == "fp32":
        return Hardware("cuda", None, "the kernels compute in bf16, and dtype float32 was asked for")
    from moe_worker.kernels.triton import e4m3  # noqa: PLC0415 - triton is not everywhere
    from moe_worker.models.cuda_build import unsupported  # noqa: PLC0415

    reason = unsupported(config, number_format)
    if reason is not None:
        return Hardware("cuda", None, reason)
    lacking = e4m3.lacking(device)
    return Hardware(
        "cuda", "triton", "this is a CUDA device",
        e4m3=lacking is None, e4m3_reason=lacking or "this device has FP8 tensor cores",
        sparse=isinstance(config.storage, SparseStorage),
    )  # fmt: skip


def cache_width(config: ModelConfig) -> int:
    """Values of a cache row in the kernels' layout: padded if a rank is not a power of two."""
    from moe_worker.models.cuda_build import Sizes  # noqa: PLC0415 - triton is not everywhere

    return Sizes.of(config.latent).cache_width(config.latent)


def make_runner(
    model: DeepseekModel, cache: PagedCache, options: EngineOptions, context: int, progress: bool
) -> Runner:
    """The model on the Triton kernels, with captured steps."""
    from moe_worker.models.cuda_build import prepare  # noqa: PLC0415 - triton is not everywhere
    from moe_worker.models.cuda_runner import CudaRunner  # noqa: PLC0415

    most, tokens = options.max_batch_size, options.prefill_tokens
    with _room_for_passes(model.device):
        return CudaRunner(prepare(model, consume=True), cache, most, context, tokens, progress)


def make_stage(
    model: DeepseekModel, cache: PagedCache, group: dist.ProcessGroup | None, options: EngineOptions,
    context: int, progress: bool,
) -> RankStage:  # fmt: skip
    """A mesh rank's stage on the Triton kernels, with captured decode steps; all ranks of the stage call."""
    from moe_worker.mesh.cuda_stage import CudaStage  # noqa: PLC0415 - triton is not everywhere

    most, tokens = options.max_batch_size, options.prefill_tokens
    with _room_for_passes(model.device):
        return CudaStage(model, cache, group, most, context, tokens, progress)


@contextlib.contextmanager
def _room_for_passes(device: torch.device) -> Iterator[None]:
    """Raises DeviceMemoryError where the first forward passes and their CUDA graphs find no memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"{device} has no memory for forward passes next to the weights and the KV cache; lower the KV "
            "memory, the batch size or the context length"
        ) from error


def weight_bytes(config: ModelConfig, number_format: str, spread: bool = False) -> int:
    """Estimated bytes of the weights on the kernels: all are packed but the embedding, W_UK and W_UV, of
    which W_UV is kept in two layouts.

    spread: whether the ranks of a mesh share the experts, so that sparse ones become dense.
    """
    dense = 4 if number_format == "fp32" else 2
    bits = FORMATS[number_format].bits if number_format in FORMATS else None
    kept, twice = config.vocab_size * config.hidden_size, 0
    if isinstance(config.attention, LatentConfig):
        latent = config.attention
        each = config.num_hidden_layers * latent.num_attention_heads * latent.kv_lora_rank
        kept += each * (latent.qk_nope_head_dim + latent.v_head_dim)
        twice = each * latent.v_head_dim
    packed_bits = (config.parameters_total - kept) * (8 * dense if bits is None else bits)
    if number_format == "w4a8" and isinstance(config.storage, SparseStorage) and not spread:
        moe, wide = config.moe, len(config.dense_layers) * config.intermediate_size
        wide += len(config.moe_layers) * (moe.routed + moe.shared) * moe.intermediate
        packed_bits -= 3 * config.hidden_size * wide * SPARSE_SAVES
    return int(packed_bits / 8 + (kept + twice) * dense)


def growth(
    config: ModelConfig, number_format: str, device: torch.device, share: float = 1.0, spread: bool = False
) -> int:
    """Bytes by which loaded weights grow when they are prepared for the kernels: 1:4 sparse ones that become
    dense. share, spread: see check_weights_fit.
    """
    if not isinstance(config.storage, SparseStorage):
        return 0
    needed = int(share * weight_bytes(config, number_format, spread))
    return max(0, needed - torch.cuda.memory_allocated(device))


def check_weights_fit(
    config: ModelConfig, number_format: str, device: torch.device, free: int, share: float = 1.0,
    spread: bool = False,
) -> None:  # fmt: skip
    """Raises SettingsError if the weights do not fit into `free` bytes of `device`; the message says what
    would fit.

    share: of the weights, which a rank of a mesh holds. spread: whether its ranks share the experts.
    """
    needed = share * weight_bytes(config, number_format, spread)
    if needed <= free:
        return
    packed = share * weight_bytes(config, "w4a8", spread)
    part, larger = ("the weights", "") if share == 1 else ("the weights of this rank", " or more ranks")
    smaller = f"use --format w4a8, which takes about {packed / GB:.1f} GB, or " if packed < free else ""
    raise SettingsError(
        f"{part} take about {needed / GB:.1f} GB as {number_format}, and {device} has "
        f"{free / GB:.1f} GB free; {smaller}use a larger GPU{larger}"
    )


def cache_bytes(device: torch.device, rows: CacheShape, options: EngineOptions, grows: int) -> int:
    """Bytes that the KV cache may take once the weights are loaded, which will need `grows` more."""
    free, total = torch.cuda.mem_get_info(device)
    return cache_room(free - grows, total, _frames(rows, options))


def cache_room(free: float, total: int, frames: int) -> int:
    """Bytes for the KV cache: of `free` ones of a GPU with `total`, if the KV offload takes `frames`."""
    return max(0, int(free - frames - SPARE_SHARE * total))


def pass_bytes(config: ModelConfig, options: EngineOptions) -> int:
    """Bytes that the largest step takes at least: the logits of a full batch, and a hidden state and its sum
    with what a layer adds for each token.
    """
    batch = options.max_batch_size
    tokens = batch + options.prefill_tokens
    return 4 * batch * config.vocab_size + 2 * 2 * tokens * config.hidden_size


def check_cache_fits(
    rows: CacheShape, options: EngineOptions, context: int, device: torch.device, left: float, total: int,
    passes: int,
) -> None:  # fmt: skip
    """Raises SettingsError if the KV cache does not fit into the `left` bytes of `device`, which has `total`,
    that the weights leave by their estimate, next to `passes` bytes for forward passes.
    """
    frames = _frames(rows, options)
    room = cache_room(left, total, frames)
    needed = rows.pages_of(context, options.kv_memory, options.max_batch_size, room) * rows.page_bytes
    if needed + frames > left:
        also = f" and the frames of the KV offload {frames / GB:.1f} GB" if frames else ""
        raise SettingsError(
            f"the KV cache takes {needed / GB:.1f} GB{also}, and the weights leave about {left / GB:.1f} GB "
            f"of {device}; lower the KV memory, the batch size or the context length"
        )
    spare = left - needed - frames
    if spare < passes:
        raise SettingsError(
            f"the KV cache of {needed / GB:.1f} GB leaves about {spare / GB:.1f} GB of {device} for forward "
            f"passes, which take more than {passes / GB:.1f} GB; lower the KV memory or the batch size"
        )
    if spare < SPARE_SHARE * total and options.kv_memory is not None:
        log.warning(
            "the KV cache of %.1f GB leaves about %.1f GB of %s for forward passes and their CUDA graphs; "
            "leave the KV memory out to keep %.1f GB, or lower it if memory runs out",
            needed / GB, spare / GB, device, SPARE_SHARE * total / GB,
        )  # fmt: skip


def _frames(rows: CacheShape, options: EngineOptions) -> int:
    """Bytes of the GPU through which pages leave and come back."""
    return frame_bytes(options.kv_offload, rows.page_bytes) if options.kv_offload else 0
