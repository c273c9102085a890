"""Runs what has to be measured on a GPU, each part with a time limit, and keeps what it prints.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_session PART ... [--out DIRECTORY] [--tiny] [--keep]
        [--list]

`--list` shows the parts, those first that are worth device time most. A part that fails or takes too long
does not stop the others; the exit status is 1 then. Output goes to DIRECTORY/PART.txt as it comes. `--tiny`
tries the commands on a CPU with a small model, where they can run: the figures mean nothing. `load` writes a
checkpoint of 31 GB into DIRECTORY, `serving` one of 9 GB; --keep keeps them.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.commands import gigabytes, need_gpu, need_space

ROOT = Path(__file__).parents[1]
PYTEST = "{python} -m pytest --noconftest -p no:cacheprovider -q"
MOE = "{python} -m moe_worker"
TEXT = "{out}/text.txt"


@dataclass(frozen=True)
class Part:
    """Commands that answer one question. tiny: the same on a CPU; empty: there are none. checkpoint: format
    of the one that they write to {checkpoint}, with the shape "large", on a CPU "small"; empty: none.
    """

    question: str
    seconds: int
    commands: tuple[str, ...]
    tiny: tuple[str, ...] = ()
    checkpoint: str = ""


PARTS = {
    "tests": Part(
        "do the kernels, the captured steps and the sampler compute what plain torch does?", 590,
        (f"{PYTEST} tests/gpu tests/worker/test_sampling_gpu.py",),
    ),
    "host": Part(
        "does the host limit a decode step of 1 to 256 streams, and which functions take its time?", 300,
        ("{python} -m benchmarks.gpu_decode --formats w4a8 --skip-prefill --host --json",),
        ("{python} -m benchmarks.engine_step --batch 1 8 --steps 20 --rounds 1 --profile",),
    ),
    "sampled": Part(
        "how fast is decode at temperature 1?", 240,
        ("{python} -m benchmarks.gpu_decode --formats w4a8 --skip-prefill --temperature 1 --json",),
        ("{python} -m benchmarks.engine_step --batch 1 8 --steps 20 --rounds 1 --temperature 1",),
    ),
    "fusion": Part(
        "how many kernels does a decode step of a checkpoint take, in every format?", 240,
        tuple(
            f"{MOE} explain examples/docs-moe --device cuda --dtype auto --format {each} --fusion"
            for each in ("dense", "fp8", "w4a16", "w4a8")
        ),
        (f"{MOE} explain examples/docs-moe --device cpu --format w4a8 --fusion",),
    ),
    "quality": Part(
        "how many bits does each format cost on the GPU itself, and an FP8 KV cache?", 590,
        tuple(
            f"{MOE} eval examples/docs-moe --data {TEXT} --device cuda --dtype auto --json {each}"
            for each in (
                "--format dense", "--format fp8", "--format w4a16", "--format w4a8",
                "--format dense --kv-dtype fp8", "--format w4a8 --kv-dtype fp8",
            )
        ),
        (f"{MOE} eval examples/docs-moe --data {TEXT} --device cpu --dtype float32 --json --kv-dtype fp8",),
    ),
    "latency": Part(
        "which prefill_tokens and target_step_ms give the best times to tokens?", 590,
        ("{python} -m benchmarks.serving_defaults --format w4a8 --rates 8 24 --requests 96 --json",),
        (
            "{python} -m benchmarks.serving_defaults --device cpu --format dense --rates 50 --requests 6"
            " --prompt 16 --tokens 4 --prefill-tokens 64 8 --target-ms 50 --batch 4 --json",
        ),
    ),
    "serving": Part(
        "what does gRPC cost, and how soon does the first token of a cached prompt come?", 300,
        (
            "{python} -m benchmarks.gpu_checkpoint {checkpoint}",
            "{python} -m benchmarks.serving {checkpoint} --device cuda --format w4a8 --tokens 128 512"
            " --streams 64 256 --clients 4 --json",
        ),
        (
            "{python} -m benchmarks.gpu_checkpoint {checkpoint} --shape small --device cpu",
            "{python} -m benchmarks.serving {checkpoint} --device cpu --format w4a8 --tokens 8"
            " --streams 4 --prompt 8 --rounds 1 --long 128 --json",
        ),
        checkpoint="w4a16",
    ),
    "offload": Part(
        "when do pages come back sooner from CPU memory than they are computed?", 120,
        ("{python} -m benchmarks.kv_offload",),
        ("{python} -m benchmarks.kv_offload --small --tokens 32",),
    ),
    "load": Part(
        "how long does a large checkpoint take to load as W4A8, and which memory?", 590,
        (
            "{python} -m benchmarks.gpu_checkpoint {checkpoint} --format bf16",
            "{python} -m benchmarks.gpu_load {checkpoint} --format w4a8 --rounds 2 --json",
        ),
        (
            "{python} -m benchmarks.gpu_checkpoint {checkpoint} --shape small --format bf16 --device cpu",
            "{python} -m benchmarks.gpu_load {checkpoint} --device cpu --context 64 --rounds 1 --json",
        ),
        checkpoint="bf16",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="one or more of --list")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-session"), help="folder of what the parts print"
    )
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="what `quality` scores")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints that parts write")
    parser.add_argument("--list", action="store_true", help="print the parts and their questions")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"parts {', '.join(sorted(unknown))} are unknown; choose from {', '.join(PARTS)}")
    if args.list or not args.parts:
        for name, part in PARTS.items():
            print(f"{name:8} {part.seconds:4} s at most   {part.question}")
        return
    if not args.tiny:
        need_gpu(parser, "--tiny tries the commands on a CPU")
    announce_checkpoints(parser, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "text.txt").write_bytes(args.text.read_bytes()[: 4_000 if args.tiny else 300_000])
    failed = [name for name in args.parts if not run(name, args)]
    if failed:
        raise SystemExit(f"failed or not finished: {', '.join(failed)}; see {args.out}")


def announce_checkpoints(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Says what the parts write, and ends the command if the disk has no room for it."""
    writing = [name for name in args.parts if PARTS[name].checkpoint]
    if not writing:
        return
    from benchmarks.gpu_checkpoint import expected_bytes  # noqa: PLC0415 - torch: seconds, not for --list

    shape = "small" if args.tiny else "large"
    sizes = {name: expected_bytes(shape, PARTS[name].checkpoint) for name in writing}
    need_space(parser, args.out, sum(sizes.values()) if args.keep else max(sizes.values()))
    for name, nbytes in sizes.items():
        end = "" if args.keep else ", and removes it at its end; --keep keeps it"
        print(
            f"{name} writes a checkpoint of {gigabytes(nbytes)} to {checkpoint_of(name, args)}{end}",
            flush=True,
        )


def checkpoint_of(name: str, args: argparse.Namespace) -> Path:
    return Path(args.out, f"{name}-checkpoint")


def run(name: str, args: argparse.Namespace) -> bool:
    """Whether all commands of a part succeeded within its time."""
    checkpoint = checkpoint_of(name, args)
    try:
        return run_commands(name, args, shlex.quote(str(checkpoint)))
    finally:
        if checkpoint.exists() and not args.keep:
            shutil.rmtree(checkpoint)


def run_commands(name: str, args: argparse.Namespace, checkpoint: str) -> bool:
    part = PARTS[name]
    ends, good = time.monotonic() + part.seconds, True
    with (args.out / f"{name}.txt").open("w") as log:
        for command in part.tiny if args.tiny else part.commands:
            filled = command.format(
                python=shlex.quote(sys.executable), out=shlex.quote(str(args.out)), checkpoint=checkpoint
            )
            print(f"$ {filled}", file=log, flush=True)
            begin = time.monotonic()
            try:
                result = subprocess.run(
                    shlex.split(filled), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False,
                    timeout=max(1.0, ends - begin),
                )  # fmt: skip
                status: int | str = result.returncode
            except subprocess.TimeoutExpired:
                status = "timeout"
            good &= status == 0
            print(f"{name}: status {status} after {time.monotonic() - begin:.0f} s: {filled}", flush=True)
    return good


if __name__ == "__main__":
    main()
