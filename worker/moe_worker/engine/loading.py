"""Loads a model from a checkpoint directory and engine options."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from moe_worker.config.attention import LatentConfig
from moe_worker.config.directory import find_checkpoint, read_checkpoint_config
from moe_worker.config.engine import EngineOptions
from moe_worker.config.mesh import MeshShape
from moe_worker.config.model import ModelConfig
from moe_worker.config.quantization import PackedStorage, SparseStorage
from moe_worker.engine import gpu
from moe_worker.engine.routing import balance, domains_to_learn, learner_of, nudges_of, with_mass
from moe_worker.engine.spread import Spread
from moe_worker.errors import SettingsError
from moe_worker.kernels.cpu.library import Kernels
from moe_worker.kernels.cpu.weights import GROUPS, SPARSE_GROUPS
from moe_worker.kernels.registry import Hardware, choose, explain, probe_cpu
from moe_worker.kernels.transfer import make_current
from moe_worker.kvcache.host import check_memory
from moe_worker.kvcache.paged import FP8, CacheShape, PagedCache
from moe_worker.mesh.member import Member
from moe_worker.mesh.part import share_of
from moe_worker.mesh.rank_stage import ModelStage
from moe_worker.mesh.recovery import agree_on_pages
from moe_worker.mesh.runner import MeshRunner
from moe_worker.models.checkpoint import load_model
from moe_worker.models.deepseek import DeepseekModel
from moe_worker.models.digests import check_digests
from moe_worker.models.layers import StageModel
from moe_worker.models.memory import keep_freed
from moe_worker.models.native import NativeModel
from moe_worker.models.runner import ModelRunner, Runner
from moe_worker.models.stored import Placement
from moe_worker.models.tokenizer import Tokenizer
from moe_worker.models.tokenizer_guard import load_guarded
from moe_worker.moe.learning import RoutingLearner
from moe_worker.sampling.guides import Guides

log = logging.getLogger(__name__)
# Number of active weights up to which one thread is as fast as several.
SINGLE_THREAD_BYTES = 64 * 2**20
# Of the pages of a mesh that takes the room that its GPUs have.
LATER_SHARE = 0.01
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DTYPE_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_DTYPES = DTYPE_BY_NAME | {"fp8": FP8}
ONE_PROCESS = MeshShape()
CPU_CACHE, GPU_CACHE = ("float32", "bfloat16"), ("bfloat16", "fp8")


@dataclass(frozen=True)
class LoadedModel:
    """The constant state of the engine, and its cache.

    member: this process in its mesh; None: it is the whole replica. prepared: see `guides`.
    """

    config: ModelConfig
    runner: Runner
    tokenizer: Tokenizer
    cache: PagedCache
    context: int
    format: str
    member: Member | None = None
    learner: RoutingLearner | None = None
    prepared: Guides | None = None

    @cached_property
    def guides(self) -> Guides:
        """Compiles output formats. `prepared` ones have read the vocabulary; others do for a first format."""
        return self.prepared or _guides_of(self.tokenizer, self.config)

    @property
    def shards(self) -> Sequence[int]:
        """Caches of the size of `cache` over which new sequences are spread, by number."""
        return self.runner.shards if isinstance(self.runner, MeshRunner) else (0,)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.cache.device


def load(
    directory: Path,
    options: EngineOptions,
    progress: bool,
    load_tokenizer: Callable[[Path, ModelConfig], Tokenizer] = load_guarded,
    prepare_formats: bool = False,
) -> LoadedModel:
    """Checks everything that is cheap to check, then reads the weights. Raises WorkerError.

    prepare_formats: reads the vocabulary for output formats, before this process meets other ranks: it sends
    no heartbeat meanwhile. The device becomes the current one of the calling thread, which is the one that
    may compute.
    """
    directory = find_checkpoint(directory)
    config = with_mass(read_checkpoint_config(directory, options.config_override), directory, options)
    context = options.context_for(config.max_position_embeddings)
    tokenizer = load_tokenizer(directory, config)
    device = choose_device(options.device)
    make_current(device)
    known = domains_to_learn(config, directory, options, device)
    nudges = nudges_of(config, directory, options)
    dtype = choose_dtype(options.dtype, device)
    weights = choose_format(options.format, config)
    placement = Placement(dtype, device, weights, options.check_weights)
    name = NAMES[dtype] if weights == "dense" else weights
    shape, spread, stage, share = options.mesh_shape, None, None, 1.0
    hardware = probe(device, config, name, shape)
    chosen = choose("pass", name, hardware)
    log.info("kernels: %s", chosen)
    path = chosen.implementation
    rows = _cache_shape(config, options, dtype, path)
    if shape.ranks == 1:
        _check_sizes(config, name, rows, options, context, device)
    threads = options.threads or suggested_threads(config, dtype)
    torch.set_num_threads(threads)
    if options.check_digests:
        check_digests(directory, usable_cores(), progress)
    guides = _guides_of(tokenizer, config) if prepare_formats else None
    if guides is not None:
        guides.prepare()
    with contextlib.ExitStack() as unfinished, torch.inference_mode():
        if shape.ranks > 1:
            spread = Spread.join(directory, config, options, placement)
            unfinished.push(_giving_up(spread.member))
            stage = spread.stage()
            rows = replace(rows, layers=len(stage.layers))
            share = share_of(stage, spread.stored)
            _check_sizes(config, name, rows, options, context, device, share)
        model = load_model(directory, config, placement, context, progress, stage)
        balance(model, nudges)
        member = None if spread is None else spread.member
        grows = gpu.growth(config, name, device, share, shape.expert > 1) if path == "triton" else 0
        cache = _allocate_cache(rows, options, context, device, member, grows)
        runner = _runner(model, cache, options, context, path, progress, spread)
        learner = learner_of(runner, config, known)
        unfinished.pop_all()
    if device.type == "cpu":
        keep_freed()
    return LoadedModel(config, runner, tokenizer, cache, context, name, member, learner, guides)


def _guides_of(tokenizer: Tokenizer, config: ModelConfig) -> Guides:
    return Guides(tokenizer, config.vocab_size, config.eos_token_ids, torch.get_num_threads())


def _giving_up(member: Member) -> Callable[..., None]:
    """The end of a block that loads: other ranks are told why it fails."""

    def leave(_kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            member.give_up(error)

    return leave


def _cache_shape(config: ModelConfig, options: EngineOptions, dtype: torch.dtype, path: str) -> CacheShape:
    """The shape of a cache for a model computed in `dtype` by the kernels `path`. Raises SettingsError."""
    width = gpu.cache_width(config) if path == "triton" else config.attention.cache_width
    rows = cache_dtype(options, dtype, path)
    return CacheShape(config.num_hidden_layers, width, options.page_size, rows)


def _check_sizes(
    config: ModelConfig, number_format: str, rows: CacheShape, options: EngineOptions, context: int,
    device: torch.device, share: float = 1.0,
) -> None:  # fmt: skip
    """Raises SettingsError if the weights, of which this process has `share`, the cache and what it evicts do
    not fit into memory, as far as that is known before the weights are read.
    """
    on_gpu = device.type == "cuda"
    if options.kv_offload:
        check_memory(options.kv_offload, rows.page_bytes, pinned=on_gpu)
    if on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        spread = options.mesh_shape.expert > 1
        gpu.check_weights_fit(config, number_format, device, free, share, spread)
        left = free - share * gpu.weight_bytes(config, number_format, spread)
        passes = gpu.pass_bytes(config, options)
        gpu.check_cache_fits(rows, options, context, device, left, total, passes)
    else:  # such memory is only mapped, which takes no time
        pages = rows.pages_of(context, options.kv_memory, options.max_batch_size)
        PagedCache.allocate(rows, pages, device)


def _allocate_cache(
    shape: CacheShape, options: EngineOptions, context: int, device: torch.device, member: Member | None,
    grows: int,
) -> PagedCache:  # fmt: skip
    """Allocates the memory that the user set, or on a GPU what the weights leave, which need `grows` more
    bytes than now. Raises SettingsError if it is too small.
    """
    room = gpu.cache_bytes(device, shape, options, grows) if device.type == "cuda" else None
    pages = shape.pages_of(context, options.kv_memory, options.max_batch_size, room)
    if member is not None:
        full = shape.pages_for(context) * options.max_batch_size
        by_room = options.kv_memory is None and room is not None
        trim = partial(_trimmed, least=shape.pages_for(context), full=full) if by_room else None
        pages = agree_on_pages(member, pages, trim=trim)
    return PagedCache.allocate(shape, pages, device)


def _trimmed(pages: int, least: int, full: int) -> int:
    """Of the pages that all ranks of a mesh found room for, those that it uses: a rank that replaces a lost
    one may find a little less room, and must have as many. full: pages of a full batch, more than which no
    rank asks for.
    """
    return pages if pages >= full else max(least, pages - math.ceil(pages * LATER_SHARE))


def cache_dtype(options: EngineOptions, dtype: torch.dtype, path: str) -> torch.dtype:
    """The dtype of the cache, for a model computed in `dtype` by the kernels `path`. Raises SettingsError."""
    if options.kv_dtype == "auto":
        return torch.bfloat16 if path.startswith("cpu/") and options.dtype == "auto" else dtype
    allowed = GPU_CACHE if path == "triton" else CPU_CACHE if path.startswith("cpu/") else tuple(CACHE_DTYPES)
    if options.kv_dtype not in allowed:
        raise SettingsError(
            f"kv_dtype {options.kv_dtype} is not for these kernels ({path}); use {' or '.join(allowed)}"
        )
    return CACHE_DTYPES[options.kv_dtype]


def _runner(
    model: DeepseekModel, cache: PagedCache, options: EngineOptions, context: int, path: str,
    progress: bool, spread: Spread | None,
) -> Runner:  # fmt: skip
    if path == "triton":
        if spread is None:
            return gpu.make_runner(model, cache, options, context, progress)
        group = spread.member.group
        part = gpu.make_stage(model, cache, group, options, context, progress)
        return spread.runner(part, cache, feeds=True)
    stage: StageModel = model
    if path.startswith("cpu/"):
        stage = NativeModel.of(model, Kernels(threads=torch.get_num_threads()), consume=True)
    return ModelRunner(stage) if spread is None else spread.runner(ModelStage(stage), cache)


def explain_choice(directory: Path, options: EngineOptions) -> list[str]:
    """The implementations for this checkpoint, and the reasons. Raises WorkerError."""
    config = read_checkpoint_config(find_checkpoint(directory), options.config_override)
    device = choose_device(options.device)
    dtype, weights = choose_dtype(options.dtype, device), choose_format(options.format, config)
    name = NAMES[dtype] if weights == "dense" else weights
    first = f"{config.architecture} on {device}, weights {weights}, computed in {NAMES[dtype]}"
    return [first, *explain(name, probe(device, config, name, options.mesh_shape))]


def probe(
    device: torch.device, config: ModelConfig, number_format: str, shape: MeshShape = ONE_PROCESS
) -> Hardware:
    """Kernels that `device` has for a model in `number_format` (see registry.choose)."""
    if device.type == "cuda":
        return replace(gpu.probe_gpu(config, number_format, device), ranks=shape.expert)
    reason = _unsupported_on_cpus(config, number_format)
    found = probe_cpu() if reason is None else Hardware("cpu", None, reason)
    return replace(found, ranks=shape.expert)


def _unsupported_on_cpus(config: ModelConfig, number_format: str) -> str | None:
    """Why the CPU kernels cannot compute the model in `number_format`; None if they can."""
    if not isinstance(config.attention, LatentConfig):
        return f"there are no CPU kernels for the attention of {config.architecture} yet"
    storage = config.storage
    if number_format == "w4a8" and isinstance(storage, PackedStorage | SparseStorage):
        whole = GROUPS if isinstance(storage, PackedStorage) else SPARSE_GROUPS
        if storage.group is not None and storage.group % whole:
            return f"the CPU kernels take groups of multiples of {whole} inputs, not of {storage.group}"
    return None


def choose_device(name: str) -> torch.device:
    """The device that `name` ("auto", "cpu", "cuda", "cuda:N") means here. Raises SettingsError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {name} is not available: torch sees {torch.cuda.device_count()} GPUs; use cpu or auto"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` ("auto", "float32", "bfloat16") means on `device`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPE_BY_NAME[name]


def choose_format(name: str, config: ModelConfig) -> str:
    """The format that `name` (of FORMATS) means for this checkpoint."""
    if name == "auto":
        if isinstance(config.storage, SparseStorage):
            return "w4a8"  # such weights were trained for it, and kernels exist
        return "w4a16" if isinstance(config.storage, PackedStorage) else "dense"
    return name


def suggested_threads(config: ModelConfig, dtype: torch.dtype) -> int:
    """All usable cores, or one for models so small that threads mostly wait for each other.

    A step with 20 MB of active weights takes 5.8 ms on one thread under any load. On two threads it takes 4.3
    ms on idle cores, but 13 to 400 ms on shared cores, such as those of a Kubernetes node.
    """
    small = config.parameters_active * dtype.itemsize <= SINGLE_THREAD_BYTES
    return 1 if small else usable_cores()


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and its cgroup's quota (v2 or v1) if any."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cgroup_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text()
        period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text()
    except OSError:
        return None
    return int(quota) / int(period) if int(quota) > 0 else None
