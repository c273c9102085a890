"""Loading a checkpoint: seconds from disk and from the page cache, and memory against a model of it.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_load CHECKPOINT [--format w4a8] [--device auto]
        [--context 4096] [--batch 16] [--rounds 3] [--json]

benchmarks.gpu_checkpoint writes a checkpoint with random weights. Each load has a process of its own; before
those "from disk" the kernel is asked to drop the checkpoint's pages from its cache. Seconds are medians, and
their parts are the weights (reading, rounding and packing), the KV cache, and the runner (on a GPU converting
layers to the kernels' layout, compiling, and recording graphs). Memory is that of the GPU, or of this process
on a CPU; the baseline of each kind is the engine's own estimate (engine/gpu.py, kvcache/paged.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import positive, run
from moe_worker.config.directory import find_checkpoint
from moe_worker.config.engine import FORMATS, EngineOptions
from moe_worker.engine import gpu, loading
from moe_worker.models.memory import weight_memory

GB = 1e9
PARTS = {"load_model": "weights", "_allocate_cache": "KV cache", "_runner": "runner"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="w4a8")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--context", type=positive, default=4096)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--once", action="store_true", help="one load in this process (used by itself)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(load_once(args)))
        return
    files = sorted(find_checkpoint(args.checkpoint).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / GB
    found: dict[str, Any] = {}
    for source in ("disk", "page cache"):
        rounds = []
        for _ in range(args.rounds):
            prepare(files, cached=source == "page cache")
            rounds.append(child(sys.argv[1:]))
        found = rounds[-1]
        total = statistics.median(each["seconds"] for each in rounds)
        tell(f"load of {size:.1f} GB as {args.format} from {source}", total, None, "s", found["device"], args)
        for part in PARTS.values():
            seconds = statistics.median(each["parts"][part] for each in rounds)
            tell(f"load from {source}, {part}", seconds, None, "s", found["device"], args)
    for kind, (measured, expected) in found["memory"].items():
        tell(f"memory, {kind}", measured / GB, expected and expected / GB, "GB", found["device"], args)


def prepare(files: list[Path], *, cached: bool) -> None:
    """Reads the files, or lets the kernel forget them."""
    for file in files:
        with file.open("rb") as opened:
            if cached:
                while opened.read(1 << 26):
                    pass
            else:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_load", *arguments, "--once"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


class Watch:
    """Times functions of `loading`, and notes memory before and behind each, and at its peak."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, dict[str, float]()
        self.used: dict[str, tuple[int, int]] = {}
        self.kinds: dict[str, int] = {}

    def wrap(self, name: str) -> None:
        inner: Callable[..., Any] = getattr(loading, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, begin = self.allocated(), time.perf_counter()
            self.reset_peak()
            result = inner(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.parts[PARTS[name]] = time.perf_counter() - begin
            self.used[PARTS[name]] = self.allocated() - before, self.peak() - before
            if name == "load_model":
                self.kinds = weight_memory(result)
            return result

        setattr(loading, name, timed)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else status("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else status("VmHWM")

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what it is now


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def load_once(args: argparse.Namespace) -> dict[str, Any]:
    device = loading.choose_device(args.device)
    watch = Watch(device)
    for name in PARTS:
        watch.wrap(name)
    options = EngineOptions(
        device=args.device, format=args.format, context_length=args.context, max_batch_size=args.batch
    )
    begin = time.perf_counter()
    loaded = loading.load(args.checkpoint, options, progress=False)
    seconds = time.perf_counter() - begin
    weights, cache = gpu.weight_bytes(loaded.config, loaded.format), loaded.cache
    kept, most = watch.used["weights"]
    runner_kept, runner_most = watch.used["runner"]
    cache_bytes = (cache.pages + 1) * cache.page_size * cache.shape.bytes_per_token
    memory: dict[str, tuple[int, int | None]] = {
        f"weights as loaded, {kind}": (nbytes, None) for kind, nbytes in watch.kinds.items() if nbytes
    }
    memory |= {
        "weights as loaded": (kept, weights),
        "highest while weights load": (most, weights),
        "weights as the kernels read them, and graphs": (kept + runner_kept, weights),
        "highest while the runner is made": (kept + runner_most, weights),
        "KV cache": (watch.used["KV cache"][0], cache_bytes if device.type == "cuda" else None),
        "host, highest": (status("VmHWM"), None),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"seconds": seconds, "parts": watch.parts, "memory": memory, "device": name}


def tell(
    what: str, ours: float, baseline: float | None, unit: str, device: str, args: argparse.Namespace
) -> None:
    row = {"what": what, "ours": round(ours, 3), "peer": baseline and round(baseline, 3)}
    row |= {"ratio": round(ours / baseline, 3) if baseline else None, "unit": unit, "device": device}
    beside = f"   expected {baseline:.3f}, {ours / baseline:.2f}x" if baseline else ""
    print(json.dumps(row) if args.json else f"{what:60} {ours:10.3f} {unit}{beside}", flush=True)


if __name__ == "__main__":
    run(main)
