"""Loads a checkpoint and prints, in bytes, the most memory that took and the tensors that are left.

python -m tests.worker.load_memory SMALL_CHECKPOINT CHECKPOINT FORMAT
"""

import gc
import json
import sys
import warnings
from pathlib import Path

import torch

from moe_worker.config.engine import EngineOptions
from moe_worker.engine.loading import load


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def tensor_bytes():
    """Of all that live, memory that several share once, and without what only aligns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    largest = {}
    for each in tensors:
        where = each.untyped_storage().data_ptr()
        largest[where] = max(largest.get(where, 0), each.nbytes)
    return sum(largest.values())


def main(small, directory, number_format):
    options = EngineOptions(device="cpu", format=number_format, context_length=64, max_batch_size=1)
    load(Path(small), options, progress=False)  # whatever the first load brings into memory for good
    gc.collect()
    resident, tensors = status("VmRSS"), tensor_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what it is now
    _loaded = load(Path(directory), options, progress=False)  # lives until the end
    peak = status("VmHWM") - resident
    gc.collect()
    print(json.dumps({"peak": peak, "kept": tensor_bytes() - tensors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
