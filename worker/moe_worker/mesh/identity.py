"""What all ranks of a replica must have in common, as one digest."""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moe_worker.config.directory import CONFIG, LARGEST_CONFIG
from moe_worker.config.engine import EngineOptions
from moe_worker.config.routing_report import ROUTING_FILE
from moe_worker.mesh.messages import CODEC
from moe_worker.models.safetensors import StoredTensor
from moe_worker.reading import open_file, present, read_file

# Options that may differ between ranks; all others change what a rank computes or how much it holds.
OWN = (
    "mesh_rank",
    "mesh_leader",
    "mesh_tls",
    "device",
    "threads",
    "check_weights",
    "check_digests",
    "max_queue",
    "learn_routing",
    "mesh_reforms",
    "rebalance",
    "rebalance_interval",
    "rebalance_threshold",
)
DISTRIBUTION = "moe-operator"
SAMPLES, SAMPLE_BYTES = 16, 4096


def mesh_digest(directory: Path, stored: Mapping[str, StoredTensor], options: EngineOptions) -> str:
    """SHA-256 in hexadecimal of config.json, routing.json, headers, samples of each file, and options.

    Samples, because reading all of a checkpoint takes minutes: two trainings of one shape differ everywhere.
    """
    digest = hashlib.sha256()
    shared = {name: value for name, value in asdict(options).items() if name not in OWN}
    digest.update(repr(sorted(shared.items())).encode())
    digest.update(read_file(directory / CONFIG, LARGEST_CONFIG))
    if present(directory / ROUTING_FILE):
        digest.update(read_file(directory / ROUTING_FILE, LARGEST_CONFIG))
    for name in sorted(stored):
        tensor = stored[name]
        digest.update(repr((name, tensor.file.name, tensor.dtype, tensor.shape, tensor.offset)).encode())
    for path in sorted({tensor.file for tensor in stored.values()}):
        digest.update(_samples(path))
    return digest.hexdigest()


def worker_version() -> str:
    """Of this worker, and a digest of the messages between ranks: those of one release may change before the
    next.
    """
    try:
        release = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        release = "unreleased"
    return f"{release}+{CODEC.digest[:8]}"


def _samples(path: Path) -> bytes:
    with open_file(path) as file:
        size, found = path.stat().st_size, []
        for number in range(SAMPLES):
            file.seek(size * number // SAMPLES)
            found.append(file.read(SAMPLE_BYTES))
    return b"".join(found)
