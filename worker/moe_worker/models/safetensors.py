"""The tensors of a checkpoint, from the headers of its safetensors files (no torch, no data).

Format: https://huggingface.co/docs/safetensors: 8 bytes of header length (little endian), a header in JSON,
data.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_worker.config.directory import read_json
from moe_worker.errors import CheckpointError
from moe_worker.models.layouts import INDEX_FILE, SINGLE_FILE, shards_without_index
from moe_worker.reading import open_file, present, refuse_pointer

# Eight times the largest published index.
LARGEST_INDEX = 100_000_000
# The same bound as the safetensors library sets.
LARGEST_HEADER = 100_000_000
MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: dtype, shape and the `offset` of its first byte."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint by name, from one file or from shards with or without an index.

    Raises CheckpointError for a missing or damaged file.
    """
    if present(directory / INDEX_FILE):
        return _collect(_listed(directory))
    if present(directory / SINGLE_FILE):
        return _collect([directory / SINGLE_FILE])
    return _collect(shards_without_index(directory))


def _collect(files: Sequence[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in files:
        for tensor in read_header(path):
            if tensor.name in found:
                raise CheckpointError(
                    f"{path} holds tensor {tensor.name}, which {found[tensor.name].file.name} holds too; "
                    "remove the file that does not belong to the checkpoint"
                )
            found[tensor.name] = tensor
    return found


def _listed(directory: Path) -> list[Path]:
    """The shards that the index lists."""
    index = directory / INDEX_FILE
    weight_map = read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must be an object that gives a file name for each tensor")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{index}: shard {name!r} must be the name of a file in the same directory")
        if not present(directory / name):
            raise CheckpointError(
                f"{directory / name} is missing, but {INDEX_FILE} lists it; copy the shard too"
            )
    return [directory / name for name in names]


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors in one file, checked against its size. Raises CheckpointError."""
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            refuse_pointer(path, head + file.read(64 - len(head)))
            length = int.from_bytes(head, "little")
            if size < 8 or length > size - 8 or length > LARGEST_HEADER:
                raise _truncated(path, f"its header should take {length} bytes, the file has {size}")
            file.seek(8)
            header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; give a readable file") from error
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _truncated(path, f"its header cannot be read ({_first_line(error)})") from error
    if not isinstance(entries, dict):
        raise _truncated(path, "its header is not a JSON object")
    start = 8 + length
    tensors = [_entry(path, name, entry, start) for name, entry in entries.items() if name != "__metadata__"]
    _check_layout(path, tensors, start, size)
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_layout(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Tensors must be contiguous from byte `start` to the end of the file, `size`."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        gap = tensor.offset - end
        if gap:
            how = "overlaps the one before it" if gap < 0 else f"leaves {gap} bytes before it"
            raise _truncated(path, f"tensor {tensor.name!r} {how}")
        end += tensor.nbytes
    if end != size:
        raise _truncated(
            path, f"its header promises {end - start} bytes of data, the file has {size - start}"
        )


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """The tensor; data begins at byte `start` of the file."""
    try:
        begin, end = _sizes(entry["data_offsets"])
        shape, dtype = _sizes(entry["shape"]), entry["dtype"]
        if end < begin or len(shape) > MOST_DIMENSIONS or not isinstance(dtype, str):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _truncated(path, f"the header entry of {name!r} is malformed") from error
    return StoredTensor(name, path, dtype, shape, end - begin, start + begin)


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise TypeError("sizes must be a list of integers of at least 0")
    return tuple(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _truncated(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged: {why}; copy it again")
