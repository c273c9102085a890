"""Decode speed on the CPU, beside transformers on the same checkpoint in the same run.

    python -m benchmarks.decode_cpu CHECKPOINT [--tokens 64] [--prompt 64] [--batch 1] [--threads N]

Both decode greedily in float32 with the same number of threads (by default all cores). Rounds alternate
between the two, so that a busy machine slows both, and medians are reported. The time of prefill is taken
off: a round is the time for TOKENS + 1 tokens less the time for 1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DeepseekV3ForCausalLM

import moe_worker
from moe_worker.engine.loading import usable_cores

# Ways in which transformers can compute experts; the fastest of them is the peer.
PEER_EXPERTS = ("grouped_mm", "batched_mm", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    candidates = {"ours": ours(args.checkpoint, args.prompt, args.batch, args.threads)}
    for experts in PEER_EXPERTS:
        candidates[experts] = transformers(args.checkpoint, experts, args.prompt, args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(args.rounds + 1):
        for name, generate in candidates.items():
            elapsed = decode_seconds(generate, args.tokens)
            if number > 0:  # the first round warms up
                seconds[name].append(elapsed)
    report({name: args.batch * args.tokens / statistics.median(s) for name, s in seconds.items()}, args)


def ours(checkpoint: Path, prompt: int, batch: int, threads: int) -> Callable[[int], object]:
    engine = moe_worker.Engine(checkpoint, max_batch_size=batch, threads=threads)
    prompts = make_prompts(engine.config.vocab_size, prompt, batch)

    def generate(tokens: int) -> object:
        results = engine.generate(prompts.tolist(), moe_worker.SamplingParameters(max_tokens=tokens))
        # The peer, whose tokens are the same, would end early too: a rate would count what nobody computed.
        if any(len(result.token_ids) < tokens for result in results):
            raise SystemExit(f"a text ended before {tokens} tokens; give fewer --tokens or another --prompt")
        return results

    return generate


def transformers(checkpoint: Path, experts: str, prompt: int, batch: int) -> Callable[[int], object]:
    model = DeepseekV3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train(False)
    model.set_experts_implementation(experts)
    prompts = make_prompts(model.config.vocab_size, prompt, batch)

    def generate(tokens: int) -> object:
        with torch.inference_mode():
            return model.generate(prompts, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    return generate


def make_prompts(vocab_size: int, length: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab_size, (batch, length), generator=generator)


def decode_seconds(generate: Callable[[int], object], tokens: int) -> float:
    start = time.perf_counter()
    generate(1)
    middle = time.perf_counter()
    generate(tokens + 1)
    return time.perf_counter() - middle - (middle - start)


def report(rates: dict[str, float], args: argparse.Namespace) -> None:
    peer = max(PEER_EXPERTS, key=lambda name: rates[name])
    if args.json:
        row = {
            "what": f"decode, batch {args.batch}, prompt {args.prompt}, {args.tokens} tokens",
            "ours": rates["ours"],
            "peer": rates[peer],
            "ratio": rates["ours"] / rates[peer],
            "unit": "tokens/s",
            "device": f"cpu, {args.threads} threads",
        }
        print(json.dumps(row))
        return
    print(f"batch {args.batch}, prompt {args.prompt}, {args.tokens} tokens, {args.threads} threads, float32")
    for name, rate in rates.items():
        label = "moe_worker" if name == "ours" else f"transformers {name}"
        print(f"{label:26} {rate:8.1f} tokens/s  {rate / rates[peer]:6.2f}x")


if __name__ == "__main__":
    main()
