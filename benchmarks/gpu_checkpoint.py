"""Writes a checkpoint with random weights, for benchmarks that need one.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_checkpoint DIRECTORY [--shape cpu] [--format bf16]
        [--device auto]

The shape "large" is that of benchmarks/gpu_random.py: 15.7 billion parameters, 9 GB in four bits and 31 GB in
bf16, in memory until it is written; "small" is one to try it with; "cpu" is CPU_SHAPE of
benchmarks.cpu_decode, 0.8 billion. A file has 5 GB at most. The model generates no meaningful text.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from benchmarks.commands import gigabytes, need_space
from benchmarks.gpu_random import LARGE, SMALL, RandomSource, config_of
from moe_worker.engine.gpu import weight_bytes
from moe_worker.models.build import build_model
from moe_worker.quant.compressed_tensors import quantization_config, to_tensors
from moe_worker.quant.int4 import GROUP, Int4Weight
from moe_worker.quant.matrix import Matrix

FILE_BYTES = 5 * 10**9


class Recorder(RandomSource):
    """Records the tensors that a model loads, with the names and layout of a checkpoint, on the CPU."""

    tensors: dict[str, Tensor]

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        value = super().take(name, *shape, dtype=dtype)
        self.tensors[name] = value.cpu()
        return value

    def matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        value = super().matrix(name, outputs, inputs)
        if isinstance(value, Int4Weight):
            parts = to_tensors(value)
            self.tensors |= {
                f"{name.removesuffix('weight')}{part}": each.cpu() for part, each in parts.items()
            }
        return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=("large", "small", "cpu"), default="large")
    parser.add_argument("--format", choices=("w4a16", "bf16"), default="w4a16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    values = values_of(args.shape)
    nbytes = expected_bytes(args.shape, args.format)
    need_space(parser, args.directory, nbytes)
    print(f"writing {gigabytes(nbytes)} to {args.directory}", file=sys.stderr, flush=True)
    packed = args.format == "w4a16"
    source = Recorder(torch.device(args.device), torch.bfloat16, "w4a16" if packed else "dense")
    source.tensors = {}
    with torch.inference_mode():
        build_model(config_of(values), source, 1)
    args.directory.mkdir(parents=True, exist_ok=True)
    save(source.tensors, args.directory)
    config = dict(values)
    if packed:
        config["quantization_config"] = quantization_config(GROUP, symmetric=True, ignore=[])
    (args.directory / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(args.directory / "tokenizer.json")


def values_of(shape: str) -> dict[str, Any]:
    return cpu_shape() if shape == "cpu" else {"large": LARGE, "small": SMALL}[shape]


def expected_bytes(shape: str, number_format: str) -> int:
    """On the disk; a little more than it will be."""
    return weight_bytes(config_of(values_of(shape)), "dense" if number_format == "bf16" else number_format)


def save(tensors: dict[str, Tensor], directory: Path, most: int = FILE_BYTES) -> None:
    """Files of `most` bytes at most (a larger tensor has its own), and their index."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > most:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, part in zip(names, files, strict=True):
        save_file(part, directory / name, metadata={"format": "pt"})
    weights = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": weights}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def cpu_shape() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "shared" / "peers" / "shapes.py"
    if not path.exists():
        raise SystemExit(f"{path} is not there: --shape cpu needs it")
    shape: dict[str, Any] = runpy.run_path(str(path))["CPU_SHAPE"]
    return {"model_type": "deepseek_v3", "norm_topk_prob": True, **shape}


def write_tokenizer(path: Path) -> None:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|begin|>", "<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


if __name__ == "__main__":
    main()
