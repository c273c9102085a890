"""GPTQ by a library, as a baseline for this project's rounding and training: writes a checkpoint to score.

    python -m venv /tmp/gptq && /tmp/gptq/bin/pip install llmcompressor torchvision zstandard
    PYTHONPATH=.:worker /tmp/gptq/bin/python -m benchmarks.gptq MODEL --data train.txt.zst --out /tmp/out
    moe-worker eval /tmp/out --data test.txt.zst --format w4a8

The library is llm-compressor (of the vLLM project), in an environment of its own: it pins older versions of
packages that this project uses. Weights become four-bit integers in groups, the activations stay; what
this project stores in bfloat16 (W_UK and W_UV, the router, the head) stays here too. `--method round` rounds
to the nearest with the same library, scheme and scales, for the difference that GPTQ alone makes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.commands import positive
from moe_worker.train.data import read_documents

try:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise SystemExit(
        f"error: {error}; install llm-compressor in an environment of its own:\n\n{__doc__}"
    ) from None

LONGEST = 512  # tokens of a calibration text
IGNORED = ["lm_head", "re:.*kv_b_proj$", "re:.*mlp.gate$"]


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = [tokenizer(text)["input_ids"][:LONGEST] for text in calibration_texts(args.data, args.samples)]
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    int4 = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=args.group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=int4)
    modifier = GPTQModifier if args.method == "gptq" else QuantizationModifier
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=modifier(config_groups={"group_0": scheme}, ignore=IGNORED),
        num_calibration_samples=len(ids),
        max_seq_length=LONGEST,
        processor=tokenizer,
    )
    model.bfloat16().save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    print(f"written to {args.out}: {args.method}, groups of {args.group}, {len(ids)} calibration texts")


def calibration_texts(path: Path, number: int) -> list[str]:
    """Documents from all over the text, longer than their first tokens that are taken."""
    documents = [document for document in read_documents(path) if len(document) > 4 * LONGEST]
    if len(documents) < number:
        raise SystemExit(
            f"{path} holds {len(documents)} documents of {4 * LONGEST} characters; --samples {number}"
        )
    return documents[:: len(documents) // number][:number]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="bf16 checkpoint directory")
    parser.add_argument("--data", type=Path, required=True, help="training text, documents between NUL bytes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=("gptq", "round"), default="gptq")
    parser.add_argument("--group", type=positive, default=64, help="inputs that share a scale")
    parser.add_argument("--samples", type=positive, default=96, help="calibration texts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
