"""Writes a checkpoint with random weights in four bits, for benchmarks that need one.

    PYTHONPATH=worker:protos:. python -m benchmarks.gpu_checkpoint DIRECTORY [--small] [--device auto]

The shape is that of benchmarks/gpu_random.py: 15.7 billion parameters, 9 GB. It says nothing; it only runs.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from benchmarks.gpu_random import LARGE, SMALL, RandomSource, config_of
from moe_worker.models.build import build_model
from moe_worker.quant.compressed_tensors import quantization_config, to_tensors
from moe_worker.quant.int4 import GROUP, Int4Weight
from moe_worker.quant.matrix import Matrix


class Recorder(RandomSource):
    """Keeps what a model takes, as a checkpoint names and stores it, on the CPU."""

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
    parser.add_argument("--small", action="store_true", help="a small shape, to try it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    values = SMALL if args.small else LARGE
    source = Recorder(torch.device(args.device), torch.bfloat16, "w4a16")
    source.tensors = {}
    with torch.inference_mode():
        build_model(config_of(values), source, 1)
    args.directory.mkdir(parents=True, exist_ok=True)
    save_file(source.tensors, args.directory / "model.safetensors", metadata={"format": "pt"})
    config = values | {"quantization_config": quantization_config(GROUP, symmetric=True, ignore=[])}
    (args.directory / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(args.directory / "tokenizer.json")


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
