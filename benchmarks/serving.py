"""The cost of serving compared with the engine alone, and the gain of a cached prompt.

    python -m benchmarks.serving CHECKPOINT [--streams 64 256] [--tokens 128 512] [--clients 1] [--prompt 64]
        [--rounds 3] [--long 4096] [--device auto] [--format auto] [--threads N] [--simulated] [--json]

"through gRPC": tokens per second of all streams through `moe-worker serve` over loopback; the baseline is the
engine in one process with the same requests. Rounds alternate, nothing is cached, medians are reported. The
edge, which is the worker without its engine, has a process of its own; `--clients` spreads the streams over
several client processes, since one of Python limits them as much as the edge does. With `--simulated` a step
computes nothing, but takes as long as on a GPU (benchmarks/simulated.py): that shows the edge alone.
"cached": time to first token of a prompt of LONG tokens of which another request had the first 90 %; the
baseline is a prompt with nothing in common (LONG is limited by the model's context).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import simulated
from benchmarks.commands import positive, run
from moe_worker.config.engine import EngineOptions
from moe_worker.engine.core import EngineCore
from moe_worker.engine.loading import LoadedModel, load
from moe_worker.engine.requests import Request
from moe_worker.sampling.parameters import SamplingParameters

Prompts = list[tuple[int, ...]]
# `moe-worker` with another engine process.
SIMULATED = """
from moe_worker.service import engine_client
engine_client.ENGINE = "benchmarks.simulated"
from moe_worker.__main__ import main
main()
"""


def main() -> None:
    args = arguments()
    options = EngineOptions(
        device=args.device,
        format=args.format,
        threads=args.threads,
        max_batch_size=max(args.streams),
        prefix_cache=False,
    )
    if args.simulated:
        loaded = simulated.load(args.checkpoint, options, progress=False)
    else:
        loaded = load(args.checkpoint, options, progress=False)
    device = f"{loaded.device}, {platform.machine()}, {loaded.format}"
    device += ", simulated steps" if args.simulated else ""
    with serving(args) as worker:
        for tokens, streams in itertools.product(args.tokens, args.streams):
            compare(loaded, options, worker, streams, tokens, device, args)
    if args.simulated:
        return
    cached, fresh = first_token_times(loaded, args.long, args.rounds)
    what = "time to first token, 90 % of the prompt cached, against none"
    report(what, 1e3 * cached, 1e3 * fresh, "ms", device, args.json)


def compare(
    loaded: LoadedModel, options: EngineOptions, worker: Worker, streams: int, tokens: int, device: str,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Rounds through gRPC and without, in turn; the first is left out."""
    bare, rounds = [], []
    for number in range(args.rounds + 1):
        prompts = make_prompts(loaded, streams, args.prompt, seed=number)
        bare.append(bare_rate(loaded, options, prompts, tokens))
        rounds.append(served(worker, prompts, tokens, args.clients))
    behind, messages = f", {streams} streams of {tokens} tokens", sum(each.messages for each in rounds[1:])
    produced = sum(each.tokens for each in rounds[1:])

    def say_of(what: str, ours: float, unit: str, baseline: float | None = None) -> None:
        report(what + behind, ours, baseline, unit, device, args.json)

    rate = statistics.median(each.rate for each in rounds[1:])
    say_of("through gRPC against the bare engine", rate, "tok/s", statistics.median(bare[1:]))
    say_of("tokens of a message", produced / messages, "tokens")
    edge, client = (sum(getattr(each, name) for each in rounds[1:]) for name in ("edge_cpu", "client_cpu"))
    say_of("CPU time of the edge for a message", 1e6 * edge / messages, "us")
    say_of("CPU time of the edge for a token", 1e6 * edge / produced, "us")
    say_of("CPU time of the clients for a message", 1e6 * client / messages, "us")
    for name in ("firsts", "gaps"):
        cuts = statistics.quantiles([x for each in rounds[1:] for x in getattr(each, name)], n=100)
        title = "time to first token" if name == "firsts" else "time between messages"
        say_of(f"{title}, median", 1e3 * cuts[49], "ms")
        say_of(f"{title}, p99", 1e3 * cuts[98], "ms")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=positive, nargs="+", default=[64])
    parser.add_argument("--clients", type=positive, default=1, help="client processes, a connection each")
    parser.add_argument("--prompt", type=positive, default=64)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[64], help="of a stream")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--long", type=positive, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--simulated", action="store_true", help="steps that only take a GPU's time")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_prompts(loaded: LoadedModel, count: int, length: int, seed: int) -> Prompts:
    chance = random.Random(seed)
    return [tuple(chance.choices(range(loaded.config.vocab_size), k=length)) for _ in range(count)]


def bare_rate(loaded: LoadedModel, options: EngineOptions, prompts: Prompts, tokens: int) -> float:
    core = EngineCore(loaded, options)
    sampling = SamplingParameters(max_tokens=tokens, ignore_eos=True)
    began, produced = time.perf_counter(), 0
    for number, prompt in enumerate(prompts):
        core.submit(Request(number, prompt, sampling, seed=0))
    while not core.idle:
        produced += len(core.step())
    return produced / (time.perf_counter() - began)


@dataclass(frozen=True)
class Served:
    """What clients saw of one round, and the time of the edge's process; seconds.

    gaps: between two messages of a stream.
    """

    rate: float
    messages: int
    tokens: int
    firsts: list[float]
    gaps: list[float]
    edge_cpu: float
    client_cpu: float


def served(worker: Worker, prompts: Prompts, tokens: int, clients: int) -> Served:
    """All streams at once, from `clients` processes."""
    command = [sys.executable, "-m", "benchmarks.stream_client"]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(clients)
        ]
        for number, process in enumerate(processes):
            task = {"address": worker.address, "prompts": prompts[number::clients], "tokens": tokens}
            say(process, json.dumps(task))
        for process in processes:
            heard(process)
        cpu = worker.edge_cpu()
        for process in processes:
            say(process, "")
        parts = [json.loads(heard(process)) for process in processes]
        cpu = worker.edge_cpu() - cpu
    began = min(part["began"] for part in parts)
    came = [stream for part in parts for stream in part["came"]]
    produced = sum(part["tokens"] for part in parts)
    return Served(
        rate=produced / (max(part["ended"] for part in parts) - began),
        messages=sum(map(len, came)),
        tokens=produced,
        firsts=[stream[0] - began for stream in came],
        gaps=[b - a for stream in came for a, b in itertools.pairwise(stream)],
        edge_cpu=cpu,
        client_cpu=sum(part["cpu"] for part in parts),
    )


def say(process: subprocess.Popen[str], line: str) -> None:
    if process.stdin is None:
        raise SystemExit("a client has no standard input")
    process.stdin.write(line + "\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise SystemExit("a client ended before it was done")
    return line


@dataclass(frozen=True)
class Worker:
    """A `moe-worker serve`; its edge is the process itself, the engine a child."""

    address: str
    pid: int

    def edge_cpu(self) -> float:
        """Seconds of CPU time of the edge so far, on Linux."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(each.read_text().split()[0]) for each in threads) / 1e9


def serving(args: argparse.Namespace) -> contextlib.AbstractContextManager[Worker]:
    """A worker with the same options."""
    command = [sys.executable, "-c", SIMULATED] if args.simulated else [sys.executable, "-m", "moe_worker"]
    command += ["serve"]
    command += ["--model", str(args.checkpoint), "--listen", "127.0.0.1:0", "--device", args.device]
    command += ["--format", args.format, "--max-batch-size", str(max(args.streams)), "--no-prefix-cache"]
    command += ["--threads", str(args.threads)] if args.threads else []
    return running(command)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[Worker]:
    """A worker that `command` starts, when it serves."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            if process.stderr is None:
                raise SystemExit("the worker has no log")
            port, last = "", ""
            for line in process.stderr:
                last = line.strip() or last
                port = found[1] if (found := re.search(r"listening on port (\d+)", line)) else port
                if "INFO serving " in line:
                    break
            else:
                raise SystemExit(f"the worker ended before it served: {last}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it never blocks
            yield Worker(f"127.0.0.1:{port}", process.pid)
        finally:
            process.kill()


def first_token_times(loaded: LoadedModel, long: int, rounds: int) -> tuple[float, float]:
    """Seconds with 90 % cached and with nothing, medians; rounds alternate."""
    length = min(long, loaded.context - 1)
    options = EngineOptions(max_batch_size=1, prefill_tokens=length)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        core = EngineCore(loaded, options)
        [first, other] = make_prompts(loaded, 2, length, seed=number)
        first_token(core, 0, first)
        times[0].append(first_token(core, 1, first[: length * 9 // 10] + other[length * 9 // 10 :]))
        times[1].append(first_token(core, 2, other))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def first_token(core: EngineCore, number: int, prompt: tuple[int, ...]) -> float:
    began = time.perf_counter()
    core.submit(Request(number, prompt, SamplingParameters(max_tokens=1), seed=0))
    while not core.idle:
        core.step()
    return time.perf_counter() - began


def report(what: str, ours: float, peer: float | None, unit: str, device: str, as_json: bool) -> None:
    line = {"what": what, "ours": round(ours, 2), "peer": peer and round(peer, 2)}
    line["ratio"] = peer and round(ours / peer, 3)
    against = f" against {peer:,.1f} {unit}, {ours / peer:.2f}x" if peer else f" {unit}"
    text = json.dumps(line | {"unit": unit, "device": device})
    print(text if as_json else f"{what}: {ours:,.1f}{against} ({device})", flush=True)


if __name__ == "__main__":
    run(main)
